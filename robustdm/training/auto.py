"""``--objective auto``: the objective that the noise of the data calls for."""

from __future__ import annotations

from dataclasses import replace

from robustdm.data import load_data
from robustdm.data.noise import ADVICE, MEANING, noise_of
from robustdm.errors import UsageError
from robustdm.runs.config import TrainConfig


def choose_objective(config: TrainConfig, speak: bool = True) -> TrainConfig:
    """The configuration with the objective that fits its data, if it leaves that open.

    Args:
        speak: print what was found.

    Raises:
        UsageError: for data that cannot be read, are too few to tell, or hold nothing to learn.
    """
    if config.objective != "auto":
        return config
    data = load_data(config)
    found = noise_of(data, config.seed)
    objective, baseline, why = ADVICE[found.kind]
    if objective is None:
        raise UsageError(f"objective is 'auto': {data.name} holds {MEANING[found.kind]}; {why}")
    if speak:
        print(f"noise      {MEANING[found.kind]}, sd {found.sigma:.3g} on {found.share:.0%}: "
              f"--objective {objective}; {why}", flush=True)
    return replace(config, objective=objective, correct_samples=baseline == "known")
