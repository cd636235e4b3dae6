"""Log-probs under the reference policy, computed once and cached on disk for all losses."""

import hashlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from synthneg_jax.core import geometry
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.models.decoder import Model
from synthneg_jax.runtime import device_mesh, distributed
from synthneg_jax.runtime.errors import writing
from synthneg_jax.runtime.progress import Progress
from synthneg_jax.training import batch as batch_lib
from synthneg_jax.training import objectives
from synthneg_jax.training import step as step_lib
from synthneg_jax.training.batch import Example

_MIN_ROWS = 16  # rows per call


def rows_per_call(mesh: Mesh) -> int:
  """Rows that are scored together: at least 16, a multiple of the mesh's row shards."""
  shards = device_mesh.row_shards(mesh)
  return -(-_MIN_ROWS // shards) * shards


def branch_key(trunk: Sequence[int], fork: int, ids: Sequence[int]) -> str:
  """Hashes a branch's sequence and fork, independently of its tree and packing."""
  digest = hashlib.blake2b(digest_size=12)
  for part in (trunk[:fork], ids):
    digest.update(np.asarray(part, "<i4").tobytes() + b"|")
  return digest.hexdigest()


def _whole_branches(tree: Tree) -> list[Branch]:
  """The tree's branches, each extended to start where its path leaves the trunk."""
  return [
    Branch(len(before), tree.layout.token[own])
    for before, own in map(tree.path, range(tree.num_branches))
  ]


def branch_keys(tree: Tree) -> list[str]:
  """The `branch_key` of each branch, extended to start where its path leaves the trunk."""
  return [branch_key(tree.trunk, branch.fork, branch.ids) for branch in _whole_branches(tree)]


class Store:
  """Per-token log-probs in nats by `branch_key`; one .npz file per policy fingerprint and dtype."""

  def __init__(self, path: epath.Path):
    self._path, self._values = path, {}
    if path.exists():
      with np.load(io.BytesIO(path.read_bytes())) as file:
        flat, ends = file["logp"], file["ends"]
        for key, part in zip(file["key"].tolist(), np.split(flat, ends[:-1]), strict=True):
          self._values[key] = part

  def __contains__(self, key: str) -> bool:
    return key in self._values

  def __getitem__(self, key: str) -> np.ndarray:
    return self._values[key]

  def add(self, values: dict[str, np.ndarray]) -> None:
    """Adds log-probs and writes the file. All processes call it with the same values."""
    if not values:
      return
    self._values |= values
    buffer = io.BytesIO()
    np.savez(
      buffer,
      key=np.array(list(self._values)),
      logp=np.concatenate(list(self._values.values())),
      ends=np.cumsum([len(part) for part in self._values.values()]),
    )
    if distributed.is_primary():
      with writing(self._path):
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.parent / f"{self._path.name}.tmp"
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(self._path)
    distributed.barrier()


def make_forward(model: Model, mesh: Mesh, chunk: int = 0):
  """Returns a jitted forward(params, batch) -> log-probs [R, S] of scored tokens, nats, replicated.

  `chunk` as in `objectives.scored_logprobs`.
  """

  def forward(params, batch):
    return objectives.scored_logprobs(model, params, batch, chunk=chunk)[0]

  return jax.jit(
    device_mesh.under(mesh, forward),
    in_shardings=(
      device_mesh.shardings(mesh, model.logical_axes()),
      step_lib.batch_shardings(mesh),
    ),
    out_shardings=device_mesh.replicated(mesh),
  )


class Packing(NamedTuple):
  """How trees are packed for scoring.

  Attributes:
    mesh: of the forward pass.
    row_length: T, tokens per row; 0 to choose it.
    logit_chunk: `chunk` of `objectives.scored_logprobs`.
  """

  mesh: Mesh
  row_length: int
  logit_chunk: int = 0


def score(model: Model, params, trees: Sequence[Tree], *, store: Store, packing: Packing) -> None:
  """Scores every branch that is missing from the store, and adds it.

  Args:
    model, params: the reference; params are not read if no branch is missing.
    trees: the trees to score.
    store: receives the log-probs.
    packing: how trees are packed.

  Raises:
    UserError: a tree contains an id without a row in the embedding.
    Stopped: on SIGTERM, after adding what was scored.
  """
  mesh, row_length, chunk = packing
  unscored = []
  for tree in trees:
    missing = {
      key: branch
      for key, branch in zip(branch_keys(tree), _whole_branches(tree), strict=True)
      if key not in store
    }
    if missing:
      unscored.append(Tree(tree.trunk, tuple(missing.values())))
  if not unscored:
    logging.info("reference: all branches are in the store.")
    return
  for tree in unscored:
    model.config.check_ids(tree.layout.token, "A text to be scored")
  if not row_length:
    unscored.sort(key=lambda tree: -tree.num_tokens)
    row_length = geometry.fit_rows([[tree.num_tokens for tree in unscored]]).length
  examples = [Example(tree) for tree in unscored]
  rows = batch_lib.assign_rows(examples, row_length)
  per_call = rows_per_call(mesh)
  calls = [
    [examples[i] for row in rows[start : start + per_call] for i in row]
    for start in range(0, len(rows), per_call)
  ]
  shapes = [batch_lib.measure(call, row_length) for call in calls]
  shape = batch_lib.Shape(
    rows=per_call,
    length=row_length,
    scored=max(s.scored for s in shapes),
    pairs=0,
    branches=max(s.branches for s in shapes),
  ).rounded()
  forward = make_forward(model, mesh, chunk)
  values = {}
  with Progress("reference", len(calls), "batches") as progress:
    for call in calls:
      batch = batch_lib.build(call, shape)
      logp_RS = np.asarray(
        forward(params, device_mesh.place(batch, step_lib.batch_shardings(mesh)))
      )
      for r, row in enumerate(batch_lib.assign_rows(call, row_length)):
        start = 0
        for index in row:
          tree = call[index].tree
          scored_index = start + np.cumsum(tree.layout.scored) - 1
          for number, key in enumerate(branch_keys(tree)):
            values[key] = logp_RS[r, scored_index[tree.path(number)[1]]].astype(np.float32)
          start += tree.num_scored
      progress.update(1)
      if distributed.stopping():
        store.add(values)
        raise distributed.Stopped
  store.add(values)
