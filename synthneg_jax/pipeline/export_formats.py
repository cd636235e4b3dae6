"""Exports traces, preference pairs and step labels in the formats of other trainers.

Text is decoded from the tokens, including special tokens. Retokenising it may give other tokens, so
formats that allow it also hold the ids. docs/interchange.md describes each format.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from etils import epath

from synthneg_jax.data.records import Pair, Problem, Shards, StepEstimate, Trace
from synthneg_jax.decoding.policy import load_token_text
from synthneg_jax.pipeline import record_io, train_policy
from synthneg_jax.pipeline.experiment import Experiment, check_config
from synthneg_jax.runtime.errors import UserError

STEP_TAG = "ки"  # Math-Shepherd's token after each step, at which the step's value is predicted


class _Workdir:
  """Records of a workdir and the tokenizer that its policies share; reads no weights."""

  def __init__(self, experiment: Experiment):
    self._experiment = experiment
    folder = experiment.workdir / "sft" / "policy"
    if not folder.exists():
      raise UserError(
        f"{experiment.workdir} has no sft/policy, whose tokenizer is needed to read its records."
      )
    self.tokenizer, self.token_text = load_token_text(folder)

  def read(self, folder: str, kind) -> Iterator:
    shards = Shards(self._experiment.workdir / folder, kind)
    if not shards.files():
      raise UserError(
        f"{self._experiment.workdir / folder} has no records; run the stage that writes them first."
      )
    return shards.read()

  def problems(self, split: str) -> dict[str, Problem]:
    return {problem.id: problem for problem in self.read(f"synthesize/{split}", Problem)}

  def prompt_ids(self, problem: Problem) -> list[int]:
    return train_policy.prompt_ids(self._experiment, self.tokenizer, problem)

  def text(self, ids: Sequence[int]) -> str:
    """The text of ids, including special tokens."""
    return self.token_text.text(ids, special=True)


def traces(workdir: _Workdir, folder: str) -> Iterator[dict]:
  """Unchanged trace records with the problem's text and gold answer.

  launch/import_traces.py imports those of "sample" again.

  Args:
    workdir: the source.
    folder: "sample" or "evaluate/METHOD".
  """
  problems = workdir.problems("train" if folder == "sample" else "test")
  for trace in workdir.read(f"{folder}/traces", Trace):
    problem = problems[trace.problem_id]
    yield dataclasses.asdict(trace) | {"problem": problem.prompt, "answer": problem.answer}


def pairs(workdir: _Workdir, variant: str) -> Iterator[dict]:
  """TRL's `prompt`, `chosen`, `rejected`, with the tokens as `*_ids` and the pair's origin.

  A branch ends in EOS only if its author stopped there. TRL's DPOTrainer appends EOS to every text
  that lacks it and tokenises prompt and branch as one text; give it the ids to train on exactly
  these tokens (docs/interchange.md).

  Args:
    workdir: the source.
    variant: "step_dpo" or "dpo".
  """
  for pair in workdir.read(f"pairs/{variant}/pairs", Pair):
    texts = {"prompt": pair.trunk, "chosen": pair.chosen, "rejected": pair.rejected}
    yield {
      **{name: workdir.text(ids) for name, ids in texts.items()},
      **{f"{name}_ids": ids for name, ids in texts.items()},
      "id": pair.id,
      "problem_id": pair.problem_id,
      "trace_id": pair.trace_id,
      "pair_mode": pair.pair_mode,
      "pit": pair.pit,
      "p_flipped": pair.p_flipped,
      "context": pair.context,
    }


@dataclasses.dataclass(frozen=True)
class _Labelled:
  """A credited trace up to its first step without an estimate.

  Attributes:
    problem: the problem.
    trace: the trace.
    steps: texts of the steps, without delimiters.
    labels: True if any rollout after the step, or the trace itself, is right (Math-Shepherd's hard
      estimate, https://arxiv.org/abs/2312.08935; counting the trace itself is ours).
    successes, rollouts: counts per step; for a trace's last step its verdict, of 1.
  """

  problem: Problem
  trace: Trace
  steps: list[str]
  labels: list[bool]
  successes: list[int]
  rollouts: list[int]


def _labelled(workdir: _Workdir) -> Iterator[_Labelled]:
  problems = workdir.problems("train")
  by_id = {trace.id: trace for trace in workdir.read("sample/traces", Trace)}
  groups = {}
  for estimate in workdir.read("credit/estimates", StepEstimate):
    groups.setdefault(estimate.trace_id, []).append(estimate)
  for key, estimates in groups.items():
    trace, start = by_id[key], 0
    row = _Labelled(problems[trace.problem_id], trace, [], [], [], [])
    for estimate in sorted(estimates, key=lambda estimate: estimate.step):
      if not estimate.exact and not estimate.rollouts:
        break
      row.steps.append(workdir.token_text.text(trace.ids[start : estimate.prefix_end]).rstrip("\n"))
      row.successes.append(int(estimate.correct) if estimate.exact else estimate.successes)
      row.rollouts.append(1 if estimate.exact else estimate.rollouts)
      row.labels.append(row.successes[-1] > 0 or trace.correct)
      start = estimate.prefix_end
    if row.steps:
      yield row


def stepwise(workdir: _Workdir) -> Iterator[dict]:
  """TRL's stepwise supervision (`prompt`, `completions`, `labels`), with the labels' counts."""
  for row in _labelled(workdir):
    yield {
      "prompt": workdir.text(workdir.prompt_ids(row.problem)),
      "completions": row.steps,
      "labels": row.labels,
      "successes": row.successes,
      "rollouts": row.rollouts,
      "trace_id": row.trace.id,
    }


def math_shepherd(workdir: _Workdir) -> Iterator[dict]:
  """Math-Shepherd's `input` (a tag after each step), `label` (+ or - in its place) and `task`."""
  for row in _labelled(workdir):
    tagged, signed = [], []
    for number, (step, label) in enumerate(zip(row.steps, row.labels, strict=True), start=1):
      tagged.append(f"Step {number}: {step.strip()} {STEP_TAG}")
      signed.append(f"Step {number}: {step.strip()} {'+' if label else '-'}")
    prompt = row.problem.prompt.strip()
    yield {
      "input": prompt + " " + "\n".join(tagged),
      "label": prompt + " " + "\n".join(signed),
      "task": row.problem.source,
    }


def prm800k(workdir: _Workdir) -> Iterator[dict]:
  """PRM800K's `question` and `label`: ratings of 1 or -1 up to the first -1, as in the original.

  PRM800K's rating 0, "neutral", is not used because counts cannot justify it.
  """
  for row in _labelled(workdir):
    end = next((i + 1 for i, label in enumerate(row.labels) if not label), len(row.labels))

    steps = [
      {
        "completions": [{"text": step, "rating": 1 if label else -1, "flagged": None}],
        "human_completion": None,
        "chosen_completion": 0 if label else None,
      }
      for step, label in zip(row.steps[:end], row.labels[:end], strict=True)
    ]
    if not row.labels[end - 1]:
      reason = "found_error"
    else:
      complete = len(row.steps) == len(row.trace.step_ends)
      reason = "solution" if complete else "give_up"
    yield {
      "labeler": f"rollouts of {row.trace.policy}",
      "timestamp": None,
      "generation": None,
      "is_quality_control_question": False,
      "is_initial_screening_question": False,
      "question": {
        "problem": row.problem.prompt,
        "ground_truth_solution": row.problem.solution or None,
        "ground_truth_answer": row.problem.answer,
        "pre_generated_steps": row.steps,
        "pre_generated_answer": row.trace.extracted,
        "pre_generated_verifier_score": None,
      },
      "label": {"steps": steps, "total_time": 0, "finish_reason": reason},
    }


FORMATS: dict[str, Callable[..., Iterator[dict]]] = {
  "traces": traces,
  "pairs": pairs,
  "stepwise": stepwise,
  "math_shepherd": math_shepherd,
  "prm800k": prm800k,
}


def write(experiment: Experiment, what: str, out: str, source: str = "") -> int:
  """Writes records in one format to a .jsonl or .parquet file; returns the number of rows.

  Args:
    experiment: the run.
    what: a key of FORMATS.
    out: the file.
    source: for traces "sample" (default) or "evaluate/METHOD", for pairs "step_dpo" (default) or
      "dpo".

  Raises:
    UserError: the records do not exist, or the file cannot be written.
  """
  check_config(experiment, ("synthesize", "sft", "sample", "credit"))
  workdir = _Workdir(experiment)
  default = {"traces": "sample", "pairs": "step_dpo"}.get(what)
  if source and default is None:
    raise UserError(f"--source={source} requires --what=traces or --what=pairs.")
  arguments = () if default is None else (source or default,)
  return record_io.write(epath.Path(out).expanduser(), FORMATS[what](workdir, *arguments))
