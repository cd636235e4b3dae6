"""The decoding engine of sampling, credit and evaluation: grows branches from trunks."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from synthneg_jax.core import geometry
from synthneg_jax.core.geometry import Lanes
from synthneg_jax.decoding import decode as decode_lib
from synthneg_jax.decoding.decode import Collected, DecodeSpec, Geometry, State, Stops, TrunkBatch
from synthneg_jax.decoding.sampling import Sampling
from synthneg_jax.models import layer_stacking
from synthneg_jax.models.decoder import Model
from synthneg_jax.runtime import device_mesh, distributed

_FINISH_REASONS = {decode_lib.EOS: "eos", decode_lib.STOP: "stop", decode_lib.LENGTH: "length"}


@dataclasses.dataclass(frozen=True)
class Trunk:
  """A trunk and the branches wanted from it.

  Attributes:
    ids: int [C].
    forks: number of trunk tokens that each item continues, 1..C.
    keys: uint32 [items, 2], the only source of randomness of each item (runtime/keys.py).
    limits: maximum new tokens of each item, at least 1; None for the engine's max_new_tokens.
  """

  ids: Sequence[int]
  forks: Sequence[int]
  keys: np.ndarray
  limits: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True)
class Generation:
  """One grown branch.

  Attributes:
    ids: int32 [n], ending with EOS iff the model stopped there.
    logp: float32 [n], nats, under the untempered model.
    drawn_logp: float32 [n], nats, under the sampling distribution.
    finish_reason: "eos", "stop" (a stop string was completed) or "length".
  """

  ids: np.ndarray
  logp: np.ndarray
  drawn_logp: np.ndarray
  finish_reason: str


def items_bucket(items: int) -> int:
  """Rounds up to 1, 4, 16, 64, ...: an item takes little memory beside its trunk's keys and
  values.
  """
  return 4 ** -(-(items - 1).bit_length() // 2)


def bucket(size: int) -> int:
  """Rounds up to 1, 2, 4, 8, 16, 32, 40, 48, 56, 64, 80, 96, ...: few shapes, little padding."""
  power = 1 << (size - 1).bit_length()
  quarter = power // 8
  return power if quarter < 8 else -(-size // quarter) * quarter


def cast_for_decoding(model: Model, params):
  """Casts parameters for decoding: matrices to the compute dtype; unrolled layers are unstacked.

  Matrix products would cast them anyway; casting once saves memory traffic on every token. Norm
  scales keep their dtype, because they enter in float32.
  """
  dtype = np.dtype(model.config.dtype)

  def cast(axes, leaf):
    return leaf if "norm" in axes else leaf.astype(dtype)

  params = jax.tree.map(
    cast, model.logical_axes(), params, is_leaf=lambda leaf: isinstance(leaf, tuple)
  )
  return layer_stacking.unstack(params) if layer_stacking.unrolls(model.config) else params


def params_shardings(model: Model, mesh: Mesh):
  """Shardings of `cast_for_decoding`'s result on a mesh from `runtime.device_mesh.decoding`."""
  shardings = device_mesh.shardings(mesh, model.logical_axes())
  if layer_stacking.unrolls(model.config):
    return layer_stacking.unstacked_shardings(shardings, model.config.num_layers)
  return shardings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
  """The jitted programs of one `DecodeSpec` on one mesh; each compiles at its first call.

  Attributes:
    empty: () -> State.
    prefill: (params, State, TrunkBatch) -> State; the state is donated.
    decode: (params, State, enough) -> State; the state is donated.
    collect: (State, lane) -> Collected, replicated.
    resting: (State,) -> bool [lanes], replicated.
  """

  empty: Callable[[], State]
  prefill: Callable[..., State]
  decode: Callable[..., State]
  collect: Callable[..., Collected]
  resting: Callable[[State], jax.Array]


@functools.lru_cache(maxsize=64)
def programs(spec: DecodeSpec, mesh: Mesh) -> Programs:
  """The cached programs of a spec; parameters keep their shardings.

  Args:
    spec: compared by content.
    mesh: from `runtime.device_mesh.decoding`.
  """
  state = decode_lib.state_shardings(spec.model, mesh)
  replicated = device_mesh.replicated(mesh)

  def jit_update(fn):
    """Jits fn(spec, params, state, replicated arrays) -> state."""
    fn = device_mesh.under(mesh, functools.partial(fn, spec))
    return jax.jit(
      fn, in_shardings=(None, state, replicated), out_shardings=state, donate_argnums=1
    )

  return Programs(
    empty=jax.jit(
      functools.partial(decode_lib.empty_state, spec.model, spec.geometry), out_shardings=state
    ),
    prefill=jit_update(decode_lib.prefill),
    decode=jit_update(decode_lib.decode),
    collect=jax.jit(decode_lib.collect, in_shardings=(state, replicated), out_shardings=replicated),
    resting=jax.jit(decode_lib.resting, in_shardings=(state,), out_shardings=replicated),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """The expected decoding work.

  Attributes:
    sizes: expected tokens of each trunk's items.
    longest: tokens of the longest trunk.
  """

  sizes: Sequence[Sequence[int]]
  longest: int


def fit(
  model: Model, mesh: Mesh, work: Work, *, fixed: Lanes, max_new_tokens: int, memory: float
) -> Lanes:
  """Chooses lanes and slots for some work that fit on the devices beside the parameters.

  Args:
    model, mesh: those of the engine.
    work: what is to be decoded.
    fixed: lanes and slots to keep; those that are 0 are chosen.
    max_new_tokens: L, maximum tokens of an item.
    memory: bytes of a device for parameters and state.
  """

  def state_bytes(slots: int) -> int:
    g = Geometry(
      lanes=1,
      slots=slots,
      trunk=bucket(work.longest),
      items=items_bucket(max(map(len, work.sizes), default=1)),
      new=max_new_tokens,
      refill=1,
    )
    state = jax.eval_shape(functools.partial(decode_lib.empty_state, model, g))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

  slot_bytes, tensor_shards = state_bytes(2) - state_bytes(1), mesh.shape["tensor"]
  # Each parameter is held twice: as loaded, and cast.
  param_bytes = sum(
    np.dtype(dtype).itemsize for dtype in (model.config.param_dtype, model.config.dtype)
  )
  return geometry.fit_lanes(
    [[max(size - 1, 0) for size in items] for items in work.sizes],
    longest=max_new_tokens - 1,
    lanes=fixed.lanes,
    slots=fixed.slots,
    shards=device_mesh.row_shards(mesh),
    memory=geometry.LaneMemory(
      lane_bytes=(state_bytes(1) - slot_bytes) / tensor_shards,
      slot_bytes=slot_bytes / tensor_shards,
      limit=memory - model.config.num_params * param_bytes / tensor_shards,
    ),
  )


@functools.lru_cache(maxsize=8)
def _cast_program(model: Model, mesh: Mesh) -> Callable:
  """The jitted `cast_for_decoding`."""
  return jax.jit(
    functools.partial(cast_for_decoding, model), out_shardings=params_shardings(model, mesh)
  )


class Engine:
  """Decodes any number of trunks with a fixed set of compiled programs.

  Attributes:
    stats: totals over all runs: decode steps, busy slot steps, slot steps, prefilled tokens.
  """

  def __init__(self, model: Model, mesh: Mesh, stops: Stops, *, lanes: Lanes, max_new_tokens: int):
    """Compiles nothing yet.

    Args:
      model: the architecture.
      mesh: lanes are split over its "data" and "fsdp" axes, parameters over "tensor" only.
      stops: EOS ids and stop strings.
      lanes: the number of lanes is rounded up to a multiple of the mesh's row shards.
      max_new_tokens: L.
    """
    shards = device_mesh.row_shards(mesh)
    num_lanes = -(-lanes.lanes // shards) * shards
    self._model, self._mesh, self._stops = model, device_mesh.decoding(mesh), stops
    self._lanes, self._new = dataclasses.replace(lanes, lanes=num_lanes), max_new_tokens
    self._source_params = self._params = None
    self.stats = {"steps": 0, "busy_slots": 0, "slots": 0, "prefill_tokens": 0}

  def run(
    self, params, trunks: Sequence[Trunk], sampling: Sampling, *, longest: int = 0
  ) -> Iterator[tuple[int, list[Generation]]]:
    """Yields (index of the trunk, its branches in the order of its items) as trunks finish.

    Trunks with most items start first. The tokens of an item depend only on its trunk, fork and
    key, not on the rest of the batch. Every process passes the same trunks and gets all branches.

    Args:
      params: the policy's parameters.
      trunks: what to decode.
      sampling: how tokens are drawn.
      longest: tokens of the longest trunk of all calls. Programs are compiled for bucketed sizes;
        with it, calls with shorter trunks reuse the same programs.

    Raises:
      UserError: a trunk contains an id without a row in the embedding.
      Stopped: on SIGTERM, after yielding the finished trunks.
    """
    if not trunks:
      return
    for trunk in trunks:
      self._model.config.check_ids(np.asarray(trunk.ids), "A prompt")
    lanes = self._num_lanes(len(trunks))
    g = Geometry(
      lanes=lanes,
      slots=self._lanes.slots,
      trunk=bucket(max(longest, *(len(trunk.ids) for trunk in trunks))),
      items=items_bucket(max(len(trunk.forks) for trunk in trunks)),
      new=self._new,
      refill=max(min(self._lanes.refill or lanes // 4, lanes), 1),
    )
    spec = DecodeSpec(model=self._model, geometry=g, sampling=sampling, stops=self._stops)
    compiled = programs(spec, self._mesh)
    params, state = self._cast(params), compiled.empty()
    waiting = sorted(range(len(trunks)), key=lambda index: -len(trunks[index].forks))[::-1]
    held = [-1] * lanes  # index of each lane's trunk, -1 for none

    while waiting or any(trunk >= 0 for trunk in held):
      free = [lane for lane in range(lanes) if held[lane] < 0]
      while waiting and free:
        group = [
          (free.pop(0), waiting.pop()) for _ in range(min(g.refill, len(free), len(waiting)))
        ]
        for lane, index in group:
          held[lane] = index
        self.stats["prefill_tokens"] += sum(len(trunks[index].ids) for _, index in group)
        batch = trunk_arrays(g, [(lane, trunks[index]) for lane, index in group])
        state = compiled.prefill(params, state, batch)
      state = compiled.decode(params, state, np.int32(g.refill if waiting else lanes))
      resting = np.asarray(compiled.resting(state))
      done = [lane for lane in range(lanes) if held[lane] >= 0 and resting[lane]]
      for start in range(0, len(done), g.refill):
        part = done[start : start + g.refill]
        lane = np.full(g.refill, part[-1], np.int32)
        lane[: len(part)] = part
        collected = jax.device_get(compiled.collect(state, lane))
        for row, lane in enumerate(part):
          yield held[lane], _generations(collected, row, num_items=len(trunks[held[lane]].forks))
          held[lane] = -1
      if distributed.stopping():
        raise distributed.Stopped
    steps, busy = jax.device_get((state.steps, state.busy))
    self.stats["steps"] += int(steps)
    self.stats["busy_slots"] += int(busy)
    self.stats["slots"] += int(steps) * lanes * self._lanes.slots

  def _num_lanes(self, num_trunks: int) -> int:
    """All lanes, or a quarter, a sixteenth ... for few trunks: each number is compiled for anew."""
    lanes, shards = self._lanes.lanes, device_mesh.row_shards(self._mesh)
    while (fewer := -(-lanes // (4 * shards)) * shards) >= num_trunks and fewer < lanes:
      lanes = fewer
    return lanes

  def _cast(self, params):
    """`cast_for_decoding`, cached for the last parameters."""
    if self._source_params is not params:
      self._source_params, self._params = params, _cast_program(self._model, self._mesh)(params)
    return self._params


def trunk_arrays(g: Geometry, group: Sequence[tuple[int, Trunk]]) -> TrunkBatch:
  """(lane, trunk) pairs as numpy arrays for `decode.prefill`, padded with empty rows."""
  batch = TrunkBatch(
    lane=np.full(g.refill, g.lanes, np.int32),
    token=np.zeros((g.refill, g.trunk), np.int32),
    length=np.zeros(g.refill, np.int32),
    item_fork=np.ones((g.refill, g.items), np.int32),
    item_key=np.zeros((g.refill, g.items, 2), np.uint32),
    item_limit=np.full((g.refill, g.items), g.new, np.int32),
    num_items=np.zeros(g.refill, np.int32),
  )
  for row, (lane, trunk) in enumerate(group):
    size, items = len(trunk.ids), len(trunk.forks)
    batch.lane[row], batch.length[row], batch.num_items[row] = lane, size, items
    batch.token[row, :size] = trunk.ids
    batch.item_fork[row, :items], batch.item_key[row, :items] = trunk.forks, trunk.keys
    if trunk.limits is not None:
      batch.item_limit[row, :items] = np.minimum(trunk.limits, g.new)
  return batch


def _generations(collected: Collected, row: int, *, num_items: int) -> list[Generation]:
  """The branches of one collected lane, as copies."""
  branches = []
  for item in range(num_items):
    index = (row, item, slice(collected.size[row, item]))
    branches.append(
      Generation(
        ids=collected.token[index].copy(),
        logp=collected.logp[index].copy(),
        drawn_logp=collected.drawn_logp[index].copy(),
        finish_reason=_FINISH_REASONS[int(collected.finish[row, item])],
      )
    )
  return branches
