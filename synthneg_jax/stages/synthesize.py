"""Stage synthesize: the problems, with known solutions to train on (D_syn) and answers to test on."""

import json

from synthneg_jax.runtime.records import Problem, Shards
from synthneg_jax.stages.run import Run
from synthneg_jax.tasks import problems


def run(run_: Run) -> dict:
  """Writes synthesize/{train,test}/: the task's problems. Test problems never stand among the training ones.

  Training problems that overlap test problems, and broken rows, are left out and listed in synthesize/left_out.jsonl.
  """
  stage = run_.stage("synthesize", ["task"])
  if stage.done:
    return {}
  c = run_.config
  chosen = problems.choose(c.task, c.seed)
  files = []
  for split, records in (("train", chosen.train), ("test", chosen.test)):
    shards = Shards(stage.folder / split, Problem)
    shards.write_shared(records)
    files += shards.files()
  temporary = stage.folder / "left_out.jsonl.tmp"
  temporary.write_text("".join(json.dumps(line) + "\n" for line in chosen.report))
  temporary.replace(stage.folder / "left_out.jsonl")
  return stage.finish({"train": len(chosen.train), "test": len(chosen.test), **chosen.figures}, files)
