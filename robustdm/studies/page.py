"""The page that a reproduction writes: the paper's numbers beside ours, and a verdict per claim."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from robustdm.reporting import plots, webpage
from robustdm.reporting.tables import Rows, table_lines, text_table
from robustdm.reporting.webpage import Picture, Section
from robustdm.runs.rundir import provenance, write_text
from robustdm.studies.claims import Claim
from robustdm.studies.runner import write_results


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
    verdicts = [["claim", "here (mean ± sd over seeds)", "holds if", "paper", "verdict"]]
    for c in claims:
        found = f"{c.value:.3g}" if isinstance(c.value, float) else str(c.value or "-")
        verdicts.append([c.text, found, c.target or "-", c.paper or "-", c.verdict])
    sections = [Section("Verdicts", table=verdicts, plain=True)]
    if differs:
        sections.append(Section("What is not as in the paper", differs))
    text = [f"# {title}", *(f"- {line}" for line in differs)]
    for heading, rows in tables.items():
        sections.append(Section(heading, table=table_lines(rows)))
        text += [f"## {heading}", text_table(rows, markdown=True)]
        print(f"{heading}\n{text_table(rows)}\n")
    if notes:
        sections.append(Section("How to read it", notes))
    pictures = []
    for name, (made, caption) in (figures or {}).items():
        png = made if isinstance(made, bytes) else plots.png_bytes(made)
        (out / f"{name}.png").write_bytes(png)
        pictures.append(Picture(png, caption, name))
    if pictures:
        sections.append(Section("Figures", pictures=pictures))
    lines = [f"python -m robustdm.reproduce {' '.join(sys.argv[1:])}".rstrip(), *commands]
    made_with = [[key, value] for key, value in provenance().items()
                 if not isinstance(value, dict | list)]
    sections += [Section("Commands", code="\n".join(lines)),
                 Section("Made with", table=made_with, head=False, plain=True)]
    write_text(out / "page.html", webpage.page(title, sections))
    write_results(out, [*text, *notes], claims, records)
    return list(claims)
