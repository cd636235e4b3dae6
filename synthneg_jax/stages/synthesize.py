"""Stage synthesize: the problems, with known solutions to train on (D_syn) and answers to test on."""

from synthneg_jax.runtime.records import Problem, Shards
from synthneg_jax.stages.run import Run
from synthneg_jax.tasks import problems


def run(run_: Run) -> dict:
  """Writes synthesize/{train,test}/: the task's problems. Test problems never stand among the training ones."""
  stage = run_.stage("synthesize", ["task"])
  if stage.done:
    return {}
  c = run_.config
  test = problems.load(c.task, c.seed, "test", c.task.test_problems)
  unseen = {problem.prompt for problem in test}
  train = problems.load(c.task, c.seed, "train", c.task.train_problems)
  kept = [problem for problem in train if problem.prompt not in unseen]
  files = []
  for split, records in (("train", kept), ("test", test)):
    shards = Shards(stage.folder / split, Problem)
    shards.write_shared(records)
    files += shards.files()
  return stage.finish({"train": len(kept), "test": len(test), "dropped_as_test": len(train) - len(kept)}, files)
