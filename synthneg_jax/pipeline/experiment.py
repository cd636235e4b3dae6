"""What every stage is given: the config, the workdir, and how to open its own folder and the policies of others."""

import dataclasses
import json
from collections.abc import Sequence

import jax
from etils import epath
from jax.sharding import Mesh

from synthneg_jax.data.records import Problem, Shards
from synthneg_jax.decoding.engine import Engine
from synthneg_jax.decoding.policy import Policy, files_identity, resolve
from synthneg_jax.decoding.sampling import Sampling
from synthneg_jax.runtime import config_schema, device_mesh, manifest, processes
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
    if processes.count() > 1:
      processes.barrier()
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
    """Opens a stage that depends on the seed, these config sections or leaves, these stages and perhaps the base model.

    What else it reads from outside the workdir is `given`: identities by name.
    """
    leaves = config_schema.plain(self.config, ("seed", *sections))
    fixed = {leaf: value for leaf, value in leaves.items() if config_schema.changes_results(leaf)}
    if reads_base:
      given = (given or {}) | {"base model": files_identity(resolve(self.config.model.path))}
    return manifest.Stage(self.workdir, name, fixed, needs, given)

  def base(self) -> Policy:
    """The base model."""
    return Policy.load(resolve(self.config.model.path), self.config.model, self.mesh)

  def policy(self, stage: str) -> Policy:
    """What a training stage made."""
    policy = Policy.load(self.workdir / stage / "policy", self.config.model, self.mesh)
    written = json.loads((policy.folder / "fingerprint.json").read_text())["fingerprint"]
    if policy.fingerprint != written:
      raise UserError(
        f"{policy.folder / 'params'} holds other weights ({policy.fingerprint}) than stage {stage} wrote ({written}); "
        f"delete {self.workdir / stage} to have it made again."
      )
    return policy

  def problems(self, split: str) -> dict[str, Problem]:
    """Problems by id, as the stage synthesize wrote them."""
    return Shards(self.workdir / "synthesize" / split, Problem).read_dict()

  def engine(self, policy: Policy, *, lanes: int | None = None, slots: int | None = None) -> Engine:
    """The decoding engine for a policy."""
    c = self.config.engine
    return Engine(
      policy.model,
      self.mesh,
      policy.stops(c.stop),
      lanes=lanes or c.lanes,
      slots=slots or c.slots,
      max_new_tokens=c.max_new_tokens,
    )


def sampling(section) -> Sampling:
  """Temperature, top-k and top-p of a config section."""
  return Sampling(section.temperature, section.get("top_k", 0), section.get("top_p", 1.0))
