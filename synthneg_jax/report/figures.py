"""Drawings of the report as matplotlib figures, and each as SVG for the page or as PNG bytes.

Ink (text, axes, grid) is one colour that the SVG turns into currentColor, so it follows the page's
light or dark mode; the other colours are of middle lightness and the background is transparent. The
same data give the same SVG.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib
from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

matplotlib.use("Agg")

INK = "#1f2328"
BLUE, ORANGE, GREY = "#3b86c8", "#d9772b", "#8a919b"
STYLE = {
  "axes.axisbelow": True,
  "axes.edgecolor": INK,
  "axes.labelcolor": INK,
  "axes.labelsize": 9,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "figure.dpi": 130,  # in notebooks; files say their own
  "font.family": "sans-serif",
  "font.size": 9,
  "grid.alpha": 0.15,
  "grid.color": INK,
  "svg.fonttype": "none",
  "svg.hashsalt": "synthneg_jax",
  "text.color": INK,
  "xtick.color": INK,
  "ytick.color": INK,
}


def _figure(height: float, panels: int = 1, **options):
  figure = Figure(
    figsize=(4.3, height), layout="constrained"
  )  # inches; narrow, so that text is large on a phone
  return figure, figure.subplots(panels, 1, **options)


def errors(
  labels: Sequence[str], values: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> Figure:
  """Test errors as points with their intervals, first label on top.

  Args:
    labels: of the methods.
    values: test errors, shares in [0, 1].
    intervals: (low, high) of each, shares.
  """
  with matplotlib.rc_context(STYLE):
    figure, axes = _figure(0.75 + 0.34 * len(labels))
    for row, (value, (low, high)) in enumerate(zip(values, intervals, strict=True)):
      axes.plot(
        [100 * low, 100 * high], [row, row], color=BLUE, linewidth=2.5, solid_capstyle="round"
      )
      axes.plot([100 * value], [row], "o", color=BLUE, markersize=6)
      axes.annotate(
        f"{100 * value:.1f}",
        (100 * value, row),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
        fontsize=8,
      )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.6)
    axes.set_xlabel("test error, % of the problems")
    axes.grid(axis="x")
    return figure


def mean_values(means: Sequence[float], counts: Sequence[int], start: float) -> Figure:
  """Mean Q by step, with how many traces each mean is over below it.

  Args:
    means: mean Q after step 1, 2, ...
    counts: traces in each mean; where 0, no mean is drawn.
    start: mean V of the bare problem, drawn at step 0.
  """
  with matplotlib.rc_context(STYLE):
    figure, (above, below) = _figure(3.1, 2, sharex=True, height_ratios=(3, 1))
    steps = list(range(1, len(means) + 1))
    means = [mean if count else math.nan for mean, count in zip(means, counts, strict=True)]
    above.plot([0, *steps], [start, *means], "-", color=BLUE, linewidth=1.8)
    above.plot(steps, means, "o", color=BLUE, markersize=5, clip_on=False, zorder=3)
    above.plot([0], [start], "s", color=GREY, markersize=6, clip_on=False, zorder=3)
    above.annotate(
      "problem alone", (0, start), xytext=(-4, 14), textcoords="offset points", fontsize=8
    )
    above.set_ylim(0, max(0.1, 1.15 * max([start, *filter(math.isfinite, means)])))
    above.set_ylabel("mean Q")
    above.grid(axis="y")
    below.bar(steps, counts, color=GREY, width=0.6)
    below.set_ylabel("traces")
    below.set_xlabel("step")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    figure.align_ylabels()
    return figure


def step_values(
  values: Sequence[float | None],
  intervals: Sequence[tuple[float, float] | None],
  start: float,
  pit: int,
) -> Figure:
  """Q after each step of one trace.

  Args:
    values: Q after step 1, 2, ... under Best-of-k; None where it is not known.
    intervals: (low, high) of the success rate of the rollouts from there; None without rollouts.
    start: V of the bare problem, drawn at step 0.
    pit: number of the step that is the pit, from 0; -1 for none.
  """
  with matplotlib.rc_context(STYLE):
    figure, axes = _figure(2.4)
    for step, interval in enumerate(intervals, start=1):
      if interval is not None:
        axes.plot(
          [step, step], interval, color=GREY, linewidth=2.5, alpha=0.5, solid_capstyle="round"
        )
    there = [(step, value) for step, value in enumerate(values, start=1) if value is not None]
    axes.plot(
      *zip((0, start), *there, strict=True),
      "o-",
      color=BLUE,
      linewidth=1.8,
      markersize=5,
      clip_on=False,
    )
    if pit >= 0:
      axes.axvspan(pit + 0.5, pit + 1.5, color=ORANGE, alpha=0.25, linewidth=0)
    axes.set_ylim(0, 1.03)
    axes.set_xlim(-0.3, len(values) + 0.5)
    axes.set_xlabel("step (shaded: the pit)" if pit >= 0 else "step")
    axes.set_ylabel("Q")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    return figure


def mean_advantages(means: Sequence[float], counts: Sequence[int]) -> Figure:
  """Mean advantage by step: bars, up in blue, down in orange.

  Args:
    means: of step 1, 2, ...
    counts: traces in each mean; where 0, no bar is drawn.
  """
  with matplotlib.rc_context(STYLE):
    figure, axes = _figure(2.4)
    there = [
      (step, mean)
      for step, (mean, count) in enumerate(zip(means, counts, strict=True), start=1)
      if count
    ]
    for step, mean in there:
      axes.bar([step], [mean], color=BLUE if mean >= 0 else ORANGE, width=0.6)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("mean advantage")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    return figure


def curves(
  steps: Sequence[int],
  panels: Sequence[tuple[str, Mapping[str, Sequence[float]]]],
  smooth: Callable[[Sequence[float]], Sequence[float]],
) -> Figure:
  """Metrics by update, one panel a quantity.

  Args:
    steps: numbers of the updates, from 0.
    panels: (label of the axis, line's name -> values), top to bottom.
    smooth: gives the thick line of a thin one.
  """
  styles = ((BLUE, "-"), (ORANGE, "--"), (GREY, ":"))
  with matplotlib.rc_context(STYLE):
    figure, all_axes = _figure(0.5 + 1.45 * len(panels), len(panels), sharex=True, squeeze=False)
    for axes, (label, lines) in zip(all_axes[:, 0], panels, strict=True):
      for (name, values), (color, dash) in zip(lines.items(), styles, strict=False):
        axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.45)
        axes.plot(steps, smooth(values), dash, color=color, linewidth=1.8, label=name)
      axes.set_ylabel(label)
      axes.yaxis.set_major_locator(MaxNLocator(4))
      axes.grid(axis="y")
      if len(lines) > 1:
        axes.legend(
          frameon=False,
          fontsize=8,
          ncols=len(lines),
          loc="lower left",
          bbox_to_anchor=(0, 1),
          borderpad=0,
        )
    all_axes[-1, 0].set_xlabel("update")
    all_axes[-1, 0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.align_ylabels()
    return figure


def times(labels: Sequence[str], seconds: Sequence[float]) -> Figure:
  """Seconds by stage as bars, first label on top, each with its number."""
  with matplotlib.rc_context(STYLE):
    figure, axes = _figure(0.6 + 0.27 * len(labels))
    places = range(len(labels))
    axes.barh(places, seconds, color=BLUE, height=0.6)
    for place, value in zip(places, seconds, strict=True):
      axes.annotate(
        f"{value:g}",
        (value, place),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
      )
    axes.set_yticks(places, labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * max([*seconds, 0.1]))
    axes.set_xlabel("seconds")
    axes.grid(axis="x")
    return figure


def verdicts(reasons: Mapping[str, Mapping[str, int]], names: Mapping[str, str]) -> Figure:
  """Responses by verdict, one bar a row of 100 %: right in blue, wrong in orange, all others in
  greys.

  Args:
    reasons: row -> verdict's reason -> responses.
    names: reason -> what the legend calls it, in the order of the bar.
  """
  shades = iter(("#8a919b", "#b3b9c1", "#6b727c", "#ccd1d6", "#565c64", "#dde1e5"))
  there = [reason for reason in names if any(reason in row for row in reasons.values())]
  colors = {
    reason: {"right": BLUE, "wrong": ORANGE}.get(reason) or next(shades) for reason in there
  }
  with matplotlib.rc_context(STYLE):
    figure, axes = _figure(1.2 + 0.32 * len(reasons))
    for place, row in enumerate(reasons.values()):
      left = 0.0
      for reason in there:
        share = 100 * row.get(reason, 0) / max(1, sum(row.values()))
        label = names[reason] if place == 0 else None
        axes.barh([place], [share], left=left, color=colors[reason], height=0.6, label=label)
        if share > 8:
          axes.text(
            left + share / 2,
            place,
            f"{share:.0f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white",
          )
        left += share
    axes.set_yticks(range(len(reasons)), list(reasons))
    axes.set_ylim(len(reasons) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the responses")
    figure.legend(frameon=False, fontsize=8, ncols=2, loc="outside upper left")
    return figure


def shifts(chosen: Sequence[float], rejected: Sequence[float]) -> Figure:
  """Each pair as a dot: how far training has moved its two branches. Below the diagonal the margin
  has grown.

  Args:
    chosen, rejected: log π − log π_ref of each pair's branches, nats.
  """
  with matplotlib.rc_context(STYLE):
    figure, axes = _figure(3.4)
    axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
    axes.axvline(0, color=INK, linewidth=0.8, alpha=0.5)
    colors = [BLUE if c > r else ORANGE for c, r in zip(chosen, rejected, strict=True)]
    axes.scatter(chosen, rejected, s=9, color=colors, alpha=0.5, linewidth=0)
    axes.axline((0, 0), slope=1, color=INK, linewidth=0.8, linestyle="--")
    axes.set_xlabel("shift of the chosen, nats")
    axes.set_ylabel("shift of the rejected, nats")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid()
    return figure


def pits(counts: Sequence[int], without: int) -> Figure:
  """How many traces have their pit at each step, and how many have none.

  Args:
    counts: traces whose pit is step 1, 2, ...
    without: traces in which the rule finds no pit.
  """
  with matplotlib.rc_context(STYLE):
    figure, axes = _figure(2.4)
    places = list(range(1, len(counts) + 1))
    axes.bar(places, counts, color=ORANGE, width=0.6)
    last = len(counts) + 1.5
    axes.bar([last], [without], color=GREY, width=0.6)
    every = max(1, -(-len(counts) // 12))  # at most a dozen numbers below the axis
    axes.set_xticks([*places[::every], last], [*map(str, places[::every]), "none"])
    axes.set_xlabel("step of the pit")
    axes.set_ylabel("traces")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y")
    return figure


def png(figure: Figure, dots_per_inch: int = 200) -> bytes:
  """The drawing on white."""
  buffer = io.BytesIO()
  figure.savefig(
    buffer, format="png", dpi=dots_per_inch, facecolor="white", metadata={"Software": None}
  )
  return buffer.getvalue()


def svg(figure: Figure, name: str, label: str) -> str:
  """The drawing as an <svg> element to stand in a page.

  Args:
    figure: as the functions above make it.
    name: put before every id, so that several drawings can stand in one page.
    label: what a screen reader says, plain text without quotes or markup.
  """
  buffer = io.StringIO()
  with matplotlib.rc_context(STYLE):
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
  text = buffer.getvalue()
  text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
  box = re.search(r'viewBox="([^"]+)"', text).group(1)
  text = re.sub(
    r"<svg[^>]*>", f'<svg viewBox="{box}" role="img" aria-label="{label}">', text, count=1
  )
  text = re.sub(r'\bid="', f'id="{name}-', text)
  text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
  return text.replace(INK, "currentColor").strip()


def svg_file(figure: Figure) -> str:
  """The drawing as an SVG file of its own, whose ink follows the reader's light or dark mode."""
  text = svg(figure, "figure", "")
  dark = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"
  head, _, rest = text.partition(">")
  names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
  return f"{head.replace('<svg', f'<svg {names}', 1)}>{dark}{rest}"


def save(figure: Figure, path: epath.PathLike) -> None:
  """Writes path.png and path.svg, both on white."""
  path = epath.Path(path)
  with matplotlib.rc_context(STYLE):  # without dates, so that the same result gives the same files
    figure.savefig(
      path.with_suffix(".png"), dpi=160, facecolor="white", metadata={"Software": None}
    )
    figure.savefig(path.with_suffix(".svg"), facecolor="white", metadata={"Date": None})
