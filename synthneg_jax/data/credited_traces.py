"""Traces with step-level credit, from the records of stages sample and credit.

Counts become values (core/advantages.py) and pits (core/pits.py) only here, so pairs, the RFT
filter, the report, the trace viewer and TensorBoard use the same Q, advantages and pits.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from etils import epath

from synthneg_jax.core import advantages, pits
from synthneg_jax.core.pairs import Count
from synthneg_jax.data.records import Shards, StepEstimate, Trace


def by_problem(traces: Iterable[Trace], order: Iterable[str] = ()) -> dict[str, list[Trace]]:
  """Groups traces by problem: problems in `order`, then the rest as they come; traces by index.

  The order of problems in shards depends on which process wrote them, so nothing derived from
  traces may depend on it.
  """
  groups = {key: [] for key in order}
  for trace in traces:
    groups.setdefault(trace.problem_id, []).append(trace)
  return {
    key: sorted(group, key=lambda trace: trace.index) for key, group in groups.items() if group
  }


@dataclasses.dataclass(frozen=True)
class CreditedTrace:
  """A trace with the credit of its S steps.

  Attributes:
    trace: the record.
    estimates: one per step.
    q: float32 [S], Q under Best-of-k after each step; 0 where unknown.
    known: bool [S], True for steps with at least k rollouts or an exact value.
    v0: V of the bare problem under Best-of-k.
    advantage: float32 [S].
    advantage_known: bool [S], True if Q is known both after and before the step.
  """

  trace: Trace
  estimates: Sequence[StepEstimate]
  q: np.ndarray
  known: np.ndarray
  v0: float
  advantage: np.ndarray
  advantage_known: np.ndarray


def pad(traces: Sequence[CreditedTrace]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Pads N traces to the longest: (q [N, S], known [N, S], False beyond a trace's end, v0 [N])."""
  width = max(len(credited.q) for credited in traces)
  q, known = np.zeros((len(traces), width), np.float32), np.zeros((len(traces), width), bool)
  for n, credited in enumerate(traces):
    q[n, : len(credited.q)], known[n, : len(credited.q)] = credited.q, credited.known
  return q, known, np.array([credited.v0 for credited in traces], np.float32)


def first_pits(traces: Sequence[CreditedTrace], section) -> list[int]:
  """The first pit of each wrong trace; -1 for none.

  Args:
    traces: wrong traces.
    section: the config's section `pairs`, with the rule.
  """
  if not traces:
    return []
  rule = functools.partial(
    pits.first_pit,
    rule=section.pit_rule,
    drop_ratio=section.drop_ratio,
    min_before=section.min_before,
  )
  return np.asarray(jax.jit(jax.vmap(rule))(*pad(traces))).tolist()


def spurious_steps(traces: Sequence[CreditedTrace], below: float) -> list[int]:
  """The spurious step (advantage less than `below`) of each right trace; -1 for none."""
  if not traces:
    return []
  rule = functools.partial(pits.spurious_step, below=below)
  return np.asarray(jax.jit(jax.vmap(rule))(*pad(traces))).tolist()


class CreditedTraces:
  """All sampled traces of a run and the credit of those that have any.

  Attributes:
    groups: every sampled trace, by problem.
    estimates: by key, "TRACE_ID/STEP".
    traces: traces with credit, in the order of `groups`.
    start: (right, all) samples of each problem, the estimate of V.
  """

  def __init__(
    self, groups: Mapping[str, Sequence[Trace]], estimates: Mapping[str, StepEstimate], best_of: int
  ):
    """
    Args:
      groups: as `by_problem` returns them.
      estimates: the records of stage credit, by key.
      best_of: k of Best-of-k; every problem has at least k samples.
    """
    self.groups, self.estimates = groups, estimates
    self.start = {
      key: (sum(trace.correct for trace in group), len(group)) for key, group in groups.items()
    }
    with_credit = {estimate.trace_id for estimate in estimates.values()}
    traces = [trace for group in groups.values() for trace in group if trace.id in with_credit]
    self.traces = self._with_values(traces, best_of) if traces else []

  @classmethod
  def load(cls, workdir: epath.Path, best_of: int, order: Iterable[str] = ()) -> "CreditedTraces":
    """Reads sample/traces/ and credit/estimates/ of a workdir; problems follow `order`."""
    groups = by_problem(Shards(workdir / "sample" / "traces", Trace).read(), order)
    return cls(groups, Shards(workdir / "credit" / "estimates", StepEstimate).read_dict(), best_of)

  @property
  def wrong(self) -> list[CreditedTrace]:
    """Wrong traces with credit."""
    return [credited for credited in self.traces if not credited.trace.correct]

  @property
  def right(self) -> list[CreditedTrace]:
    """Right traces with credit."""
    return [credited for credited in self.traces if credited.trace.correct]

  def count(self, trace: Trace, num_steps: int) -> Count:
    """The rollout counts behind Q after the first `num_steps` steps; those behind V for 0 steps."""
    if num_steps == 0:
      return Count(*self.start[trace.problem_id])
    estimate = self.estimates[f"{trace.id}/{num_steps - 1}"]
    return (
      Count(int(estimate.correct), 1, exact=True)
      if estimate.exact
      else Count(estimate.successes, estimate.rollouts)
    )

  def _with_values(self, traces: Sequence[Trace], best_of: int) -> list[CreditedTrace]:
    width = max(len(trace.step_ends) for trace in traces)
    successes, rollouts = np.zeros((2, len(traces), width), np.int32)
    exact = np.zeros((len(traces), width), bool)
    for n, trace in enumerate(traces):
      for step in range(len(trace.step_ends)):
        count = self.count(trace, step + 1)
        successes[n, step], rollouts[n, step] = count.successes, count.rollouts
        exact[n, step] = count.exact
    best_of_k = jax.jit(advantages.best_of_k, static_argnums=2)
    q, known = map(np.asarray, best_of_k(successes, rollouts, best_of, exact=exact))
    start = np.array([self.start[trace.problem_id] for trace in traces], np.int32)
    v0, v0_known = map(np.asarray, advantages.best_of_k(start[:, 0], start[:, 1], best_of))
    assert np.all(v0_known)  # config_schema.check_values: sample.num_traces >= best_of
    advantage = np.asarray(jax.jit(jax.vmap(advantages.step_advantages))(q, v0))
    advantage_known = known & np.concatenate([np.ones_like(known[:, :1]), known[:, :-1]], axis=1)
    credited = []
    for n, trace in enumerate(traces):
      steps = slice(len(trace.step_ends))
      estimates = [self.estimates[f"{trace.id}/{step}"] for step in range(len(trace.step_ends))]
      arrays = {
        "q": q[n, steps],
        "known": known[n, steps],
        "advantage": advantage[n, steps],
        "advantage_known": advantage_known[n, steps],
      }
      credited.append(CreditedTrace(trace, estimates, v0=float(v0[n]), **arrays))
    return credited
