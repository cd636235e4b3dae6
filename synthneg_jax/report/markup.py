"""What pages are made of: the style sheet, escaped text, tables, and figures with their files."""

import csv
import html
import io
from collections.abc import Sequence

from etils import epath

from synthneg_jax.report import figures

CSS = """
:root { color-scheme: light dark; --fg: #1f2328; --bg: #ffffff; --soft: #f4f6f8; --line: #d5dae0; --dim: #59636e;
  --link: #0b5cad; --bad: 214, 96, 30; --good: 40, 120, 200; }
@media (prefers-color-scheme: dark) {
  :root { --fg: #e4e8ec; --bg: #14181d; --soft: #1d232a; --line: #37404a; --dim: #9aa5b1; --link: #7db7f0; --bad: 236, 120, 52;
    --good: 74, 150, 226; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--fg); background: var(--bg);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.4rem; padding-top: 0.6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 0.4rem; }
p { max-width: 46rem; margin: 0.5rem 0; }
a { color: var(--link); }
a.dim { color: var(--dim); }
.dim, figcaption { color: var(--dim); font-size: 0.875rem; }
.missing { padding: 0.5rem 0.8rem; border-left: 4px solid var(--line); background: var(--soft); color: var(--dim); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.9rem 0.3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
.num { text-align: right; }
td.num { white-space: nowrap; }
table.loose td:last-child { overflow-wrap: anywhere; }
table.leaves { width: 100%; table-layout: fixed; }
table.leaves td { overflow-wrap: anywhere; }
tr.changed code { font-weight: 700; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem; }
.figures.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
.side { display: grid; gap: 0.5rem 2rem; align-items: start; }
@media (min-width: 64rem) { .side { grid-template-columns: minmax(0, 1fr) minmax(0, 26rem); }
  .side.left { grid-template-columns: minmax(0, 24rem) minmax(0, 1fr); } }
figure { margin: 0.8rem 0 0; max-width: 32rem; }
svg { display: block; width: 100%; height: auto; color: var(--fg); }
svg text { font-family: inherit !important; }
pre, code, .text { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 0.85rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: 0.7rem; margin: 0.4rem 0; }
article p { max-width: none; }
article { margin: 1.2rem 0; padding: 0.8rem; border: 1px solid var(--line); border-radius: 0.5rem; }
ol.steps { list-style: none; margin: 0.6rem 0; padding: 0; }
ol.steps li { display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; padding: 0.35rem 0.6rem; margin: 2px 0;
  border-left: 4px solid transparent; border-radius: 0.2rem; }
ol.steps li.pit { border-left-color: rgb(var(--bad)); }
.text { flex: 1 1 16rem; min-width: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.credit { flex: 0 1 21rem; font-size: 0.8rem; font-variant-numeric: tabular-nums; }
.tag { font-weight: 700; white-space: nowrap; }
.sample { display: inline-block; padding: 0 0.5rem; border-radius: 0.2rem; }
details { margin: 0.6rem 0; }
summary { cursor: pointer; }
@media (max-width: 30rem) {
  table { font-size: 0.82rem; } th, td { padding-right: 0.5rem; }
  table.dense { font-size: 0.66rem; } table.dense th { font-size: 0.58rem; }
  table.dense th, table.dense td { padding-right: 0.25rem; }
  table.loose tr { display: grid; grid-template-columns: 1fr auto 4.6rem; border-bottom: 1px solid var(--line); }
  table.loose th, table.loose td { border: 0; }
  table.loose thead th:last-child { display: none; }
  table.loose td:last-child { grid-column: 1 / -1; padding-top: 0; color: var(--dim); }
}
"""


REASONS = {  # verdicts in words
  "right": "right",
  "wrong": "wrong answer",
  "no_answer": "no answer",
  "truncated": "cut off at the length limit",
  "ambiguous": "several answers",
  "unparsable": "answer not readable",
  "too_large": "answer too large",
  "timeout": "grading took too long",
}


def percent(share: float) -> str:
  """A share as text, one decimal; what is there at all never reads as 0."""
  if 0 < share < 0.0005:
    return "under 0.1 %"
  return f"{100 * share:.1f} %"


def escape(text: object) -> str:
  """Text that no browser takes for markup."""
  return html.escape(str(text), quote=True)


def missing(text: str) -> str:
  """A note that something is not there yet."""
  return f'<p class="missing">{escape(text)}</p>'


def csv_text(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
  """Rows as CSV."""
  buffer = io.StringIO()
  csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
  return buffer.getvalue()


def table(
  header: Sequence[str],
  rows: Sequence[Sequence[str]],
  numeric: Sequence[int],
  caption: str,
  loose: bool = False,
) -> str:
  """A table of escaped cells, and below it what it says.

  Args:
    header: of the columns.
    rows: of cells.
    numeric: columns that are set to the right.
    caption: escaped.
    loose: the last column may break anywhere, and stands below the others on a phone.
  """

  def kind(i):
    return ' class="num"' if i in numeric else ""

  head = "".join(f"<th{kind(i)}>{cell}</th>" for i, cell in enumerate(header))
  body = "".join(
    "<tr>" + "".join(f"<td{kind(i)}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>\n"
    for row in rows
  )
  style = ' class="loose"' if loose else ' class="dense"' if len(header) > 6 else ""
  return (
    f'<div class="wide"><table{style}><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n'
    f'<p class="dim">{caption}</p>'
  )


class Folder:
  """Takes figures: each as PNG and CSV on disk and as SVG for the page."""

  def __init__(self, path: epath.Path):
    self.path = path
    path.mkdir(parents=True, exist_ok=True)
    for old in [*path.glob("*.png"), *path.glob("*.csv")]:  # of a stage that has been deleted since
      old.unlink()

  def add(self, name: str, figure, header, rows, label: str, caption: str) -> str:
    """Keeps a figure with its numbers; returns a <figure>."""
    (self.path / f"{name}.png").write_bytes(figures.png(figure))
    (self.path / f"{name}.csv").write_text(csv_text(header, rows))
    return (
      f"<figure>{figures.svg(figure, name, label)}<figcaption>{caption} "
      f"Numbers: <code>{name}.csv</code>.</figcaption></figure>"
    )
