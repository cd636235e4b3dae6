"""Stage credit: step-level Q. From every step's prefix of a trace, rollouts of π_sft, counted right or not.

One prefill of prompt and trace serves all its prefixes: a rollout is a branch that forks at a step's end. The last step
has no rollouts: its value is the trace's verdict. Equal prefixes of a problem are estimated once.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from synthneg_jax.core import pairs, selection
from synthneg_jax.rollouts.engine import Trunk
from synthneg_jax.runtime import keys
from synthneg_jax.runtime.progress import Progress
from synthneg_jax.runtime.records import Problem, Rollout, Shards, StepEstimate, Trace
from synthneg_jax.stages import traces as traces_lib
from synthneg_jax.stages import training
from synthneg_jax.stages.policies import Policy
from synthneg_jax.stages.run import Run, sampling
from synthneg_jax.tasks.token_text import step_ends

_SHARD = 256  # problems a shard


def choose(group: Sequence[Trace], max_wrong: int, max_right: int) -> list[Trace]:
  """The traces of one problem that get credit: distinct, with an answer, the first of each verdict."""
  right = selection.keep_right([(trace.ids, trace.correct) for trace in group], max_right)
  wrong = pairs.negatives([(trace.ids, trace.reason) for trace in group], max_wrong)
  return [group[index] for index in sorted(right + wrong)]


def _plan(run_: Run, prompt: Sequence[int], trace: Trace, owner: dict[str, str]) -> Trunk | None:
  """The trunk of a trace with rollouts at each prefix that no trace of the problem holds yet; fills in `owner`."""
  section = run_.config.credit
  forks, item_keys = [], []
  for step, end in enumerate(trace.step_ends[:-1]):
    prefix = keys.hash_ids(trace.ids[:end])
    if prefix in owner:
      continue
    owner[prefix] = f"{trace.id}/{step}"
    for index in range(section.num_rollouts):
      forks.append(len(prompt) + end)
      item_keys.append(keys.draw_key(run_.config.seed, "credit", 0, trace.problem_id, prefix, index))
  if not forks:
    return None
  longest = trace.step_ends[-2]
  return Trunk(list(prompt) + trace.ids[:longest], forks, np.stack(item_keys))


def _estimates(trace: Trace, owner: dict[str, str], made: dict[str, list[Rollout]]) -> list[StepEstimate]:
  records = []
  for step, end in enumerate(trace.step_ends):
    key = f"{trace.id}/{step}"
    if step == len(trace.step_ends) - 1:
      at, rollouts, samples, exact = key, 0, [], True
      successes = 0
    else:
      at = owner[keys.hash_ids(trace.ids[:end])]
      samples, exact = made[at], False
      rollouts, successes = len(samples), sum(sample.correct for sample in samples)
    records.append(
      StepEstimate(
        trace_id=trace.id,
        problem_id=trace.problem_id,
        step=step,
        prefix_end=end,
        rollouts=rollouts,
        successes=successes,
        exact=exact,
        correct=exact and trace.correct,
        samples=[dataclasses.asdict(sample) for sample in samples] if at == key else [],
        samples_at=at,
      )
    )
  return records


def _credit(run_: Run, policy: Policy, engine, problems: Sequence[Problem], groups, progress) -> list[StepEstimate]:
  """Estimates of all chosen traces of some problems."""
  section = run_.config.credit
  owners, chosen, trunks, held_by = {}, [], [], []
  for problem in problems:
    prompt = training.prompt_ids(run_, policy, problem)
    owner = owners.setdefault(problem.id, {})
    for trace in choose(groups.get(problem.id, []), section.max_wrong_per_problem, section.max_right_per_problem):
      chosen.append(trace)
      trunk = _plan(run_, prompt, trace, owner)
      if trunk:
        trunks.append(trunk)
        held_by.append((trace, len(prompt)))
  answer = {problem.id: problem.answer for problem in problems}
  made = {}
  for index, generations in engine.run(policy.params, trunks, sampling(section)):
    trace, offset = held_by[index]
    step_of = {offset + end: step for step, end in enumerate(trace.step_ends)}
    for fork, generation in zip(trunks[index].forks, generations, strict=True):
      ids = generation.ids.tolist()
      text = policy.token_text.text(trace.ids[: fork - offset] + ids)
      graded = traces_lib.verdict(run_, policy, text, answer[trace.problem_id], generation.finish)
      first = (step_ends(ids, policy.token_text, run_.config.task.step_delimiter) or [0])[0]
      logp = [round(float(np.sum(generation.logp[:end])), 5) for end in (first, len(ids))]
      made.setdefault(f"{trace.id}/{step_of[fork]}", []).append(
        Rollout(ids, graded.correct, graded.reason, generation.finish, *logp)
      )
    progress.update(1)
  progress.update(len(chosen) - len(trunks))
  return [record for trace in chosen for record in _estimates(trace, owners[trace.problem_id], made)]


def run(run_: Run) -> dict:
  """Writes credit/estimates/: one StepEstimate a step of every chosen trace, with its rollouts."""
  stage = run_.stage("credit", ["task", "model", "engine", "sample", "credit"], ["synthesize", "sft", "sample"])
  if stage.done:
    return {}
  section, policy = run_.config.credit, run_.policy("sft")
  problems = list(run_.problems("train").values())
  groups = traces_lib.by_problem(Shards(run_.workdir / "sample" / "traces", Trace).read())
  engine = run_.engine(policy, lanes=section.lanes, slots=section.slots)
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
  return stage.finish(figures, shards.files())
