"""Arguments for group normalisation with everything around it, and its float64 oracle."""

import torch

from robustdm.ops import reference

ALL = ("affine", "scale", "add", "silu", "dropout")

# shape, groups, features: together every feature alone and with the others, and odd shapes.
CASES = [
    ((3, 6, 7, 5), 3, ALL),
    ((2, 12, 5, 3), 4, ("affine", "silu")),
    ((2, 24, 5, 3), 2, ("affine", "add", "silu", "dropout")),
    ((2, 16, 3, 7), 8, ("scale", "add")),
    ((2, 40, 3, 3), 4, ("affine", "dropout")),
    ((1, 20, 4, 4), 1, ()),
    ((2, 8, 1, 1), 2, ("affine", "silu", "dropout")),
    ((1, 5, 3, 3), 5, ("add", "silu", "dropout")),
    ((1, 48, 9), 12, ("affine", "scale", "silu")),
    ((2, 6, 2, 3, 2), 2, ("affine", "silu")),
    ((2, 96, 3, 2), 24, ALL),
    ((2, 4, 1, 1), 4, ALL),  # groups of one value
    ((1, 4), 4, ("affine", "silu")),
]


def images(shape, dtype, seed):
    """Normal numbers with channels-last strides, which are those of a permuted view."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(shape[0], *shape[2:], shape[1], generator=generator)
    return flat.to(dtype).movedim(-1, 1)


def arguments(shape, features, dtype, parameter_dtype=torch.float32):
    """The tensors of a call: x, weight, bias, scale, shift, add, and the options."""
    batch, channels = shape[:2]
    generator = torch.Generator().manual_seed(3)

    def parameter(name, *size):
        value = torch.randn(size, generator=generator).to(parameter_dtype)
        return value if name in features else None

    tensors = {
        "x": images(shape, dtype, 1) + 0.5,
        "weight": parameter("affine", channels), "bias": parameter("affine", channels),
        "scale": parameter("scale", batch, channels), "shift": parameter("scale", batch, channels),
        "add": parameter("add", batch, channels),
    }
    options = {
        "silu": "silu" in features, "dropout": 0.3 if "dropout" in features else 0.0,
        "key": torch.tensor([5, 2**31 + 7, 11]), "layer": 3,
    }
    return tensors, options


def forward(module, tensors, options, groups, tiny=1e-5):
    t, o = tensors, options
    return module.group_norm_act_forward(
        t["x"], groups, t["weight"], t["bias"], t["scale"], t["shift"], t["add"], o["silu"],
        o["dropout"], o["key"], o["layer"], tiny,
    )


def backward(module, tensors, options, groups, saved, dy, need_sums=True):
    t, o = tensors, options
    return module.group_norm_act_backward(
        dy, t["x"], *saved, groups, t["weight"], t["bias"], t["scale"], t["shift"], t["add"],
        o["silu"], o["dropout"], o["key"], o["layer"], need_sums,
    )


def gradients(tensors, sums):
    """What `robustdm.ops` makes of the sums."""
    du, du_xhat, dx = sums.unbind(-1)
    gain = 1.0 if tensors["scale"] is None else 1 + tensors["scale"].float()
    weight, bias = (tensors[n] for n in ("weight", "bias"))
    return {
        "weight": (du_xhat * gain).sum(0), "bias": (du * gain).sum(0), "shift": du, "add": dx,
        "scale": du_xhat if weight is None else weight.float() * du_xhat + bias.float() * du,
    }


def oracle(tensors, options, groups, dy=None):
    """y in float64, and the gradients for the cotangent dy."""
    leaves = {
        n: None if t is None else t.detach().double().requires_grad_() for n, t in tensors.items()
    }
    y = reference.group_norm_act(groups=groups, **leaves, **options)
    if dy is None:
        return y.detach(), {}
    inputs = {n: t for n, t in leaves.items() if t is not None}
    # In a group of one value, y does not depend on x.
    grads = torch.autograd.grad(y, list(inputs.values()), dy.double(), materialize_grads=True)
    return y.detach(), dict(zip(inputs, grads, strict=True))


def error(got, wanted, scale=0.0):
    """Relative to the norm of what is wanted, or to ``scale`` where that is nearly zero."""
    assert got.shape == wanted.shape
    return float((got.double() - wanted).norm() / max(wanted.norm(), scale, 1e-12))
