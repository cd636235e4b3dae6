"""The data flow of a run with its counts, after figure 1 of the paper."""

import csv
import dataclasses
import io
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from synthneg_jax.report import figures

_POSITIONS = {  # node -> (column, row)
  "problems": (0, 0),
  "D_syn": (1, 0),
  "π_sft": (2, 0),
  "traces": (3, 0),
  "π_rft": (3, 1),
  "Q, A": (2, 1),
  "pits": (1, 1),
  "pairs": (0, 1),
  "π_dpo": (0, 2),
}
_EDGES = (  # from, to, label, the label's offset from the arrow's middle
  ("problems", "D_syn", "synthesize", (0, 0.36)),
  ("D_syn", "π_sft", "sft", (0, 0.36)),
  ("π_sft", "traces", "sample", (0, 0.36)),
  ("traces", "π_rft", "rft", (0.1, 0)),
  ("traces", "Q, A", "credit", (-0.14, 0.1)),
  ("Q, A", "pits", "", (0, 0)),
  ("pits", "pairs", "", (0, 0)),
  ("pairs", "π_dpo", "dpo, against π_sft", (0.06, 0)),
)
_WIDTH, _HEIGHT = 0.8, 0.56


@dataclasses.dataclass(frozen=True)
class Counts:
  """Counts of a run's data, in order of the data flow.

  Attributes:
    problems: in D_syn.
    solutions: the teacher's, for SFT.
    traces, right, wrong: π_sft's samples; the rest are truncated, ambiguous or without an answer.
    rft: right samples that RFT trains on.
    credited, steps, rollouts: wrong samples with credit, their steps, and rollouts before and
      after these steps.
    pits: credited samples with a pit.
    pairs: for DPO.
    errors: test errors of sft, rft and dpo, shares.
  """

  problems: int
  solutions: int
  traces: int
  right: int
  wrong: int
  rft: int
  credited: int
  steps: int
  rollouts: int
  pits: int
  pairs: int
  errors: tuple[float, float, float]

  def captions(self) -> dict[str, Sequence[str]]:
    """Lines of text below each node's name."""
    sft, rft, dpo = (f"test error {100 * error:.1f} %" for error in self.errors)
    return {
      "problems": [f"{self.problems:,}"],
      "D_syn": [f"{self.solutions:,} solutions"],
      "π_sft": [sft],
      "traces": [f"{self.traces:,}: {self.right:,} right,", f"{self.wrong:,} wrong"],
      "π_rft": [rft, f"from {self.rft:,} right"],
      "Q, A": [f"{self.credited:,} wrong, {self.steps:,} steps", f"{self.rollouts:,} rollouts"],
      "pits": [f"{self.pits:,}"],
      "pairs": [f"{self.pairs:,}"],
      "π_dpo": [dpo],
    }


def draw(counts: Counts, title: str) -> Figure:
  """Data as blue boxes, policies as orange boxes, stages as arrows."""
  with matplotlib.rc_context(figures.STYLE):
    figure = Figure(figsize=(6.6, 3.7), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(-0.46, 3.46)
    axes.set_ylim(2.4, -0.5)
    for name, lines in counts.captions().items():
      column, row = _POSITIONS[name]
      color = figures.ORANGE if name.startswith("π") else figures.BLUE
      corner = (column - _WIDTH / 2, row - _HEIGHT / 2)
      look = {
        "boxstyle": "round,pad=0,rounding_size=0.06",
        "facecolor": color + "26",
        "edgecolor": color,
      }
      axes.add_patch(FancyBboxPatch(corner, _WIDTH, _HEIGHT, linewidth=1.2, **look))
      axes.text(column, row - 0.13, name, ha="center", va="center", fontsize=11, weight="semibold")
      axes.text(
        column,
        row + 0.09,
        "\n".join(lines),
        ha="center",
        va="center",
        fontsize=6.8,
        linespacing=1.2,
      )
    for start, end, label, (right, up) in _EDGES:
      (x0, y0), (x1, y1) = _POSITIONS[start], _POSITIONS[end]
      if x0 != x1 and y0 != y1:  # diagonal, from the lower left corner
        x0, y0, x1, y1 = x0 - _WIDTH / 2, y0 + _HEIGHT / 2, x1 + _WIDTH / 2 - 0.08, y1 - _HEIGHT / 2
      else:
        half = (_WIDTH / 2) * (x1 > x0) - (_WIDTH / 2) * (x1 < x0), (_HEIGHT / 2) * (y1 > y0)
        x0, x1, y0, y1 = x0 + half[0], x1 - half[0], y0 + half[1], y1 - half[1]
      arrow = {
        "arrowstyle": "-|>",
        "color": figures.INK,
        "linewidth": 1.0,
        "shrinkA": 1,
        "shrinkB": 1,
      }
      axes.annotate("", (x1, y1), (x0, y0), arrowprops=arrow)
      align = {"ha": "left" if right > 0 else "center", "va": "center"}
      x, y = (x0 + x1) / 2 + right, (y0 + y1) / 2 - up
      axes.text(x, y, label, **align, fontsize=8, style="italic")
    figure.suptitle(title, fontsize=9, x=0.02, ha="left")
    return figure


def as_csv(counts: Counts) -> str:
  """One row per count; errors as shares."""
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator="\n")
  writer.writerow(["what", "count"])
  for field in dataclasses.fields(counts)[:-1]:
    writer.writerow([field.name, getattr(counts, field.name)])
  writer.writerows(zip(("sft error", "rft error", "dpo error"), counts.errors, strict=True))
  return buffer.getvalue()
