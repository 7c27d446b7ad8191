"""What a benchmark case is made of, and how a result is checked before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Allowed relative error to the float64 reference: for our backends, and for other people's code,
# which may round between its kernels.
OURS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
OTHERS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
BACKENDS = ("torch", "cpp", "triton")


@dataclass(frozen=True)
class Verdict:
    """Outcome of a check; ``how`` says against what."""

    error: float
    limit: float
    how: str

    @property
    def right(self) -> bool:
        return self.error <= self.limit  # False for NaN


@dataclass(frozen=True)
class Provider:
    """One way to do a case's job.

    Attributes:
        name: "eager", "compile", "torch", "cpp", "triton", a peer's, or these with an addition.
        call: does the job on a case's inputs and returns its tensors.
        check: (inputs, what ``call`` returned) -> Verdict.
        ours: an error in it is a failure of the run, not a provider that is off.
        compiles: its first call compiles, for seconds.
    """

    name: str
    call: Callable
    check: Callable[[tuple, Sequence[Tensor]], Verdict]
    ours: bool = False
    compiles: bool = False


@dataclass(frozen=True)
class Setup:
    """Inputs on a device, providers for them, and why other providers are off."""

    inputs: tuple
    providers: list[Provider]
    off: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A row group of the table.

    Attributes:
        op: name of the fused op.
        name: op, variant, shape and dtype; unique.
        nbytes: bytes that have to move at least.
        formula: the sum behind ``nbytes``, in words.
        dtype: of the batch.
        build: device -> Setup.
        priority: 0 first; what is late may not fit into the time.
        uses: how many layers of a network have this shape, where that is the reason for it.
    """

    op: str
    name: str
    nbytes: int
    formula: str
    dtype: torch.dtype
    build: Callable[[torch.device], Setup]
    priority: int = 1
    uses: str = ""


def case_name(op: str, variant: str, shape: Sequence[int], dtype: torch.dtype) -> str:
    """For example "equivariance_loss ran 128x3x32x32 bf16"."""
    return " ".join(filter(None, (op, variant, "x".join(map(str, shape)), NAMES[dtype])))


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest ||got - expected|| / ||expected|| of several tensors; NaN if any is."""
    errors = []
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape:
            return float("nan")
        norm = b.double().norm().item()
        errors.append((a.detach().double() - b.double()).norm().item() / (norm or 1.0))
    return max(errors, key=lambda e: (e != e, e))


def against(expected: Callable[[], Sequence[Tensor]], limit: float) -> Callable:
    """A check against the float64 reference."""

    def check(inputs: tuple, got: Sequence[Tensor]) -> Verdict:
        return Verdict(relative_error(got, expected()), limit, "float64 reference")

    return check


def looks_like(expected: Callable[[], Sequence[Tensor]]) -> Callable:
    """A check of code that draws noise of its own: every output's mean and spread must be the
    reference's, as closely as its number of elements allows; numbers per sample, roughly."""

    def check(inputs: tuple, got: Sequence[Tensor]) -> Verdict:
        worst = 0.0
        for a, b in zip(got, expected(), strict=True):
            a, b = a.detach().double(), b.double()
            if a.shape != b.shape:
                return Verdict(float("nan"), 1.0, "statistics")
            if a.ndim < 2:
                found = [relative_error([a], [b]) / 0.5]
            else:
                allowed = 8 / a.numel() ** 0.5 + 0.002
                sd = b.std()
                found = [((a.mean() - b.mean()) / sd).abs().item() / allowed,
                         (a.std() / sd - 1).abs().item() / allowed]
            worst = max([worst, *found], key=lambda e: (e != e, e))
        return Verdict(worst, 1.0, "statistics")

    return check


def both(first: Callable, second: Callable) -> Callable:
    """The worse of two checks, by error over limit."""

    def check(inputs: tuple, got: Sequence[Tensor]) -> Verdict:
        verdicts = [first(inputs, got), second(inputs, got)]
        return max(verdicts, key=lambda v: (not v.right, v.error / v.limit))

    return check


def eager_and_compiled(
    function: Callable, check: Callable, around: Callable = lambda f: f, suffix: str = ""
) -> Iterator[Provider]:
    """Plain torch code as it is, and compiled.

    Args:
        around: puts what cannot be compiled itself, such as a backward pass, around the function.
    """
    yield Provider(f"eager{suffix}", around(function), check)
    # Default mode: what its CUDA graphs would add, the timer's own graphs give to every provider.
    compiled = torch.compile(function, dynamic=False)
    yield Provider(f"compile{suffix}", around(compiled), check, compiles=True)


def our_backends(
    op: str, device: torch.device, call: Callable[[str], Callable], check: Callable,
    suffix: str = "",
) -> tuple[list[Provider], dict[str, str]]:
    """One provider per backend that is on, and why the others are off.

    Args:
        call: backend -> a function of the case's inputs.
    """
    from robustdm import ops

    reasons = {b: ops.why_off(b, op, device) for b in BACKENDS}
    on = [Provider(b + suffix, call(b), check, ours=True) for b in BACKENDS if not reasons[b]]
    return on, {b + suffix: reason for b, reason in reasons.items() if reason}
