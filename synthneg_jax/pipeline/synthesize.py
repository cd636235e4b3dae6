"""Stage synthesize: training problems with known solutions (D_syn), and test problems with answers.

They come from the task itself or from a capable model (pipeline/problem_synthesis.py).
"""

import json

from synthneg_jax.data.records import Candidate, Problem, Shards
from synthneg_jax.pipeline import problem_synthesis, teacher_backends
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import distributed
from synthneg_jax.tasks import problems
from synthneg_jax.teacher import synthesis


def run(experiment: Experiment) -> dict:
  """Writes the problems synthesize/train/ and synthesize/test/, which are disjoint.

  With task.fresh_problems, synthesize/sft/ holds the problems for SFT and synthesize/train/ those
  to sample traces on. Training problems that overlap test problems, and broken rows, are listed in
  synthesize/left_out.jsonl. With a capable model, synthesize/candidates/ holds every problem with
  all its solutions and its outcome.

  Raises:
    UserError: unreadable problems, a provider that cannot be used, a spent budget, or fewer
      problems than the config asks for.
  """
  c = experiment.config
  sections, given = ["task"], {}
  if c.synthesis.provider != "task":
    templates = synthesis.Templates.read(c.synthesis.prompts)
    sections.append("synthesis")
    given["capable model"] = teacher_backends.identity(experiment)
    given["set of prompts"] = templates.identity
  stage = experiment.stage("synthesize", sections, given=given)
  if stage.done:
    return {}
  if c.synthesis.provider == "task":
    chosen, candidates = problems.choose_splits(c.task, c.seed), []
  else:
    distributed.require_single_process("Asking a capable model")
    chosen, candidates = problem_synthesis.Synthesis(experiment, templates).run()
  files = []
  for name, kind, records in (
    ("train", Problem, chosen.train),
    ("test", Problem, chosen.test),
    ("sft", Problem, chosen.sft),
    ("candidates", Candidate, candidates),
  ):
    shards = Shards(stage.folder / name, kind)
    if records or name in ("train", "test"):
      shards.write_replicated(records)
    files += shards.files()
  if distributed.is_primary():
    temporary = stage.folder / "left_out.jsonl.tmp"
    temporary.write_text("".join(json.dumps(line) + "\n" for line in chosen.report))
    temporary.replace(stage.folder / "left_out.jsonl")
  counts = {"sft": len(chosen.sft), "train": len(chosen.train)}
  counts = {name: count for name, count in counts.items() if count}
  return stage.finish({**counts, "test": len(chosen.test), **chosen.figures}, files)
