"""robustdm: diffusion models that survive noisy data, trained fast.

The public names load on first use, so that importing the package is cheap and pulls in nothing that
is not needed.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "NoiseSchedule": "robustdm.schedule",
    "Perturbation": "robustdm.perturbation",
    "Objective": "robustdm.objectives",
    "Draw": "robustdm.objectives",
    "Loss": "robustdm.objectives",
    "GradientStep": "robustdm.step",
    "ResidentBatch": "robustdm.resident",
    "fast_network": "robustdm.inference",
    "fuse": "robustdm.models.fuse",
    "unfuse": "robustdm.models.fuse",
    "TrainConfig": "robustdm.training.config",
    "load_run": "robustdm.training.run",
    "load_data": "robustdm.data",
    "RobustDMError": "robustdm.errors",
    "UsageError": "robustdm.errors",
    "RunError": "robustdm.errors",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'robustdm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
