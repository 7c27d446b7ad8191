"""The C++ and CUDA backend: calls into the libraries that setup.py builds from csrc/.

The functions have the names, arguments and results of `robustdm.ops.reference`. They work on CPU
tensors; `adamw_ema` also on CUDA tensors. Arguments are trusted: `robustdm.ops` checks them.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from ctypes import c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ABI = 4  # ROBUSTDM_ABI in csrc: a library of another number was built from other sources
FOLDER = Path(__file__).parents[1] / "_native"
LEVELS = ("base", "avx2", "avx512")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SERIAL = 32_768  # up to so many elements, waking threads costs more than they save
MAX_PLANAR = 96  # channels that a block of the C++ code can hold in contiguous memory
FAILURES = {1: "out of memory"}

_POINTER = c_void_p
_SIGNATURES = {
    "noise_perturb": [
        _POINTER, c_int, _POINTER, _POINTER, c_int, *[c_int64] * 3, *[_POINTER] * 4, c_int,
        _POINTER,
    ],
    "fgsm_project": [
        _POINTER, c_int, _POINTER, c_int, _POINTER, _POINTER, *[c_int64] * 3, *[_POINTER] * 3,
        c_int, _POINTER,
    ],
    "equivariance_loss": [
        _POINTER, _POINTER, c_int, _POINTER, c_int, _POINTER, _POINTER, c_int, *[_POINTER] * 3,
        *[c_int64] * 3, *[_POINTER] * 3, c_int, c_int, c_int, _POINTER,
    ],
    "group_norm_act_forward": [
        _POINTER, c_int, *[c_int64] * 4, *[_POINTER] * 8, c_int, c_double, _POINTER, c_int,
        c_double, c_int, _POINTER,
    ],
    "group_norm_act_backward": [
        _POINTER, c_int, *[c_int64] * 4, *[_POINTER] * 10, c_int, c_double, _POINTER, c_int, c_int,
        _POINTER,
    ],
    # The last two: threads and runtime, or device and stream.
    "adamw_ema": [c_int64, *[_POINTER] * 12, *[c_double] * 4, c_int, _POINTER],
}


@cache
def _open(name: str, folder: Path) -> tuple[ctypes.CDLL | None, str]:
    """Load a library once: the library, or None and why it cannot be used."""
    path, note = folder / f"librobustdm_{name}.so", folder / f"{name}.txt"
    if not path.exists():
        return None, note.read_text().strip() if note.exists() else "not built: run pip install"
    try:
        library = ctypes.CDLL(str(path))
        version = getattr(library, "abi_base" if name == "cpu" else "abi_cuda")()
    except (OSError, AttributeError) as error:
        return None, f"cannot be loaded: {error}"
    if version != ABI:
        return None, "built by another version: reinstall"
    if name == "cuda" and not torch.cuda.is_available():
        return None, "built, but torch finds no CUDA device"
    if name == "cuda" and (code := library.probe_cuda()):
        return None, f"built, but {_cuda_error(library, code)}"
    return library, "built"


def _library(name: str) -> ctypes.CDLL:
    library, reason = _open(name, FOLDER)
    if library is None:
        raise RuntimeError(f"the {name} library of csrc is off: {reason}")
    return library


@cache
def _runtime() -> int | None:
    """Address of GOMP_parallel: of torch's own OpenMP, so that its threads are used, or None."""
    for path in (*(Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), "libgomp.so.1"):
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


@cache
def level() -> str:
    """The widest instruction set that both the library and this processor have."""
    library = _library("cpu")
    usable = LEVELS[: library.level_base() + 1]
    return [name for name in usable if hasattr(library, f"noise_perturb_{name}")][-1]


@cache
def _function(name: str, variant: str) -> Callable[..., int]:
    """``name`` of a library: variant "cuda", or an instruction set of the CPU's."""
    function = getattr(_library("cuda" if variant == "cuda" else "cpu"), f"{name}_{variant}")
    function.argtypes = _SIGNATURES[name]
    return function


def status() -> dict[str, tuple[bool, str]]:
    """For "cpu" and "cuda": whether the library can be used, and what it uses or why it is off."""
    (cpu, reason), (cuda, cuda_reason) = (_open(name, FOLDER) for name in ("cpu", "cuda"))
    if cpu is not None:
        threads = "torch's threads" if _runtime() else "one thread, as no OpenMP runtime was found"
        reason = f"{level()}, {threads}"
    return {"cpu": (cpu is not None, reason), "cuda": (cuda is not None, cuda_reason)}


def _cuda_error(library: ctypes.CDLL, code: int) -> str:
    text = ctypes.create_string_buffer(256)
    library.error_text_cuda(code, text, len(text))
    return f"CUDA says: {text.value.decode()}"


def _call(name: str, *arguments, variant: str | None = None) -> None:
    code = _function(name, variant or level())(*arguments)
    if code:
        why = _cuda_error(_library("cuda"), code) if variant == "cuda" else FAILURES[code]
        raise RuntimeError(f"{name}: {why}")


def _team(elements: int) -> tuple[int, int | None]:
    return (torch.get_num_threads() if elements > SERIAL else 1), _runtime()


def _shape(x: Tensor) -> tuple[int, int, int]:
    """(batch, channels, spatial) as csrc wants it: one channel where memory is channels-last."""
    batch, numel = x.shape[0], math.prod(x.shape[1:])
    channels = x.shape[1] if x.ndim > 2 and x.is_contiguous() else 1
    return (batch, 1, numel) if channels == numel else (batch, channels, numel // channels)


def _wide_planar(x: Tensor) -> bool:
    """Contiguous memory with more channels than a block holds: brought to channels-last first."""
    _, channels, spatial = _shape(x)
    return channels > MAX_PLANAR and spatial > 1


def _channels_last(x: Tensor | None) -> Tensor | None:
    """(B, S, C) with contiguous memory: to csrc, (B, D) in channels-last order."""
    return x if x is None else x.movedim(1, -1).contiguous().flatten(1)


def _restored(flat: Tensor, shape: torch.Size) -> Tensor:
    return flat.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


def _narrow(x: Tensor | None) -> Tensor | None:
    """float64 beside narrower tensors: arithmetic is in float32 anyway."""
    return x if x is None or x.dtype in DTYPES else x.float()


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def noise_perturb(
    x0: Tensor, signal: Tensor, noise: Tensor, radius: Tensor, key: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`robustdm.ops.reference.noise_perturb`."""
    x0 = _narrow(x0)
    if _wide_planar(x0):
        parts = noise_perturb(_channels_last(x0), signal, noise, radius, key, dtype)
        return tuple(_restored(part, x0.shape) for part in parts)
    xt, x_ran = torch.empty_like(x0, dtype=dtype), torch.empty_like(x0, dtype=dtype)
    if x0.numel():
        _call(
            "noise_perturb", x0.data_ptr(), DTYPES[x0.dtype], xt.data_ptr(), x_ran.data_ptr(),
            DTYPES[dtype], *_shape(x0), signal.data_ptr(), noise.data_ptr(), radius.data_ptr(),
            key.data_ptr(), *_team(x0.numel()),
        )
    return xt, x_ran


def fgsm_project(
    xt: Tensor, gradient: Tensor | None, noise: Tensor, radius: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    """`robustdm.ops.reference.fgsm_project`, but that a NaN in the gradient gives a NaN delta."""
    gradient = _narrow(gradient)
    if _wide_planar(xt):
        parts = fgsm_project(_channels_last(xt), _channels_last(gradient), noise, radius, key)
        return tuple(_restored(part, xt.shape) for part in parts)
    x_adv, delta = torch.empty_like(xt), torch.empty_like(xt)
    if xt.numel():
        of_gradient = DTYPES[xt.dtype if gradient is None else gradient.dtype]
        _call(
            "fgsm_project", xt.data_ptr(), DTYPES[xt.dtype], _address(gradient), of_gradient,
            x_adv.data_ptr(), delta.data_ptr(), *_shape(xt), noise.data_ptr(), radius.data_ptr(),
            key.data_ptr(), *_team(xt.numel()),
        )
    return x_adv, delta


def equivariance_loss(
    eps_pred: Tensor, eps_pred_adv: Tensor | None, delta: Tensor | None, radius: Tensor,
    lambda_t: Tensor, key: Tensor, dtype: torch.dtype, invariance: bool, detach_clean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`robustdm.ops.reference.equivariance_loss`. Sums do not depend on the number of threads."""
    o, adv, delta = eps_pred, eps_pred_adv, _narrow(delta)
    if _wide_planar(o):
        *loss, grad, grad_adv = equivariance_loss(
            _channels_last(o), _channels_last(adv), _channels_last(delta), radius, lambda_t, key,
            dtype, invariance, detach_clean,
        )
        if adv is not None:
            grad_adv = _restored(grad_adv, o.shape)
        return *loss, _restored(grad, o.shape), grad_adv
    stored = torch.float32 if o.dtype == torch.float16 else o.dtype
    grad = torch.empty_like(o, dtype=stored)
    grad_adv = o.new_empty(0, dtype=stored) if adv is None else torch.empty_like(adv, dtype=stored)
    if not o.numel():  # means of nothing
        total, fit, reg = (torch.full(size, math.nan) for size in ((), (len(o),), (len(o),)))
        return total, fit, reg, grad, grad_adv
    total, fit, reg = torch.empty(()), torch.empty(len(o)), torch.empty(len(o))
    _call(
        "equivariance_loss", o.data_ptr(), _address(adv), DTYPES[o.dtype], _address(delta),
        DTYPES.get(dtype, 0) if delta is None else DTYPES[delta.dtype], grad.data_ptr(),
        None if adv is None else grad_adv.data_ptr(), DTYPES[stored], total.data_ptr(),
        fit.data_ptr(), reg.data_ptr(), *_shape(o), radius.data_ptr(), lambda_t.data_ptr(),
        key.data_ptr(), invariance, detach_clean, *_team(o.numel()),
    )
    return total, fit, reg, grad, grad_adv


def _addresses(tensors: list[Tensor | None]) -> list[int | None]:
    return [x if x is None else x.data_ptr() for x in tensors]


def _norm_shape(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    return x.shape[0], math.prod(x.shape[2:]), x.shape[1], groups


def group_norm_act_forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, add: Tensor | None, silu: bool, dropout: float, key: Tensor | None,
    layer: int, tiny: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`robustdm.ops.reference.group_norm_act_forward` of channels-last tensors; stores no mask."""
    y = torch.empty_like(x)
    mean, rstd = torch.empty(x.shape[0], groups), torch.empty(x.shape[0], groups)
    if x.numel():
        parameters = [p if p is None else p.float().contiguous()
                      for p in (weight, bias, scale, shift, add)]
        _call(
            "group_norm_act_forward", x.data_ptr(), DTYPES[x.dtype], *_norm_shape(x, groups),
            *_addresses(parameters), y.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
            silu, dropout, _address(key), layer, tiny, *_team(x.numel()),
        )
    return y, x.new_empty(0, dtype=torch.uint8), mean, rstd


def group_norm_act_backward(
    dy: Tensor, x: Tensor, keep: Tensor, mean: Tensor, rstd: Tensor, groups: int,
    weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    add: Tensor | None, silu: bool, dropout: float, key: Tensor | None, layer: int,
    need_sums: bool,
) -> tuple[Tensor, Tensor]:
    """`robustdm.ops.reference.group_norm_act_backward` of channels-last tensors."""
    dx = torch.empty_like(dy)
    sums = torch.empty((*dy.shape[:2], 3) if need_sums else (0,))
    if dy.numel():
        parameters = [p if p is None else p.float().contiguous()
                      for p in (weight, bias, scale, shift, add)]
        _call(
            "group_norm_act_backward", dy.data_ptr(), DTYPES[dy.dtype], *_norm_shape(dy, groups),
            x.data_ptr(), mean.data_ptr(), rstd.data_ptr(), *_addresses(parameters),
            dx.data_ptr(), sums.data_ptr() if need_sums else None, silu, dropout,
            _address(key), layer, *_team(dy.numel()),
        )
    return dx, sums


def _pointers(tensors: list[Tensor]) -> ctypes.Array | None:
    return (c_void_p * len(tensors))(*[x.data_ptr() for x in tensors]) if tensors else None


def adamw_ema(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    averages: list[Tensor], copies: list[Tensor], lr: Tensor, step: Tensor, decay: Tensor,
    factor: Tensor, skip: Tensor, beta1: float, beta2: float, tiny: float, weight_decay: float,
) -> None:
    """`robustdm.ops.reference.adamw_ema`, in one pass; in place. CPU or CUDA tensors, all dense.

    On CUDA it is only launched, on torch's current stream.
    """
    if not params:
        return
    numbers = [x.numel() for x in params]
    sizes = (c_int64 * len(params))(*numbers)
    lists = (params, grads, exp_avgs, exp_avg_sqs, averages, copies)
    arguments = (
        len(params), sizes, *map(_pointers, lists),
        *[x.data_ptr() for x in (lr, step, decay, factor, skip)], beta1, beta2, tiny, weight_decay,
    )
    device = params[0].device
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        _call("adamw_ema", *arguments, device.index, stream, variant="cuda")
    else:
        _call("adamw_ema", *arguments, *_team(sum(numbers)))
