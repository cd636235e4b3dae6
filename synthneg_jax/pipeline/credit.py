"""Stage credit: counts of correct π_sft rollouts from the end of every step of a trace.

core/advantages.py turns these counts into step-level Q values.

All prefixes of a trace share one prefill of its prompt and tokens: a rollout is a branch that forks
at the end of a step. The last step needs no rollouts because its value is the trace's verdict.
Equal prefixes of a problem share their rollouts. `credit.schedule` (core/rollout_schedules.py)
selects the prefixes, in several rounds if the choice depends on earlier outcomes.
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

_SHARD = 256  # problems per shard
_SHARD_IN_BUDGET = 16  # the last shard's rollouts beyond the budget are discarded
_UNSEEN = Rollout([], False, "", "", 0.0, 0.0)  # graded and written by another process


def choose(group: Sequence[Trace], max_wrong: int, max_right: int) -> list[Trace]:
  """Selects the first distinct traces of one problem that have an answer, with limits.

  Args:
    group: the problem's traces.
    max_wrong, max_right: most traces with a wrong and with a right answer.
  """
  right = selection.keep_right([(trace.ids, trace.correct) for trace in group], max_right)
  wrong = pairs.negatives([(trace.ids, trace.reason) for trace in group], max_wrong)
  return [group[index] for index in sorted(right + wrong)]


@dataclasses.dataclass
class _Prefix:
  """The first `step` + 1 steps of a trace, with the rollouts that continue them.

  `trace` is the first trace of the problem with this prefix.
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


class _Request(NamedTuple):
  """`count` more rollouts from a prefix."""

  prefix: _Prefix
  count: int


def _prefixes(traces: Sequence[Trace]) -> dict[str, list[_Prefix]]:
  """Proper prefixes of one problem's traces, by trace id; equal prefixes are the same object."""
  unique, prefixes = {}, {}
  for trace in traces:
    hashes = [keys.hash_ids(trace.ids[:end]) for end in trace.step_ends[:-1]]
    prefixes[trace.id] = [
      unique.setdefault(h, _Prefix(trace, step, h)) for step, h in enumerate(hashes)
    ]
  return prefixes


def _requests(
  experiment: Experiment, prefixes: Mapping[str, Sequence[_Prefix]]
) -> dict[str, list[_Request]]:
  """The rollouts that the schedule wants next, by the id of the trace that holds their prefix.

  Args:
    experiment: gives schedule and number of rollouts.
    prefixes: by trace id, from `_prefixes`.
  """
  section = experiment.config.credit
  schedule = rollout_schedules.SCHEDULES[section.schedule]
  requests = {}
  for trace_prefixes in prefixes.values():
    successes = [prefix.successes for prefix in trace_prefixes]
    rollouts = [len(prefix.samples) for prefix in trace_prefixes]
    counts = schedule(successes, rollouts, section.num_rollouts)
    for prefix, count in zip(trace_prefixes, counts, strict=True):
      if prefix.key in requests:  # traces that share a prefix may ask for different counts
        count = max(count, requests[prefix.key].count)
      if count:
        requests[prefix.key] = _Request(prefix, count)
  by_trace = {}
  for request in requests.values():
    by_trace.setdefault(request.prefix.trace.id, []).append(request)
  return by_trace


class _Sampler(NamedTuple):
  """What generates and grades rollouts."""

  experiment: Experiment
  policy: Policy
  engine: Engine | RemoteEngine
  problems: Mapping[str, Problem]  # by id

  def graded(
    self, prefixes: Sequence[_Prefix], generations: Sequence[Generation], problem: Problem
  ) -> list[Rollout]:
    """Grades generations, each a continuation of its prefix, in one batch."""
    token_text, task = self.policy.token_text, self.experiment.config.task
    completions = [generation.ids.tolist() for generation in generations]
    texts = [
      token_text.text(prefix.trace.ids[: prefix.trace.step_ends[prefix.step]] + ids)
      for prefix, ids in zip(prefixes, completions, strict=True)
    ]
    verdicts = traces_lib.verdicts(
      self.experiment,
      self.policy,
      texts,
      [problem] * len(texts),
      [generation.finish_reason for generation in generations],
    )
    rollouts = []
    for generation, ids, verdict in zip(generations, completions, verdicts, strict=True):
      first_end = (steps.ends(ids, token_text, task) or [0])[0]
      step_logp, logp = (
        None if generation.logp is None else round(float(np.sum(generation.logp[:end])), 5)
        for end in (first_end, len(ids))
      )
      rollouts.append(
        Rollout(ids, verdict.correct, verdict.reason, generation.finish_reason, step_logp, logp)
      )
    return rollouts

  def run(
    self,
    requests: Mapping[str, Sequence[_Request]],
    prompts: Mapping[str, list[int]],
    *,
    longest: int,
  ) -> Iterator[str]:
    """Generates the requested rollouts, appends them to their prefixes, and yields finished traces.

    Each process grades the rollouts of the problems it owns. The processes exchange verdicts, which
    the schedule needs, and nothing else.

    Args:
      requests: by trace id.
      prompts: token ids by problem id.
      longest: tokens of the longest trunk in any round.

    Yields:
      The id of a trace once all its requested rollouts are generated.
    """
    config = self.experiment.config
    trunks, branches = [], []  # branches: per trunk, the (prefix, index of the rollout) of each
    number = {problem_id: number for number, problem_id in enumerate(self.problems)}
    for group in requests.values():
      trace = group[0].prefix.trace
      prompt = prompts[trace.problem_id]
      branches.append(
        [(prefix, len(prefix.samples) + n) for prefix, count in group for n in range(count)]
      )
      ends = [trace.step_ends[prefix.step] for prefix, _ in branches[-1]]
      draw_keys = [
        keys.draw_key(config.seed, "credit", 0, trace.problem_id, prefix.hash, index)
        for prefix, index in branches[-1]
      ]
      forks = [len(prompt) + end for end in ends]
      room = [max(config.model.max_length - fork, 1) for fork in forks]
      limits = [min(config.engine.max_new_tokens, most) for most in room]
      trunks.append(Trunk(prompt + trace.ids[: max(ends)], forks, np.stack(draw_keys), limits))
    verdicts, stopped = [], None
    try:
      for index, generations in self.engine.run(
        self.policy.params, trunks, sampling(config.credit), longest=longest
      ):
        prefixes = [prefix for prefix, _ in branches[index]]
        trace = prefixes[0].trace
        rollouts = [_UNSEEN] * len(generations)
        if distributed.owns(number[trace.problem_id]):
          rollouts = self.graded(prefixes, generations, self.problems[trace.problem_id])
          verdicts.append([index, [rollout.correct for rollout in rollouts]])
        for prefix, rollout in zip(prefixes, rollouts, strict=True):
          prefix.samples.append(rollout)
        yield trace.id
    except distributed.Stopped as stop:
      stopped = stop
    for index, all_correct in itertools.chain(*distributed.gather(verdicts)):
      for (prefix, n), correct in zip(branches[index], all_correct, strict=True):
        prefix.samples[n] = dataclasses.replace(prefix.samples[n], correct=correct)
    if stopped is not None:
      raise stopped


def _estimates(trace: Trace, prefixes: Sequence[_Prefix]) -> list[StepEstimate]:
  """The records of a trace, one per step."""
  records = []
  for step, end in enumerate(trace.step_ends):
    last = step == len(trace.step_ends) - 1
    prefix = _Prefix(trace, step, "") if last else prefixes[step]
    holds_samples = prefix.key == f"{trace.id}/{step}"
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
        samples=[dataclasses.asdict(s) for s in prefix.samples] if holds_samples else [],
        samples_at=prefix.key,
      )
    )
  return records


def _credit(
  sampler: _Sampler,
  chosen: Mapping[str, list[Trace]],
  shards: Shards,
  *,
  progress: Progress,
  budget: float = math.inf,
) -> int:
  """Generates and writes the rollouts of some problems, in as many rounds as the schedule needs.

  Args:
    sampler: generates the rollouts.
    chosen: traces by problem, in order.
    shards: receives the estimates.
    progress: advances by one per trace.
    budget: most rollouts; the problem that exceeds it is still written, later ones are not.

  Returns:
    The number of rollouts of the problems written, over all processes.

  Raises:
    Stopped: after SIGTERM; without a budget, finished problems are written first.
  """
  experiment, tokenizer = sampler.experiment, sampler.policy.tokenizer
  sampler = sampler._replace(problems={key: sampler.problems[key] for key in chosen})
  prompts = {
    key: train_policy.prompt_ids(experiment, tokenizer, problem)
    for key, problem in sampler.problems.items()
  }
  prefixes, longest = {}, 0
  for problem_id, traces in chosen.items():
    prefixes |= _prefixes(traces)
    for trace in traces:
      if len(trace.step_ends) > 1:
        longest = max(longest, len(prompts[problem_id]) + trace.step_ends[-2])
  open_traces, finished, stopped = prefixes, set(), None
  try:
    while requests := _requests(experiment, open_traces):
      for key in sampler.run(requests, prompts, longest=longest):
        if key not in finished and not _requests(experiment, {key: prefixes[key]}):
          finished.add(key)
          progress.update(1)
      requested = {request.prefix.key for group in requests.values() for request in group}
      open_traces = {
        key: trace_prefixes
        for key, trace_prefixes in open_traces.items()
        if any(prefix.key in requested for prefix in trace_prefixes)
      }
    progress.update(len(prefixes) - len(finished))
  except distributed.Stopped as stop:
    stopped = stop
  written, spent = [], 0
  for number, traces in enumerate(chosen.values()):
    if spent >= budget or (stopped is not None and budget < math.inf):
      break
    unique = {prefix.key: prefix for trace in traces for prefix in prefixes[trace.id]}
    spent += sum(len(prefix.samples) for prefix in unique.values())
    complete = not _requests(experiment, {trace.id: prefixes[trace.id] for trace in traces})
    if distributed.owns(number) and complete:
      written += traces
  shards.write(record for trace in written for record in _estimates(trace, prefixes[trace.id]))
  if stopped is not None:
    raise stopped
  return spent


def _work(
  experiment: Experiment,
  policy: Policy,
  problems: Mapping[str, Problem],
  chosen: Mapping[str, Sequence[Trace]],
) -> Work:
  """The first round of some problems; assumes that a rollout ends where its trace ends."""
  sizes, longest = [], 1
  for key, traces in chosen.items():
    prompt_size = len(train_policy.prompt_ids(experiment, policy.tokenizer, problems[key]))
    for group in _requests(experiment, _prefixes(traces)).values():
      group_sizes = []
      for prefix, count in group:
        end = prefix.trace.step_ends[prefix.step]
        group_sizes += [len(prefix.trace.ids) - end] * count
        longest = max(longest, prompt_size + end)
      sizes.append(group_sizes)
  return Work(sizes=sizes, longest=longest)


def _remote(experiment: Experiment, policy: Policy) -> RemoteEngine:
  """An engine whose rollouts come from credit.endpoint, a server that must hold the SFT policy."""
  distributed.require_single_process("Credit by rollouts of a server")
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
  """Writes credit/estimates/: a StepEstimate, with rollouts, per step of every chosen trace."""
  stage = experiment.stage(
    "credit", ["task", "model", "engine", "sample", "credit"], ["synthesize", "sft", "sample"]
  )
  if stage.done:
    return {}
  section, policy = experiment.config.credit, experiment.policy("sft")
  problems = experiment.problems("train")
  groups = by_problem(Shards(experiment.workdir / "sample" / "traces", Trace).read(), problems)
  shards = Shards(stage.folder / "estimates", StepEstimate)
  finished, spent = set(), 0
  for estimate in shards.read():
    finished.add(estimate.problem_id)
    spent += len(estimate.samples)
  chosen = {
    key: choose(group, section.max_wrong_per_problem, section.max_right_per_problem)
    for key, group in groups.items()
  }
  missing = [key for key in chosen if chosen[key] and key not in finished]
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
  sampler = _Sampler(experiment, policy, engine, problems)
  with Progress("credit", sum(len(chosen[key]) for key in missing), "traces") as progress:
    budget = section.max_rollouts or math.inf
    size = _SHARD if budget == math.inf else _SHARD_IN_BUDGET
    for start in range(0, len(missing), size):
      if spent >= budget:
        break
      part = {key: chosen[key] for key in missing[start : start + size]}
      spent += _credit(sampler, part, shards, progress=progress, budget=budget - spent)
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
    "slot_use": traces_lib.slot_use(engine),
  }
  credited = CreditedTraces(
    groups, {estimate.key: estimate for estimate in estimates}, section.best_of
  )
  tensorboard_summaries.credited(experiment, stage.folder, problems, credited)
  if section.endpoint.url:
    figures |= {name: engine.stats[name] for name in ("requests", "retokenised", "without_logp")}
  return stage.finish(figures, shards.files())
