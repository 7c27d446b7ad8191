"""Networks: diffusers UNets for images, a residual MLP for points."""

from robustdm.models.build import build_model, make_unet, unet_config
from robustdm.models.mlp import PointMLP

__all__ = ["PointMLP", "build_model", "make_unet", "unet_config"]
