"""Stage dpo: trains π_sft on preference pairs, with π_sft as the reference.

Each of its two variants is a stage: dpo/dpo (whole responses) and dpo/step_dpo (per-step pairs).
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from synthneg_jax.core import losses
from synthneg_jax.data.records import Pair, Shards, Trace
from synthneg_jax.decoding.policy import Policy
from synthneg_jax.pipeline import pair_logprobs, train_policy
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.pipeline.pairs import VARIANTS
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.training import batches, objectives, pair_trees, reference


def run(experiment: Experiment) -> dict:
  """Writes dpo/dpo/ and dpo/step_dpo/: policy/, scores/ and metrics.jsonl.

  dpo/reference/ caches the reference log-probs that both share.
  """
  results = {name: variant(experiment, name) for name in VARIANTS}
  return {name: figures for name, figures in results.items() if figures}


def _start_check(dtype: str, plan: batches.Batches):
  """Returns a check that the metrics of step 0 show no shift from the reference.

  Before the first update policy and reference are equal. The tolerance is 1e-4 nats per branch in
  float32 and 2e-2 nats per scored token in bfloat16.
  """
  tolerance = 1e-4 if dtype == "float32" else 2e-2 * plan.shape.scored / max(plan.shape.branches, 1)

  def check(metrics: dict[str, float]) -> None:
    for metric in ("chosen_shift/per_pair", "rejected_shift/per_pair"):
      if abs(metrics[metric]) > tolerance:
        raise UserError(
          f"At step 0 {metric} is {metrics[metric]:.2g} nats, not 0: the reference log-probs do "
          "not belong to the policy that training starts from. Delete dpo/reference/ in the "
          "workdir."
        )

  return check


def _loss(section):
  """The config's preference loss with its settings bound."""
  loss, leaves = losses.PREFERENCE_LOSSES[section.loss]
  return functools.partial(loss, **{leaf: section[leaf] for leaf in leaves})


def _sampler_gap(
  experiment: Experiment, policy: Policy, pairs: Sequence[Pair], store: reference.Store
) -> float:
  """The largest difference in nats between sampler and trainer log-probs of rejected tokens.

  Both score the same tokens under π_sft, so a difference beyond rounding is a defect.
  """
  traces = Shards(experiment.workdir / "sample" / "traces", Trace).read_dict()
  problems, largest = experiment.problems("train"), 0.0

  @functools.cache
  def prompt_size(problem_id: str) -> int:
    return len(train_policy.prompt_ids(experiment, policy.tokenizer, problems[problem_id]))

  for pair in pairs:
    start = len(pair.trunk) - prompt_size(pair.problem_id)
    drawn = traces[pair.trace_id].logps[start : start + len(pair.rejected)]
    scored = store[reference.branch_key(pair.trunk, len(pair.trunk), pair.rejected)]
    largest = max(largest, float(np.max(np.abs(scored - np.asarray(drawn)))))
  return largest


def variant(experiment: Experiment, name: str) -> dict:
  """Writes dpo/<name>/, trained on the pairs of pairs/<name>/."""
  needs = ["synthesize", "sft", "sample", f"pairs/{name}"]
  stage = experiment.stage(f"dpo/{name}", ["task", "model", "dpo"], needs)
  if stage.done:
    return {}
  section, policy = experiment.config.dpo, experiment.policy("sft")
  pairs = list(Shards(experiment.workdir / "pairs" / name / "pairs", Pair).read())
  built = pair_trees.build(
    pairs,
    max_branches=min(section.max_branches_per_tree, section.batch_size + 1),
    max_pairs=section.batch_size,
    length=train_policy.longest_tree(experiment.config, section),
  )
  store = pair_logprobs.score(
    experiment, policy, section, folder=experiment.workdir / "dpo" / "reference", trees=built.trees
  )
  sampler_gap = round(_sampler_gap(experiment, policy, pairs, store), 7)
  objective = objectives.make_preference(
    policy.model,
    objectives.Preference(
      loss=_loss(section),
      beta=section.beta,
      penalty=section.penalty if section.loss == "dpop" else 0.0,
      nll_weight=section.nll_weight,
    ),
    eos_ids=policy.eos_ids,
    chunk=section.logit_chunk,
  )
  training = train_policy.make_run(
    experiment,
    stage,
    section,
    model=policy.model,
    objective=objective,
    trees=train_policy.Trees(pair_trees.examples(built, store), built.names),
  )
  check = _start_check(experiment.config.model.dtype, training.batches)
  training = dataclasses.replace(training, check_start=check)
  identity, figures = train_policy.train(experiment, policy, training)
  trained = experiment.policy(f"dpo/{name}")
  pair_logprobs.score(
    experiment, trained, section, folder=stage.folder / "scores", trees=built.trees
  )
  return stage.finish({"sampler_gap_nats": sampler_gap, **figures}, identity=identity)
