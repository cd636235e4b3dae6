"""Stage sft: the base model learns D_syn's solutions; the result is π_sft, which everything after it starts from."""

from synthneg_jax.stages import training
from synthneg_jax.stages.run import Run
from synthneg_jax.tasks import prompts
from synthneg_jax.training import objectives


def run(run_: Run, name: str = "sft") -> dict:
  """Writes <name>/policy/ and <name>/metrics.jsonl."""
  stage = run_.stage(name, ["task", "model", "sft"], ["synthesize"], reads_base=True)
  if stage.done:
    return {}
  section, policy = run_.config.sft, run_.base()
  problems = {key: problem for key, problem in run_.problems("train").items() if problem.solution}
  trunks = {key: training.prompt_ids(run_, policy, problem) for key, problem in problems.items()}
  solutions = {key: [prompts.encode_solution(policy.tokenizer, problem.solution)] for key, problem in problems.items()}
  length = min(section.row_length, run_.config.model.max_length)
  examples, names, dropped = training.solution_trees(
    trunks, solutions, min(section.max_branches_per_tree, section.batch_size), length
  )
  plan = training.plan(run_, section, examples, names)
  identity, figures = training.train(
    run_, name, section, policy, objectives.make_sft(policy.model, section.logit_chunk), plan, stage.folder
  )
  return stage.finish({"solutions": len(names), "too_long": dropped, **figures}, identity=identity)
