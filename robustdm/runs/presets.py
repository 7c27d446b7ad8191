"""The presets: named sets of values that differ from the defaults of `TrainConfig`."""

from __future__ import annotations

from pathlib import Path

from robustdm.errors import UsageError

_POINTS = dict(network="mlp", batch_size=512, steps=2500, lr=1e-3, warmup_steps=50,
               ema_rates=(0.995,), log_every=50, sample_every=500, checkpoint_every=500,
               num_samples=2000, preview_steps=100)
_CIFAR = dict(data="cifar10", resolution=32, batch_size=128, steps=200_000, lr=1e-4,
              warmup_steps=5000, ema_rates=(0.9999,), norm_groups=32, log_every=100,
              sample_every=5000, checkpoint_every=5000, clip_samples=True, precision="bf16")
PRESETS: dict[str, dict] = {
    "digits": {},
    "plane": dict(_POINTS, data="plane"),
    "gaussians": dict(_POINTS, data="gaussians", point_noise="outlier", point_noise_level=0.2),
    "subspace": dict(_POINTS, data="subspace", mlp_width=256, mlp_depth=4, batch_size=128,
                     steps=3000, num_points=5000, corrupt_sigma=0.1, num_samples=500),
    # The network of google/ddpm-cifar10-32: 35.7 M parameters, one attention head.
    "cifar10": dict(_CIFAR, block_channels=(128, 256, 256, 256), layers_per_block=2,
                    attention_resolutions=(16,), dropout=0.1),
    # improved-diffusion's CIFAR-10 network: 52.5 M parameters, four heads of 64 channels.
    "cifar10-iddpm": dict(_CIFAR, block_channels=(128, 256, 256, 256), layers_per_block=3,
                          attention_resolutions=(16, 8), attention_head_dim=64, dropout=0.3,
                          scale_shift_norm=True),
    "celeba64": dict(_CIFAR, data="images", resolution=64, crop=140,
                     block_channels=(128, 256, 384, 512), layers_per_block=3,
                     attention_resolutions=(16, 8), attention_head_dim=64,
                     scale_shift_norm=True, dropout=0.1),
    "imagenet64": dict(_CIFAR, data="images", resolution=64, steps=500_000,
                       block_channels=(128, 256, 384, 512), layers_per_block=3,
                       attention_resolutions=(16, 8), attention_head_dim=64,
                       scale_shift_norm=True),
    "lsun256": dict(_CIFAR, data="images", resolution=256,
                    block_channels=(128, 128, 256, 256, 512, 512), layers_per_block=2,
                    attention_resolutions=(16,), resident_gib=0.0, accumulate=8),
    # A small network for a folder of one's own pictures.
    "folder": dict(data="images", corrupt_fraction=0.0, resolution=32,
                   block_channels=(64, 128, 128), layers_per_block=2,
                   attention_resolutions=(8,), norm_groups=32, lr=2e-4, batch_size=64,
                   steps=20_000, warmup_steps=500, ema_rates=(0.999,),
                   sample_every=1000, checkpoint_every=1000, log_every=50, clip_samples=True,
                   final_steps=100),
    # Robust fine-tuning of a model named by --init-from, on noisy pictures. docs/pretrained.md says
    # why these values.
    "finetune": dict(data="images", corrupt_fraction=0.0, lr=2e-5, warmup_steps=500,
                     batch_size=128, steps=10_000, ema_rates=(0.999,), sample_every=1000,
                     checkpoint_every=1000, log_every=50, final_steps=100),
}


def preset_values(name: str) -> dict:
    """The fields a preset sets, with its run directory.

    Raises:
        UsageError: for an unknown preset.
    """
    if name not in PRESETS:
        raise UsageError(f"preset is {name!r}: choose one of {', '.join(PRESETS)}")
    return {"preset": name, "out": Path("runs") / name, **PRESETS[name]}
