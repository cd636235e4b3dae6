"""Stage credit: step-level Q. From every step's prefix of a trace, rollouts of π_sft, counted right or not.

One prefill of prompt and trace serves all its prefixes: a rollout is a branch that forks at a step's end. The last step
has no rollouts: its value is the trace's verdict. Equal prefixes of a problem are estimated once. Which prefixes get
rollouts is credit.schedule's to say (rollouts/schedules.py), round by round where it depends on what came out.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from synthneg_jax.core import pairs, selection
from synthneg_jax.rollouts import schedules
from synthneg_jax.rollouts.engine import Trunk
from synthneg_jax.rollouts.remote import RemoteEngine
from synthneg_jax.runtime import keys
from synthneg_jax.runtime.progress import Progress
from synthneg_jax.runtime.records import Problem, Rollout, Shards, StepEstimate, Trace
from synthneg_jax.stages import traces as traces_lib
from synthneg_jax.stages import training
from synthneg_jax.stages.policies import Policy
from synthneg_jax.stages.run import Run, sampling
from synthneg_jax.tasks import steps

_SHARD = 256  # problems a shard


def choose(group: Sequence[Trace], max_wrong: int, max_right: int) -> list[Trace]:
  """The traces of one problem that get credit: distinct, with an answer, the first of each verdict."""
  right = selection.keep_right([(trace.ids, trace.correct) for trace in group], max_right)
  wrong = pairs.negatives([(trace.ids, trace.reason) for trace in group], max_wrong)
  return [group[index] for index in sorted(right + wrong)]


@dataclasses.dataclass
class _Prefix:
  """The first `steps` + 1 steps of a trace, the first of its problem that begins so, with the rollouts made from there."""

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
    of_trace[trace.id] = [known.setdefault(h, _Prefix(trace, step, h)) for step, h in enumerate(hashes)]
  return of_trace


def _wanted(run_: Run, of_trace: dict[str, list[_Prefix]]) -> dict[str, list[tuple[_Prefix, int]]]:
  """By the trace that holds them: prefixes and how many more rollouts the schedule wants from each, now."""
  section = run_.config.credit
  schedule = schedules.SCHEDULES[section.schedule]
  more = {}
  for prefixes in of_trace.values():
    successes, rollouts = [p.successes for p in prefixes], [len(p.samples) for p in prefixes]
    for prefix, count in zip(prefixes, schedule(successes, rollouts, section.num_rollouts), strict=True):
      if count:
        more[prefix.key] = prefix, max(count, more.get(prefix.key, (None, 0))[1])
  holders = {}
  for prefix, count in more.values():
    holders.setdefault(prefix.trace.id, []).append((prefix, count))
  return holders


def _roll_out(run_: Run, policy: Policy, engine, wanted, prompts, answers, longest: int) -> Iterator[str]:
  """One round of the engine: adds the rollouts to their prefixes, and yields the id of each trace whose own are there."""
  section, trunks, items = run_.config.credit, [], []
  for group in wanted.values():
    trace = group[0][0].trace
    prompt = prompts[trace.problem_id]
    places = [(prefix, len(prefix.samples) + n) for prefix, count in group for n in range(count)]
    ends = [trace.step_ends[prefix.step] for prefix, _ in places]
    draw_keys = [
      keys.draw_key(run_.config.seed, "credit", 0, trace.problem_id, prefix.hash, index) for prefix, index in places
    ]
    trunks.append(Trunk(prompt + trace.ids[: max(ends)], [len(prompt) + end for end in ends], np.stack(draw_keys)))
    items.append(places)
  for index, generations in engine.run(policy.params, trunks, sampling(section), longest):
    texts = [
      policy.token_text.text(prefix.trace.ids[: prefix.trace.step_ends[prefix.step]] + generation.ids.tolist())
      for (prefix, _), generation in zip(items[index], generations, strict=True)
    ]
    golds = [answers[prefix.trace.problem_id] for prefix, _ in items[index]]
    verdicts = traces_lib.verdicts(run_, texts, golds, [generation.finish for generation in generations])
    for (prefix, _), generation, graded in zip(items[index], generations, verdicts, strict=True):
      ids = generation.ids.tolist()
      first = (steps.ends(ids, policy.token_text, run_.config.task) or [0])[0]
      logp = [
        None if generation.logp is None else round(float(np.sum(generation.logp[:end])), 5) for end in (first, len(ids))
      ]
      prefix.samples.append(Rollout(ids, graded.correct, graded.reason, generation.finish, *logp))
    yield items[index][0][0].trace.id


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
        samples=[dataclasses.asdict(sample) for sample in prefix.samples] if prefix.key == key else [],
        samples_at=prefix.key,
      )
    )
  return records


def _credit(run_: Run, policy: Policy, engine, problems: Sequence[Problem], groups, progress) -> list[StepEstimate]:
  """Estimates of all chosen traces of some problems, in as many rounds of the engine as the schedule takes."""
  section = run_.config.credit
  chosen = {
    problem.id: choose(groups.get(problem.id, []), section.max_wrong_per_problem, section.max_right_per_problem)
    for problem in problems
  }
  prompts = {problem.id: training.prompt_ids(run_, policy, problem) for problem in problems}
  answers = {problem.id: problem.answer for problem in problems}
  of_trace = {key: prefixes for traces in chosen.values() for key, prefixes in _prefixes(traces).items()}
  longest = max(
    (len(prompts[t.problem_id]) + t.step_ends[-2] for t in itertools.chain(*chosen.values()) if t.step_ends[1:]),
    default=0,
  )
  open_traces, said = of_trace, set()
  while wanted := _wanted(run_, open_traces):
    for key in _roll_out(run_, policy, engine, wanted, prompts, answers, longest):
      if key not in said and not _wanted(run_, {key: of_trace[key]}):
        said.add(key)
        progress.update(1)
    busy = {prefix.key for group in wanted.values() for prefix, _ in group}
    open_traces = {key: prefixes for key, prefixes in open_traces.items() if any(p.key in busy for p in prefixes)}
  progress.update(len(of_trace) - len(said))
  return [record for traces in chosen.values() for trace in traces for record in _estimates(trace, of_trace[trace.id])]


def _remote(run_: Run, policy: Policy) -> RemoteEngine:
  """The server of credit.endpoint, which is to hold the SFT policy, as the engine."""
  c, tokenizer = run_.config, policy.tokenizer
  return RemoteEngine(
    c.credit.endpoint,
    eos_id=tokenizer.eos_token_id,
    encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
    decode=lambda ids: policy.token_text.text(ids, special=True),
    stop=c.engine.stop,
    max_new_tokens=c.engine.max_new_tokens,
    send_ids=c.credit.endpoint_ids,
  )


def run(run_: Run) -> dict:
  """Writes credit/estimates/: one StepEstimate a step of every chosen trace, with its rollouts."""
  stage = run_.stage("credit", ["task", "model", "engine", "sample", "credit"], ["synthesize", "sft", "sample"])
  if stage.done:
    return {}
  section, policy = run_.config.credit, run_.policy("sft")
  problems = list(run_.problems("train").values())
  groups = traces_lib.by_problem(Shards(run_.workdir / "sample" / "traces", Trace).read())
  engine = (
    _remote(run_, policy) if section.endpoint.url else run_.engine(policy, lanes=section.lanes, slots=section.slots)
  )
  shards = Shards(stage.folder / "estimates", StepEstimate)
  there = {int(path.stem) for path in shards.files()}  # shard n holds the n-th _SHARD problems
  missing = [n for n in range(-(-len(problems) // _SHARD)) if n not in there]
  of_shard = lambda n: problems[n * _SHARD : (n + 1) * _SHARD]
  chosen = lambda problem: choose(
    groups.get(problem.id, []), section.max_wrong_per_problem, section.max_right_per_problem
  )
  total = sum(len(chosen(problem)) for n in missing for problem in of_shard(n))
  with Progress("credit", total, "traces") as progress:
    for n in missing:
      shards.write(_credit(run_, policy, engine, of_shard(n), groups, progress))
  estimates = list(shards.read())
  figures = {
    "traces": len({estimate.trace_id for estimate in estimates}),
    "steps": len(estimates),
    "rollouts": sum(len(estimate.samples) for estimate in estimates),
    "shared_prefixes": sum(estimate.samples_at != estimate.key for estimate in estimates),
    "rollout_tokens": sum(len(sample["ids"]) for estimate in estimates for sample in estimate.samples),
    "slot_use": round(engine.stats["busy_slots"] / max(engine.stats["slots"], 1), 3),
  }
  if section.endpoint.url:
    figures |= {name: engine.stats[name] for name in ("requests", "retokenised", "without_logp")}
  return stage.finish(figures, shards.files())
