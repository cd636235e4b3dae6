"""Stage dpo: from π_sft, against π_sft, on pairs. Twice: whole responses ("dpo") and per-step pairs ("step_dpo")."""

import functools

from synthneg_jax.core import losses
from synthneg_jax.data.records import Pair, Shards
from synthneg_jax.pipeline import pair_logprobs, train_policy
from synthneg_jax.pipeline import pairs as pairs_lib
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.training import batches, objectives, reference


def run(experiment: Experiment) -> dict:
  """Writes dpo/dpo/ and dpo/step_dpo/: pairs/, policy/, scores/ and metrics.jsonl; dpo/reference/ holds what both share."""
  variants = {"dpo": experiment.config.pairs.outcome_mode, "step_dpo": experiment.config.pairs.pair_mode}
  results = {name: variant(experiment, name, mode) for name, mode in variants.items()}
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
          f"At step 0 {metric} is {metrics[metric]:.2g} nats, not 0: the reference log-probs are not those "
          "of the policy that training starts from. Delete dpo/reference/ in the workdir."
        )

  return check


def _loss(section):
  """The preference loss of the config, with its settings."""
  if section.loss == "ipo":
    return functools.partial(losses.ipo_loss, tau=section.tau)
  if section.loss == "dpop":
    return functools.partial(losses.dpop_loss, beta=section.beta, penalty=section.penalty)
  return functools.partial(losses.dpo_loss, beta=section.beta, label_smoothing=section.label_smoothing)


def variant(experiment: Experiment, name: str, mode: str) -> dict:
  """Writes dpo/<name>/, trained on pairs of a mode (as pairs.pair_mode)."""
  stage = experiment.stage(
    f"dpo/{name}", ["task", "model", "dpo", "pairs", "credit"], ["synthesize", "sft", "sample", "credit"]
  )
  if stage.done:
    return {}
  section, policy = experiment.config.dpo, experiment.policy("sft")
  pairs, figures = pairs_lib.build(experiment, policy, mode)
  if not pairs:
    raise UserError(
      f"Stage dpo/{name} found no pair ({figures}): more traces (sample.num_traces), more rollouts "
      "(credit.num_rollouts) or another pairs.pit_rule may give some."
    )
  shards = Shards(stage.folder / "pairs", Pair)
  shards.write_shared(pairs)

  length = min(section.row_length, experiment.config.model.max_length)
  trees, numbered, names, too_long = pairs_lib.trees(
    pairs, min(section.max_branches_per_tree, section.batch_size + 1), length
  )
  store = reference.Store(
    experiment.workdir / "dpo" / "reference" / f"{policy.fingerprint}-{experiment.config.model.dtype}.npz"
  )
  packing = reference.Packing(experiment.mesh, section.row_length, section.logit_chunk)
  reference.score(policy.model, policy.params, trees, store=store, packing=packing)
  figures["sampler_gap_nats"] = round(pairs_lib.sampler_gap(experiment, policy, pairs, store), 7)
  plan = train_policy.plan(experiment, section, pairs_lib.examples(trees, numbered, store), names)
  objective = objectives.make_preference(
    policy.model,
    plan.shape.branches,
    objectives.Preference(
      loss=_loss(section),
      beta=section.beta,
      penalty=section.penalty if section.loss == "dpop" else 0.0,
      nll_weight=section.nll_weight,
    ),
    eos_ids=policy.eos_ids,
    chunk=section.logit_chunk,
  )
  identity, last = train_policy.train(
    experiment, name, section, policy, objective, plan, stage.folder, _start_check(experiment.config.model.dtype, plan)
  )
  pair_logprobs.keep(experiment, name, section, identity, trees)
  return stage.finish({**figures, "too_long": too_long, **last}, shards.files(), identity)
