"""The report's figures, drawn by matplotlib and saved as SVG or PNG.

Text, axes and grid use one colour (INK), which becomes currentColor in the SVG and so follows the
page's light or dark mode. The other colours have medium lightness, and the background is
transparent. Equal data give equal SVGs.
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
  "figure.dpi": 130,  # in notebooks; files set their own
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
  # In inches; narrow, so that text is large on a phone.
  figure = Figure(figsize=(4.3, height), layout="constrained")
  return figure, figure.subplots(panels, 1, **options)


def errors(
  labels: Sequence[str], values: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> Figure:
  """Test errors as points with intervals, first label on top.

  Args:
    labels: names of the methods.
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
  """Mean Q by step and, below it, the number of traces in each mean.

  Args:
    means: mean Q after step 1, 2, ...
    counts: traces in each mean; a mean of 0 traces is not drawn.
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
    values: Q after step 1, 2, ... under Best-of-k; None if unknown.
    intervals: (low, high) of the rollouts' success rate; None without rollouts.
    start: V of the bare problem, drawn at step 0.
    pit: index of the pit, from 0; -1 for none.
  """
  with matplotlib.rc_context(STYLE):
    figure, axes = _figure(2.4)
    for step, interval in enumerate(intervals, start=1):
      if interval is not None:
        axes.plot(
          [step, step], interval, color=GREY, linewidth=2.5, alpha=0.5, solid_capstyle="round"
        )
    known = [(step, value) for step, value in enumerate(values, start=1) if value is not None]
    axes.plot(
      *zip((0, start), *known, strict=True),
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
  """Mean advantage by step as bars, positive in blue, negative in orange.

  Args:
    means: mean advantage of step 1, 2, ...
    counts: traces in each mean; a mean of 0 traces is not drawn.
  """
  with matplotlib.rc_context(STYLE):
    figure, axes = _figure(2.4)
    for step, (mean, count) in enumerate(zip(means, counts, strict=True), start=1):
      if count:
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
  """Metrics by update, one panel per quantity: raw values thin, smoothed values thick.

  Args:
    steps: indices of the updates, from 0.
    panels: (axis label, line's name -> values), top to bottom.
    smooth: smooths the values of a line.
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
  """Seconds by stage as labelled bars, first label on top."""
  with matplotlib.rc_context(STYLE):
    figure, axes = _figure(0.6 + 0.27 * len(labels))
    rows = range(len(labels))
    axes.barh(rows, seconds, color=BLUE, height=0.6)
    for row, value in zip(rows, seconds, strict=True):
      axes.annotate(
        f"{value:g}",
        (value, row),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
      )
    axes.set_yticks(rows, labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * max([*seconds, 0.1]))
    axes.set_xlabel("seconds")
    axes.grid(axis="x")
    return figure


def verdicts(reasons: Mapping[str, Mapping[str, int]], names: Mapping[str, str]) -> Figure:
  """Shares of verdicts as stacked bars: right in blue, wrong in orange, all others in greys.

  Args:
    reasons: row -> verdict's reason -> number of responses.
    names: reason -> its name in the legend, in the order of the bar.
  """
  shades = iter(("#8a919b", "#b3b9c1", "#6b727c", "#ccd1d6", "#565c64", "#dde1e5"))
  colors = {}
  for reason in names:
    if any(reason in row for row in reasons.values()):
      colors[reason] = {"right": BLUE, "wrong": ORANGE}.get(reason) or next(shades)
  with matplotlib.rc_context(STYLE):
    figure, axes = _figure(1.2 + 0.32 * len(reasons))
    for y, row in enumerate(reasons.values()):
      left = 0.0
      for reason, color in colors.items():
        share = 100 * row.get(reason, 0) / max(1, sum(row.values()))
        label = names[reason] if y == 0 else None
        axes.barh([y], [share], left=left, color=color, height=0.6, label=label)
        if share > 8:
          axes.text(
            left + share / 2,
            y,
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
  """Shifts of both branches of each pair as dots; below the diagonal the margin has grown.

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
  """Number of traces with their pit at each step, and without a pit.

  Args:
    counts: traces whose pit is step 1, 2, ...
    without: traces without a pit.
  """
  with matplotlib.rc_context(STYLE):
    figure, axes = _figure(2.4)
    steps = list(range(1, len(counts) + 1))
    axes.bar(steps, counts, color=ORANGE, width=0.6)
    last = len(counts) + 1.5
    axes.bar([last], [without], color=GREY, width=0.6)
    ticks = steps[:: max(1, -(-len(counts) // 12))]  # at most a dozen
    axes.set_xticks([*ticks, last], [*map(str, ticks), "none"])
    axes.set_xlabel("step of the pit")
    axes.set_ylabel("traces")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y")
    return figure


def png(figure: Figure, dots_per_inch: int = 200) -> bytes:
  """The figure as PNG, on white."""
  buffer = io.BytesIO()
  figure.savefig(
    buffer, format="png", dpi=dots_per_inch, facecolor="white", metadata={"Software": None}
  )
  return buffer.getvalue()


def svg(figure: Figure, name: str, label: str) -> str:
  """The figure as an <svg> element for a page.

  Args:
    figure: returned by a function above.
    name: prefix of all ids, so that a page can hold several figures.
    label: text for screen readers, without quotes or markup.
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
  """The figure as a standalone SVG file that follows the reader's light or dark mode."""
  text = svg(figure, "figure", "")
  dark = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"
  head, _, rest = text.partition(">")
  names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
  return f"{head.replace('<svg', f'<svg {names}', 1)}>{dark}{rest}"


def save(figure: Figure, path: epath.PathLike) -> None:
  """Writes path.png and path.svg, both on white."""
  path = epath.Path(path)
  with matplotlib.rc_context(STYLE):  # no dates, so that equal figures give equal files
    figure.savefig(
      path.with_suffix(".png"), dpi=160, facecolor="white", metadata={"Software": None}
    )
    figure.savefig(path.with_suffix(".svg"), facecolor="white", metadata={"Date": None})
