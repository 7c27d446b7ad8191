"""Tables of numbers: as lines of cells, as plain text and as Markdown."""

from collections.abc import Mapping

Rows = Mapping[str, Mapping[str, object]]


def table_lines(rows: Rows, corner: str = "", digits: int = 3) -> list[list[str]]:
    """The head and a line per row, with one column per key that any row has.

    Args:
        rows: row name -> {column: value}; missing values are shown as a dash.
        corner: above the names.
        digits: significant digits of floats.
    """
    def cell(value: object) -> str:
        if value is None:
            return "-"
        return f"{value:.{digits}g}" if isinstance(value, float) else str(value)

    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    return [[corner, *columns], *(
        [name, *(cell(row.get(column)) for column in columns)] for name, row in rows.items())]


def text_table(rows: Rows, markdown: bool = False) -> str:
    """``table_lines(rows)`` as text, with pipes between the columns if ``markdown``."""
    lines = table_lines(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(
            zip(line, widths, strict=True))]
        for line in lines
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in text)
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [text[0], rule, *text[1:]])
