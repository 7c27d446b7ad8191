"""robustdm: diffusion models that survive noisy data, trained fast.

The public names load on first use, so that importing the package is cheap and pulls in nothing that
is not needed.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "NoiseSchedule": "robustdm.method.schedule",
    "Perturbation": "robustdm.method.perturbation",
    "Objective": "robustdm.method.objectives",
    "Draw": "robustdm.method.draws",
    "Loss": "robustdm.method.objectives",
    "GradientStep": "robustdm.method.gradients",
    "fast_network": "robustdm.models.inference",
    "fuse": "robustdm.models.fuse",
    "unfuse": "robustdm.models.fuse",
    "TrainConfig": "robustdm.runs.config",
    "CleanPipeline": "robustdm.models.clean_pipeline",
    "load_run": "robustdm.models.load_run",
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
