"""Self-contained HTML pages: template, tables and images.

The template is one string with three fields, and a table is two lines of code, so there
is no template engine.
"""

import base64
import string
from html import escape

# The fields title, lead and body are HTML.
TEMPLATE = string.Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --page: #fbfaf8; --ink: #1d2127; --soft: #5c6370;
  --line: #e3e1dc; --card: #f3f1ed; }
@media (prefers-color-scheme: dark) { :root { --page: #15171b; --ink: #e8e6e1;
  --soft: #9aa1ad; --line: #2c3038; --card: #1d2026; } }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 5rem 2rem; }
h1, h2, h3 { line-height: 1.15; margin: 0 0 1.25rem; overflow-wrap: anywhere; }
h1 { font-size: clamp(2rem, 5vw, 2.5rem); letter-spacing: -.02em; text-wrap: balance; }
h2 { font-size: 1.6rem; margin-top: 5rem; }
.wide + h3 { margin-top: 2.5rem; }
h3 span, p, th, dt, figcaption, summary, .baseline { color: var(--soft); }
p { font-size: 1.1rem; max-width: 42rem; margin: 0; }
.wide, pre { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .55rem 0 .55rem 1.5rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th, dl, figcaption, summary, h3 span { font-size: .875rem; font-weight: 400; }
.baseline th { padding-top: 2rem; }
:is(th, td):nth-child(-n + 2) { text-align: left; }
:is(th, td):first-child { padding-left: 0; }
.model td:first-child, figcaption b { color: var(--ink); font-weight: 600; }
dl, dd, figure { margin: 0; }
.meanings { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.5rem;
  margin-top: 2rem; max-width: 44rem; }
.facts { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; }
.facts dd { font-size: 1.2rem; }
.tiles { display: grid; gap: 1.75rem; margin: 1.75rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(var(--tile), 100%), 1fr)); }
img { display: block; width: 100%; margin-bottom: .5rem; image-rendering: pixelated; }
article { border-top: 1px solid var(--line); padding: 2rem 0 2.5rem; }
pre { background: var(--card); border-radius: 6px; padding: 1rem 1.25rem;
  font: .82rem/1.55 ui-monospace, Menlo, monospace; }
</style></head><body><main><h1>$title</h1><p>$lead</p>
$body</main></body></html>
""")


def row(tag: str, cells: list[str]) -> str:
  """Returns a row of a table.

  Args:
    tag: "th" or "td".
    cells: texts, which are escaped.
  """
  return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>\n"


def table(head: list[str], lines: list[list[str]]) -> str:
  """Returns a table.

  Args:
    head: texts of the header.
    lines: texts of the cells, line by line.

  Example:
    >>> "<td>1</td>" in table(["x"], [["1"]])
    True
  """
  body = "".join(row("td", cells) for cells in lines)
  return (
    f'<div class="wide"><table>\n<thead>\n{row("th", head)}</thead>\n<tbody>\n{body}'
    "</tbody></table></div>\n"
  )


def uri(content: bytes, kind: str) -> str:
  """Returns an image as a data URI.

  Args:
    content: the image file.
    kind: "png", "gif" or "svg+xml".
  """
  return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
