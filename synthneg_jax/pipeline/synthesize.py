"""Stage synthesize: the problems, with known solutions to train on (D_syn) and answers to test on.

Either the task's own problems and solutions, or those of a capable model
(pipeline/problem_synthesis.py).
"""

import json

from synthneg_jax.data.records import Candidate, Problem, Shards
from synthneg_jax.pipeline import problem_synthesis, teacher_backends
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import distributed
from synthneg_jax.tasks import problems
from synthneg_jax.teacher import synthesis


def run(experiment: Experiment) -> dict:
  """Writes synthesize/{train,test}/: problems. Test problems never stand among the training ones.

  With task.fresh_problems, synthesize/sft/ holds SFT's problems, and synthesize/train/ those that
  traces are sampled on.

  Training problems that overlap test problems, and broken rows, are left out and listed in
  synthesize/left_out.jsonl. Where a capable model wrote them, synthesize/candidates/ holds every
  problem with all its solutions and what became of it.

  Raises:
    UserError: what the problems cannot be read from; a provider that cannot be asked, a budget that
      is spent, or fewer problems than wanted.
  """
  c = experiment.config
  own = c.synthesis.provider == "task"
  templates = None if own else synthesis.Templates.read(c.synthesis.prompts)
  given = (
    {}
    if own
    else {
      "capable model": teacher_backends.identity(experiment),
      "set of prompts": templates.identity,
    }
  )
  stage = experiment.stage("synthesize", ["task"] if own else ["task", "synthesis"], given=given)
  if stage.done:
    return {}
  if own:
    chosen, written = problems.choose(c.task, c.seed), []
  else:
    distributed.alone("Asking a capable model")
    chosen, written = problem_synthesis.Synthesis(experiment, templates).run()
  files = []
  for name, kind, records in (
    ("train", Problem, chosen.train),
    ("test", Problem, chosen.test),
    ("sft", Problem, chosen.sft),
    ("candidates", Candidate, written),
  ):
    shards = Shards(stage.folder / name, kind)
    if records or name in ("train", "test"):
      shards.write_shared(records)
    files += shards.files()
  if distributed.first():
    temporary = stage.folder / "left_out.jsonl.tmp"
    temporary.write_text("".join(json.dumps(line) + "\n" for line in chosen.report))
    temporary.replace(stage.folder / "left_out.jsonl")
  counts = {
    name: len(records)
    for name, records in (("sft", chosen.sft), ("train", chosen.train))
    if records
  }
  return stage.finish({**counts, "test": len(chosen.test), **chosen.figures}, files)
