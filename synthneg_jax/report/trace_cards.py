"""The section of the report that shows a few wrong traces in full, each step with its credit."""

import dataclasses
import urllib.parse
from collections.abc import Sequence

from synthneg_jax.report import markup


@dataclasses.dataclass(frozen=True)
class Step:
  """One step of a shown trace."""

  text: str
  rollouts: int  # from the end of the step; 0 where exact
  successes: int
  # 95 %, of the share of right rollouts; None without rollouts
  interval: tuple[float, float] | None
  q: float | None  # under Best-of-k; None where unknown
  advantage: float | None  # q minus q of the step before; None where either is unknown
  exact: bool  # the last step: q is the verdict


@dataclasses.dataclass(frozen=True)
class ShownTrace:
  """A wrong trace that is shown in full."""

  id: str
  problem: str
  gold: str
  extracted: str | None  # the answer that was graded
  reason: str  # of the verdict
  right_samples: int  # of the problem's traces
  samples: int
  v0: float  # value of the bare problem under Best-of-k
  steps: Sequence[Step]
  pit: int  # step from 0, -1 where there is none
  # what the per-step pair makes likelier than the pit; empty: no pair, None: not yet made
  preferred: str | None


def _step(step: Step, number: int, trace: ShownTrace, best_of: int) -> str:
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
  kind, tag = (
    (' class="pit"', ' <span class="tag">◀ pit</span>') if number == trace.pit else ("", "")
  )
  return (
    f'<li{kind}{style}><span class="text">{number + 1}. {markup.escape(step.text.strip())}</span>'
    f'<span class="credit">{credit}{tag}</span></li>'
  )


def _trace(trace: ShownTrace, number: int, best_of: int, pair_mode: str) -> str:
  graded = "none" if trace.extracted is None else trace.extracted
  start = f"{trace.right_samples} of {trace.samples} samples of the problem are right"
  value = f"{trace.v0:.3f}".removesuffix("0")  # eighths need the third decimal
  start += f" (value {value} under Best-of-{best_of})" if best_of > 1 else f" (value {value})"
  steps = "\n".join(_step(step, i, trace, best_of) for i, step in enumerate(trace.steps))
  what = (
    "this known solution to the trace up to and with its pit"
    if pair_mode in ("algorithm1", "prefix_protected")
    else "this to the pit; it is from a continuation of the same steps that came out right"
  )
  preferred = (
    '<p class="dim">The per-step pair prefers '
    f"{what}:</p><pre>{markup.escape(trace.preferred.strip())}</pre>"
    if trace.preferred
    else ""
  )
  if trace.pit >= 0 and trace.preferred == "":
    preferred = (
      '<p class="dim">This trace gave no per-step pair: nothing stood against the pit, or another '
      "trace had given the "
      "same pair, or its problem had given enough.</p>"
    )
  no_pit = "" if trace.pit >= 0 else ' <span class="dim">The rule finds no pit here.</span>'
  return (
    f"<article><h3>Trace {number} <a "
    f'href="traces.html#trace={urllib.parse.quote(trace.id, safe="")}" class="dim">'
    f"{markup.escape(trace.id)}</a></h3>"
    f"<pre>{markup.escape(trace.problem.strip())}</pre>"
    f"<p>Verdict: <b>{markup.escape(markup.REASONS.get(trace.reason, trace.reason))}</b>; answer "
    f"{markup.escape(graded)}, "
    f"gold answer {markup.escape(trace.gold)}. {start}.{no_pit}</p>"
    f'<ol class="steps">\n{steps}\n</ol>{preferred}</article>'
  )


def section(traces: Sequence[ShownTrace] | None, best_of: int, pair_mode: str) -> str:
  """The section of the report that shows them; None where there is no credit yet."""
  if traces is None:
    return markup.missing("Stage credit is not done: no step has been given credit yet.")
  if not traces:
    return markup.missing("There is no credited wrong trace to show.")
  whose = "those with a pit"
  if any(trace.pit < 0 for trace in traces):
    whose += ", then from those without"
  return (
    f"<p>Wrong traces of the SFT policy, taken at even distances from the list of {whose}, one a "
    "problem; "
    "they are not picked by hand. Each step shows how many rollouts from its end came out right, "
    "with the 95 % "
    "interval (Wilson) of that share, and its advantage. Colour: "
    '<span class="sample" style="background: rgba(var(--bad), 0.5)">the step lowers Q</span> '
    '<span class="sample" style="background: rgba(var(--good), 0.5)">the step raises Q</span>, the '
    "stronger the more."
    "</p>"
    + "\n".join(_trace(trace, i, best_of, pair_mode) for i, trace in enumerate(traces, start=1))
  )
