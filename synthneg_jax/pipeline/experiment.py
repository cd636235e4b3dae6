"""What every stage receives: config, workdir, mesh, and access to policies and problems."""

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
  """A workdir with its config and the devices that it runs on."""

  config: object
  workdir: epath.Path
  mesh: Mesh

  @classmethod
  def open(cls, config, workdir) -> "Experiment":
    """Opens a workdir on all devices.

    Raises:
      UserError: the mesh does not fit the devices, or processes were started differently.
    """
    if config.model.dtype == "float32":  # accelerators multiply float32 in bfloat16 by default
      jax.config.update("jax_default_matmul_precision", "float32")
    mesh = device_mesh.make_mesh(**config.mesh)
    if distributed.count() > 1:
      distributed.require_same(_launch_state(config))
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
    """Opens a stage.

    Args:
      name: the stage's folder in the workdir.
      sections: config sections or leaves that it reads, besides the seed.
      needs: stages whose results it reads.
      reads_base: whether it reads the base model.
      given: identities of other inputs from outside the workdir, by name.

    Raises:
      UserError: as `manifest.Stage`.
    """
    leaves = config_schema.plain(self.config, ("seed", *sections))
    fixed = {leaf: value for leaf, value in leaves.items() if config_schema.changes_results(leaf)}
    if reads_base:
      base = files_identity(resolve(self.config.model.path)) if distributed.is_primary() else ""
      given = (given or {}) | {"base model": distributed.broadcast(base)}
    return manifest.Stage(self.workdir, name, fixed, needs, given)

  def base(self) -> Policy:
    """The base model."""
    return Policy.load(resolve_for_all(self.config.model.path), self.config.model, self.mesh)

  def policy(self, stage: str) -> Policy:
    """The policy that a training stage wrote.

    Raises:
      UserError: its weights have changed since.
    """
    policy = Policy.load(self.workdir / stage / "policy", self.config.model, self.mesh)
    written = json.loads((policy.folder / "fingerprint.json").read_text())["fingerprint"]
    if policy.fingerprint != written:
      raise UserError(
        f"{policy.folder / 'params'} holds other weights ({policy.fingerprint}) than stage {stage} "
        f"wrote ({written}); delete {self.workdir / stage} and re-run the stage."
      )
    return policy

  def problems(self, split: str) -> dict[str, Problem]:
    """The problems of a split by id, as stage synthesize wrote them."""
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
    """The decoding engine of a policy.

    Args:
      policy: the policy to sample from.
      work: returns the expected work; called in the first process if lanes or slots are 0.
      lanes, slots: the config's values; 0 chooses what fits the work and the memory.
      stage: records the choice for resumed runs; None chooses anew each time.
      max_new_tokens: 0 for the config's.
    """
    c = self.config.engine
    new, refill = max_new_tokens or c.max_new_tokens, 0
    if not lanes or not slots:

      def choose():
        chosen = fit(
          policy.model,
          self.mesh,
          work(),
          fixed=Lanes(lanes, slots),
          max_new_tokens=new,
          memory=device_mesh.memory(),
        )
        logging.info(
          "%s: chose %d lanes of %d slots, refilled %d at a time; about %.0f %% of slots will be "
          "busy.",
          stage.name if stage else "decoding",
          chosen.lanes,
          chosen.slots,
          chosen.refill,
          100 * chosen.busy,
        )
        return dataclasses.asdict(chosen)

      if stage:
        chosen = stage.choose_once("lanes", choose)
      else:
        chosen = distributed.broadcast(choose() if distributed.is_primary() else None)
      lanes, slots, refill = lanes or chosen["lanes"], slots or chosen["slots"], chosen["refill"]
    return Engine(
      policy.model,
      self.mesh,
      policy.stops(c.stop),
      lanes=Lanes(lanes, slots, refill),
      max_new_tokens=new,
    )


def _launch_state(config) -> dict:
  """What must be equal in all processes: config, versions, source, and local data files."""
  package = pathlib.Path(__file__).parents[1]
  source = hashlib.sha256()
  for path in sorted(package.rglob("*.py")):
    source.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
  state = {
    **config_schema.plain(config),
    **{f"the version of {name}": version for name, version in manifest.versions().items()},
    "the source of synthneg_jax": source.hexdigest()[:16],
  }
  home, task = os.environ.get("SYNTHNEG_DATA_DIR", ""), config.task
  for path in (task.path, task.test_path, home and os.path.join(home, task.name)):
    if path:
      state.update(_file_hashes(epath.Path(path).expanduser()))
  return state


def _compare_base_models(path: str) -> None:
  """Raises UserError if base models differ; a process without one will receive process 0's."""
  base = epath.Path(BASES.get(path, path)).expanduser()
  identity = files_identity(base) if path and base.exists() else ""
  first_identity = next(filter(None, distributed.gather(identity)), "")
  distributed.require_same({f"the files of the base model {base}": identity or first_identity})


def _file_hashes(path: epath.Path) -> dict[str, str]:
  """Hashes of a data file or of a folder's files; empty for other paths, such as Hub datasets."""
  if not path.exists():
    return {}
  hashes = {}
  for file in sorted(path.glob("*")) if path.is_dir() else [path]:
    if not file.is_dir():
      digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
      hashes[f"the data file {file.parent.name}/{file.name}"] = digest
  return hashes


def sampling(section) -> Sampling:
  """Temperature, top-k and top-p of a config section."""
  return Sampling(section.temperature, section.get("top_k", 0), section.get("top_p", 1.0))


def check_config(experiment: Experiment, names: Sequence[str]) -> None:
  """Raises UserError unless the config is the one that the stages were run with."""
  now = json.loads(json.dumps(config_schema.plain(experiment.config)))
  for name in names:
    path = experiment.workdir / name / "begun.json"
    if not path.exists():
      continue
    for leaf, value in json.loads(path.read_text())["config"].items():
      if now.get(leaf) != value:
        raise UserError(
          f"Stage {name} in {experiment.workdir} was begun with {leaf}={value!r}, now it is "
          f"{now.get(leaf)!r}; pass the config of the run."
        )
