"""The fused ops: one file each, and `dispatch`, which decides what runs them."""

from robustdm.ops.adamw_ema import adamw_ema
from robustdm.ops.dispatch import BACKENDS, OPS, resolve, why_off
from robustdm.ops.equivariance_loss import equivariance_loss
from robustdm.ops.fgsm_project import fgsm_project
from robustdm.ops.group_norm_act import group_norm_act
from robustdm.ops.noise_perturb import noise_perturb

__all__ = [
    "BACKENDS", "OPS", "adamw_ema", "equivariance_loss", "fgsm_project", "group_norm_act",
    "noise_perturb", "resolve", "why_off",
]
