"""The parts of a self-contained HTML page: no script, no external resource, light and dark.

Every function escapes the text it is given; what ``section`` and ``document`` join is HTML.
"""

import base64
import html
from collections.abc import Iterable

CSS = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5d646d; --line: #d9dde2;
  --card: #f6f7f9; --page: #ffffff; --accent: #2a6fad; --warn: #fff4dc; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #9aa2ac; --line: #343a41;
  --card: #1d2126; --page: #14171a; --accent: #6db1ea; --warn: #3a2f14; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 75ch; }
.soft { color: var(--soft); font-size: .9rem; }
.tiles, .cards { display: grid; gap: .75rem; margin: 1rem 0; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); }
.cards.small { grid-template-columns: repeat(auto-fill, minmax(min(170px, 45%), 1fr)); }
.tile, figure { background: var(--card); border-radius: 8px; padding: .7rem .8rem; margin: 0; }
.tile b { display: block; font-size: 1.5rem; font-weight: 600; }
.tile span { display: block; font-size: .8rem; color: var(--soft); overflow-wrap: anywhere; }
figure img { display: block; width: 100%; max-width: 560px; height: auto; margin: 0 auto; }
figcaption { font-size: .85rem; color: var(--soft); margin-top: .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .25rem 1.1rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.warn { background: var(--warn); border-radius: 8px; padding: .6rem .9rem; margin: .5rem 0; }
pre { background: var(--card); border-radius: 8px; padding: .7rem .9rem; overflow-x: auto;
  font-size: .85rem; margin: .25rem 0 .75rem; }
details summary { cursor: pointer; color: var(--accent); }
"""


def document(title: str, body: Iterable[str]) -> str:
    """A whole page from its parts; empty parts are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, body)) + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def soft(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def table(rows: Iterable[list], head: list[str] | None = None, numbers: bool = False) -> str:
    """A table of plain values; the first column names the row."""
    rows = list(rows)
    if not rows:
        return ""
    kind = ' class="n"' if numbers else ""

    def line(cells: list, tag: str) -> str:
        rest = "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell in cells[1:])
        scope = "col" if tag == "th" else "row"
        return f'<tr><th scope="{scope}">{escape(cells[0])}</th>{rest}</tr>'

    top = f"<thead>{line(head, 'th')}</thead>" if head else ""
    return (f'<div class="scroll"><table>{top}<tbody>'
            f"{''.join(line(row, 'td') for row in rows)}</tbody></table></div>")


def picture(png: bytes, caption: str = "", alt: str = "") -> str:
    data = base64.b64encode(png).decode("ascii")
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (f'<figure><img alt="{escape(alt or caption)}" src="data:image/png;base64,{data}">'
            f"{text}</figure>")


def escape(value) -> str:
    return html.escape(str(value), quote=True)
