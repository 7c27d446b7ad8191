"""Self-contained HTML pages, made by the templates beside this file.

Whatever goes into a template is escaped, and a name that a template does not find is an error.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_TEMPLATES.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")


class Picture(NamedTuple):
    """A PNG and its words; ``alt`` is the caption if not given."""

    png: bytes
    caption: str = ""
    alt: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, in this order.

    Attributes:
        heading: its title.
        text: paragraphs.
        table: lines of cells, of which the first names the line.
        head: whether the first line is the head of the table.
        plain: whether the cells are words, not numbers.
        notes: paragraphs below the table.
        pictures: one below the other.
        columns: "wide" or "small" to put them side by side.
        code: text that keeps its spaces.
    """

    heading: str
    text: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    head: bool = True
    plain: bool = False
    notes: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    columns: str = ""
    code: str = ""


def page(title: str, sections: Sequence[Section]) -> str:
    """A page of sections as HTML."""
    return render("page.html.j2", title=title, sections=sections)


def render(template: str, **values) -> str:
    """The template of that name, filled in."""
    return _TEMPLATES.get_template(template).render(values)
