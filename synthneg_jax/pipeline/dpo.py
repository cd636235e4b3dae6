"""Stage dpo: from π_sft, against π_sft, on the pairs of stage pairs.

Two variants, each a stage of its own: dpo/dpo (whole responses) and dpo/step_dpo (per-step pairs).
"""

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
from synthneg_jax.training import batches, loop, objectives, pair_trees, reference


def run(experiment: Experiment) -> dict:
  """Writes dpo/dpo/ and dpo/step_dpo/: policy/, scores/ and metrics.jsonl; dpo/reference/ holds
  what both share.
  """
  results = {name: variant(experiment, name) for name in VARIANTS}
  return {name: figures for name, figures in results.items() if figures}


def _start_check(dtype: str, plan: batches.Batches):
  """Before the first update policy and reference are one, so no log-prob may have shifted.

  Tolerance: 1e-4 nats a branch in float32, 2e-2 nats a scored token in bfloat16.
  """
  tolerance = 1e-4 if dtype == "float32" else 2e-2 * plan.shape.scored / max(plan.shape.branches, 1)

  def check(metrics: dict[str, float]) -> None:
    for metric in ("chosen_shift/per_pair", "rejected_shift/per_pair"):
      if abs(metrics[metric]) > tolerance:
        raise UserError(
          f"At step 0 {metric} is {metrics[metric]:.2g} nats, not 0: the reference log-probs are "
          "not those of the policy that training starts from. Delete dpo/reference/ in the "
          "workdir."
        )

  return check


def _loss(section):
  """The preference loss of the config, with its settings."""
  loss, leaves = losses.PREFERENCE_LOSSES[section.loss]
  return functools.partial(loss, **{leaf: section[leaf] for leaf in leaves})


def _sampler_gap(
  experiment: Experiment, policy: Policy, pairs: Sequence[Pair], store: reference.Store
) -> float:
  """The largest difference between sampler and trainer over the rejected tokens' log-probs under
  π_sft, nats.

  Both passes are of one model; what lies between them is rounding, or a defect.
  """
  traces = {
    trace.id: trace for trace in Shards(experiment.workdir / "sample" / "traces", Trace).read()
  }
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
  made = pair_trees.build(
    pairs,
    max_branches=min(section.max_branches_per_tree, section.batch_size + 1),
    length=train_policy.longest_tree(experiment.config, section),
  )
  store = reference.Store(
    experiment.workdir
    / "dpo"
    / "reference"
    / f"{policy.fingerprint}-{experiment.config.model.dtype}.npz"
  )
  packing = reference.Packing(experiment.mesh, section.row_length, section.logit_chunk)
  reference.score(policy.model, policy.params, made.trees, store=store, packing=packing)
  sampler_gap = round(_sampler_gap(experiment, policy, pairs, store), 7)
  examples = pair_trees.examples(made, store)
  plan = train_policy.plan(
    experiment, stage, section, policy.model, examples=examples, names=made.names
  )
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
  training = loop.Run(
    name=name,
    section=section,
    model=policy.model,
    objective=objective,
    batches=plan,
    mesh=experiment.mesh,
    folder=stage.folder,
    check_start=_start_check(experiment.config.model.dtype, plan),
  )
  identity, last = train_policy.train(experiment, policy, training)
  pair_logprobs.keep(experiment, name, section, identity, made.trees)
  return stage.finish({"sampler_gap_nats": sampler_gap, **last}, identity=identity)
