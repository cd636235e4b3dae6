"""Stage sft: fine-tunes the base model on the solutions of D_syn, which gives π_sft."""

from synthneg_jax.data import prompts
from synthneg_jax.pipeline import train_policy
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.training import objectives


def run(experiment: Experiment, name: str = "sft") -> dict:
  """Writes <name>/policy/ and <name>/metrics.jsonl."""
  stage = experiment.stage(name, ["task", "model", "sft"], ["synthesize"], reads_base=True)
  if stage.done:
    return {}
  section, policy = experiment.config.sft, experiment.base()
  split = "sft" if experiment.config.task.fresh_problems else "train"
  problems = {
    key: problem for key, problem in experiment.problems(split).items() if problem.solution
  }
  trunks = {
    key: train_policy.prompt_ids(experiment, policy.tokenizer, problem)
    for key, problem in problems.items()
  }
  solutions = {
    key: [prompts.encode_solution(policy.tokenizer, problem.solution)]
    for key, problem in problems.items()
  }
  trees = train_policy.solution_trees(
    trunks,
    solutions,
    max_branches=min(section.max_branches_per_tree, section.batch_size),
    max_tokens=train_policy.longest_tree(experiment.config, section),
  )
  training = train_policy.make_run(
    experiment,
    stage,
    section,
    model=policy.model,
    objective=objectives.make_sft(policy.model, section.logit_chunk),
    trees=trees,
  )
  identity, figures = train_policy.train(experiment, policy, training)
  counts = {"solutions": len(trees.names), "too_long": trees.dropped}
  return stage.finish({**counts, **figures}, identity=identity)
