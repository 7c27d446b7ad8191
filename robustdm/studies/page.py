"""The page that a reproduction writes: the paper's numbers beside ours, and a verdict per claim."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from robustdm.reporting import plots, webpage
from robustdm.reporting.tables import text_table
from robustdm.runs.rundir import provenance, write_text
from robustdm.studies.claims import Claim
from robustdm.studies.runner import write_results

Rows = Mapping[str, Mapping[str, object]]


def write_page(
    out: Path, title: str, tables: Mapping[str, Rows], claims: Sequence[Claim], records,
    differs: Sequence[str] = (), notes: Sequence[str] = (),
    figures: Mapping[str, tuple[Figure | bytes, str]] | None = None, commands: Sequence[str] = (),
) -> list[Claim]:
    """Print the tables; write page.html, table.md, results.json and the figures.

    Args:
        out: directory, made if missing.
        title: what is reproduced.
        tables: heading -> rows; the paper's own under a heading that says so.
        claims: the verdicts.
        records: what is behind the tables, JSON-able.
        differs: what is not as in the paper, a sentence each.
        notes: how to read it, a sentence each.
        figures: name -> (figure or PNG, caption), written as NAME.png.
        commands: besides the one that runs, commands that are part of it.

    Returns:
        The claims.
    """
    out.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, (made, caption) in (figures or {}).items():
        png = made if isinstance(made, bytes) else plots.png_bytes(made)
        (out / f"{name}.png").write_bytes(png)
        pictures[name] = webpage.picture(png, caption, name)
    body = [
        f"<header><h1>{webpage.escape(title)}</h1></header>",
        webpage.section("Verdicts", webpage.table(
            [[c.text, _words(c.value), c.target or "-", c.paper or "-", c.verdict] for c in claims],
            ["claim", "here (mean ± sd over seeds)", "holds if", "paper", "verdict"])),
    ]
    if differs:
        body.append(webpage.section("What is not as in the paper", *map(webpage.soft, differs)))
    sections = [f"# {title}", *(f"- {line}" for line in differs)]
    for heading, rows in tables.items():
        columns = list(dict.fromkeys(key for row in rows.values() for key in row))
        body.append(webpage.section(heading, webpage.table(
            [[name, *(_words(row.get(c)) for c in columns)] for name, row in rows.items()],
            ["", *columns], numbers=True)))
        sections += [f"## {heading}", text_table(rows, markdown=True)]
        print(f"{heading}\n{text_table(rows)}\n")
    if notes:
        body.append(webpage.section("How to read it", *map(webpage.soft, notes)))
    if pictures:
        body.append(webpage.section("Figures", *pictures.values()))
    arguments = " ".join(sys.argv[1:])
    lines = [f"python -m robustdm.reproduce {arguments}".rstrip(), *commands]
    body.append(webpage.section("Commands", f"<pre>{webpage.escape(chr(10).join(lines))}</pre>"))
    made = provenance()
    body.append(webpage.section("Made with", webpage.table(
        [[key, value] for key, value in made.items() if not isinstance(value, dict | list)])))
    write_text(out / "page.html", webpage.document(title, body))
    write_results(out, [*sections, *notes], claims, records)
    return list(claims)


def _words(value) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
