"""Tables of numbers as plain text and as Markdown."""

from collections.abc import Mapping


def text_table(rows: Mapping[str, Mapping[str, object]], markdown: bool = False) -> str:
    """A table with one line per row and one column per key that any row has.

    Args:
        rows: row name -> {column: value}; floats are shown with three significant digits, missing
            values as a dash.
        markdown: pipes between the columns.
    """
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [["", *columns]]
    for name, row in rows.items():
        lines.append([name, *(_cell(row.get(column)) for column in columns)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    text = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(
            zip(line, widths, strict=True))]
        for line in lines
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in text)
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [text[0], rule, *text[1:]])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
