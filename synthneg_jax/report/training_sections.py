"""Sections of the report on training and on what it cost: curves by update, the rollout bill, and
time by stage.
"""

from collections.abc import Mapping, Sequence

from synthneg_jax.report import figures, markup

# panel's label -> metrics drawn in it, each with the name of its line; as docs/data.md names them
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
  """Means over `width` values around each, fewer at the ends."""
  half = width // 2
  windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
  return [sum(window) / len(window) for window in windows]


def _width(rows: Sequence[Mapping[str, float]]) -> int:
  """How many updates the thick line is a mean of."""
  return max(1, len(rows) // 25) | 1


def training_figure(rows: Sequence[Mapping[str, float]]) -> figures.Figure:
  """What was measured at each update of a training stage: loss, and of a preference loss shifts and
  accuracy.

  Args:
    rows: metrics of each update, at least one, "step" among them.
  """
  panels = []
  for title, lines in _PANELS:
    there = {
      name: [row[metric] for row in rows] for metric, name in lines.items() if metric in rows[0]
    }
    if there:
      panels.append((title, there))
  return figures.curves(
    [int(row["step"]) for row in rows], panels, lambda values: smoothed(values, _width(rows))
  )


def curves(
  training: Mapping[str, tuple[str, Sequence[Mapping[str, float]]]], folder: markup.Folder
) -> str:
  """Figures of what was measured at each update.

  Args:
    training: stage -> (its label, a mapping of metrics an update, "step" among them).
    folder: takes the figures.
  """
  made = []
  for stage, (label, rows) in training.items():
    if not rows:
      continue
    steps, width = [int(row["step"]) for row in rows], _width(rows)
    names = [name for name in rows[0] if name != "step"]
    made.append(
      folder.add(
        f"training_{stage.rpartition('/')[2]}",
        training_figure(rows),
        ("step", *names),
        [
          (step, *(row.get(name, "") for name in names))
          for step, row in zip(steps, rows, strict=True)
        ],
        f"Training of {label}",
        f"{markup.escape(label)}, {len(rows)} updates: thin, each update's batch; thick, the mean "
        f"of {width} updates "
        "around it.",
      )
    )
  if not made:
    return markup.missing("No policy has been trained yet.")
  note = (
    "<p>A shift is log p of a branch under the policy minus that under the SFT policy; the margin "
    "is chosen shift − "
    "rejected shift.</p>"
    if any("dpo" in stage and rows for stage, (_, rows) in training.items())
    else ""
  )
  return f'{note}<div class="figures">{"".join(made)}</div>'


def bill(
  found: Mapping[str, Mapping[str, object]], num_rollouts: int, folder: markup.Folder
) -> tuple[str, str]:
  """What was drawn from models as text, and the time of each stage as a figure.

  Args:
    found: finished stage -> what it reported.
    num_rollouts: credit.num_rollouts, from each prefix.
    folder: takes the figure.
  """
  rows, lines = [], []
  if "sample" in found:
    sample = found["sample"]
    lines.append(
      f"{_count(sample['traces'])} traces were sampled for training ({_count(sample['tokens'])} "
      "tokens)."
    )
  if "credit" in found:
    credit = found["credit"]
    inner = credit["steps"] - credit["traces"]
    lines.append(
      f"{_count(credit['traces'])} traces got credit, with {_count(credit['steps'])} steps; the "
      "last step of each needs no "
      f"rollout. {num_rollouts} rollouts from each of the other {_count(inner)} would be "
      f"{_count(inner * num_rollouts)}; "
      f"{_count(credit['rollouts'])} were drawn ({_count(credit['rollout_tokens'])} tokens): equal "
      "prefixes of a problem "
      "share theirs, and a schedule may leave some out."
    )
  for stage, figures_ in found.items():
    drawn = figures_.get("rollouts", figures_.get("traces", figures_.get("num_problems", "")))
    tokens = figures_.get("rollout_tokens", figures_.get("tokens", ""))
    if not tokens and "mean_tokens" in figures_:
      tokens = round(figures_["mean_tokens"] * figures_["num_problems"])
    rows.append((stage, figures_["seconds"], drawn, tokens))
  if not rows:
    return markup.missing("No stage is done yet."), ""
  figure = folder.add(
    "time",
    figures.times([row[0] for row in rows], [row[1] for row in rows]),
    ("stage", "seconds", "responses_drawn", "tokens_drawn"),
    rows,
    "Time by stage",
    "Seconds of the process that finished each stage.",
  )
  return f"<p>{' '.join(lines)}</p>" if lines else "", figure


def _count(value: int) -> str:
  return f"{value:,}".replace(",", "\u202f")
