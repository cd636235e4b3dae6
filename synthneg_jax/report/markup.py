"""Building blocks of pages: style sheet, escaped text, tables, and figures with their files."""

import csv
import html
import io
import pathlib
from collections.abc import Sequence

from etils import epath

from synthneg_jax.report import figures

CSS = (pathlib.Path(__file__).parent / "page" / "report.css").read_text()
REASONS = {  # verdict's reason -> label
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
  """A share as a percentage with one decimal; a positive share never reads as 0."""
  if 0 < share < 0.0005:
    return "under 0.1 %"
  return f"{100 * share:.1f} %"


def escape(text: object) -> str:
  """Escapes text for HTML."""
  return html.escape(str(text), quote=True)


def missing(text: str) -> str:
  """A note about a part that does not exist yet."""
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
  *,
  caption: str,
  loose: bool = False,
) -> str:
  """A table with a caption below it.

  Args:
    header: column titles, escaped.
    rows: cells, escaped.
    numeric: indices of right-aligned columns.
    caption: escaped.
    loose: lets the last column break anywhere, and moves it below the others on a phone.
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
    f'<div class="wide"><table{style}><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody>'
    "</table></div>\n"
    f'<p class="dim">{caption}</p>'
  )


class Folder:
  """Writes each figure as PNG and CSV, and returns it as SVG for the page."""

  def __init__(self, path: epath.Path):
    self.path = path
    path.mkdir(parents=True, exist_ok=True)
    for old in [*path.glob("*.png"), *path.glob("*.csv")]:  # some may belong to a deleted stage
      old.unlink()

  def add(self, name: str, figure, header, rows, *, label: str, caption: str) -> str:
    """Writes a figure and its numbers; returns a <figure> element.

    Args:
      name: of the files, without suffix.
      figure: to save.
      header, rows: of the CSV file.
      label: text for screen readers.
      caption: HTML.
    """
    (self.path / f"{name}.png").write_bytes(figures.png(figure))
    (self.path / f"{name}.csv").write_text(csv_text(header, rows))
    return (
      f"<figure>{figures.svg(figure, name, label)}<figcaption>{caption} Numbers: "
      f"<code>{name}.csv</code>.</figcaption></figure>"
    )
