"""Networks: diffusers UNets for images, a residual MLP for points."""

from robustdm.models.build import build_model, unet_config
from robustdm.models.mlp import PointMLP
from robustdm.models.predict import predict_noise

__all__ = ["PointMLP", "build_model", "predict_noise", "unet_config"]
