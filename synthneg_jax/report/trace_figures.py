"""One trace as a drawing: its steps coloured by advantage beside Q with its interval, and the pair
that its pit gives.

For notebooks and slides, where no style sheet reaches; the report has the same as text
(trace_cards.py). What a model wrote is drawn as it stands: never read as a formula.
"""

import dataclasses
import textwrap
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from synthneg_jax.report import figures
from synthneg_jax.report.trace_cards import ShownTrace, Step

_LETTER = 0.0633  # inches: of a letter of a step's text
_ROW, _LINE = 0.34, 0.145  # inches: of a row with one line of text, and of each further line
_LETTERS = 64  # of a line of text
_MOST_LINES = 6  # of one step


@dataclasses.dataclass(frozen=True)
class Pair:
  """The two branches at a pit, with their log-probs in nats before training and after; None where
  not trained.
  """

  trunk: Sequence[str]  # steps before the pit
  chosen: str
  rejected: str
  chosen_logp: tuple[float, float] | None = None
  rejected_logp: tuple[float, float] | None = None


def _lines(text: str) -> list[str]:
  """A step's text as lines that fit, the rest cut off with an ellipsis; unprintable signs as their
  escapes.
  """
  clean = "".join(
    c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
    for c in text.strip("\n")
  )
  lines = [
    part for line in clean.split("\n") for part in textwrap.wrap(line.strip(), _LETTERS) or [""]
  ]
  return lines[: _MOST_LINES - 1] + ["…"] if len(lines) > _MOST_LINES else lines


def _signed(value: float) -> str:
  text = f"{value:+.2f}".replace("-", "−")
  return text if text[1:] != "0.00" else "0.00"


def _credit(step: Step, best_of: int) -> str:
  if step.exact:
    text = f"Q = {step.q:.0f}, the verdict"
  elif not step.rollouts:
    return "no rollouts"
  else:
    share = f"{step.successes}/{step.rollouts}"
    text = (
      f"Q = {share}"
      if best_of == 1
      else f"{share} right" + (f", Q {step.q:.2f}" if step.q is not None else "")
    )
  return text + (f", A {_signed(step.advantage)}" if step.advantage is not None else "")


def _box(
  axes, width: float, top: float, height: float, advantage: float | None, framed: bool
) -> None:
  moved = 0.0 if advantage is None else advantage
  color = figures.GREY if abs(moved) < 0.005 else figures.ORANGE if moved < 0 else figures.BLUE
  strength = 0.08 + 0.55 * min(1.0, abs(moved))
  place = {
    "boxstyle": "round,pad=0,rounding_size=0.05",
    "transform": axes.transData,
    "clip_on": False,
  }
  box = ((0.0, -top - height + 0.02), width, height - 0.04)
  axes.add_patch(FancyBboxPatch(*box, facecolor=color, alpha=strength, linewidth=0, **place))
  if framed:
    axes.add_patch(
      FancyBboxPatch(*box, facecolor="none", edgecolor=figures.ORANGE, linewidth=1.8, **place)
    )


def _text(axes, x: float, y: float, text: str, **options) -> None:
  axes.text(x, y, text, parse_math=False, va="center", clip_on=False, **options)


def credit(trace: ShownTrace, best_of: int = 1) -> Figure:
  """Steps from top to bottom, orange where they lower Q and blue where they raise it; to the right
  Q itself.

  Args:
    trace: with its credit; its pit is framed.
    best_of: k of Best-of-k, whose Q this is; 1 for the policy itself.
  """
  texts = [
    _lines(f"{number}. {step.text.strip()}") for number, step in enumerate(trace.steps, start=1)
  ]
  heights = [_ROW] + [_ROW + _LINE * (len(lines) - 1) for lines in texts]
  width = max(
    2.6, 0.3 + _LETTER * max(len(line) for lines in texts for line in lines)
  )  # of a step's box
  with matplotlib.rc_context(figures.STYLE):
    figure = Figure(figsize=(width + 3.6, sum(heights) + 0.62))
    axes = figure.add_axes((0, 0, 1, 1))  # data are inches, downwards from the first row
    axes.set_xlim(-0.12, width + 3.48)
    axes.set_ylim(-sum(heights) - 0.5, 0.12)
    axes.axis("off")
    left, right, said = (
      width + 0.25,
      width + 1.45,
      width + 1.65,
    )  # where Q is 0 and 1, and where it is said

    def place(q):
      return left + (right - left) * q

    for q in (0, 0.5, 1):
      axes.plot([place(q)] * 2, [0, -sum(heights)], color=figures.INK, alpha=0.15, linewidth=0.8)
      _text(axes, place(q), -sum(heights) - 0.12, f"{q:g}", fontsize=8, ha="center")
    _text(axes, place(0.5), -sum(heights) - 0.32, "Q", fontsize=9, ha="center")
    _text(axes, 0.1, -heights[0] / 2, "the problem alone", fontsize=8, style="italic")
    _text(axes, said, -heights[0] / 2, f"V = {trace.right_samples}/{trace.samples}", fontsize=8)
    line, top = [(place(trace.v0), -heights[0] / 2)], heights[0]
    for number, (step, lines, height) in enumerate(
      zip(trace.steps, texts, heights[1:], strict=True)
    ):
      middle = -top - height / 2
      _box(axes, width, top, height, step.advantage, framed=number == trace.pit)
      for row, text in enumerate(lines):
        y = middle + _LINE * ((len(lines) - 1) / 2 - row)
        _text(axes, 0.1, y, text, fontsize=7.5, family="monospace")
      _text(axes, said, middle, _credit(step, best_of), fontsize=8)
      if number == trace.pit:
        _text(
          axes,
          width + 3.4,
          middle,
          "◀ pit",
          fontsize=8.5,
          weight="bold",
          color=figures.ORANGE,
          ha="right",
        )
      if step.interval and best_of == 1:
        axes.plot(
          [place(q) for q in step.interval],
          [middle] * 2,
          color=figures.BLUE,
          linewidth=2.5,
          alpha=0.4,
        )
      if step.q is not None:
        line.append((place(step.q), middle))
        axes.plot(*line[-1], "D" if step.exact else "o", color=figures.BLUE, markersize=5.5)
      top += height
    axes.plot(*zip(*line, strict=True), color=figures.BLUE, linewidth=1, alpha=0.6, zorder=1)
    axes.plot(*line[0], "s", color=figures.GREY, markersize=6)
    return figure


def pair_at_pit(
  trace: ShownTrace,
  chosen_logp: tuple[float, float] | None = None,
  rejected_logp: tuple[float, float] | None = None,
) -> Pair:
  """The pair of a trace that has a pit and something preferred to it."""
  texts = [step.text for step in trace.steps]
  return Pair(texts[: trace.pit], trace.preferred, texts[trace.pit], chosen_logp, rejected_logp)


def _branch_lines(text: str) -> list[str]:
  return [part for line in _lines(text) for part in textwrap.wrap(line, 40) or [""]]


def _moved(logp: tuple[float, float] | None) -> str:
  if logp is None:
    return ""
  return f"log p {logp[0]:.2f} → {logp[1]:.2f} nats".replace("-", "−")


def fork(pair: Pair) -> Figure:
  """The pair as the fork that it is: the steps that both share, and the two ways on."""
  trunk = [line for text in pair.trunk for line in _branch_lines(text)] or ["(the problem alone)"]
  branches = (
    ("chosen: made likelier", pair.chosen, pair.chosen_logp, figures.BLUE),
    ("rejected: the pit, made less likely", pair.rejected, pair.rejected_logp, figures.ORANGE),
  )
  sizes = [0.55 + _LINE * (len(_branch_lines(text)) + bool(logp)) for _, text, logp, _ in branches]
  height = max(sum(sizes) + 0.15, 0.5 + _LINE * len(trunk))

  def longest(lines):
    return _LETTER * max(map(len, lines))

  fork_at = 0.3 + max(1.8, longest(trunk))
  wide = max(2.4, *(longest(_branch_lines(text)) for _, text, _, _ in branches))
  with matplotlib.rc_context(figures.STYLE):
    figure = Figure(figsize=(fork_at + 1.0 + wide, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, fork_at + 1.0 + wide)
    axes.set_ylim(-height, 0)
    axes.axis("off")
    middle = -height / 2
    for row, line in enumerate(trunk):
      y = middle + _LINE * ((len(trunk) - 1) / 2 - row)
      _text(axes, 0.15, y, line, fontsize=7.5, family="monospace")
    _text(
      axes,
      0.15,
      middle + _LINE * (len(trunk) + 1.6) / 2,
      "trunk: what both share",
      fontsize=8,
      weight="bold",
    )
    top = (height - sum(sizes)) / 2
    for (title, text, logp, color), size in zip(branches, sizes, strict=True):
      at = -top - size / 2
      axes.annotate(
        "",
        (fork_at + 0.8, at),
        (fork_at, middle),
        arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.8, "shrinkA": 0},
      )
      _text(axes, fork_at + 0.9, -top - 0.18, title, fontsize=8, weight="bold", color=color)
      for row, line in enumerate(_branch_lines(text)):
        _text(
          axes, fork_at + 0.9, -top - 0.38 - _LINE * row, line, fontsize=7.5, family="monospace"
        )
      if logp:
        _text(
          axes,
          fork_at + 0.9,
          -top - 0.4 - _LINE * len(_branch_lines(text)),
          _moved(logp),
          fontsize=8,
        )
      top += size
    return figure
