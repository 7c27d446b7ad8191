"""What the entry points share: flags to configuration, errors to one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from robustdm.errors import PeerError, RobustDMError, UsageError
from robustdm.flags import parse_flags
from robustdm.host import keep_freed_memory
from robustdm.runs.config import TrainConfig
from robustdm.runs.fields import load_yaml
from robustdm.runs.presets import preset_values


def on_main_rank() -> bool:
    """Whether this process is the only one of its job, or the one that speaks for it."""
    return os.environ.get("RANK", "0") == "0"


def guard(main: Callable[[], int | None]) -> None:
    """Run an entry point; an error of ours becomes one line on stderr and its exit code.

    The process keeps the memory that it frees, see `keep_freed_memory`.
    """
    keep_freed_memory()
    try:
        code = main()
    except RobustDMError as error:
        if not isinstance(error, PeerError):
            several = int(os.environ.get("WORLD_SIZE", 1)) > 1
            where = f"rank {os.environ.get('RANK')}: " if several else ""
            print(f"error: {where}{error}", file=sys.stderr)
        code = error.exit_code
    except BrokenPipeError:
        code = 1
    except KeyboardInterrupt:
        if on_main_rank():
            print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code or 0)


def read_yaml(path: Path) -> dict:
    """Fields from a YAML file.

    Raises:
        UsageError: if the file is missing, is not YAML or is not a mapping.
    """
    try:
        values = load_yaml(path)
    except OSError as error:
        raise UsageError(f"config is {str(path)!r}: it cannot be read ({error})") from None
    except ValueError as error:
        raise UsageError(f"config is {str(path)!r}: it is not valid YAML ({error})") from None
    if not isinstance(values, dict):
        raise UsageError(f"config is {str(path)!r}: it must hold one 'field: value' per line")
    return values


def _flags_over(config: TrainConfig, argv: Sequence[str]) -> TrainConfig:
    return parse_flags(TrainConfig, argv, default=config, prog="python -m robustdm.train",
                       description="Train a diffusion model that survives noisy data.")


_UNTOLD = {"resolution": "the size of its images", "schedule": "its noise schedule"}


def parse_train(argv: Sequence[str] | None = None) -> TrainConfig:
    """Configuration of a training run: preset, then YAML file, then flags.

    With ``--resume`` the configuration saved in ``--out`` takes the place of preset and file. With
    ``--init-from`` the model's network, schedule and resolution take the place of the preset's.

    Raises:
        UsageError: for an unknown preset, field or value in preset and file.
        SystemExit: from the flag parser, with code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset")
    first.add_argument("--config")
    first.add_argument("--out")
    first.add_argument("--resume", action="store_true")
    for name in _UNTOLD:
        first.add_argument(f"--{name}")
    try:
        known, _ = first.parse_known_args(argv)
    except argparse.ArgumentError:
        known = argparse.Namespace(preset=None, config=None, out=None, resume=False,
                                   **dict.fromkeys(_UNTOLD))
    values: dict = {}
    if known.resume:
        from robustdm.runs.rundir import read_config

        if known.config:
            raise UsageError(
                f"config is {known.config!r}: --resume continues with the run's own "
                "configuration; leave --config out, and give what may change as flags"
            )
        values = read_config(Path(known.out or preset_values(known.preset or "digits")["out"]))
        if known.preset and known.preset != values.get("preset"):
            raise UsageError(
                f"preset is {known.preset!r}: the run was started with {values.get('preset')!r}; "
                "leave --preset out"
            )
        values = {**values, "resume": True, "dry_run": False, "stop_after": None, "max_time": None}
        file = {}
    else:
        file = read_yaml(Path(known.config)) if known.config else {}
        file.pop("pretrained", None)  # of an earlier run: init_from is looked at anew
        name = known.preset or file.get("preset") or "digits"
        values = {**preset_values(str(name)), **file, "preset": name, "config": known.config}
    base = TrainConfig.from_dict(values, str(known.config or "configuration"))

    config = _flags_over(base, argv)
    if config.preset == "finetune" and config.init_from is None:
        raise UsageError("preset is 'finetune': name the model to start from with --init-from, a "
                         "diffusers directory, a name on the Hub, a run or an improved-diffusion "
                         ".pt")
    if config.init_from is None or config.resume:
        return config
    from robustdm.models.pretrained import check_settled, settle, untold

    settled = settle(config)
    # Again, over the model's values: so far, preset and flags were one.
    config = _flags_over(
        TrainConfig.from_dict({**settled.to_dict(), **file}, str(known.config)), argv)
    check_settled(config, settled)
    given = {*file, *preset_values(str(name)), *(k for k in _UNTOLD if getattr(known, k))}
    for field in untold(settled):
        if field not in given:
            raise UsageError(f"{field} is not given: init_from is {config.init_from!r}, which does "
                             f"not tell {_UNTOLD[field]}; give --{field}, as it was trained with")
    return config
