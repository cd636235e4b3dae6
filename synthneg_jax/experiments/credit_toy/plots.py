"""Statistics and figures of the comparison of credit by step with credit by response.

A run is one seed. Intervals are 95 % intervals of the mean over runs (Student's t). In the figures,
each method has one colour, and bands are these intervals.
"""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from scipy import stats

from synthneg_jax.core import statistics
from synthneg_jax.report import figures

_COLORS = {"response": figures.ORANGE, "step": figures.BLUE}


def slope(x_R: np.ndarray, y_R: np.ndarray) -> list[float]:
  """Least-squares slope of y on x, with intercept: [slope, low, high]."""
  fit = stats.linregress(x_R, y_R)
  half = stats.t.ppf(0.975, len(x_R) - 2) * fit.stderr
  return [round(float(value), 4) for value in (fit.slope, fit.slope - half, fit.slope + half)]


def first_crossing(x_N: np.ndarray, y_N: np.ndarray, target: float) -> float:
  """The x at which a piecewise linear curve first reaches the target.

  NaN if the curve starts at or above the target, or never reaches it.
  """
  above = np.flatnonzero(np.asarray(y_N) >= target)
  if above.size == 0 or above[0] == 0:
    return np.nan
  segment = slice(above[0] - 1, above[0] + 1)
  return float(np.interp(target, y_N[segment], x_N[segment]))


def ratio(response_R: np.ndarray, step_R: np.ndarray) -> dict:
  """Geometric means and response / step with its interval, over runs with both values."""
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
  """A figure 7 inches wide with one panel for each title, side by side."""
  figure = Figure(figsize=(7.0, 2.7), layout="constrained")
  panels = figure.subplots(1, len(titles))
  for axes, title in zip(panels, titles, strict=True):
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axes.grid()
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
  return figure, panels


def _draw_curve(axes, method: str, x, *, intervals, marker: str = "") -> None:
  """Draws means as a line and their intervals as a band; each interval is [mean, low, high]."""
  mean, low, high = np.array(intervals).T
  axes.fill_between(x, low, high, color=_COLORS[method], alpha=0.2, linewidth=0)
  axes.plot(x, mean, f"{marker}-", color=_COLORS[method], linewidth=1.8, markersize=4)


def _label(axes, method: str, xy: tuple[float, float], **options) -> None:
  """Writes the method's name in its colour at xy in axes coordinates."""
  axes.text(
    *xy,
    f"by {method}",
    color=_COLORS[method],
    fontweight="bold",
    transform=axes.transAxes,
    **options,
  )


def _log_ticks(axes, ticks: list[float]) -> None:
  axes.set_xscale("log")
  axes.xaxis.set_major_locator(FixedLocator(ticks))
  axes.xaxis.set_minor_locator(NullLocator())
  axes.set_xticklabels([f"{tick:g}" if tick < 1000 else f"{tick / 1000:g}k" for tick in ticks])


def _means(intervals) -> list[float]:
  return [mean for mean, _, _ in intervals]


def budget(result: dict, beta: float) -> Figure:
  """Return against pairs and against rollouts, and KL at irrelevant steps against return.

  Args:
    result: from `credit_toy.study.budget`.
    beta: the β of the third panel.
  """
  with matplotlib.rc_context(figures.STYLE):
    figure, (pairs, rollouts, movement) = _panels(
      ["return by pairs", "return by rollouts", "irrelevant steps"]
    )
    for method in _COLORS:
      curve, path = result["curves"][method], result["paths"][method][str(beta)]
      for axes, cost in ((pairs, "pairs"), (rollouts, "rollouts")):
        _draw_curve(axes, method, _means(curve[cost]), intervals=curve["return"], marker="o")
      _draw_curve(
        movement, method, _means(path["return"]), intervals=path["kl_irrelevant"], marker="."
      )
    start = result["reference_return"][0]
    for axes, ticks in ((pairs, [10, 100, 1000]), (rollouts, [100, 1000, 10000])):
      axes.axhline(start, color=figures.GREY, linewidth=1, linestyle="--")
      _log_ticks(axes, ticks)
      axes.set_ylim(0, 1)
    pairs.annotate(
      "SFT",
      (1, start),
      xycoords=("axes fraction", "data"),
      xytext=(-3, 3),
      textcoords="offset points",
      ha="right",
      fontsize=8,
    )
    pairs.set_ylabel("return")
    pairs.set_xlabel("pairs")
    rollouts.set_xlabel("rollouts, including credit")
    movement.set_xlabel("return during training")
    movement.set_ylabel("KL at irrelevant steps, nats")
    movement.set_ylim(bottom=0)
    _label(pairs, "response", (0.04, 0.92))
    _label(pairs, "step", (0.55, 0.42))
    _label(rollouts, "response", (0.04, 0.92))
    _label(rollouts, "step", (0.96, 0.42), ha="right")
    _label(movement, "response", (0.04, 0.92))
    _label(movement, "step", (0.96, 0.08), ha="right")
    return figure


def spurious(result: dict, beta: float) -> Figure:
  """Shift of the remark's log-odds, reliance on the remark, and return on fresh problems.

  Args:
    result: from `credit_toy.study.spurious`.
    beta: the β that is drawn.
  """
  with matplotlib.rc_context(figures.STYLE):
    figure, (remark, reliance, value) = _panels(
      ["shift of the remark", "reliance on the remark", "return, fresh problems"]
    )
    steps, log_ratio_R = result["training_steps"], np.array(result["failure_log_odds_ratio"])
    ends = np.array([log_ratio_R.min(), log_ratio_R.max()])
    for method, color in _COLORS.items():
      curves = result[method][str(beta)]
      shift_R, fitted = np.array(curves["shift_at_half"]), curves["slope_at_half"][0]
      remark.plot(log_ratio_R, shift_R, "o", color=color, markersize=4, alpha=0.8)
      line = shift_R.mean() + fitted * (ends - log_ratio_R.mean())
      remark.plot(ends, line, color=color, linewidth=1.2)
      _draw_curve(reliance, method, steps, intervals=curves["reliance"])
      _draw_curve(value, method, steps, intervals=curves["return"])
    for axes in (remark, reliance):
      axes.axhline(0, color=figures.INK, linewidth=0.8)
    remark.set_xlabel("failure given the remark,\nlog odds ratio in the sample")
    remark.set_ylabel("shift, log-odds")
    reliance.set_ylabel("reliance, log-odds")
    value.set_ylabel("return")
    for axes in (reliance, value):
      axes.set_xlabel("gradient steps")
    _label(remark, "response", (0.98, 0.92), ha="right")
    _label(remark, "step", (0.02, 0.06))
    _label(reliance, "response", (0.45, 0.75))
    _label(reliance, "step", (0.10, 0.08))
    _label(value, "response", (0.45, 0.10))
    _label(value, "step", (0.45, 0.22))
    return figure
