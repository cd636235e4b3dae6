"""Sections of the report on training curves, the number of rollouts, and time by stage."""

import functools
from collections.abc import Mapping, Sequence

from synthneg_jax.report import figures, markup

# (panel's label, metric of docs/data.md -> name of its line)
_PANELS = (
  ("loss, nats a token", {"loss/per_token": "loss"}),
  ("loss, nats a pair", {"loss/per_pair": "loss"}),
  (
    "shift, nats a pair",
    {
      "chosen_shift/per_pair": "chosen",
      "rejected_shift/per_pair": "rejected",
      "margin/per_pair": "margin",
    },
  ),
  ("accuracy", {"accuracy/per_pair": "margin above 0"}),
)


def smoothed(values: Sequence[float], width: int) -> list[float]:
  """Running means over `width` values, fewer at the ends."""
  half = width // 2
  means = []
  for i in range(len(values)):
    window = values[max(0, i - half) : i + half + 1]
    means.append(sum(window) / len(window))
  return means


def _width(rows: Sequence[Mapping[str, float]]) -> int:
  """The number of updates in a running mean; odd."""
  return max(1, len(rows) // 25) | 1


def training_figure(rows: Sequence[Mapping[str, float]]) -> figures.Figure:
  """Loss by update and, for preference losses, shifts and accuracy.

  Args:
    rows: metrics of each update, at least one, with "step".
  """
  panels = []
  for title, metrics in _PANELS:
    lines = {
      name: [row[metric] for row in rows] for metric, name in metrics.items() if metric in rows[0]
    }
    if lines:
      panels.append((title, lines))
  smooth = functools.partial(smoothed, width=_width(rows))
  return figures.curves([int(row["step"]) for row in rows], panels, smooth)


def curves(
  training: Mapping[str, tuple[str, Sequence[Mapping[str, float]]]], folder: markup.Folder
) -> str:
  """The figures of all training stages.

  Args:
    training: stage -> (its label, the metrics of each update, with "step").
    folder: receives the figures.
  """
  drawn = []
  for stage, (label, rows) in training.items():
    if not rows:
      continue
    steps, width = [int(row["step"]) for row in rows], _width(rows)
    names = [name for name in rows[0] if name != "step"]
    numbers = [
      (step, *(row.get(name, "") for name in names)) for step, row in zip(steps, rows, strict=True)
    ]
    drawn.append(
      folder.add(
        f"training_{stage.rpartition('/')[2]}",
        training_figure(rows),
        ("step", *names),
        numbers,
        label=f"Training of {label}",
        caption=(
          f"{markup.escape(label)}, {len(rows)} updates. Thin: each update's batch; thick: running "
          f"mean over {width} updates."
        ),
      )
    )
  if not drawn:
    return markup.missing("No policy has been trained yet.")
  note = ""
  if any("dpo" in stage and rows for stage, (_, rows) in training.items()):
    note = (
      "<p>The shift of a branch is its log p under the policy minus its log p under the SFT "
      "policy; the margin is chosen shift − rejected shift.</p>"
    )
  return f'{note}<div class="figures">{"".join(drawn)}</div>'


def rollouts_and_time(
  stages: Mapping[str, Mapping[str, object]], num_rollouts: int, folder: markup.Folder
) -> tuple[str, str]:
  """Numbers of samples and rollouts as text, and the time of each stage as a figure.

  Args:
    stages: finished stage -> its figures.
    num_rollouts: credit.num_rollouts, per prefix.
    folder: receives the figure.
  """
  rows, lines = [], []
  if "sample" in stages:
    sample = stages["sample"]
    lines.append(
      f"{_count(sample['traces'])} traces were sampled for training ({_count(sample['tokens'])} "
      "tokens)."
    )
  if "credit" in stages:
    credit = stages["credit"]
    inner = credit["steps"] - credit["traces"]
    lines.append(
      f"{_count(credit['traces'])} traces with {_count(credit['steps'])} steps got credit; last "
      f"steps need no rollouts. {num_rollouts} rollouts from each of the other {_count(inner)} "
      f"steps would be {_count(inner * num_rollouts)}; {_count(credit['rollouts'])} were drawn "
      f"({_count(credit['rollout_tokens'])} tokens), because equal prefixes of a problem share "
      "rollouts and a schedule may skip some."
    )
  for stage, reported in stages.items():
    drawn = reported.get("rollouts", reported.get("traces", reported.get("num_problems", "")))
    tokens = reported.get("rollout_tokens", reported.get("tokens", ""))
    if not tokens and "mean_tokens" in reported:
      tokens = round(reported["mean_tokens"] * reported["num_problems"])
    rows.append((stage, reported["seconds"], drawn, tokens))
  if not rows:
    return markup.missing("No stage is done yet."), ""
  figure = folder.add(
    "time",
    figures.times([row[0] for row in rows], [row[1] for row in rows]),
    ("stage", "seconds", "responses_drawn", "tokens_drawn"),
    rows,
    label="Time by stage",
    caption="Seconds of the process that finished each stage.",
  )
  return f"<p>{' '.join(lines)}</p>" if lines else "", figure


def _count(value: int) -> str:
  return f"{value:,}".replace(",", "\u202f")
