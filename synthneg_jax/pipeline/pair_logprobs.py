"""Log-probs of each pair's branches under π_sft and under the trained policy."""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
from etils import epath

from synthneg_jax.core.tree import Tree
from synthneg_jax.data.records import Pair, Shards
from synthneg_jax.decoding.policy import Policy
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.training import reference


@dataclasses.dataclass(frozen=True)
class Margin:
  """Summed log-probs of a pair's scored tokens in nats, each (before, after) training."""

  chosen: tuple[float, float]
  rejected: tuple[float, float]

  @property
  def before(self) -> float:
    """log π(chosen) − log π(rejected) under π_sft."""
    return self.chosen[0] - self.rejected[0]

  @property
  def after(self) -> float:
    """The same under the trained policy; `after - before` is DPO's margin."""
    return self.chosen[1] - self.rejected[1]


def _store(experiment: Experiment, folder: epath.Path, fingerprint: str) -> reference.Store:
  return reference.Store(folder / f"{fingerprint}-{experiment.config.model.dtype}.npz")


def score(
  experiment: Experiment, policy: Policy, section, *, folder: epath.Path, trees: Sequence[Tree]
) -> reference.Store:
  """Computes the log-probs of the trees' branches under a policy and caches them in a folder.

  Args:
    experiment: gives mesh and dtype.
    policy: the policy that scores.
    section: the config section dpo.
    folder: receives one file per policy and dtype.
    trees: the trees; branches that the folder has are not scored again.
  """
  store = _store(experiment, folder, policy.fingerprint)
  packing = reference.Packing(experiment.mesh, section.row_length, section.logit_chunk)
  reference.score(policy.model, policy.params, trees, store=store, packing=packing)
  return store


def read(experiment: Experiment, name: str) -> dict[str, Margin]:
  """Margins of the pairs of dpo/`name` by pair id; empty without scores.

  Pairs that were too long to train on have no margin.
  """

  def open_store(folder: str, stage: str) -> reference.Store:
    path = experiment.workdir / stage / "policy" / "fingerprint.json"
    fingerprint = json.loads(path.read_text())["fingerprint"]
    return _store(experiment, experiment.workdir / folder, fingerprint)

  try:
    before = open_store("dpo/reference", "sft")
    after = open_store(f"dpo/{name}/scores", f"dpo/{name}")
  except FileNotFoundError:
    return {}
  margins = {}
  for pair in Shards(experiment.workdir / "pairs" / name / "pairs", Pair).read():
    keys = [
      reference.branch_key(pair.trunk, len(pair.trunk), ids) for ids in (pair.chosen, pair.rejected)
    ]
    if all(key in store for key in keys for store in (before, after)):
      chosen, rejected = (
        tuple(float(np.sum(store[key][start:], dtype=np.float64)) for store in (before, after))
        for key, start in zip(keys, (0, pair.context), strict=True)
      )
      margins[pair.id] = Margin(chosen, rejected)
  return margins
