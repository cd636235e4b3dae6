"""Plots of studies: error against problems or a setting, bars, distributions, Q by step; and CSV.

Points are means over seeds, small dots single seeds, and error bars 95 % bootstrap intervals.
Colours and style are those of report/figures.py. figure.py maps figures to these functions.
"""

import csv
import dataclasses
import io
import textwrap
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from synthneg_jax.report import figures

GREEN, PURPLE, RED = "#3a9a6b", "#8d6bc4", "#c8504e"
COLORS = (figures.GREY, figures.BLUE, figures.ORANGE, GREEN, PURPLE, RED)
MARKERS = "os^Dvp"


@dataclasses.dataclass(frozen=True)
class Series:
  """One line or one group of bars.

  Attributes:
    label: of the method.
    x: positions.
    mean, low, high: values with their intervals.
    dots: values of single seeds at each position; may be empty.
    dashed: whether the line is dashed.
  """

  label: str
  x: Sequence[float]
  mean: Sequence[float]
  low: Sequence[float]
  high: Sequence[float]
  dots: Sequence[Sequence[float]] = ()
  dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Reach:
  """An efficiency factor: a method's point, and the size at which the baseline has its error."""

  size: float
  baseline_size: float
  error: float
  label: str


def _draw(axes, series: Sequence[Series]) -> None:
  for number, line in enumerate(series):
    color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
    for x, values in zip(line.x, line.dots, strict=False):
      axes.plot([x] * len(values), values, ".", color=color, alpha=0.45, markersize=3.5)
    below = np.subtract(line.mean, line.low)
    above = np.subtract(line.high, line.mean)
    axes.errorbar(
      line.x,
      line.mean,
      np.maximum(0, [below, above]),
      linestyle="--" if line.dashed else "-",
      marker=marker,
      color=color,
      label=line.label,
      linewidth=1.6,
      markersize=5,
      capsize=2,
    )


def _legend(axes, columns: int = 2) -> None:
  axes.legend(
    frameon=False, fontsize=8, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0
  )


def _whole_numbers(axis, positions: Sequence[float]) -> None:
  axis.set_major_locator(FixedLocator(sorted(set(positions))))
  axis.set_minor_locator(NullLocator())
  axis.set_major_formatter(
    FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
  )


def _log_percent(axis, series: Sequence[Series]) -> None:
  low = min(value for line in series for value in line.low)
  high = max(value for line in series for value in line.high)
  ticks = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
  axis.set_major_locator(FixedLocator([tick for tick in ticks if 0.9 * low <= tick <= 1.1 * high]))
  axis.set_minor_locator(NullLocator())
  axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))


def _log_log(series: Sequence[Series], title: str, label: str):
  """Returns (figure, axes) of test errors against x, both on logarithmic axes."""
  figure = Figure(figsize=(4.3, 3.3), layout="constrained")
  axes = figure.subplots()
  axes.set_xscale("log")
  axes.set_yscale("log")
  _draw(axes, series)
  _log_percent(axes.yaxis, series)
  axes.set_xlabel(label)
  axes.set_ylabel("test error, %")
  axes.grid(axis="y")
  _legend(axes)
  figure.suptitle(title, fontsize=9, x=0.02, ha="left")
  return figure, axes


def against_compute(series: Sequence[Series], title: str) -> Figure:
  """Test error against floating-point operations."""
  with matplotlib.rc_context(figures.STYLE):
    figure, axes = _log_log(series, title, "floating-point operations after the base model")
    axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
      FuncFormatter(lambda value, _: f"{value:.0e}".replace("e+", "e"))
    )
    return figure


def against_problems(series: Sequence[Series], title: str, reaches: Sequence[Reach] = ()) -> Figure:
  """Test error against |D_syn|: figures 2a, 2b, 5a, 5b, 9, 10 and 11 of the paper.

  Args:
    series: x in problems, values as fractions.
    title: of the figure.
    reaches: factors, drawn as arrows from the baseline's line to the method's point.
  """
  with matplotlib.rc_context(figures.STYLE):
    figure, axes = _log_log(series, title, "synthetic problems")
    for reach in reaches:
      arrow = {"arrowstyle": "<-", "color": figures.INK, "linewidth": 0.9}
      axes.annotate(
        "", (reach.baseline_size, reach.error), (reach.size, reach.error), arrowprops=arrow
      )
      end = (reach.baseline_size, reach.error)
      axes.annotate(
        reach.label, end, xytext=(-3, -10), textcoords="offset points", ha="right", fontsize=8
      )
    _whole_numbers(axes.xaxis, [x for line in series for x in line.x])
    return figure


def against_setting(
  series: Sequence[Series],
  title: str,
  label: str,
  *,
  level: tuple[float, str] | None = None,
  log: bool = True,
  value: str = "",
) -> Figure:
  """Test error, or another value, against a setting such as beta: figures 2c and 5c.

  Args:
    series: x in the setting's unit.
    title: of the figure.
    label: of the x axis.
    level: a value drawn as a horizontal line, and its label.
    log: whether the x axis is logarithmic.
    value: label of the y axis; empty for test errors in percent.
  """
  with matplotlib.rc_context(figures.STYLE):
    figure = Figure(figsize=(4.3, 3.1), layout="constrained")
    axes = figure.subplots()
    if log:
      axes.set_xscale("log")
    if level:
      axes.axhline(level[0], color=figures.INK, linewidth=0.9, linestyle=":")
      axes.annotate(
        level[1],
        (1, level[0]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
      )
    _draw(axes, series)
    if log:
      _whole_numbers(axes.xaxis, [x for line in series for x in line.x])
    if not value:
      axes.yaxis.set_major_formatter(FuncFormatter(lambda fraction, _: f"{100 * fraction:g}"))
    axes.set_xlabel(label)
    axes.set_ylabel(value or "test error, %")
    axes.grid(axis="y")
    _legend(axes, 1 if value else 2)  # other values have longer names
    figure.suptitle(title, fontsize=9, x=0.02, ha="left")
    return figure


def bars(series: Sequence[Series], title: str, label: str, percent: bool = True) -> Figure:
  """One value per method, as points with intervals, the first on top: figure 4."""
  with matplotlib.rc_context(figures.STYLE):
    labels = [textwrap.fill(line.label, 36) for line in series]
    row_height = 0.24 + 0.12 * max(label.count("\n") + 1 for label in labels)
    figure = Figure(figsize=(4.3, 0.95 + row_height * len(series)), layout="constrained")
    axes, scale = figure.subplots(), 100 if percent else 1
    for row, line in enumerate(series):
      color = COLORS[row % len(COLORS)]
      axes.plot(
        [scale * line.low[0], scale * line.high[0]],
        [row, row],
        color=color,
        linewidth=2.5,
        solid_capstyle="round",
      )
      axes.plot([scale * line.mean[0]], [row], "o", color=color, markersize=6)
      if line.dots:
        axes.plot(
          np.multiply(line.dots[0], scale),
          [row] * len(line.dots[0]),
          "|",
          color=color,
          markersize=8,
          alpha=0.6,
        )
      text = f"{scale * line.mean[0]:.1f}" if scale == 100 else f"{line.mean[0]:.3g}"
      axes.annotate(
        text,
        (scale * line.mean[0], row),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
        fontsize=8,
      )
    axes.set_yticks(range(len(series)), labels)
    axes.set_ylim(len(series) - 0.5, -0.7)
    axes.set_xlabel(label, loc="right")  # a long one ends below the names
    axes.grid(axis="x")
    figure.suptitle(title, fontsize=9, x=0.02, ha="left")
    return figure


def by_step(series: Sequence[Series], title: str, label: str = "mean Q") -> Figure:
  """A mean at each step of a solution; step 0 is the bare problem: figure 7."""
  with matplotlib.rc_context(figures.STYLE):
    figure = Figure(figsize=(4.3, 3.1), layout="constrained")
    axes = figure.subplots()
    _draw(axes, series)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step (0: the bare problem)")
    axes.set_ylabel(label)
    axes.grid(axis="y")
    _legend(axes)
    figure.suptitle(title, fontsize=9, x=0.02, ha="left")
    return figure


def distributions(samples: Sequence[tuple[str, Sequence[float]]], title: str, label: str) -> Figure:
  """Overlaid histograms, each with its mean: figure 3."""
  with matplotlib.rc_context(figures.STYLE):
    figure = Figure(figsize=(4.3, 2.9), layout="constrained")
    axes = figure.subplots()
    pooled = np.concatenate([values for _, values in samples])
    edges = np.histogram_bin_edges(pooled, bins=40)
    for (name, values), color in zip(
      samples, (figures.BLUE, figures.ORANGE, figures.GREY), strict=False
    ):
      axes.hist(
        values,
        edges,
        density=True,
        color=color,
        alpha=0.5,
        label=f"{name}, mean {np.mean(values):.3g}",
      )
      axes.axvline(np.mean(values), color=color, linewidth=1.5)
    axes.set_xlabel(label)
    axes.set_ylabel("density")
    _legend(axes, 1)
    figure.suptitle(title, fontsize=9, x=0.02, ha="left")
    return figure


def as_csv(series: Sequence[Series], x: str) -> str:
  """The data of a plot, one row per point; `seeds` has the seeds' values, separated by spaces."""
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator="\n")
  writer.writerow(["series", x, "mean", "low", "high", "seeds"])
  for line in series:
    for i, position in enumerate(line.x):
      dots = " ".join(f"{value:.5f}" for value in line.dots[i]) if line.dots else ""
      writer.writerow(
        [
          line.label,
          f"{position:g}",
          *(f"{part[i]:.5f}" for part in (line.mean, line.low, line.high)),
          dots,
        ]
      )
  return buffer.getvalue()
