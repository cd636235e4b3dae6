"""What every stage is given: the config, the workdir, and how to open its own folder and the
policies of others.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from synthneg_jax.core.geometry import Lanes
from synthneg_jax.data.records import Problem, Shards
from synthneg_jax.decoding.engine import Engine, Work, fit
from synthneg_jax.decoding.policy import BASES, Policy, files_identity, resolve, resolve_for_all
from synthneg_jax.decoding.sampling import Sampling
from synthneg_jax.runtime import config_schema, device_mesh, distributed, manifest
from synthneg_jax.runtime.errors import UserError


@dataclasses.dataclass
class Experiment:
  """One workdir with its config."""

  config: object
  workdir: epath.Path
  mesh: Mesh

  @classmethod
  def open(cls, config, workdir) -> "Experiment":
    """A run on all devices there are."""
    if config.model.dtype == "float32":  # accelerators would multiply float32 in bfloat16 parts
      jax.config.update("jax_default_matmul_precision", "float32")
    mesh = device_mesh.make_mesh(**config.mesh)
    if distributed.count() > 1:
      distributed.require_same(_started_with(config))
      _compare_base_models(config.model.path)
      device_mesh.connect(mesh)
    return cls(config, epath.Path(workdir), mesh)

  def stage(
    self,
    name: str,
    sections: Sequence[str],
    needs: Sequence[str] = (),
    *,
    reads_base: bool = False,
    given: dict[str, str] | None = None,
  ) -> manifest.Stage:
    """Opens a stage that depends on the seed, these config sections or leaves, these stages and
    perhaps the base model.

    What else it reads from outside the workdir is `given`: identities by name.
    """
    leaves = config_schema.plain(self.config, ("seed", *sections))
    fixed = {leaf: value for leaf, value in leaves.items() if config_schema.changes_results(leaf)}
    if reads_base:
      base = files_identity(resolve(self.config.model.path)) if distributed.first() else ""
      given = (given or {}) | {"base model": distributed.agree(base)}
    return manifest.Stage(self.workdir, name, fixed, needs, given)

  def base(self) -> Policy:
    """The base model."""
    return Policy.load(resolve_for_all(self.config.model.path), self.config.model, self.mesh)

  def policy(self, stage: str) -> Policy:
    """What a training stage made."""
    policy = Policy.load(self.workdir / stage / "policy", self.config.model, self.mesh)
    written = json.loads((policy.folder / "fingerprint.json").read_text())["fingerprint"]
    if policy.fingerprint != written:
      raise UserError(
        f"{policy.folder / 'params'} holds other weights ({policy.fingerprint}) than stage {stage} "
        f"wrote ({written}); delete {self.workdir / stage} to have it made again."
      )
    return policy

  def problems(self, split: str) -> dict[str, Problem]:
    """Problems by id, as the stage synthesize wrote them."""
    return Shards(self.workdir / "synthesize" / split, Problem).read_dict()

  def engine(
    self,
    policy: Policy,
    work: Callable[[], Work] | None = None,
    *,
    lanes: int,
    slots: int,
    stage: manifest.Stage | None = None,
    max_new_tokens: int = 0,
  ) -> Engine:
    """The decoding engine for a policy.

    Args:
      policy: what decodes.
      work: gives what there is to decode; asked by the first process where lanes or slots are 0.
      lanes, slots: as the config has them; 0 for what fits the work.
      stage: keeps what was chosen; None to choose anew.
      max_new_tokens: 0 for the config's.
    """
    c = self.config.engine
    new, refill = max_new_tokens or c.max_new_tokens, 0
    if not lanes or not slots:

      def choose():
        memory = device_mesh.memory()
        chosen = fit(
          policy.model,
          self.mesh,
          work(),
          fixed=Lanes(lanes, slots),
          max_new_tokens=new,
          memory=memory,
        )
        logging.info(
          "%s: %d lanes of %d slots, filled by %d, are chosen; %.0f %% of slots are expected to be "
          "busy.",
          stage.name if stage else "decoding",
          chosen.lanes,
          chosen.slots,
          chosen.refill,
          100 * chosen.busy,
        )
        return dataclasses.asdict(chosen)

      kept = (
        stage.settle("lanes", choose)
        if stage
        else distributed.agree(choose() if distributed.first() else None)
      )
      lanes, slots, refill = lanes or kept["lanes"], slots or kept["slots"], kept["refill"]
    return Engine(
      policy.model,
      self.mesh,
      policy.stops(c.stop),
      lanes=Lanes(lanes, slots, refill),
      max_new_tokens=new,
    )


def _started_with(config) -> dict:
  """What all processes must agree on: the config, versions and source, and the files that each
  reads for itself.
  """
  package = pathlib.Path(__file__).parents[1]
  source = hashlib.sha256()
  for path in sorted(package.rglob("*.py")):
    source.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
  about = {
    **config_schema.plain(config),
    **{f"the version of {name}": version for name, version in manifest.versions().items()},
    "the source of synthneg_jax": source.hexdigest()[:16],
  }
  home = os.environ.get("SYNTHNEG_DATA_DIR", "")
  for path in filter(
    None, (config.task.path, config.task.test_path, home and os.path.join(home, config.task.name))
  ):
    about.update(_file_hashes(epath.Path(path).expanduser()))
  return about


def _compare_base_models(path: str) -> None:
  """Refuses base models that differ; a process without one is sent process 0's."""
  base = epath.Path(BASES.get(path, path)).expanduser()
  identity = files_identity(base) if path and base.exists() else ""
  known = next(filter(None, distributed.gather(identity)), "")
  distributed.require_same({f"the files of the base model {base}": identity or known})


def _file_hashes(path: epath.Path) -> dict[str, str]:
  """The hash of a data file, or of each in a folder; nothing for what is no file here, such as a
  dataset of the Hub.
  """
  if not path.exists():
    return {}
  files = sorted(path.glob("*")) if path.is_dir() else [path]
  return {
    f"the data file {file.parent.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest()[
      :16
    ]
    for file in files
    if not file.is_dir()
  }


def sampling(section) -> Sampling:
  """Temperature, top-k and top-p of a config section."""
  return Sampling(section.temperature, section.get("top_k", 0), section.get("top_p", 1.0))
