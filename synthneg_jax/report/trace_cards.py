"""The section of the report that shows a few wrong traces in full, with the credit of each step."""

import dataclasses
import urllib.parse
from collections.abc import Sequence

from synthneg_jax.report import markup


@dataclasses.dataclass(frozen=True)
class Step:
  """One step of a shown trace."""

  text: str
  rollouts: int  # from the end of the step; 0 if exact
  successes: int
  interval: tuple[float, float] | None  # 95 %, of the success rate; None without rollouts
  q: float | None  # under Best-of-k; None if unknown
  advantage: float | None  # q minus q of the step before; None if either is unknown
  exact: bool  # the last step: q is the verdict


@dataclasses.dataclass(frozen=True)
class ShownTrace:
  """A wrong trace shown in full."""

  id: str
  problem: str
  gold: str
  extracted: str | None  # the graded answer
  reason: str  # of the verdict
  right_samples: int  # among the problem's samples
  samples: int
  v0: float  # value of the bare problem under Best-of-k
  steps: Sequence[Step]
  pit: int  # step from 0; -1 for none
  preferred: str | None  # chosen branch of the per-step pair; "" for no pair, None if not yet made


def _step(step: Step, *, number: int, trace: ShownTrace, best_of: int) -> str:
  if step.exact:
    credit = f"Q = {step.q:.0f}, the verdict"
  elif step.rollouts:
    low, high = step.interval
    share = f"{step.successes / step.rollouts:.2f}"
    name = "right" if best_of > 1 else "Q"
    credit = f"{name} {step.successes}/{step.rollouts} = {share} ({low:.2f} – {high:.2f})"
    if best_of > 1:
      credit += f", Q {step.q:.2f}" if step.q is not None else ", Q unknown"
  else:
    credit = "no rollouts"
  style = ""
  if step.advantage is not None:
    change = f"{step.advantage:+.2f}".replace("-", "−")
    credit += f", advantage {change if change[1:] != '0.00' else '0.00'}"
    shade = round(0.55 * min(1.0, abs(step.advantage)), 3)
    style = f' style="background: rgba(var(--{"bad" if step.advantage < 0 else "good"}), {shade})"'
  is_pit = number == trace.pit
  kind = ' class="pit"' if is_pit else ""
  tag = ' <span class="tag">◀ pit</span>' if is_pit else ""
  return (
    f'<li{kind}{style}><span class="text">{number + 1}. {markup.escape(step.text.strip())}</span>'
    f'<span class="credit">{credit}{tag}</span></li>'
  )


def _trace(trace: ShownTrace, number: int, *, best_of: int, pair_mode: str) -> str:
  graded = "none" if trace.extracted is None else trace.extracted
  start = f"{trace.right_samples} of {trace.samples} samples of the problem are right"
  value = f"{trace.v0:.3f}".removesuffix("0")  # eighths need the third decimal
  start += f" (value {value} under Best-of-{best_of})" if best_of > 1 else f" (value {value})"
  steps = "\n".join(
    _step(step, number=i, trace=trace, best_of=best_of) for i, step in enumerate(trace.steps)
  )
  preferred = ""
  if trace.preferred:
    comparison = "this correct continuation of the same steps to the pit"
    if pair_mode in ("algorithm1", "prefix_protected"):
      comparison = "this known solution to the trace up to and including its pit"
    preferred = (
      f'<p class="dim">The per-step pair prefers {comparison}:</p>'
      f"<pre>{markup.escape(trace.preferred.strip())}</pre>"
    )
  elif trace.pit >= 0 and trace.preferred == "":
    preferred = (
      '<p class="dim">This trace gave no per-step pair: the pit has no correct alternative, '
      "another trace gave the same pair, or its problem reached the maximum number of pairs.</p>"
    )
  no_pit = "" if trace.pit >= 0 else ' <span class="dim">The rule finds no pit here.</span>'
  return (
    f"<article><h3>Trace {number} <a "
    f'href="traces.html#trace={urllib.parse.quote(trace.id, safe="")}" class="dim">'
    f"{markup.escape(trace.id)}</a></h3>"
    f"<pre>{markup.escape(trace.problem.strip())}</pre>"
    f"<p>Verdict: <b>{markup.escape(markup.REASONS.get(trace.reason, trace.reason))}</b>; answer "
    f"{markup.escape(graded)}, gold answer {markup.escape(trace.gold)}. {start}.{no_pit}</p>"
    f'<ol class="steps">\n{steps}\n</ol>{preferred}</article>'
  )


def section(traces: Sequence[ShownTrace] | None, best_of: int, pair_mode: str) -> str:
  """The section's HTML; `traces` is None before stage credit."""
  if traces is None:
    return markup.missing("Stage credit is not done: no step has credit yet.")
  if not traces:
    return markup.missing("No wrong trace has credit.")
  pool = "the wrong traces with a pit"
  if any(trace.pit < 0 for trace in traces):
    pool += ", then of those without"
  return (
    f"<p>An evenly spaced sample of {pool}, one per problem, from the SFT policy. Each step shows "
    "how many rollouts from its end are correct, the success rate with its 95 % interval (Wilson), "
    "and the advantage. Colour: "
    '<span class="sample" style="background: rgba(var(--bad), 0.5)">the step lowers Q</span> '
    '<span class="sample" style="background: rgba(var(--good), 0.5)">the step raises Q</span>; '
    "stronger colour means a larger change.</p>"
    + "\n".join(
      _trace(trace, i, best_of=best_of, pair_mode=pair_mode)
      for i, trace in enumerate(traces, start=1)
    )
  )
