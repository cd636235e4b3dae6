"""Figure 8 from its cells, as JSON, CSV, SVG and PNG; and plots of single graphs and cells.

Curves are means over seeds with 95 % intervals by Student's t.
"""

import csv
import io
import json
from collections.abc import Sequence

import matplotlib
import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from synthneg_jax.core.statistics import mean_interval
from synthneg_jax.report import figures

# Of checkpoints, in the order of their steps.
_SHADES = ("#9ecae9", "#3b86c8", "#1b4f87", "#d9772b", "#8f4513", "#4b2a10")


def _curve(cells: Sequence[dict]) -> dict:
  """Measures over seeds: {"step": [...], "test/error": [[mean, low, high], ...], ...}."""
  points_RP = [cell["curve"] for cell in cells]
  curve = {"step": [point["step"] for point in points_RP[0]]}
  for split in ("train", "test"):
    for name in points_RP[0][0][split]:
      curve[f"{split}/{name}"] = mean_interval(
        [[point[split][name] for point in points] for points in points_RP]
      )
  if "dpo_loss" in points_RP[0][0]:
    curve["dpo_loss"] = mean_interval(
      [[point["dpo_loss"] for point in points] for points in points_RP]
    )
  return curve


def collect(cells: Sequence[dict], degree: int) -> dict:
  """The data of the figure.

  Args:
    cells: the base, SFT of every seed, DPO of every seed and checkpoint. DPO without pairs, because
      no wrong response was sampled, does not train: its curve is extended as constant.
    degree: arms of a graph; chance is 1 / degree.

  Returns:
    {"chance", "seeds", "base", "sft": curve, "dpo": {checkpoint: {"pairs", **curve}}, "gain":
    {checkpoint: decrease of the test error by DPO, paired by seed}, "seconds"}; averages over seeds
    are [mean, low, high].
  """
  base = next(cell for cell in cells if cell["cell"] == "base")
  sft = [cell for cell in cells if cell["cell"].startswith("sft_")]
  dpo = [cell for cell in cells if cell["cell"].startswith("dpo_")]
  longest = max((cell["curve"] for cell in dpo), key=len)
  for cell in dpo:
    cell["curve"] += [
      {**cell["curve"][-1], "step": point["step"]} for point in longest[len(cell["curve"]) :]
    ]
  by_checkpoint, gain = {}, {}
  for checkpoint in sorted({cell["checkpoint"] for cell in dpo}):
    group = [cell for cell in dpo if cell["checkpoint"] == checkpoint]
    by_checkpoint[str(checkpoint)] = {
      "pairs": mean_interval([cell["pairs"] for cell in group]),
      **_curve(group),
    }
    errors = [[cell["curve"][i]["test"]["error"] for i in (0, -1)] for cell in group]
    gain[str(checkpoint)] = mean_interval([start - end for start, end in errors])
  return {
    "chance": 1 / degree,
    "seeds": len(sft),
    "base": base["test"],
    "sft": _curve(sft),
    "dpo": by_checkpoint,
    "gain": gain,
    "seconds": round(sum(cell["seconds"] for cell in cells), 1),
  }


def table(result: dict) -> str:
  """The curves as CSV: method, checkpoint, step, measure, mean, low, high."""
  text = io.StringIO()
  rows = csv.writer(text, lineterminator="\n")
  rows.writerow(["method", "checkpoint", "step", "measure", "mean", "low", "high"])
  for method, checkpoint, curve in [
    ("sft", "", result["sft"]),
    *(("dpo", at, curve) for at, curve in result["dpo"].items()),
  ]:
    for name, values in curve.items():
      if name not in ("step", "pairs"):
        rows.writerows(
          [method, checkpoint, step, name, *value]
          for step, value in zip(curve["step"], values, strict=True)
        )
  return text.getvalue()


def _line(axes, x, values, *, color: str, label: str, dash: str = "-") -> None:
  mean, low, high = np.array(values).T
  axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
  axes.plot(x, mean, dash, color=color, linewidth=1.6, label=label)


def draw(result: dict, under: Sequence[int], over: Sequence[int]) -> Figure:
  """Draws loss and critical token's Q of SFT and DPO (a), and DPO's test error (b, c).

  Args:
    result: from `collect`.
    under, over: checkpoints of (b) and (c); (a) shows DPO from the last of `under`.
  """
  with matplotlib.rc_context(figures.STYLE):
    figure = Figure(figsize=(7.0, 4.8), layout="constrained")
    (loss, value), (early, late) = figure.subplots(2, 2)
    sft, shown = result["sft"], under[-1]
    dpo = result["dpo"][str(shown)]
    x = [shown + step for step in dpo["step"]]
    for split, dash in (("train", "-"), ("test", "--")):
      _line(
        loss,
        sft["step"],
        sft[f"{split}/loss"],
        color=figures.ORANGE,
        label=f"SFT, {split}",
        dash=dash,
      )
      _line(
        value,
        sft["step"],
        sft[f"{split}/value"],
        color=figures.ORANGE,
        label=f"SFT, {split}",
        dash=dash,
      )
      _line(
        value,
        x,
        dpo[f"{split}/value"],
        color=figures.BLUE,
        label=f"DPO from {shown}, {split}",
        dash=dash,
      )
    _line(loss, x, dpo["dpo_loss"], color=figures.BLUE, label=f"DPO's loss from {shown}")
    for axes, checkpoints in ((early, under), (late, over)):
      for checkpoint, color in zip(checkpoints, _SHADES[0 if axes is early else 3 :], strict=False):
        curve = result["dpo"][str(checkpoint)]
        _line(
          axes, curve["step"], curve["test/error"], color=color, label=f"from SFT step {checkpoint}"
        )
      axes.set_ylabel("test error, greedy")
      axes.set_xlabel("DPO steps")
      axes.set_ylim(0, 1)
    for axes, level in (
      (value, result["chance"]),
      (early, 1 - result["chance"]),
      (late, 1 - result["chance"]),
    ):
      axes.axhline(level, color=figures.GREY, linewidth=1, linestyle=":")
      axes.annotate("chance", (1, level), xycoords=("axes fraction", "data"), xytext=(-2, 2),
      textcoords="offset points",
                    ha="right", fontsize=7)  # fmt: skip
    loss.set_ylabel("loss")
    loss.set_ylim(bottom=0)
    value.set_ylabel("mean Q of the critical token")
    value.set_ylim(0, 1)
    for axes, title in zip(
      (loss, value, early, late),
      ("a  loss", "a  credit", "b  under-trained", "c  over-trained"),
      strict=True,
    ):
      axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
      axes.grid(axis="y")
      axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
      axes.legend(frameon=False, fontsize=7)
    value.legend(frameon=False, fontsize=7, ncols=2, loc="lower left")  # below all curves
    for axes in (loss, value):
      axes.set_xlabel("steps")
    return figure


def draw_graph(
  arm_AL: Sequence[Sequence[int]],
  goal: int,
  policy_A: Sequence[float],
  q_A: Sequence[float] | None = None,
) -> Figure:
  """Draws a star graph, with the right arm in blue, and a policy at the first node of each arm.

  Args:
    arm_AL: nodes of every arm from the centre to its leaf.
    goal: index of the right arm.
    policy_A: π(first node | prompt, centre) of each arm.
    q_A: Q after the first node; None to omit it.
  """
  with matplotlib.rc_context(figures.STYLE):
    figure = Figure(figsize=(5.4, 0.4 + 0.75 * len(arm_AL)), layout="constrained")
    axes = figure.subplots()
    middle, last = (len(arm_AL) - 1) / 2, len(arm_AL[0]) - 1
    for arm, nodes in enumerate(arm_AL):
      color, y = (figures.BLUE if arm == goal else figures.GREY), len(arm_AL) - 1 - arm
      positions = [(0, middle), *((x, y) for x in range(1, last + 1))]
      for start, end in zip(positions, positions[1:], strict=False):
        axes.annotate(
          "",
          end,
          start,
          arrowprops={"arrowstyle": "-|>", "color": color, "shrinkA": 11, "shrinkB": 11},
        )
      for position, node in zip(positions[1:], nodes[1:], strict=True):
        axes.plot(
          *position, "o", markersize=20, color="white", markeredgecolor=color, markeredgewidth=1.6
        )
        axes.annotate(str(node), position, ha="center", va="center")
      text = f"π = {policy_A[arm]:.2f}" + (f", Q = {q_A[arm]:.2f}" if q_A is not None else "")
      axes.annotate(
        text, positions[1], (0, 14), textcoords="offset points", ha="center", fontsize=8
      )
      if arm == goal:
        axes.annotate(
          "goal", positions[-1], (16, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.plot(0, middle, "o", markersize=20, color=figures.GREY)
    axes.annotate(str(arm_AL[0][0]), (0, middle), ha="center", va="center", color="white")
    axes.set_xlim(-0.3, last + 0.5)
    axes.set_ylim(-0.4, len(arm_AL) - 0.4)
    axes.set_axis_off()
    return figure


def draw_cell(cell: dict, chance: float) -> Figure:
  """Draws one training run: loss, probability of the right critical node, and greedy test error.

  Args:
    cell: of SFT or DPO.
    chance: probability of the right critical node for a random arm.
  """
  points = cell["curve"]
  steps = [point["step"] for point in points]

  def values(split: str, name: str) -> list[float]:
    return [point[split][name] for point in points]

  ours = {"color": figures.BLUE, "linewidth": 1.6}
  with matplotlib.rc_context(figures.STYLE):
    figure = Figure(figsize=(7.0, 2.4), layout="constrained")
    loss, critical, error = figure.subplots(1, 3)
    if "dpo_loss" in points[0]:
      loss.plot(steps, [point["dpo_loss"] for point in points], **ours)
      loss.set_ylabel("DPO's loss, per pair")
    else:
      loss.plot(steps, values("train", "loss"), **ours)
      loss.plot(steps, values("test", "loss"), "--", **ours)
      loss.set_ylabel("SFT's loss, nats per token")
    critical.plot(steps, values("train", "critical"), label="training problems", **ours)
    critical.plot(steps, values("test", "critical"), "--", label="test problems", **ours)
    critical.set_ylabel("π(right critical node)")
    critical.legend(frameon=False, fontsize=7)
    error.plot(steps, values("test", "error"), "--", **ours)
    error.set_ylabel("test error, greedy")
    loss.set_ylim(bottom=0)
    for axes, level in ((critical, chance), (error, 1 - chance)):
      axes.set_ylim(0, 1)
      axes.axhline(level, color=figures.GREY, linewidth=1, linestyle=":")
      axes.annotate("chance", (1, level), xycoords=("axes fraction", "data"), xytext=(-2, -9),
      textcoords="offset points",
                    ha="right", fontsize=7)  # fmt: skip
    for axes in (loss, critical, error):
      axes.set_xlabel("steps")
      axes.grid(axis="y")
      axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def write(result: dict, folder: epath.PathLike, under: Sequence[int], over: Sequence[int]) -> None:
  """Writes star_graph.json, .csv, .png and .svg."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "star_graph.json").write_text(json.dumps(result, indent=1) + "\n")
  (folder / "star_graph.csv").write_text(table(result))
  figures.save(draw(result, under, over), folder / "star_graph")
