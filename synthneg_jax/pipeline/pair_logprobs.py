"""How far training moved each pair: log-probs of its branches under the SFT policy and under the
trained one.
"""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
from etils import epath

from synthneg_jax.core.tree import Tree
from synthneg_jax.data.records import Pair, Shards
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.training import reference


@dataclasses.dataclass(frozen=True)
class Margin:
  """Summed log-probs of the scored tokens of a pair's branches, nats: chosen and rejected, before
  training and after.
  """

  chosen: tuple[float, float]
  rejected: tuple[float, float]

  @property
  def before(self) -> float:
    """log p(chosen) − log p(rejected) under the SFT policy."""
    return self.chosen[0] - self.rejected[0]

  @property
  def after(self) -> float:
    """The same under the trained policy; `after - before` is DPO's margin."""
    return self.chosen[1] - self.rejected[1]


def _store(experiment: Experiment, folder: epath.Path, fingerprint: str) -> reference.Store:
  return reference.Store(folder / f"{fingerprint}-{experiment.config.model.dtype}.npz")


def keep(
  experiment: Experiment, name: str, section, fingerprint: str, trees: Sequence[Tree]
) -> None:
  """Scores the trees' branches under what stage dpo/`name` has just trained, into
  dpo/<name>/scores/.
  """
  trained = experiment.policy(f"dpo/{name}")
  store = _store(experiment, experiment.workdir / "dpo" / name / "scores", fingerprint)
  packing = reference.Packing(experiment.mesh, section.row_length, section.logit_chunk)
  reference.score(trained.model, trained.params, trees, store=store, packing=packing)


def read(experiment: Experiment, name: str) -> dict[str, Margin]:
  """Margins of the pairs of dpo/`name` by pair id, but for pairs that were too long; none where no
  scores were kept.
  """

  def policy(stage):
    return json.loads((experiment.workdir / stage / "policy" / "fingerprint.json").read_text())

  try:
    before = _store(
      experiment, experiment.workdir / "dpo" / "reference", policy("sft")["fingerprint"]
    )
    after = _store(
      experiment, experiment.workdir / "dpo" / name / "scores", policy(f"dpo/{name}")["fingerprint"]
    )
  except FileNotFoundError:
    return {}
  margins = {}
  for pair in Shards(experiment.workdir / "pairs" / name / "pairs", Pair).read():
    keys = [
      reference.branch_key(pair.trunk, len(pair.trunk), ids) for ids in (pair.chosen, pair.rejected)
    ]
    if all(key in store for key in keys for store in (before, after)):
      starts = zip(keys, (0, pair.context), strict=True)
      sums = [
        tuple(float(np.sum(store[key][start:], dtype=np.float64)) for store in (before, after))
        for key, start in starts
      ]
      margins[pair.id] = Margin(*sums)
  return margins
