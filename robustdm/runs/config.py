"""The configuration of a training run: one dataclass that has the fields of all groups.

Imports neither torch nor diffusers, so that ``--help`` and every usage error answer at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from robustdm.runs.fields import convert_fields
from robustdm.runs.groups import (
    BaseFields,
    ComputationFields,
    CorruptionFields,
    DataFields,
    LoadingFields,
    NetworkFields,
    ObjectiveFields,
    OptimisationFields,
    ProcessesFields,
    RunFields,
    StartFields,
    SyntheticFields,
)


# The fields of the last base come first.
@dataclass(frozen=True)
class TrainConfig(
    RunFields, ProcessesFields, ComputationFields, OptimisationFields,
    NetworkFields, StartFields, ObjectiveFields, LoadingFields,
    SyntheticFields, CorruptionFields, DataFields, BaseFields,
):
    """Everything that decides a training run. The defaults are the README's recipe (digits)."""

    def __post_init__(self):
        for name, value in convert_fields(TrainConfig, vars(self), "").items():
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Check each group, then what groups have to do with each other.

        Raises:
            UsageError: for the first wrong value.
        """
        super().check()
        if self.lora:
            self.need(self.network == "unet", "lora", "only networks for images can have adapters")
        halved = len(self.block_channels) - 1
        self.need(self.resolution % 2**halved == 0 or self.network == "mlp", "resolution",
                  f"it must be a multiple of {2**halved}, for the network halves it {halved} times")
        if self.parallel == "fsdp":
            self.need(not self.compile, "compile", "a network in parts runs eagerly, use "
                      "--parallel ddp or --no-compile")
            self.need(not self.lora, "lora", "what adapters add is small and not put in parts, use "
                      "--parallel ddp")

    def to_dict(self) -> dict:
        """Plain types only, as written to config.yaml: paths as strings, tuples as lists."""
        plain = dataclasses.asdict(self)
        return {
            key: str(value) if isinstance(value, Path)
            else list(value) if isinstance(value, tuple) else value
            for key, value in plain.items()
        }

    @classmethod
    def from_dict(cls, values: dict, source: str = "configuration") -> TrainConfig:
        """Build from plain types.

        Raises:
            UsageError: for an unknown field (naming the closest known one) or a wrong type.
        """
        return cls(**convert_fields(cls, values, f"{source}: "))
