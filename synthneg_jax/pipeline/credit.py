"""Stage credit: step-level Q. From every step's prefix of a trace, rollouts of π_sft, counted right
or not.

Counts become values in core/advantages.py.

One prefill of prompt and trace serves all its prefixes: a rollout is a branch that forks at a
step's end. The last step has no rollouts: its value is the trace's verdict. Equal prefixes of a
problem are estimated once. Which prefixes get rollouts is credit.schedule's to say
(core/rollout_schedules.py), round by round where it depends on what came out.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from synthneg_jax.core import pairs, rollout_schedules, selection
from synthneg_jax.data import steps
from synthneg_jax.data.credited_traces import CreditedTraces, by_problem
from synthneg_jax.data.records import Problem, Rollout, Shards, StepEstimate, Trace
from synthneg_jax.decoding.engine import Engine, Generation, Trunk, Work
from synthneg_jax.decoding.policy import Policy
from synthneg_jax.decoding.remote import Codec, RemoteEngine
from synthneg_jax.pipeline import tensorboard_summaries, train_policy
from synthneg_jax.pipeline import traces as traces_lib
from synthneg_jax.pipeline.experiment import Experiment, sampling
from synthneg_jax.runtime import distributed, keys
from synthneg_jax.runtime.progress import Progress

_SHARD = 256  # problems a shard
_SHARD_IN_BUDGET = 16  # where the last shard's rollouts beyond the budget are thrown away
# a rollout that another process grades and writes
_OF_OTHERS = Rollout([], False, "", "", 0.0, 0.0)


def choose(group: Sequence[Trace], max_wrong: int, max_right: int) -> list[Trace]:
  """Selects traces of one problem for credit: distinct, with an answer, first of each verdict."""
  right = selection.keep_right([(trace.ids, trace.correct) for trace in group], max_right)
  wrong = pairs.negatives([(trace.ids, trace.reason) for trace in group], max_wrong)
  return [group[index] for index in sorted(right + wrong)]


@dataclasses.dataclass
class _Prefix:
  """The first `steps` + 1 steps of a trace, the first of its problem that begins so, with the
  rollouts made from there.
  """

  trace: Trace
  step: int
  hash: str
  samples: list[Rollout] = dataclasses.field(default_factory=list)

  @property
  def key(self) -> str:
    return f"{self.trace.id}/{self.step}"

  @property
  def successes(self) -> int:
    return sum(sample.correct for sample in self.samples)


def _prefixes(traces: Sequence[Trace]) -> dict[str, list[_Prefix]]:
  """For each trace of one problem its prefixes but the whole; equal ones are the same object."""
  known, of_trace = {}, {}
  for trace in traces:
    hashes = [keys.hash_ids(trace.ids[:end]) for end in trace.step_ends[:-1]]
    of_trace[trace.id] = [
      known.setdefault(h, _Prefix(trace, step, h)) for step, h in enumerate(hashes)
    ]
  return of_trace


def _wanted(
  experiment: Experiment, of_trace: dict[str, list[_Prefix]]
) -> dict[str, list[tuple[_Prefix, int]]]:
  """By the trace that holds them: prefixes and how many more rollouts the schedule wants from each,
  now.
  """
  section = experiment.config.credit
  schedule = rollout_schedules.SCHEDULES[section.schedule]
  more = {}
  for prefixes in of_trace.values():
    successes, rollouts = [p.successes for p in prefixes], [len(p.samples) for p in prefixes]
    for prefix, count in zip(
      prefixes, schedule(successes, rollouts, section.num_rollouts), strict=True
    ):
      if count:
        more[prefix.key] = prefix, max(count, more.get(prefix.key, (None, 0))[1])
  holders = {}
  for prefix, count in more.values():
    holders.setdefault(prefix.trace.id, []).append((prefix, count))
  return holders


class _Resources(NamedTuple):
  """What rolling out takes besides traces."""

  experiment: Experiment
  policy: Policy
  engine: Engine | RemoteEngine
  problems: Mapping[str, Problem]  # those at hand, by id


def _rollouts(
  given: _Resources, prefixes: Sequence[_Prefix], made: Sequence[Generation], problem: Problem
) -> Iterator[Rollout]:
  """The rollouts grown from these prefixes of one problem's traces, graded all at once."""
  experiment, policy = given.experiment, given.policy
  ids = [one.ids.tolist() for one in made]
  wholes = [
    p.trace.ids[: p.trace.step_ends[p.step]] + grown for p, grown in zip(prefixes, ids, strict=True)
  ]
  texts = [policy.token_text.text(whole) for whole in wholes]
  graded = traces_lib.verdicts(
    experiment, policy, texts, [problem] * len(texts), [one.finish for one in made]
  )
  for one, grown, verdict in zip(made, ids, graded, strict=True):
    first = (steps.ends(grown, policy.token_text, experiment.config.task) or [0])[0]
    logps = [
      None if one.logp is None else round(float(np.sum(one.logp[:end])), 5)
      for end in (first, len(grown))
    ]
    yield Rollout(grown, verdict.correct, verdict.reason, one.finish, *logps)


def _roll_out(
  given: _Resources,
  wanted: Mapping[str, list[tuple[_Prefix, int]]],
  prompts: Mapping[str, list[int]],
  *,
  longest: int,
) -> Iterator[str]:
  """One round of the engine: adds the rollouts to their prefixes, and yields the id of each trace
  whose own are there.

  Of several processes each grades the rollouts of its problems; in the end all know which came out
  right, which the schedule asks for, and nothing more of the others' rollouts.
  """
  section, seed = given.experiment.config.credit, given.experiment.config.seed
  trunks, items = [], []
  number_of = {key: number for number, key in enumerate(given.problems)}
  for group in wanted.values():
    trace = group[0][0].trace
    prompt = prompts[trace.problem_id]
    places = [(prefix, len(prefix.samples) + n) for prefix, count in group for n in range(count)]
    ends = [trace.step_ends[prefix.step] for prefix, _ in places]
    draw_keys = [
      keys.draw_key(seed, "credit", 0, trace.problem_id, prefix.hash, index)
      for prefix, index in places
    ]
    trunks.append(
      Trunk(
        prompt + trace.ids[: max(ends)], [len(prompt) + end for end in ends], np.stack(draw_keys)
      )
    )
    items.append(places)
  graded, stopped = [], None
  try:
    for index, generations in given.engine.run(
      given.policy.params, trunks, sampling(section), longest=longest
    ):
      problem = given.problems[items[index][0][0].trace.problem_id]
      made = [_OF_OTHERS] * len(generations)
      if distributed.mine(number_of[problem.id]):
        made = list(_rollouts(given, [prefix for prefix, _ in items[index]], generations, problem))
        graded.append([index, [rollout.correct for rollout in made]])
      for (prefix, _), rollout in zip(items[index], made, strict=True):
        prefix.samples.append(rollout)
      yield items[index][0][0].trace.id
  except distributed.Stopped as stop:
    stopped = stop
  for index, verdicts in itertools.chain(*distributed.gather(graded)):
    for (prefix, place), correct in zip(items[index], verdicts, strict=True):
      prefix.samples[place] = dataclasses.replace(prefix.samples[place], correct=correct)
  if stopped is not None:
    raise stopped


def _estimates(trace: Trace, prefixes: Sequence[_Prefix]) -> list[StepEstimate]:
  records = []
  for step, end in enumerate(trace.step_ends):
    key, last = f"{trace.id}/{step}", step == len(trace.step_ends) - 1
    prefix = _Prefix(trace, step, "") if last else prefixes[step]
    records.append(
      StepEstimate(
        trace_id=trace.id,
        problem_id=trace.problem_id,
        step=step,
        prefix_end=end,
        rollouts=len(prefix.samples),
        successes=prefix.successes,
        exact=last,
        correct=last and trace.correct,
        samples=[dataclasses.asdict(sample) for sample in prefix.samples]
        if prefix.key == key
        else [],
        samples_at=prefix.key,
      )
    )
  return records


def _credit(
  given: _Resources,
  chosen: dict[str, list[Trace]],
  shards: Shards,
  progress: Progress,
  left: float = math.inf,
) -> int:
  """Writes the estimates of the chosen traces of some problems, made in as many rounds as the
  schedule takes.

  Args:
    given: what rolling out takes.
    chosen: traces by problem, in their order.
    shards: where estimates go.
    progress: told of every trace.
    left: rollouts of the budget; a problem is written if those before it took fewer.

  Returns:
    The rollouts of the problems written, by all processes.

  Raises:
    Stopped: SIGTERM came; without a budget the problems that were finished by then are written.
  """
  experiment, tokenizer = given.experiment, given.policy.tokenizer
  given = given._replace(problems={key: given.problems[key] for key in chosen})
  prompts = {
    key: train_policy.prompt_ids(experiment, tokenizer, problem)
    for key, problem in given.problems.items()
  }
  of_trace = {
    key: prefixes for traces in chosen.values() for key, prefixes in _prefixes(traces).items()
  }
  longest = max(
    (
      len(prompts[t.problem_id]) + t.step_ends[-2]
      for t in itertools.chain(*chosen.values())
      if t.step_ends[1:]
    ),
    default=0,
  )
  open_traces, said, stopped = of_trace, set(), None
  try:
    while wanted := _wanted(experiment, open_traces):
      for key in _roll_out(given, wanted, prompts, longest=longest):
        if key not in said and not _wanted(experiment, {key: of_trace[key]}):
          said.add(key)
          progress.update(1)
      busy = {prefix.key for group in wanted.values() for prefix, _ in group}
      open_traces = {
        key: prefixes
        for key, prefixes in open_traces.items()
        if any(p.key in busy for p in prefixes)
      }
    progress.update(len(of_trace) - len(said))
  except distributed.Stopped as stop:
    stopped = stop
  within, spent = set(), 0
  for key, traces in chosen.items():
    if spent < left and (stopped is None or left == math.inf):
      within.add(key)
      own = {prefix.key: len(prefix.samples) for trace in traces for prefix in of_trace[trace.id]}
      spent += sum(own.values())
  shards.write(
    record
    for number, (problem_id, traces) in enumerate(chosen.items())
    if problem_id in within
    and distributed.mine(number)
    and not _wanted(experiment, {trace.id: of_trace[trace.id] for trace in traces})
    for trace in traces
    for record in _estimates(trace, of_trace[trace.id])
  )
  if stopped is not None:
    raise stopped
  return spent


def _work(
  experiment: Experiment,
  policy: Policy,
  problems: Mapping[str, Problem],
  chosen: Mapping[str, Sequence[Trace]],
) -> Work:
  """The first round of some problems: a rollout is expected to end as far on as the trace that it
  leaves.
  """
  sizes, longest = [], 1
  for key, traces in chosen.items():
    prompt = len(train_policy.prompt_ids(experiment, policy.tokenizer, problems[key]))
    for group in _wanted(experiment, _prefixes(traces)).values():
      places = [(len(p.trace.ids), p.trace.step_ends[p.step], count) for p, count in group]
      sizes.append([size - end for size, end, count in places for _ in range(count)])
      longest = max(longest, *(prompt + end for _, end, _ in places))
  return Work(sizes=sizes, longest=longest)


def _remote(experiment: Experiment, policy: Policy) -> RemoteEngine:
  """The server of credit.endpoint, which is to hold the SFT policy, as the engine."""
  distributed.alone("Credit by rollouts of a server")
  c, tokenizer = experiment.config, policy.tokenizer
  return RemoteEngine(
    c.credit.endpoint,
    Codec(
      policy.eos_ids,
      encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
      decode=lambda ids: policy.token_text.text(ids, special=True),
    ),
    stop=c.engine.stop,
    max_new_tokens=c.engine.max_new_tokens,
    send_ids=c.credit.send_token_ids,
  )


def run(experiment: Experiment) -> dict:
  """Writes credit/estimates/: one StepEstimate a step of every chosen trace, with its rollouts."""
  stage = experiment.stage(
    "credit", ["task", "model", "engine", "sample", "credit"], ["synthesize", "sft", "sample"]
  )
  if stage.done:
    return {}
  section, policy = experiment.config.credit, experiment.policy("sft")
  problems = experiment.problems("train")
  groups = by_problem(Shards(experiment.workdir / "sample" / "traces", Trace).read(), problems)
  shards = Shards(stage.folder / "estimates", StepEstimate)
  there, spent = set(), 0
  for estimate in shards.read():
    there.add(estimate.problem_id)
    spent += len(estimate.samples)
  chosen = {
    key: choose(group, section.max_wrong_per_problem, section.max_right_per_problem)
    for key, group in groups.items()
  }
  missing = [key for key in chosen if chosen[key] and key not in there]
  first = {key: chosen[key] for key in missing[:_SHARD]}
  engine = (
    _remote(experiment, policy)
    if section.endpoint.url
    else experiment.engine(
      policy,
      lambda: _work(experiment, policy, problems, first),
      lanes=section.lanes,
      slots=section.slots,
      stage=stage,
    )
  )
  given = _Resources(experiment, policy, engine, problems)
  with Progress("credit", sum(len(chosen[key]) for key in missing), "traces") as progress:
    budget = section.max_rollouts or math.inf
    size = _SHARD if budget == math.inf else _SHARD_IN_BUDGET
    for start in range(0, len(missing), size):
      if spent >= budget:
        break
      part = {key: chosen[key] for key in missing[start : start + size]}
      spent += _credit(given, part, shards, progress, budget - spent)
  distributed.barrier()
  estimates = list(shards.read())
  figures = {
    "traces": len({estimate.trace_id for estimate in estimates}),
    "steps": len(estimates),
    "rollouts": sum(len(estimate.samples) for estimate in estimates),
    "shared_prefixes": sum(estimate.samples_at != estimate.key for estimate in estimates),
    "rollout_tokens": sum(
      len(sample["ids"]) for estimate in estimates for sample in estimate.samples
    ),
    "slot_use": round(engine.stats["busy_slots"] / max(engine.stats["slots"], 1), 3),
  }
  credited = CreditedTraces(
    groups, {estimate.key: estimate for estimate in estimates}, section.best_of
  )
  tensorboard_summaries.credited(experiment, stage.folder, problems, credited)
  if section.endpoint.url:
    figures |= {name: engine.stats[name] for name in ("requests", "retokenised", "without_logp")}
  return stage.finish(figures, shards.files())
