"""AdamW, a moving average of the weights and their bf16 copy, in one pass."""

from types import ModuleType

import torch
from torch import Tensor

from robustdm.ops.checks import check_device, is_dense, refuse, same_order
from robustdm.ops.dispatch import choose, implementation, registered


def _kernels() -> ModuleType:
    raise NotImplementedError  # `resolve` refuses the backend first


def _run_adamw_ema(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    averages: list[Tensor], copies: list[Tensor], lr: Tensor, step: Tensor, decay: Tensor,
    factor: Tensor, skip: Tensor, beta1: float, beta2: float, tiny: float, weight_decay: float,
    backend: str,
) -> None:
    module = implementation("adamw_ema", _kernels, backend, params[0].device, params[0].dtype)
    module.adamw_ema(params, grads, exp_avgs, exp_avg_sqs, averages, copies, lr, step, decay,
                     factor, skip, beta1, beta2, tiny, weight_decay)


_MUTATED = ("params", "exp_avgs", "exp_avg_sqs", "averages", "copies")
_adamw_ema = registered(_run_adamw_ema, _MUTATED)


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
    run = choose(params[0], _adamw_ema, _run_adamw_ema)
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
        if len(tensors) != len(params):
            refuse(op, f"{name} has {len(tensors)} tensors, params {len(params)}: they must agree")
        for i, (p, value) in enumerate(zip(params, tensors, strict=True)):
            dtype = torch.bfloat16 if name == "copies" else p.dtype
            if value.dtype != dtype:
                refuse(op, f"{name}[{i}] is {value.dtype}: it must be {dtype}")
            if value.shape != p.shape:
                refuse(op, f"{name}[{i}] has shape {tuple(value.shape)}, params[{i}] "
                       f"{tuple(p.shape)}: they must agree")
            # Memory is walked through in one order for all: other strides would mix them up.
            if not same_order(value, p):
                refuse(op, f"{name}[{i}] has strides {value.stride()}, params[{i}] {p.stride()}: "
                       "make it with torch.empty_like")
            if value.device != p.device:
                check_device(op, f"params[{i}]", p, f"{name}[{i}]", value)
    for i, p in enumerate(params):
        if p.dtype != params[0].dtype or p.dtype not in (torch.float32, torch.float64):
            refuse(op, f"params[{i}] is {p.dtype}, params[0] {params[0].dtype}: give float32 "
                   "weights")
        if not is_dense(p):
            refuse(op, f"params[{i}] has strides {p.stride()} and shape {tuple(p.shape)}, with "
                   "gaps: give whole tensors")
        if p.device != params[0].device:
            check_device(op, "params[0]", params[0], f"params[{i}]", p)
    scalars = {"lr": lr, "step": step, "decay": decay, "factor": factor, "skip": skip}
    for name, value in scalars.items():
        if value.numel() != 1 or value.dtype != torch.float32:
            refuse(op, f"{name} is {value.dtype} of shape {tuple(value.shape)}: give a float32 "
                   "scalar")
        check_device(op, "params[0]", params[0], name, value)
