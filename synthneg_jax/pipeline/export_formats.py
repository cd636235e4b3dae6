"""What a run holds, in the forms that other trainers read: traces, preference pairs, and labels of
steps.

Text is that of the tokens, special tokens included; where a form has room, the tokens stand beside
it, because text that is tokenised again may come out otherwise. docs/interchange.md shows each
form.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from etils import epath

from synthneg_jax.data.records import Pair, Problem, Shards, StepEstimate, Trace
from synthneg_jax.decoding.policy import load_token_text
from synthneg_jax.pipeline import record_io, train_policy
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime.errors import UserError

STEP_TAG = "ки"  # Math-Shepherd's mark of the place after a step where its value is asked for


class _Workdir:
  """Records of a workdir, with the tokenizer that its policies share; no weights are read."""

  def __init__(self, experiment: Experiment):
    self._run = experiment
    folder = experiment.workdir / "sft" / "policy"
    if not folder.exists():
      raise UserError(
        f"{experiment.workdir} has no sft/policy, and so no tokenizer to read its records with."
      )
    self.tokenizer, self.token_text = load_token_text(folder)

  def read(self, folder: str, kind) -> Iterator:
    shards = Shards(self._run.workdir / folder, kind)
    if not shards.files():
      raise UserError(
        f"{self._run.workdir / folder} has no records; run the stage that writes them first."
      )
    return shards.read()

  def problems(self, split: str) -> dict[str, Problem]:
    return {problem.id: problem for problem in self.read(f"synthesize/{split}", Problem)}

  def prompt_ids(self, problem: Problem) -> list[int]:
    return train_policy.prompt_ids(self._run, self.tokenizer, problem)

  def text(self, ids: Sequence[int]) -> str:
    """Text of ids with the special ones spelled out."""
    return self.token_text.text(ids, special=True)


def traces(workdir: _Workdir, folder: str) -> Iterator[dict]:
  """Trace records as they are, with the problem and its gold answer; launch/import_traces.py takes
  those of "sample" back.

  Args:
    workdir: read from.
    folder: "sample" or "evaluate/METHOD".
  """
  problems = workdir.problems("train" if folder == "sample" else "test")
  for trace in workdir.read(f"{folder}/traces", Trace):
    problem = problems[trace.problem_id]
    yield dataclasses.asdict(trace) | {"problem": problem.prompt, "answer": problem.answer}


def pairs(workdir: _Workdir, variant: str) -> Iterator[dict]:
  """Preference pairs as TRL's `prompt`, `chosen`, `rejected`, with the tokens as `*_ids` and the
  pair's provenance.

  A branch ends in EOS exactly where its author stopped. TRL's DPOTrainer puts EOS behind every text
  that has none, and tokenises prompt and branch as one text: to train on what stands here it must
  be given the ids (docs/interchange.md).

  Args:
    workdir: read from.
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
      "flip": pair.flip,
      "context": pair.context,
    }


@dataclasses.dataclass(frozen=True)
class _Labelled:
  """A credited trace up to its first step that nothing is known of.

  Attributes:
    steps: their texts, the delimiter left out.
    labels: whether anything came out right from there on: a rollout, or the trace itself
      (Math-Shepherd's hard estimate, https://arxiv.org/abs/2312.08935; that a right trace counts
      for its own steps is ours).
    successes, rollouts: the counts; of the last step of a whole trace its verdict, of 1.
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
  """TRL's stepwise supervision: `prompt`, `completions`, `labels`; and the counts behind the
  labels.
  """
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
  """Math-Shepherd's `input`, `label`, `task`: steps with the tag after each, and with + or - in its
  place.
  """
  for row in _labelled(workdir):
    numbered = [f"Step {n}: {step.strip()}" for n, step in enumerate(row.steps, start=1)]
    signs = ["+" if label else "-" for label in row.labels]

    def join(marks, numbered=numbered):
      return "\n".join(f"{s} {m}" for s, m in zip(numbered, marks, strict=True))

    yield {
      "input": f"{row.problem.prompt.strip()} {join([STEP_TAG] * len(numbered))}",
      "label": f"{row.problem.prompt.strip()} {join(signs)}",
      "task": row.problem.source,
    }


def prm800k(workdir: _Workdir) -> Iterator[dict]:
  """PRM800K's `question` and `label`: a rating of 1 or -1 for each step up to the first -1, as its
  labellers stopped there.

  It knows 0, "neutral", too; counts give no ground for it.
  """
  for row in _labelled(workdir):
    end = next((i + 1 for i, label in enumerate(row.labels) if not label), len(row.labels))

    def completion(text, label):
      return {"text": text, "rating": 1 if label else -1, "flagged": None}

    steps = [
      {
        "completions": [completion(step, label)],
        "human_completion": None,
        "chosen_completion": 0 if label else None,
      }
      for step, label in zip(row.steps[:end], row.labels[:end], strict=True)
    ]
    whole = len(row.steps) == len(row.trace.step_ends)
    reason = "found_error" if not row.labels[end - 1] else "solution" if whole else "give_up"
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


FORMS: dict[str, Callable[..., Iterator[dict]]] = {
  "traces": traces,
  "pairs": pairs,
  "stepwise": stepwise,
  "math_shepherd": math_shepherd,
  "prm800k": prm800k,
}


def write(experiment: Experiment, what: str, out: str, source: str = "") -> int:
  """Writes one form to a .jsonl or .parquet file; returns its number of rows.

  Args:
    experiment: the run.
    what: a name of FORMS.
    out: the file.
    source: traces: "sample" (the default) or "evaluate/METHOD"; pairs: "step_dpo" (the default) or
      "dpo".

  Raises:
    UserError: records that are not there, or a file that cannot be written.
  """
  workdir = _Workdir(experiment)
  default = {"traces": "sample", "pairs": "step_dpo"}.get(what)
  if source and default is None:
    raise UserError(f"--source={source} goes with --what=traces or pairs.")
  arguments = () if default is None else (source or default,)
  return record_io.write(epath.Path(out).expanduser(), FORMS[what](workdir, *arguments))
