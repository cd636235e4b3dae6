"""Stage synthesize: the problems, with known solutions to train on (D_syn) and answers to test on.

Either the task's own problems and solutions, or those of a capable model (stages/synthetic.py).
"""

import json

from synthneg_jax.runtime.records import Candidate, Problem, Shards
from synthneg_jax.stages import synthetic, teachers
from synthneg_jax.stages.run import Run
from synthneg_jax.tasks import problems, synthesis


def run(run_: Run) -> dict:
  """Writes synthesize/{train,test}/: problems. Test problems never stand among the training ones.

  Training problems that overlap test problems, and broken rows, are left out and listed in synthesize/left_out.jsonl. Where a
  capable model wrote them, synthesize/candidates/ holds every problem with all its solutions and what became of it.

  Raises:
    UserError: what the problems cannot be read from; a provider that cannot be asked, a budget that is spent, or fewer
      problems than wanted.
  """
  c = run_.config
  own = c.synthesis.provider == "task"
  templates = None if own else synthesis.Templates.read(c.synthesis.prompts)
  given = {} if own else {"capable model": teachers.identity(run_), "set of prompts": templates.identity}
  stage = run_.stage("synthesize", ["task"] if own else ["task", "synthesis"], given=given)
  if stage.done:
    return {}
  if own:
    chosen, written = problems.choose(c.task, c.seed), []
  else:
    chosen, written = synthetic.Synthesis(run_, templates).run()
  files = []
  for name, kind, records in (
    ("train", Problem, chosen.train),
    ("test", Problem, chosen.test),
    ("candidates", Candidate, written),
  ):
    shards = Shards(stage.folder / name, kind)
    for path in shards.files():
      path.unlink()
    if records or name != "candidates":
      shards.write(records)
    files += shards.files()
  temporary = stage.folder / "left_out.jsonl.tmp"
  temporary.write_text("".join(json.dumps(line) + "\n" for line in chosen.report))
  temporary.replace(stage.folder / "left_out.jsonl")
  return stage.finish({"train": len(chosen.train), "test": len(chosen.test), **chosen.figures}, files)
