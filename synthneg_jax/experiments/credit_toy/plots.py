"""Figures in number and in line for the study that sets credit by step against credit by response.

A run is one seed; intervals are 95 % ones of a mean over runs, by Student's t. In drawings a colour
is a method and a band such an interval.
"""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from scipy import stats

from synthneg_jax.core import statistics
from synthneg_jax.report import figures

_COLOR = {"response": figures.ORANGE, "step": figures.BLUE}
_NAME = {"response": "by response", "step": "by step"}


def slope(x_R: np.ndarray, y_R: np.ndarray) -> list[float]:
  """Slope of y on x by least squares with a constant: [slope, low, high]."""
  fit = stats.linregress(x_R, y_R)
  half = stats.t.ppf(0.975, len(x_R) - 2) * fit.stderr
  return [round(float(value), 4) for value in (fit.slope, fit.slope - half, fit.slope + half)]


def first_at(x_N: np.ndarray, y_N: np.ndarray, target: float) -> float:
  """The x at which a curve first reaches the target, linear between its points; NaN where it begins
  above or ends below.
  """
  above = np.flatnonzero(np.asarray(y_N) >= target)
  if above.size == 0 or above[0] == 0:
    return np.nan
  around = slice(above[0] - 1, above[0] + 1)
  return float(np.interp(target, y_N[around], x_N[around]))


def ratio(response_R: np.ndarray, step_R: np.ndarray) -> dict:
  """Geometric means and that of response / step with its interval, over the runs in which both are
  known.
  """
  both_R = np.isfinite(response_R) & np.isfinite(step_R)
  if both_R.sum() < 2:
    return {"runs": int(both_R.sum())}
  log_R, step_log_R = np.log(response_R[both_R]), np.log(step_R[both_R])
  return {
    "response": round(float(np.exp(log_R.mean())), 4),
    "step": round(float(np.exp(step_log_R.mean())), 4),
    "response_over_step": np.exp(statistics.mean_interval(log_R - step_log_R)).round(3).tolist(),
    "runs": int(both_R.sum()),
  }


def _panels(titles: list[str]):
  """Three panels beside each other, 7 inches wide."""
  figure = Figure(figsize=(7.0, 2.7), layout="constrained")
  panels = figure.subplots(1, len(titles))
  for axes, title in zip(panels, titles, strict=True):
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axes.grid()
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
  return figure, panels


def _band(axes, method: str, x, *, summaries, marker: str = "") -> None:
  mean, low, high = np.array(summaries).T
  axes.fill_between(x, low, high, color=_COLOR[method], alpha=0.2, linewidth=0)
  axes.plot(x, mean, f"{marker}-", color=_COLOR[method], linewidth=1.8, markersize=4)


def _name(axes, method: str, x: float, y: float, **options) -> None:
  """The method's name in its colour at a place in the panel, 0 to 1 both ways."""
  axes.text(
    x,
    y,
    _NAME[method],
    color=_COLOR[method],
    fontweight="bold",
    transform=axes.transAxes,
    **options,
  )


def _log_ticks(axes, ticks: list[float]) -> None:
  axes.set_xscale("log")
  axes.xaxis.set_major_locator(FixedLocator(ticks))
  axes.xaxis.set_minor_locator(NullLocator())
  axes.set_xticklabels([f"{tick:g}" if tick < 1000 else f"{tick / 1000:g}k" for tick in ticks])


def budget(result: dict, beta: float) -> Figure:
  """Return against pairs and against rollouts, and what irrelevant steps move on the way to a
  return.

  Args:
    result: as `credit_toy.study.budget` gives it.
    beta: which β is drawn in the third panel.
  """
  with matplotlib.rc_context(figures.STYLE):
    figure, (pairs, rollouts, moved) = _panels(
      ["what pairs buy", "what rollouts buy", "moved in vain"]
    )
    for method in _COLOR:
      curve, path = result["curves"][method], result["paths"][method][str(beta)]
      for axes, cost in ((pairs, "pairs"), (rollouts, "rollouts")):
        _band(
          axes, method, [mean for mean, _, _ in curve[cost]], summaries=curve["return"], marker="o"
        )
      _band(
        moved,
        method,
        [mean for mean, _, _ in path["return"]],
        summaries=path["kl_irrelevant"],
        marker=".",
      )
    start = result["reference_return"][0]
    for axes, ticks in ((pairs, [10, 100, 1000]), (rollouts, [100, 1000, 10000])):
      axes.axhline(start, color=figures.GREY, linewidth=1, linestyle="--")
      _log_ticks(axes, ticks)
      axes.set_ylim(0, 1)
    pairs.annotate("SFT", (1, start), xycoords=("axes fraction", "data"), xytext=(-3, 3),
    textcoords="offset points",
                   ha="right", fontsize=8)  # fmt: skip
    pairs.set_ylabel("return")
    pairs.set_xlabel("pairs")
    rollouts.set_xlabel("rollouts, credit included")
    moved.set_xlabel("return during training")
    moved.set_ylabel("KL at irrelevant steps, nats")
    moved.set_ylim(bottom=0)
    _name(pairs, "response", 0.04, 0.92)
    _name(pairs, "step", 0.55, 0.42)
    _name(rollouts, "response", 0.04, 0.92)
    _name(rollouts, "step", 0.96, 0.42, ha="right")
    _name(moved, "response", 0.04, 0.92)
    _name(moved, "step", 0.96, 0.08, ha="right")
    return figure


def spurious(result: dict, beta: float) -> Figure:
  """Where the remark's log-odds go, what becomes of the lean on it, and the return on fresh
  problems.

  Args:
    result: as `credit_toy.study.spurious` gives it.
    beta: which β is drawn.
  """
  with matplotlib.rc_context(figures.STYLE):
    figure, (blame, lean, value) = _panels(
      ["is the remark blamed?", "is the lean on it undone?", "fresh problems"]
    )
    steps, ratio = result["training_steps"], np.array(result["failure_log_odds_ratio"])
    for method in _COLOR:
      of_method = result[method][str(beta)]
      blame.plot(
        ratio, of_method["shift_at_half"], "o", color=_COLOR[method], markersize=4, alpha=0.8
      )
      slope, shift = of_method["slope_at_half"][0], np.array(of_method["shift_at_half"])
      ends = np.array([ratio.min(), ratio.max()])
      blame.plot(
        ends, shift.mean() + slope * (ends - ratio.mean()), color=_COLOR[method], linewidth=1.2
      )
      _band(lean, method, steps, summaries=of_method["lean"])
      _band(value, method, steps, summaries=of_method["return"])
    for axes in (blame, lean):
      axes.axhline(0, color=figures.INK, linewidth=0.8)
    blame.set_xlabel("failure with the remark,\nlog odds ratio in the sample")
    blame.set_ylabel("shift of the remark, log-odds")
    lean.set_ylabel("lean of the decision, log-odds")
    value.set_ylabel("return")
    for axes in (lean, value):
      axes.set_xlabel("gradient steps")
    _name(blame, "response", 0.98, 0.92, ha="right")
    _name(blame, "step", 0.02, 0.06)
    _name(lean, "response", 0.45, 0.75)
    _name(lean, "step", 0.10, 0.08)
    _name(value, "response", 0.45, 0.10)
    _name(value, "step", 0.45, 0.22)
    return figure
