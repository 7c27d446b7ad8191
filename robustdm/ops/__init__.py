"""The fused ops: one file each, and `dispatch`, which decides what runs them."""

from robustdm.ops.adamw_ema import adamw_ema
from robustdm.ops.dispatch import BACKENDS, OPS, resolve, why_off
from robustdm.ops.draw_samples import draw_samples
from robustdm.ops.equivariance_loss import equivariance_loss
from robustdm.ops.fgsm_project import fgsm_project
from robustdm.ops.group_norm_act import group_norm_act
from robustdm.ops.noise_perturb import noise_perturb, noise_perturb_resident

__all__ = [
    "BACKENDS", "OPS", "adamw_ema", "draw_samples", "equivariance_loss", "fgsm_project",
    "group_norm_act", "noise_perturb", "noise_perturb_resident", "resolve", "why_off",
]
