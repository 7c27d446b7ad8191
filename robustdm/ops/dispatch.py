"""The fused ops, and the one place that decides what runs them.

Every op is a ``torch.library.custom_op`` (it traces under ``torch.compile(fullgraph=True)``) over
three backends with functions of the same names and arguments:

=======  ====================  ===========================================================
backend  where                 runs on
=======  ====================  ===========================================================
torch    `robustdm.ops.reference`  every device; the only one for float64, and the oracle
cpp      `robustdm.ops.native`     CPUs, where csrc/ was built; `adamw_ema` also on CUDA
triton   robustdm.kernels      CUDA; CPU tensors under TRITON_INTERPRET=1, for tests
=======  ====================  ===========================================================

``backend="auto"`` takes triton on CUDA and cpp on the CPU where they are there, else torch;
`python -m robustdm.doctor` prints what that comes to and why.
"""

import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from robustdm.errors import UsageError
from robustdm.ops import native, reference

BACKENDS = ("auto", "torch", "cpp", "triton")
OPS = (
    "noise_perturb", "fgsm_project", "equivariance_loss", "group_norm_act", "adamw_ema",
)
_CPP_ONLY = ("adamw_ema",)


# Which backend.


def why_off(backend: str, op: str, device: torch.device) -> str | None:
    """Why a backend cannot run an op on a device; None if it can."""
    if backend == "torch":
        return None
    if backend == "cpp":
        if device.type == "cuda" and op not in _CPP_ONLY:
            return "csrc runs this op on CPU tensors only"
        if device.type not in ("cpu", "cuda"):
            return f"it has no code for {device.type} tensors"
        return native_missing(device.type)
    if op in _CPP_ONLY:
        return "there is no such kernel; it is part of csrc"
    if device.type == "cuda":
        return triton_missing()
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return triton_missing()
        return "it needs a CUDA device (or, for tests, TRITON_INTERPRET=1 set before the start)"
    return f"it has no code for {device.type} tensors"


def native_missing(device: str) -> str | None:
    available, reason = native.status()[device]
    return None if available else reason


# torch.compiler.assume_constant_result: a trace asks, and does not look into the file system. (That
# would load the compiler, which takes a second.)
native_missing._dynamo_marked_constant = True


def triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken installation raises anything
        return f"triton cannot be imported ({error})"
    return None


def resolve(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend, "torch", "cpp" or "triton", that runs an op.

    Raises:
        UsageError: if the backend asked for by name cannot run it here.
    """
    if backend not in BACKENDS:
        raise UsageError(f"{op}: backend is {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "cpp" if device.type == "cpu" or op in _CPP_ONLY else "triton"
        off = dtype == torch.float64 or why_off(backend, op, device) is not None
        return "torch" if off else backend
    if backend != "torch" and dtype == torch.float64:
        raise UsageError(f"{op}: backend is {backend!r}, but float64 has the torch backend alone")
    reason = why_off(backend, op, device)
    if reason is not None:
        raise UsageError(
            f"{op}: backend is {backend!r}, which is off: {reason}; use backend='auto'"
        )
    return backend


_implementations: dict[tuple, ModuleType] = {}


def implementation(
    op: str, kernels: Callable[[], ModuleType], backend: str, device: torch.device,
    dtype: torch.dtype,
) -> ModuleType:
    """The module whose function of the op's name runs it; ``kernels`` imports that of Triton.

    The answer is found once: what is installed does not change while a process lives.
    """
    key = op, backend, device.type, dtype
    module = _implementations.get(key)
    if module is None:
        found = resolve(op, backend, device, dtype)
        module = reference if found == "torch" else native if found == "cpp" else kernels()
        _implementations[key] = module
    return module


def is_torch(
    op: str, kernels: Callable[[], ModuleType], backend: str, device: torch.device,
    dtype: torch.dtype,
) -> bool:
    """Whether plain torch runs an op; arguments as those of `implementation`."""
    if torch.compiler.is_compiling():
        return resolve(op, backend, device, dtype) == "torch"
    return implementation(op, kernels, backend, device, dtype) is reference


# Two ways in: through torch.library where somebody traces or watches (torch.compile, fake tensors,
# dispatch modes), else straight to the function: the library's dispatch costs a tenth of a
# millisecond a call, more than most of these ops take.


def is_watched(x: Tensor) -> bool:
    return (
        torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)
        or x.device.type == "meta" or _get_current_dispatch_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def choose(x: Tensor, registered: Callable, direct: Callable) -> Callable:
    return registered if is_watched(x) else direct


def registered(function: Callable, mutated: tuple[str, ...] = ()) -> Callable:
    """``_run_NAME`` as the operator robustdm::NAME."""
    name = function.__name__.removeprefix("_run_")
    return torch.library.custom_op(f"robustdm::{name}", function, mutates_args=mutated)


def eager(function: Callable, setup: Callable, backward: Callable) -> Callable:
    """What the registration of an op with these three does, as an autograd function."""
    name = function.__name__.removeprefix("_run_")

    def once(ctx, *grads):
        if torch.is_grad_enabled():  # create_graph: what depends on the gradients would be lost
            raise RuntimeError(f"{name} has no second derivative: leave out create_graph=True")
        return backward(ctx, *grads)

    def forward(ctx, *inputs):
        # Not a setup_context of its own: torch would look up the signature in every call, which
        # takes longer than most of these ops.
        output = function(*inputs)
        setup(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(once)}
    differentiable = type(name, (torch.autograd.Function,), methods).apply

    def call(*inputs):
        if torch.is_grad_enabled():
            for value in inputs:
                if isinstance(value, Tensor) and value.requires_grad:
                    return differentiable(*inputs)
        return function(*inputs)

    return call
