"""Figure 8 from its cells: curves over seeds with their intervals, as JSON, CSV, SVG and PNG.

Intervals are 95 % ones of a mean over seeds, by Student's t.
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

from synthneg_jax.analysis import figures
from synthneg_jax.analysis.credit_matters import save, summary

_SHADES = ("#9ecae9", "#3b86c8", "#1b4f87", "#d9772b", "#8f4513", "#4b2a10")  # checkpoints, the earliest first


def _curve(cells: Sequence[dict]) -> dict:
  """Every measure of these cells, one a seed: {"step": [...], "test/error": [[mean, low, high], ...], ...}."""
  points_RP = [cell["curve"] for cell in cells]
  found = {"step": [point["step"] for point in points_RP[0]]}
  for split in ("train", "test"):
    for name in points_RP[0][0][split]:
      found[f"{split}/{name}"] = summary([[point[split][name] for point in points] for points in points_RP])
  if "dpo_loss" in points_RP[0][0]:
    found["dpo_loss"] = summary([[point["dpo_loss"] for point in points] for points in points_RP])
  return found


def collect(cells: Sequence[dict], degree: int) -> dict:
  """What the figure shows.

  Args:
    cells: the base's, SFT's of every seed, DPO's of every seed and checkpoint. DPO of a checkpoint that leaves a seed without
      pairs, since nothing was sampled wrong, ends where it began: its curve goes on flat.
    degree: arms of a graph; chance is 1 / degree.

  Returns:
    {"chance", "seeds", "base", "sft": curve, "dpo": {checkpoint: {"pairs", **curve}}, "gain": {checkpoint: fall of the test
    error from the checkpoint to the end of DPO, paired by seed}, "seconds"}; [mean, low, high] wherever seeds are averaged.
  """
  base = next(cell for cell in cells if cell["cell"] == "base")
  sft = [cell for cell in cells if cell["cell"].startswith("sft_")]
  dpo = [cell for cell in cells if cell["cell"].startswith("dpo_")]
  longest = max((cell["curve"] for cell in dpo), key=len)
  for cell in dpo:
    cell["curve"] += [{**cell["curve"][-1], "step": point["step"]} for point in longest[len(cell["curve"]) :]]
  of, gain = {}, {}
  for checkpoint in sorted({cell["checkpoint"] for cell in dpo}):
    group = [cell for cell in dpo if cell["checkpoint"] == checkpoint]
    of[str(checkpoint)] = {"pairs": summary([cell["pairs"] for cell in group]), **_curve(group)}
    errors = [[cell["curve"][i]["test"]["error"] for i in (0, -1)] for cell in group]
    gain[str(checkpoint)] = summary([start - end for start, end in errors])
  return {
    "chance": 1 / degree,
    "seeds": len(sft),
    "base": base["test"],
    "sft": _curve(sft),
    "dpo": of,
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
          [method, checkpoint, step, name, *value] for step, value in zip(curve["step"], values, strict=True)
        )
  return text.getvalue()


def _line(axes, x, values, color: str, label: str | None = None, dash: str = "-") -> None:
  mean, low, high = np.array(values).T
  axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
  axes.plot(x, mean, dash, color=color, linewidth=1.6, label=label)


def draw(result: dict, under: Sequence[int], over: Sequence[int]) -> Figure:
  """Four panels: (a) SFT's and DPO's loss, and the critical token's Q; (b), (c) test error of DPO from its checkpoints.

  Args:
    result: as `collect` gives it.
    under, over: the checkpoints of (b) and of (c). (a) shows DPO from the last of `under`.
  """
  with matplotlib.rc_context(figures.STYLE):
    figure = Figure(figsize=(7.0, 4.8), layout="constrained")
    (loss, value), (early, late) = figure.subplots(2, 2)
    sft, shown = result["sft"], under[-1]
    dpo = result["dpo"][str(shown)]
    x = [shown + step for step in dpo["step"]]
    for split, dash in (("train", "-"), ("test", "--")):
      _line(loss, sft["step"], sft[f"{split}/loss"], figures.ORANGE, f"SFT, {split}", dash)
      _line(value, sft["step"], sft[f"{split}/value"], figures.ORANGE, f"SFT, {split}", dash)
      _line(value, x, dpo[f"{split}/value"], figures.BLUE, f"DPO from {shown}, {split}", dash)
    _line(loss, x, dpo["dpo_loss"], figures.BLUE, f"DPO's loss from {shown}")
    for axes, checkpoints in ((early, under), (late, over)):
      for checkpoint, color in zip(checkpoints, _SHADES[0 if axes is early else 3 :], strict=False):
        curve = result["dpo"][str(checkpoint)]
        _line(axes, curve["step"], curve["test/error"], color, f"from SFT step {checkpoint}")
      axes.set_ylabel("test error, greedy")
      axes.set_xlabel("DPO steps")
      axes.set_ylim(0, 1)
    for axes, level in ((value, result["chance"]), (early, 1 - result["chance"]), (late, 1 - result["chance"])):
      axes.axhline(level, color=figures.GREY, linewidth=1, linestyle=":")
      axes.annotate("chance", (1, level), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
                    ha="right", fontsize=7)  # fmt: skip
    loss.set_ylabel("loss")
    loss.set_ylim(bottom=0)
    value.set_ylabel("mean Q of the critical token")
    value.set_ylim(0, 1)
    for axes, title in zip(
      (loss, value, early, late), ("a  loss", "a  credit", "b  under-trained", "c  over-trained"), strict=True
    ):
      axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
      axes.grid(axis="y")
      axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
      axes.legend(frameon=False, fontsize=7)
    for axes in (loss, value):
      axes.set_xlabel("steps")
    return figure


def write(result: dict, folder: epath.PathLike, under: Sequence[int], over: Sequence[int]) -> None:
  """star_graph.json, star_graph.csv, star_graph.png and star_graph.svg."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "star_graph.json").write_text(json.dumps(result, indent=1) + "\n")
  (folder / "star_graph.csv").write_text(table(result))
  save(draw(result, under, over), folder / "star_graph")
