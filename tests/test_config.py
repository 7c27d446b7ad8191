"""The configuration of a run: its groups, their checks and sections of --help, and the presets."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from robustdm import train
from robustdm.errors import UsageError
from robustdm.flags import parse_flags
from robustdm.runs import groups
from robustdm.runs.config import TrainConfig
from robustdm.runs.fields import Fields, load_yaml
from robustdm.runs.presets import PRESETS, preset_values

# Base classes are listed last group first, which is how dataclasses order their fields.
GROUPS = TrainConfig.__bases__[::-1]


def test_each_field_belongs_to_one_group():
    in_groups = [field.name for group in GROUPS for field in fields(group)]
    assert in_groups == [field.name for field in fields(TrainConfig)]  # so none is in two
    defined = {v for v in vars(groups).values() if isinstance(v, type) and issubclass(v, Fields)}
    assert set(GROUPS) == defined - {Fields}


def test_saved_configurations_keep_their_order():
    file = Path(__file__).parent / "fixtures/run-261452b/images/config.yaml"
    old = list(load_yaml(file))
    assert [name for name in TrainConfig().to_dict() if name in old] == old


def test_help_has_a_section_for_each_group_with_its_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    _, general, *sections = re.split(r"^\W*((?:\w+ )?options)\W*$", capsys.readouterr().out,
                                     flags=re.M)
    assert general == "options" and len(sections) == 2 * len(GROUPS) + 1
    assert "--help" in sections[0] and not re.search("^.{,2}--(?!help)[a-z]", sections[0], re.M)
    for group, title, text in zip(GROUPS, sections[1::2], sections[2::2], strict=True):
        assert title == f"{group.__name__.removesuffix('Fields').lower()} options"
        assert group.__doc__ in " ".join(text.split())
        flags = re.findall(r"^.{,2}--([a-z][a-z-]*)", text, re.M)
        assert flags == [field.name.replace("_", "-") for field in fields(group)
                         if field.name != "pretrained"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_survives_plain_types_and_flags(preset):
    model = dict(source="a", format="b", sha256="c", variance_type="d", unet={}, scheduler=None)
    config = TrainConfig(**preset_values(preset), pretrained=model)
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert all(getattr(config, name) == value for name, value in PRESETS[preset].items())
    parsed = parse_flags(TrainConfig, ["--lr", "0.5", "--flip"], prog="p", description="",
                         default=config)
    assert parsed == replace(config, lr=0.5, flip=True)


WRONG = {
    groups.DataFields: dict(resolution=0),
    groups.CorruptionFields: dict(corrupt_kind="outliers"),
    groups.SyntheticFields: dict(subspace_noise_dims=-1),
    groups.LoadingFields: dict(holdout=1.0),
    groups.ObjectiveFields: dict(lambda_max=float("nan")),
    groups.StartFields: dict(lora_alpha=2.0),
    groups.NetworkFields: dict(norm_groups=5),
    groups.OptimisationFields: dict(accumulate=3),
    groups.ComputationFields: dict(seed=2**32),
    groups.ProcessesFields: dict(rank_timeout=0.0),
    groups.RunFields: dict(stop_after=0),
}


@pytest.mark.parametrize("group", WRONG)
def test_a_group_checks_its_own_fields(group):
    group().check()
    said = []
    for make in (lambda **values: group(**values).check(), TrainConfig):
        with pytest.raises(UsageError) as error:
            make(**WRONG[group])
        said.append(str(error.value))
    assert said[0] == said[1]
