"""Fields of a configuration: their types with rules, values from plain types, and YAML files."""

from __future__ import annotations

import difflib
import functools
import math
import os
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from robustdm.errors import UsageError

YAML_LIMIT = 1 << 18  # bytes; a configuration with a table of 4000 betas has 2^17


@dataclass(frozen=True)
class Rule:
    """A rule for the values of a field, part of its type: ``Annotated[int, Rule(...)]``.

    Attributes:
        holds: whether a value, not None, obeys it.
        text: the end of the error message, after the value.
    """

    holds: Callable[[Any], bool]
    text: str


def at_most(largest: int) -> Rule:
    """The rule of an upper bound."""
    return Rule(lambda value: value <= largest, f"it must be at most {largest}")


BELOW_2_32 = Rule(lambda value: value < 2**32, "it must be below 2**32")
POSITIVE = Rule(lambda value: value > 0, "it must be positive")
_AT_LEAST_1 = Rule(lambda value: value >= 1, "it must be at least 1")
_NOT_NEGATIVE = Rule(lambda value: value >= 0, "it must not be negative")
MAY_BE_INFINITE = object()
"""Part of the type of a number for which infinity makes sense: "as much as there is"."""

Count = Annotated[int, _AT_LEAST_1]
OptionalCount = Annotated[int | None, _AT_LEAST_1]
CountOrZero = Annotated[int, _NOT_NEGATIVE]
Amount = Annotated[float, _NOT_NEGATIVE]
Share = Annotated[float, Rule(lambda value: 0 <= value <= 1, "it is a share, from 0 to 1")]
Part = Annotated[float, Rule(lambda value: 0 < value <= 1, "it is a share, above 0 and up to 1")]


class Fields:
    """Base of the groups of fields: each is a dataclass that checks its own fields."""

    def need(self, ok: bool, name: str, remedy: str) -> None:
        """Raise an error about a field unless all is well."""
        if not ok:
            raise UsageError(f"{name} is {getattr(self, name)!r}: {remedy}")

    def check(self) -> None:
        """Check the rules in the types of the fields; groups add what their types cannot say.

        Raises:
            UsageError: for the first wrong value.
        """
        for name, hint in _hints(type(self), extras=True).items():
            value, rules = getattr(self, name), getattr(hint, "__metadata__", ())
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float):
                    self.need(math.isfinite(number) or number > 0 and MAY_BE_INFINITE in rules,
                              name, "it must be a finite number")
            for rule in rules:
                if isinstance(rule, Rule):
                    self.need(value is None or rule.holds(value), name, rule.text)


@functools.cache
def _hints(fields: type, extras: bool = False) -> dict:
    return typing.get_type_hints(fields, include_extras=extras)


def convert_fields(fields: type, values: dict, source: str) -> dict:
    """Convert plain values (of a YAML file, say) to the types of the fields.

    Args:
        fields: the dataclass that has them.
        source: what errors begin with.

    Raises:
        UsageError: for an unknown field, naming the closest one, or a value of the wrong type.
    """
    hints = _hints(fields)
    checked = {}
    for key, value in values.items():
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see --help for the fields"
            raise UsageError(f"{source}unknown field {_short(key)}; {hint}")
        try:
            checked[key] = _convert(value, hints[key])
        except (TypeError, ValueError, OverflowError):
            wanted = str(hints[key]).removeprefix("typing.").removeprefix("<class '").rstrip("'>")
            raise UsageError(f"{source}{key} is {_short(value)}, but must be {wanted}") from None
    return checked


def _short(value) -> str:
    """A value for an error message; Python refuses to write out integers of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _convert(value, wanted):
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        if any(value == one and type(value) is type(one) for one in args):
            return value
    elif origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(value, args[0])
    elif origin is tuple:
        if isinstance(value, (list, tuple)) and (args[-1] is ... or len(value) == len(args)):
            return tuple(_convert(item, args[0]) for item in value)
    elif wanted is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return float(value)  # YAML 1.1 reads 1e-4 as a string
    elif wanted is dict and isinstance(value, dict):
        return value
    elif wanted is str and isinstance(value, Path):
        return str(value)
    elif wanted is Path and isinstance(value, (str, Path)) and b"\0" not in os.fsencode(value):
        return Path(value)
    elif type(value) is wanted and not (wanted is int and abs(value) >= 1 << 63):
        return value
    raise TypeError


def load_yaml(path: Path) -> object:
    """The plain value of a YAML file.

    Aliases (``*name``) are refused: nested, a few lines of them stand for more than fits in memory.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not YAML, or too long; the message is one line.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"it has an alias, *{self.peek_event().anchor}: write it out")
            return super().compose_node(parent, index)

    with open(path, "rb") as file:
        text = file.read(YAML_LIMIT + 1)
    if len(text) > YAML_LIMIT:
        raise ValueError(f"it is longer than {YAML_LIMIT} bytes")
    try:
        return yaml.load(text, Loader)
    except Exception as error:  # besides YAMLError: of dates, recursion, bytes that are no text
        raise ValueError(" ".join(str(error).split())[:300]) from None
