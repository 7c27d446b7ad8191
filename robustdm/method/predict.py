"""Calling a network, whatever form its output has."""

from collections.abc import Callable

from torch import Tensor

from robustdm.errors import UsageError


def predict_noise(model: Callable, x: Tensor, t: Tensor) -> Tensor:
    """Noise prediction of a model, whatever it wraps it in.

    Args:
        model: model(x, t) returns a tensor, or an object with the tensor in ``.sample`` (as in
            diffusers); of twice as many channels as x the first half is taken (learned variance).
        x: (B, C, ...) state.
        t: (B,) int64 timesteps.

    Returns:
        (B, C, ...) in the dtype that the model computes in.

    Raises:
        UsageError: if the prediction does not have x's shape.
    """
    eps = model(x, t)
    eps = getattr(eps, "sample", eps) if not isinstance(eps, Tensor) else eps
    if not isinstance(eps, Tensor) or not eps.is_floating_point():
        what = f"{eps.dtype} numbers" if isinstance(eps, Tensor) else type(eps).__name__
        raise UsageError(
            f"the model returns {what}: it must return the predicted noise as a floating-point "
            "tensor, or an object with that in .sample"
        )
    if eps.ndim == x.ndim > 1 and eps.shape[1] == 2 * x.shape[1]:
        eps = eps[:, : x.shape[1]]
    if eps.shape != x.shape:
        raise UsageError(
            f"the model predicts noise of shape {tuple(eps.shape)} for samples of shape "
            f"{tuple(x.shape)}: it must predict the noise, shaped like its input"
        )
    return eps
