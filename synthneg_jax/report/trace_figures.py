"""Figures of one trace: its steps coloured by advantage beside Q, and the pair at its pit.

For notebooks and slides; the report shows the same as text (trace_cards.py). A model's text is
drawn literally, never parsed as a formula.
"""

import dataclasses
import textwrap
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from synthneg_jax.report import figures
from synthneg_jax.report.trace_cards import ShownTrace, Step

_LETTER = 0.0633  # inches: width of a letter of a step's text
_ROW, _LINE = 0.34, 0.145  # inches: height of a row with one line of text, of a further line
_MAX_COLUMNS = 64  # letters of a line of text
_MAX_LINES = 6  # lines of one step


@dataclasses.dataclass(frozen=True)
class Pair:
  """The two branches at a pit, with log-probs in nats (before, after) training, or None."""

  trunk: Sequence[str]  # steps before the pit
  chosen: str
  rejected: str
  chosen_logp: tuple[float, float] | None = None
  rejected_logp: tuple[float, float] | None = None


def _lines(text: str) -> list[str]:
  """A step's text as lines that fit, truncated with an ellipsis; escapes unprintable characters."""
  clean = "".join(
    c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
    for c in text.strip("\n")
  )
  lines = _wrapped(clean.split("\n"), _MAX_COLUMNS)
  return lines[: _MAX_LINES - 1] + ["…"] if len(lines) > _MAX_LINES else lines


def _wrapped(lines: Sequence[str], width: int) -> list[str]:
  return [part for line in lines for part in textwrap.wrap(line.strip(), width) or [""]]


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
    text = f"Q = {share}" if best_of == 1 else f"{share} right"
    if best_of > 1 and step.q is not None:
      text += f", Q {step.q:.2f}"
  return text + (f", A {_signed(step.advantage)}" if step.advantage is not None else "")


def _box(axes, *, width: float, top: float, height: float, advantage: float | None, framed: bool):
  change = advantage or 0.0
  color = figures.GREY if abs(change) < 0.005 else figures.ORANGE if change < 0 else figures.BLUE
  strength = 0.08 + 0.55 * min(1.0, abs(change))
  style = {
    "boxstyle": "round,pad=0,rounding_size=0.05",
    "transform": axes.transData,
    "clip_on": False,
  }
  box = ((0.0, -top - height + 0.02), width, height - 0.04)
  axes.add_patch(FancyBboxPatch(*box, facecolor=color, alpha=strength, linewidth=0, **style))
  if framed:
    frame = {"facecolor": "none", "edgecolor": figures.ORANGE, "linewidth": 1.8}
    axes.add_patch(FancyBboxPatch(*box, **frame, **style))


def _text(axes, x: float, y: float, text: str, **options) -> None:
  axes.text(x, y, text, parse_math=False, va="center", clip_on=False, **options)


def credit(trace: ShownTrace, best_of: int = 1) -> Figure:
  """A trace's steps, orange if they lower Q and blue if they raise it, with Q to their right.

  Args:
    trace: with its credit; the pit is framed.
    best_of: k of Best-of-k that Q refers to; 1 for the policy itself.
  """
  texts = [
    _lines(f"{number}. {step.text.strip()}") for number, step in enumerate(trace.steps, start=1)
  ]
  heights = [_ROW] + [_ROW + _LINE * (len(lines) - 1) for lines in texts]
  longest = max(len(line) for lines in texts for line in lines)
  width = max(2.6, 0.3 + _LETTER * longest)  # of a step's box
  with matplotlib.rc_context(figures.STYLE):
    figure = Figure(figsize=(width + 3.6, sum(heights) + 0.62))
    axes = figure.add_axes((0, 0, 1, 1))  # data coordinates are inches, downwards from the top row
    axes.set_xlim(-0.12, width + 3.48)
    axes.set_ylim(-sum(heights) - 0.5, 0.12)
    axes.axis("off")
    left, right = width + 0.25, width + 1.45  # Q = 0 and Q = 1
    label_x = width + 1.65

    def q_x(q):
      return left + (right - left) * q

    for q in (0, 0.5, 1):
      axes.plot([q_x(q)] * 2, [0, -sum(heights)], color=figures.INK, alpha=0.15, linewidth=0.8)
      _text(axes, q_x(q), -sum(heights) - 0.12, f"{q:g}", fontsize=8, ha="center")
    _text(axes, q_x(0.5), -sum(heights) - 0.32, "Q", fontsize=9, ha="center")
    _text(axes, 0.1, -heights[0] / 2, "the problem alone", fontsize=8, style="italic")
    _text(axes, label_x, -heights[0] / 2, f"V = {trace.right_samples}/{trace.samples}", fontsize=8)
    line, top = [(q_x(trace.v0), -heights[0] / 2)], heights[0]
    for number, (step, lines, height) in enumerate(
      zip(trace.steps, texts, heights[1:], strict=True)
    ):
      middle = -top - height / 2
      is_pit = number == trace.pit
      box = {"width": width, "top": top, "height": height}
      _box(axes, **box, advantage=step.advantage, framed=is_pit)
      for row, text in enumerate(lines):
        y = middle + _LINE * ((len(lines) - 1) / 2 - row)
        _text(axes, 0.1, y, text, fontsize=7.5, family="monospace")
      _text(axes, label_x, middle, _credit(step, best_of), fontsize=8)
      if is_pit:
        style = {"fontsize": 8.5, "weight": "bold", "color": figures.ORANGE, "ha": "right"}
        _text(axes, width + 3.4, middle, "◀ pit", **style)
      if step.interval and best_of == 1:
        style = {"color": figures.BLUE, "linewidth": 2.5, "alpha": 0.4}
        axes.plot([q_x(q) for q in step.interval], [middle] * 2, **style)
      if step.q is not None:
        line.append((q_x(step.q), middle))
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
  """The pair of a trace with a pit and a preferred branch."""
  texts = [step.text for step in trace.steps]
  return Pair(texts[: trace.pit], trace.preferred, texts[trace.pit], chosen_logp, rejected_logp)


def _branch_lines(text: str) -> list[str]:
  return _wrapped(_lines(text), 40)


def _logp_change(logp: tuple[float, float] | None) -> str:
  if logp is None:
    return ""
  return f"log p {logp[0]:.2f} → {logp[1]:.2f} nats".replace("-", "−")


def fork(pair: Pair) -> Figure:
  """A pair as a fork: the shared trunk and its two branches."""
  trunk = [line for text in pair.trunk for line in _branch_lines(text)] or ["(the problem alone)"]
  branches = (
    ("chosen: more likely", pair.chosen, pair.chosen_logp, figures.BLUE),
    ("rejected: the pit, less likely", pair.rejected, pair.rejected_logp, figures.ORANGE),
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
      "shared trunk",
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
          _logp_change(logp),
          fontsize=8,
        )
      top += size
    return figure
