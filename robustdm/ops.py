"""The fused ops, and the one place that decides what runs them.

Every op is a ``torch.library.custom_op`` (it traces under ``torch.compile(fullgraph=True)``) over
three backends with functions of the same names and arguments:

=======  ====================  ===========================================================
backend  where                 runs on
=======  ====================  ===========================================================
torch    `robustdm.reference`  every device; the only one for float64, and the oracle
cpp      `robustdm.native`     CPUs, where csrc/ was built; `adamw_ema` also on CUDA
triton   robustdm.kernels      CUDA; CPU tensors under TRITON_INTERPRET=1, for tests
=======  ====================  ===========================================================

``backend="auto"`` takes triton on CUDA and cpp on the CPU where they are there, else torch;
`python -m robustdm.doctor` prints what that comes to and why.
"""

import importlib
import math
import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import _get_current_dispatch_mode

from robustdm import native, reference
from robustdm.arguments import (
    as_vector,
    channels_last,
    check_device,
    check_dtype,
    check_float,
    check_items,
    check_key,
    check_like,
    check_per_sample,
    check_values,
    dense,
    dense_format,
    is_dense,
    need,
    same_order,
)
from robustdm.errors import UsageError
from robustdm.random import check_word
from robustdm.reference import wide

BACKENDS = ("auto", "torch", "cpp", "triton")
OPS = (
    "draw_samples", "noise_perturb", "noise_perturb_resident", "fgsm_project", "equivariance_loss",
    "group_norm_act", "adamw_ema",
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
        return _native_missing(device.type)
    if op in _CPP_ONLY:
        return "there is no such kernel; it is part of csrc"
    if device.type == "cuda":
        return _triton_missing()
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return _triton_missing()
        return "it needs a CUDA device (or, for tests, TRITON_INTERPRET=1 set before the start)"
    return f"it has no code for {device.type} tensors"


def _native_missing(device: str) -> str | None:
    available, reason = native.status()[device]
    return None if available else reason


# torch.compiler.assume_constant_result: a trace asks, and does not look into the file system. (That
# would load the compiler, which takes a second.)
_native_missing._dynamo_marked_constant = True


def _triton_missing() -> str | None:
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


def _implementation(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    backend = resolve(op, backend, device, dtype)
    if backend == "torch":
        return reference
    if backend == "cpp":
        return native
    module = "noise_perturb" if op == "noise_perturb_resident" else op
    return importlib.import_module(f"robustdm.kernels.{module}")


# Two ways in: through torch.library where somebody traces or watches (torch.compile, fake tensors,
# dispatch modes), else straight to the function: the library's dispatch costs a tenth of a
# millisecond a call, more than most of these ops take.


def _is_watched(x: Tensor) -> bool:
    return (
        torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)
        or x.device.type == "meta" or _get_current_dispatch_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _choose(x: Tensor, registered: Callable, direct: Callable) -> Callable:
    return registered if _is_watched(x) else direct


def _registered(function: Callable, mutated: tuple[str, ...] = ()) -> Callable:
    """``_run_NAME`` as the operator robustdm::NAME."""
    name = function.__name__.removeprefix("_run_")
    return torch.library.custom_op(f"robustdm::{name}", function, mutates_args=mutated)


def _eager(function: Callable, setup: Callable, backward: Callable) -> Callable:
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
        return (differentiable if torch.is_grad_enabled() else function)(*inputs)

    return call


# draw_samples


def _run_draw_samples(
    key: Tensor, tables: Tensor, batch: int, dtype: torch.dtype, gamma: float, lam: float,
    lambda_mode: str, beta_low: float, beta_high: float, lambda_max: float | None,
    beta_per_batch: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = _implementation("draw_samples", backend, key.device, dtype)
    return module.draw_samples(key, tables, batch, dtype, gamma, lam, lambda_mode, beta_low,
                               beta_high, lambda_max, beta_per_batch)


_draw_samples = _registered(_run_draw_samples)


@_draw_samples.register_fake
def _(key, tables, batch, dtype, *rest):
    t = key.new_empty(batch)
    scales = (tables.new_empty(batch, dtype=wide(dtype)) for _ in range(4))
    return t, tables.new_empty(batch), *scales


def draw_samples(
    key: Tensor, tables: Tensor, batch: int, dtype: torch.dtype, gamma: float, lam: float,
    lambda_mode: str, beta_low: float, beta_high: float, lambda_max: float | None = None,
    beta_per_batch: bool = False, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw t and beta of every sample of a step, with the scales that follow, in one launch.

    Arguments and results: see `robustdm.reference.draw_samples`.

    Raises:
        UsageError: for wrong shapes, dtypes or devices, or a backend that is off.
    """
    op = "draw_samples"
    need(op, tables.ndim == 2 and tables.shape[0] == 3 and tables.shape[1] > 0
         and tables.dtype == torch.float64,
         f"tables is {tables.dtype} of shape {tuple(tables.shape)}: give (3, T) float64, T > 0")
    check_dtype(op, dtype)
    check_key(op, "tables", tables, key)
    need(op, lambda_mode in ("ray", "x", "std", "literal"),
         f"lambda_mode is {lambda_mode!r}: choose one of ray, x, std, literal")
    run = _choose(key, _draw_samples, _run_draw_samples)
    return run(key, tables.contiguous(), batch, dtype, gamma, lam, lambda_mode, beta_low,
               beta_high, lambda_max, beta_per_batch, backend)


# noise_perturb


def _run_noise_perturb(
    x0: Tensor, signal: Tensor, noise: Tensor, radius: Tensor, key: Tensor, dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_values("noise_perturb", radius)
    module = _implementation("noise_perturb", backend, x0.device, dtype)
    xt, x_ran = module.noise_perturb(x0, signal, noise, radius, key, dtype)
    return _as(xt, x0), _as(x_ran, x0)


def _as(out: Tensor, like: Tensor) -> Tensor:
    """The reference computes in any order of memory; what was promised is the input's."""
    return out.contiguous(memory_format=dense_format(like))


_noise_perturb = _registered(_run_noise_perturb)


@_noise_perturb.register_fake
def _(x0, signal, noise, radius, key, dtype, backend):
    return torch.empty_like(x0, dtype=dtype), torch.empty_like(x0, dtype=dtype)


def _noise_perturb_setup(ctx, inputs, output):
    x0, signal = inputs[0], inputs[1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(signal)
    ctx.shape, ctx.dtype = x0.shape, x0.dtype


def _noise_perturb_backward(ctx, grad_xt, grad_x_ran):
    (signal,) = ctx.saved_tensors
    parts = [grad for grad in (grad_xt, grad_x_ran) if grad is not None]
    if not parts:
        return (None,) * 7
    grad = (signal.view(-1, *[1] * (len(ctx.shape) - 1)) * sum(parts)).to(ctx.dtype)
    return grad, None, None, None, None, None, None


_noise_perturb.register_autograd(_noise_perturb_backward, setup_context=_noise_perturb_setup)
_eager_noise_perturb = _eager(_run_noise_perturb, _noise_perturb_setup, _noise_perturb_backward)


def noise_perturb(
    x0: Tensor, signal: Tensor, noise: Tensor, radius: Tensor, key: Tensor, *,
    dtype: torch.dtype | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Diffuse a batch, and perturb it at random: x_t and x_t + s delta_ran, in one launch.

    eps and delta_ran come from the random stream and are never stored: other ops, and
    `robustdm.random.element_noise`, draw the same numbers again from the same ``key``.

    Args:
        x0: (B, ...) float, data units.
        signal, noise: (B,) sqrt(abar_t) and sqrt(1 - abar_t).
        radius: (B,) radius of the l-inf ball, eps-units, 0 or more.
        key: (3,) int64 on x0's device: seed, step, global index of the first sample.
        dtype: of both results; x0's if None.
        backend: "auto", "torch", "cpp" or "triton".

    Returns:
        x_t and x_ran, (B, ...) in x0's memory format.

    Raises:
        UsageError: for wrong shapes, dtypes, devices or values, or a backend that is off.

    Source: Briglia et al. 2026, Eq. 7 and Algorithm 1.
    """
    op = "noise_perturb"
    need(op, x0.ndim >= 1, "x0 has no dimension: give a batch (B, ...)")
    check_float(op, "x0", x0)
    check_per_sample(op, "x0", x0, signal=signal, noise=noise, radius=radius)
    check_key(op, "x0", x0, key)
    dtype = dtype or x0.dtype
    check_dtype(op, dtype)
    (x0,) = dense(x0)
    run = _choose(x0, _noise_perturb, _eager_noise_perturb)
    return run(x0, *(as_vector(v, dtype) for v in (signal, noise, radius)), key, dtype,
               backend)


def _run_noise_perturb_resident(
    data: Tensor, items: Tensor, signal: Tensor, noise: Tensor, radius: Tensor, key: Tensor,
    dtype: torch.dtype, flip: bool, corrupt_fraction: float, corrupt_sigma: float,
    corrupt_seed: int, backend: str,
) -> tuple[Tensor, Tensor]:
    check_values("noise_perturb_resident", radius)
    check_items("noise_perturb_resident", items, len(data))
    module = _implementation("noise_perturb_resident", backend, data.device, dtype)
    outputs = module.noise_perturb_resident(
        data, items, signal, noise, radius, key, dtype, flip, corrupt_fraction, corrupt_sigma,
        corrupt_seed,
    )
    return tuple(out.contiguous(memory_format=torch.channels_last) for out in outputs)


_noise_perturb_resident = _registered(_run_noise_perturb_resident)


@_noise_perturb_resident.register_fake
def _(data, items, signal, noise, radius, key, dtype, *rest):
    shape = (items.shape[0], *data.shape[1:])
    return tuple(
        torch.empty(shape, dtype=dtype, device=data.device, memory_format=torch.channels_last)
        for _ in range(2)
    )


def noise_perturb_resident(
    data: Tensor, items: Tensor, signal: Tensor, noise: Tensor, radius: Tensor, key: Tensor, *,
    dtype: torch.dtype = torch.float32, flip: bool = False, corrupt_fraction: float = 0.0,
    corrupt_sigma: float = 0.0, corrupt_seed: int = 0, backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`noise_perturb` of images that lie on the device as uint8: gathered, normalised, corrupted,
    flipped, diffused and perturbed in one launch.

    Args:
        data: (N, C, H, W) uint8, the whole set.
        items: (B,) int64 rows of ``data``, from 0 to N - 1; trusted on a GPU.
        flip: mirror half of the images left to right, as this step's draw says.
        corrupt_fraction, corrupt_sigma, corrupt_seed: the set's one noisy realisation, as in
            `robustdm.data.Corruption`; none by default.
        others: as in `noise_perturb`.

    Returns:
        x_t and x_ran, (B, C, H, W), channels-last.

    Raises:
        UsageError: for wrong shapes, dtypes, devices or values, or a backend that is off.
    """
    op = "noise_perturb_resident"
    need(op, data.ndim == 4 and data.dtype == torch.uint8,
         f"data is {data.dtype} of shape {tuple(data.shape)}: give (N, C, H, W) uint8")
    need(op, items.ndim == 1 and items.dtype == torch.int64,
         f"items is {items.dtype} of shape {tuple(items.shape)}: give (B,) int64")
    check_device(op, "data", data, items=items)
    check_per_sample(op, "items", items, signal=signal, noise=noise, radius=radius)
    check_key(op, "data", data, key)
    need(op, 0 <= corrupt_fraction <= 1 and corrupt_sigma >= 0,
         f"corrupt_fraction is {corrupt_fraction}, corrupt_sigma {corrupt_sigma}: give a share "
         "from 0 to 1 and a standard deviation, 0 or more")
    check_dtype(op, dtype)
    check_word("corrupt_seed", corrupt_seed)
    if dense_format(data) is None:
        data = data.contiguous()
    run = _choose(data, _noise_perturb_resident, _run_noise_perturb_resident)
    return run(
        data, items.contiguous(), *(as_vector(v, dtype) for v in (signal, noise, radius)), key,
        dtype, flip, corrupt_fraction, corrupt_sigma, corrupt_seed, backend,
    )


# fgsm_project


def _run_fgsm_project(
    xt: Tensor, gradient: Tensor | None, noise: Tensor, radius: Tensor, key: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    check_values("fgsm_project", radius)
    module = _implementation("fgsm_project", backend, xt.device, xt.dtype)
    x_adv, delta = module.fgsm_project(xt, gradient, noise, radius, key)
    return _as(x_adv, xt), _as(delta, xt)


_fgsm_project = _registered(_run_fgsm_project)


@_fgsm_project.register_fake
def _(xt, gradient, noise, radius, key, backend):
    return torch.empty_like(xt), torch.empty_like(xt)


def _fgsm_project_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _fgsm_project_backward(ctx, grad_x_adv, grad_delta):
    return grad_x_adv, None, None, None, None, None


_fgsm_project.register_autograd(_fgsm_project_backward, setup_context=_fgsm_project_setup)
_eager_fgsm_project = _eager(_run_fgsm_project, _fgsm_project_setup, _fgsm_project_backward)


def fgsm_project(
    xt: Tensor, gradient: Tensor | None, noise: Tensor, radius: Tensor, key: Tensor, *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One sign-gradient step from the random start, projected onto the l-inf ball, in one launch.

    delta = clamp(delta_ran + r / sqrt3 sign(gradient), -r, r);  x_adv = x_t + s delta

    Args:
        xt: (B, ...) diffused batch, from `noise_perturb` with the same key.
        gradient: (B, ...) float of any dtype; where it is 0 nothing moves. None steps outwards,
            along the random start itself (a control that needs no network).
        noise, radius, key, backend: as in `noise_perturb`.

    Returns:
        x_adv and delta (eps-units), like xt. delta is a constant: no gradient flows through it.

    Raises:
        UsageError: for wrong shapes, dtypes, devices or values, or a backend that is off.

    Source: Briglia et al. 2026, Eq. 8.
    """
    op = "fgsm_project"
    need(op, xt.ndim >= 1, "xt has no dimension: give a batch (B, ...)")
    check_float(op, "xt", xt)
    check_like(op, "xt", xt, gradient=gradient)
    check_per_sample(op, "xt", xt, noise=noise, radius=radius)
    check_key(op, "xt", xt, key)
    xt, gradient = dense(xt, gradient)
    run = _choose(xt, _fgsm_project, _eager_fgsm_project)
    return run(xt, gradient, as_vector(noise, xt.dtype), as_vector(radius, xt.dtype), key,
               backend)


# equivariance_loss


def _run_equivariance_loss(
    eps_pred: Tensor, eps_pred_adv: Tensor | None, delta: Tensor | None, radius: Tensor,
    lambda_t: Tensor, key: Tensor, dtype: torch.dtype, invariance: bool, detach_clean: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_values("equivariance_loss", radius, lambda_t)
    module = _implementation("equivariance_loss", backend, eps_pred.device, eps_pred.dtype)
    total, fit, reg, grad, grad_adv = module.equivariance_loss(
        eps_pred, eps_pred_adv, delta, radius, lambda_t, key, dtype, invariance, detach_clean
    )
    grad_adv = grad_adv if eps_pred_adv is None else _as(grad_adv, eps_pred)
    return total, fit, reg, _as(grad, eps_pred), grad_adv


_equivariance_loss = _registered(_run_equivariance_loss)


@_equivariance_loss.register_fake
def _(eps_pred, eps_pred_adv, delta, radius, lambda_t, key, dtype, *rest):
    stored = torch.float32 if eps_pred.dtype == torch.float16 else eps_pred.dtype
    fit, reg = (radius.new_empty(eps_pred.shape[0], dtype=wide(eps_pred.dtype)) for _ in range(2))
    grad = torch.empty_like(eps_pred, dtype=stored)
    if eps_pred_adv is None:
        return fit.new_empty(()), fit, reg, grad, eps_pred.new_empty(0, dtype=stored)
    return fit.new_empty(()), fit, reg, grad, torch.empty_like(eps_pred, dtype=stored)


def _equivariance_loss_setup(ctx, inputs, output):
    _, fit, reg, grad, grad_adv = output
    # Else every backward would fill zeros for the outputs that have no gradient.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(fit, reg, grad, grad_adv)
    ctx.save_for_backward(grad, grad_adv)
    ctx.dtype, ctx.has_adv = inputs[0].dtype, inputs[1] is not None


def _equivariance_loss_backward(ctx, grad_total, *unused):
    if grad_total is None:
        return (None,) * 10
    # On a CPU a look at the number is free, and it is 1 but for accumulated batches; on a GPU the
    # look would cost more than the product.
    whole = grad_total.device.type == "cpu" and not torch.compiler.is_compiling() and (
        not is_fake(grad_total) and grad_total.item() == 1)
    clean, adv = (
        (grad if whole else grad_total * grad).to(ctx.dtype) for grad in ctx.saved_tensors
    )
    return clean, adv if ctx.has_adv else None, *[None] * 8


_equivariance_loss.register_autograd(
    _equivariance_loss_backward, setup_context=_equivariance_loss_setup
)
_eager_equivariance_loss = _eager(
    _run_equivariance_loss, _equivariance_loss_setup, _equivariance_loss_backward
)


def equivariance_loss(
    eps_pred: Tensor, eps_pred_adv: Tensor | None, delta: Tensor | None, radius: Tensor,
    lambda_t: Tensor, key: Tensor, *, dtype: torch.dtype | None = None, invariance: bool = False,
    detach_clean: bool = False, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The training loss; both its gradients are computed in the same pass over the predictions.

    total = mean over the batch of fit + reg,  fit = mean |o - eps|^2,
    reg = lambda_t mean |o' - o - delta|^2, with o = eps_pred, o' = eps_pred_adv.

    Args:
        eps_pred: (B, ...) float prediction at x_t.
        eps_pred_adv: (B, ...) prediction at the perturbed batch; None is plain DDPM (reg is 0).
        delta: (B, ...) perturbation, eps-units; None draws delta_ran again.
        radius, lambda_t: (B,) radius of the ball and weight of the regulariser.
        key: as in `noise_perturb`; eps is drawn again from it.
        dtype: of the batch that was perturbed (delta_ran is rounded to it); eps_pred's if None.
        invariance: penalise |o' - o|^2 instead (Eq. 14).
        detach_clean: stop the regulariser's gradient through o.
        backend: "auto", "torch", "cpp" or "triton".

    Returns:
        total (scalar), which alone carries a gradient, and fit and reg, (B,), at least float32.

    Raises:
        UsageError: for wrong shapes, dtypes, devices or values, or a backend that is off.

    Source: Briglia et al. 2026, Eq. 6 and 14; Ho et al. 2020, Eq. 14.
    """
    op = "equivariance_loss"
    need(op, eps_pred.ndim >= 1, "eps_pred has no dimension: give a batch (B, ...)")
    check_float(op, "eps_pred", eps_pred)
    check_like(op, "eps_pred", eps_pred, eps_pred_adv=eps_pred_adv, delta=delta)
    need(op, eps_pred_adv is None or eps_pred_adv.dtype == eps_pred.dtype,
         f"eps_pred_adv is {getattr(eps_pred_adv, 'dtype', None)}, eps_pred {eps_pred.dtype}: "
         "they must agree")
    check_per_sample(op, "eps_pred", eps_pred, radius=radius, lambda_t=lambda_t)
    check_key(op, "eps_pred", eps_pred, key)
    eps_pred, eps_pred_adv, delta = dense(eps_pred, eps_pred_adv, delta)
    run = _choose(eps_pred, _equivariance_loss, _eager_equivariance_loss)
    return run(
        eps_pred, eps_pred_adv, delta, as_vector(radius, eps_pred.dtype),
        as_vector(lambda_t, eps_pred.dtype), key, dtype or eps_pred.dtype, invariance, detach_clean,
        backend,
    )[:3]


# group_norm_act


def _run_group_norm_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, add: Tensor | None, key: Tensor | None, groups: int, silu: bool,
    dropout: float, layer: int, tiny: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = _implementation("group_norm_act", backend, x.device, x.dtype)
    y, keep, mean, rstd = module.group_norm_act_forward(
        x, groups, weight, bias, scale, shift, add, silu, dropout, key, layer, tiny
    )
    return channels_last(y), keep, mean, rstd


_group_norm_act = _registered(_run_group_norm_act)


@_group_norm_act.register_fake
def _(x, weight, bias, scale, shift, add, key, groups, silu, dropout, layer, tiny, backend):
    size = (0,)  # C++ and the reference draw the mask again
    if dropout and resolve("group_norm_act", backend, x.device, x.dtype) == "triton":
        size = (x.shape[0], math.prod(x.shape[2:]), (x.shape[1] + 7) // 8)
    keep = x.new_empty(size, dtype=torch.uint8)
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=wide(x.dtype)) for _ in range(2))
    return torch.empty_like(x), keep, mean, rstd


def _run_group_norm_act_backward(
    dy: Tensor, x: Tensor, keep: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, add: Tensor | None,
    key: Tensor | None, groups: int, silu: bool, dropout: float, layer: int, need_sums: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = _implementation("group_norm_act", backend, dy.device, dy.dtype)
    dx, sums = module.group_norm_act_backward(
        dy, x, keep, mean, rstd, groups, weight, bias, scale, shift, add, silu, dropout, key, layer,
        need_sums,
    )
    return channels_last(dx), sums


_group_norm_act_backward = _registered(_run_group_norm_act_backward)


@_group_norm_act_backward.register_fake
def _(dy, x, keep, mean, rstd, weight, bias, scale, shift, add, key, groups, silu, dropout, layer,
      need_sums, backend):
    shape = (*dy.shape[:2], 3) if need_sums else (0,)
    return torch.empty_like(dy), dy.new_empty(shape, dtype=wide(dy.dtype))


def _group_norm_act_setup(ctx, inputs, output):
    x, weight, bias, scale, shift, add, key, *ctx.rest = inputs
    _, keep, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.add_dtype = None if add is None else add.dtype
    ctx.mark_non_differentiable(keep, mean, rstd)
    ctx.save_for_backward(x, keep, mean, rstd, weight, bias, scale, shift, add, key)


def _group_norm_act_grad(ctx, dy, *unused):
    x, keep, mean, rstd, weight, bias, scale, shift, add, key = ctx.saved_tensors
    groups, silu, dropout, layer, _, backend = ctx.rest
    if dy is None:
        return (None,) * 13
    need_weight, need_bias, need_scale, need_shift, need_add = ctx.needs_input_grad[1:6]
    need_sums = need_weight or need_bias or need_scale or need_shift or need_add
    run = _choose(dy, _group_norm_act_backward, _run_group_norm_act_backward)
    dx, sums = run(
        channels_last(dy), x, keep, mean, rstd, weight, bias, scale, shift, add, key, groups, silu,
        dropout, layer, need_sums, backend,
    )
    grads = [None] * 5
    if need_sums:
        sum_u, sum_u_xhat, sum_x = sums.unbind(-1)
        if need_weight or need_bias:
            gain = None if scale is None else 1 + scale.to(sums.dtype)[..., None]
            by_channel = (sums if gain is None else sums * gain).sum(0)
            grads[0] = by_channel[:, 1].to(weight.dtype) if need_weight else None
            grads[1] = by_channel[:, 0].to(bias.dtype) if need_bias else None
        if need_scale:
            ds = sum_u_xhat if weight is None else weight * sum_u_xhat + bias * sum_u
            grads[2] = ds.to(scale.dtype)
        if need_shift:
            grads[3] = sum_u.to(shift.dtype)
        if need_add:
            grads[4] = sum_x.to(ctx.add_dtype)
    return dx, *grads, *[None] * 7


_group_norm_act.register_autograd(_group_norm_act_grad, setup_context=_group_norm_act_setup)
_eager_group_norm_act = _eager(_run_group_norm_act, _group_norm_act_setup, _group_norm_act_grad)


def group_norm_act(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *,
    scale: Tensor | None = None, shift: Tensor | None = None, add: Tensor | None = None,
    silu: bool = True, dropout: float = 0.0, key: Tensor | None = None, layer: int = 0,
    tiny: float = 1e-5, backend: str = "auto",
) -> Tensor:
    """Channels-last group normalisation with the addition before it and the activation after it.

    v = x + add;  u = GroupNorm(v) (1 + scale) + shift;  y = dropout(silu(u))

    In the backward pass the gradients of weight, bias, scale, shift and add cost nothing unless
    asked for. For it, the triton backend stores the dropout mask, one bit per element; the others
    draw it from ``key`` again. In a group of one value, xhat is 0.

    Args:
        x: (B, C, *spatial) float; made channels-last if it is not.
        groups: number of groups, a divisor of C.
        weight, bias: (C,), both or neither.
        scale, shift: (B, C) per sample (adaptive normalisation), both or neither.
        add: (B, C), added over all positions before the normalisation (a time embedding).
        silu: apply SiLU.
        dropout: rate of dropout behind it, from 0 to below 1.
        key: (3,) int64, needed with dropout: seed, step, global index of the first sample.
        layer: number of this layer in its network: each has masks of its own.
        tiny: added to the variance.
        backend: "auto", "torch", "cpp" or "triton".

    Returns:
        y, channels-last.

    Raises:
        UsageError: for wrong shapes, dtypes or devices, or a backend that is off.

    Source: Wu & He 2018; Nichol & Dhariwal 2021 for scale and shift.
    """
    op = "group_norm_act"
    need(op, x.ndim >= 2, f"x has shape {tuple(x.shape)}: give (B, C, *spatial)")
    check_float(op, "x", x)
    channels = x.shape[1]
    need(op, groups >= 1 and channels % groups == 0,
         f"groups is {groups}: it must divide the {channels} channels of x")
    for first, second, a, b in (("weight", "bias", weight, bias), ("scale", "shift", scale, shift)):
        need(op, (a is None) == (b is None), f"{first} and {second} go together: "
             "give both or none")
    sizes = {"weight": (channels,), "bias": (channels,), "scale": tuple(x.shape[:2]),
             "shift": tuple(x.shape[:2]), "add": tuple(x.shape[:2])}
    for (name, size), value in zip(sizes.items(), (weight, bias, scale, shift, add), strict=True):
        if value is not None:
            need(op, tuple(value.shape) == size,
                 f"{name} has shape {tuple(value.shape)}, x {tuple(x.shape)}: give {size}")
            check_float(op, name, value)
            check_device(op, "x", x, **{name: value})
    need(op, 0 <= dropout < 1, f"dropout is {dropout}: give a rate from 0 to below 1")
    need(op, not dropout or key is not None, "dropout needs a key: give (seed, step, first index)")
    if key is not None:
        check_key(op, "x", x, key)
    if backend == "auto" and resolve(op, backend, x.device, x.dtype) == "torch":
        # Torch's own gradients are faster than the reference's, and a compiler can fuse them.
        return channels_last(reference.group_norm_act(
            channels_last(x), groups, weight, bias, scale, shift, add, silu, dropout, key, layer,
            tiny,
        ))
    run = _choose(x, _group_norm_act, _eager_group_norm_act)
    return run(
        channels_last(x), *(p if p is None else p.contiguous() for p in (weight, bias)),
        *(p if p is None else p.contiguous() for p in (scale, shift, add)),
        key, groups, silu, float(dropout), layer, tiny, backend,
    )[0]


# adamw_ema


def _run_adamw_ema(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    averages: list[Tensor], copies: list[Tensor], lr: Tensor, step: Tensor, decay: Tensor,
    factor: Tensor, skip: Tensor, beta1: float, beta2: float, tiny: float, weight_decay: float,
    backend: str,
) -> None:
    module = _implementation("adamw_ema", backend, params[0].device, params[0].dtype)
    module.adamw_ema(params, grads, exp_avgs, exp_avg_sqs, averages, copies, lr, step, decay,
                     factor, skip, beta1, beta2, tiny, weight_decay)


_MUTATED = ("params", "exp_avgs", "exp_avg_sqs", "averages", "copies")
_adamw_ema = _registered(_run_adamw_ema, _MUTATED)


@_adamw_ema.register_fake
def _(*args):
    return None


def adamw_ema(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    averages: list[Tensor], copies: list[Tensor], *, lr: Tensor, step: Tensor, decay: Tensor,
    factor: Tensor, skip: Tensor, beta1: float = 0.9, beta2: float = 0.999, tiny: float = 1e-8,
    weight_decay: float = 0.0, backend: str = "auto", check: bool = True,
) -> None:
    """AdamW, a moving average of the weights and a bf16 copy of them, in one pass and in place.

    Every number that changes from step to step is a tensor, so that a CUDA graph can hold the call.

    Args:
        params: float32 weights.
        grads, exp_avgs, exp_avg_sqs: like ``params``, in shape and strides.
        averages: moving averages of the weights, or an empty list.
        copies: bfloat16 copies of the weights, or an empty list.
        lr, step, decay, factor, skip: float32 scalars on the weights' device: learning rate, number
            of this step from 1, decay of the average, factor that clips the gradients, and 1 where
            this step must leave weights and moments untouched, else 0.
        beta1, beta2, tiny, weight_decay: as in `torch.optim.AdamW` (tiny is its eps).
        backend: "auto", "torch" or "cpp".
        check: look at every tensor first, which takes milliseconds for hundreds of them; who
            passes the same weights every step may do so once.

    Raises:
        UsageError: for wrong shapes, dtypes or devices, or a backend that is off.

    Source: Loshchilov & Hutter 2019, algorithm 2.
    """
    if not params:
        return
    if check:
        _check_adamw_ema(params, grads, exp_avgs, exp_avg_sqs, averages, copies, lr, step, decay,
                         factor, skip)
    run = _choose(params[0], _adamw_ema, _run_adamw_ema)
    with torch.no_grad():
        run(params, grads, exp_avgs, exp_avg_sqs, averages, copies, lr, step, decay, factor, skip,
            beta1, beta2, tiny, weight_decay, backend)
    if run is _run_adamw_ema:  # C++ writes behind autograd's back
        torch.autograd.graph.increment_version(
            (*params, *exp_avgs, *exp_avg_sqs, *averages, *copies)
        )


def _check_adamw_ema(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    averages: list[Tensor], copies: list[Tensor], lr: Tensor, step: Tensor, decay: Tensor,
    factor: Tensor, skip: Tensor,
) -> None:
    op = "adamw_ema"
    needed = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    optional = {"averages": averages, "copies": copies}
    for name, tensors in (needed | {k: v for k, v in optional.items() if v}).items():
        need(op, len(tensors) == len(params),
             f"{name} has {len(tensors)} tensors, params {len(params)}: they must agree")
        for i, (p, value) in enumerate(zip(params, tensors, strict=True)):
            dtype = torch.bfloat16 if name == "copies" else p.dtype
            need(op, value.dtype == dtype, f"{name}[{i}] is {value.dtype}: it must be {dtype}")
            need(op, value.shape == p.shape, f"{name}[{i}] has shape {tuple(value.shape)}, "
                 f"params[{i}] {tuple(p.shape)}: they must agree")
            # Memory is walked through in one order for all: other strides would mix them up.
            need(op, same_order(value, p), f"{name}[{i}] has strides {value.stride()}, "
                 f"params[{i}] {p.stride()}: make it with torch.empty_like")
            check_device(op, f"params[{i}]", p, **{f"{name}[{i}]": value})
    for i, p in enumerate(params):
        need(op, p.dtype == params[0].dtype and p.dtype in (torch.float32, torch.float64),
             f"params[{i}] is {p.dtype}, params[0] {params[0].dtype}: give float32 weights")
        need(op, is_dense(p), f"params[{i}] has strides {p.stride()} and shape {tuple(p.shape)}, "
             "with gaps: give whole tensors")
        check_device(op, "params[0]", params[0], **{f"params[{i}]": p})
    scalars = {"lr": lr, "step": step, "decay": decay, "factor": factor, "skip": skip}
    for name, value in scalars.items():
        need(op, value.numel() == 1 and value.dtype == torch.float32,
             f"{name} is {value.dtype} of shape {tuple(value.shape)}: give a float32 scalar")
        check_device(op, "params[0]", params[0], **{name: value})
