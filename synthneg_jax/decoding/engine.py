"""The decoding engine: trunks with items go in, branches come out. Sampling, credit and evaluation
all use it.
"""

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

FINISH_REASONS = {decode_lib.EOS: "eos", decode_lib.STOP: "stop", decode_lib.LENGTH: "length"}


@dataclasses.dataclass(frozen=True)
class Trunk:
  """A trunk and the branches wanted from it.

  Attributes:
    ids: int [C].
    forks: for each item how many trunk tokens it continues, 1..C.
    keys: uint32 [items, 2], a key for each item (runtime/keys.py): its draws depend on it and
      nothing else.
    limits: for each item the most new tokens it may have, at least 1; None for the engine's
      max_new_tokens.
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
    logp: float32 [n] nats under the untempered model; drawn_logp: under the distribution that was
      drawn from.
    finish: "eos", "stop" (a stop string was completed) or "length".
  """

  ids: np.ndarray
  logp: np.ndarray
  drawn_logp: np.ndarray
  finish: str


def bucket(size: int) -> int:
  """Rounds up to 1, 2, 4, 8, 16, 32, 40, 48, 56, 64, 80, 96, ...: few shapes, little padding."""
  power = 1 << (size - 1).bit_length()
  quarter = power // 8
  return power if quarter < 8 else -(-size // quarter) * quarter


def cast_for_decoding(model: Model, params):
  """Parameters as decoding reads them, cast once for all its calls.

  Matrices in the dtype of the products that they are cast to anyway, so that no token reads more
  bytes than it needs (norms' scales enter in float32); unrolled layers are unstacked.
  """
  dtype = np.dtype(model.config.dtype)

  def cast(axes, leaf):
    return leaf if "norm" in axes else leaf.astype(dtype)

  params = jax.tree.map(
    cast, model.logical_axes(), params, is_leaf=lambda leaf: isinstance(leaf, tuple)
  )
  return layer_stacking.unstack(params) if layer_stacking.unrolls(model.config) else params


def params_shardings(model: Model, mesh: Mesh):
  """Shardings of what `cast_for_decoding` returns, on a mesh that `runtime.device_mesh.decoding`
  made.
  """
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
    collect: (State, lane) -> Collected, whole on every device.
    resting: (State,) -> bool [lanes], whole on every device.
  """

  empty: Callable[[], State]
  prefill: Callable[..., State]
  decode: Callable[..., State]
  collect: Callable[..., Collected]
  resting: Callable[[State], jax.Array]


@functools.lru_cache(maxsize=64)
def programs(spec: DecodeSpec, mesh: Mesh) -> Programs:
  """The programs of a spec, made once; parameters stay where they are.

  Args:
    spec: compared by content.
    mesh: one that `runtime.device_mesh.decoding` made.
  """
  state = decode_lib.state_shardings(spec.model, mesh)
  replicated = device_mesh.replicated(mesh)

  def update(fn):
    """(params, state, replicated arrays) -> state."""
    fn = device_mesh.under(mesh, functools.partial(fn, spec))
    return jax.jit(
      fn, in_shardings=(None, state, replicated), out_shardings=state, donate_argnums=1
    )

  return Programs(
    empty=jax.jit(
      functools.partial(decode_lib.empty_state, spec.model, spec.geometry), out_shardings=state
    ),
    prefill=update(decode_lib.prefill),
    decode=update(decode_lib.decode),
    collect=jax.jit(decode_lib.collect, in_shardings=(state, replicated), out_shardings=replicated),
    resting=jax.jit(decode_lib.resting, in_shardings=(state,), out_shardings=replicated),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What there is to decode, as far as it can be foreseen.

  Attributes:
    sizes: for each trunk the tokens that its items are expected to take.
    longest: tokens of the longest trunk.
  """

  sizes: Sequence[Sequence[int]]
  longest: int


def fit(
  model: Model,
  mesh: Mesh,
  work: Work,
  *,
  max_new_tokens: int,
  memory: float,
  lanes: int = 0,
  slots: int = 0,
) -> Lanes:
  """Lanes and slots for some work, in the memory of the mesh's devices beside the parameters.

  Args:
    model, mesh: as the engine takes them.
    work: what is to be decoded.
    max_new_tokens: L; what an item takes at most.
    memory: bytes that a device has for it all.
    lanes, slots: given ones; 0 to choose.
  """

  def state_bytes(slots: int) -> int:
    items = bucket(max(map(len, work.sizes), default=1))
    g = Geometry(
      lanes=1, slots=slots, trunk=bucket(work.longest), items=items, new=max_new_tokens, refill=1
    )
    state = jax.eval_shape(functools.partial(decode_lib.empty_state, model, g))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

  slot_bytes, split = state_bytes(2) - state_bytes(1), mesh.shape["tensor"]
  size = sum(
    np.dtype(dtype).itemsize for dtype in (model.config.param_dtype, model.config.dtype)
  )  # as loaded, and cast
  return geometry.fit_lanes(
    [[max(size - 1, 0) for size in items] for items in work.sizes],
    longest=max_new_tokens - 1,
    lanes=lanes,
    slots=slots,
    shards=device_mesh.row_shards(mesh),
    lane_bytes=(state_bytes(1) - slot_bytes) / split,
    slot_bytes=slot_bytes / split,
    room=memory - model.config.num_params * size / split,
  )


class Engine:
  """Decodes any number of trunks with a fixed set of compiled programs.

  Attributes:
    stats: decode steps, slot steps that did work and slot steps in all, prefilled tokens, over all
      runs.
  """

  def __init__(
    self,
    model: Model,
    mesh: Mesh,
    stops: Stops,
    *,
    lanes: int,
    slots: int,
    max_new_tokens: int,
    refill: int = 0,
  ):
    """Compiles nothing yet.

    Args:
      model: the architecture.
      mesh: lanes are split over its "data" and "fsdp" axes, parameters over "tensor" only.
      stops: EOS ids and stop strings.
      lanes: trunks held at once; rounded up to a multiple of the mesh's row shards.
      slots: branches of a trunk that grow at once.
      max_new_tokens: L.
      refill: lanes that are filled together, once so many rest; 0 for a quarter of them.
    """
    shards = device_mesh.row_shards(mesh)
    self._model, self._mesh, self._stops = model, device_mesh.decoding(mesh), stops
    self._lanes, self._slots, self._new = -(-lanes // shards) * shards, slots, max_new_tokens
    self._refill = refill
    self._given = self._params = None
    self.stats = {"steps": 0, "busy_slots": 0, "slots": 0, "prefill_tokens": 0}

  def run(
    self, params, trunks: Sequence[Trunk], sampling: Sampling, *, longest: int = 0
  ) -> Iterator[tuple[int, list[Generation]]]:
    """Yields (index of the trunk, its branches in the order of its items) as trunks finish; those
    with most items begin.

    The tokens of an item depend on its trunk, fork and key, not on what shares the batch. Programs
    are compiled for bucketed numbers of trunks, of their tokens and of their items; a caller that
    comes in rounds gives the tokens of the `longest` trunk that it will ever bring, so that all
    rounds share one length. Of several processes each gives the same trunks, runs the same programs
    in step, and gets all branches.

    Raises:
      UserError: a trunk holds an id that the model has no row for.
      Stopped: SIGTERM came; after the trunks that had finished by then.
    """
    if not trunks:
      return
    for trunk in trunks:
      self._model.config.check_ids(np.asarray(trunk.ids), "A prompt")
    shards = device_mesh.row_shards(self._mesh)
    lanes = min(self._lanes, -(-bucket(len(trunks)) // shards) * shards)
    g = Geometry(
      lanes=lanes,
      slots=self._slots,
      trunk=bucket(max(longest, *(len(trunk.ids) for trunk in trunks))),
      items=bucket(max(len(trunk.forks) for trunk in trunks)),
      new=self._new,
      refill=max(min(self._refill or lanes // 4, lanes), 1),
    )
    spec = DecodeSpec(model=self._model, geometry=g, sampling=sampling, stops=self._stops)
    compiled = programs(spec, self._mesh)
    params, state = self._laid_out(params), compiled.empty()
    waiting = sorted(range(len(trunks)), key=lambda index: -len(trunks[index].forks))[::-1]
    held = [-1] * lanes  # which trunk a lane holds

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
      rests = np.asarray(compiled.resting(state))
      done = [lane for lane in range(lanes) if held[lane] >= 0 and rests[lane]]
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
    self.stats["slots"] += int(steps) * lanes * self._slots

  def _laid_out(self, params):
    """The parameters as the programs read them, laid out once and not in each call."""
    if self._given is not params:
      lay_out = jax.jit(
        functools.partial(cast_for_decoding, self._model),
        out_shardings=params_shardings(self._model, self._mesh),
      )
      self._given, self._params = params, lay_out(params)
    return self._params


def trunk_arrays(g: Geometry, group: Sequence[tuple[int, Trunk]]) -> TrunkBatch:
  """Trunks and the lanes that they go to, as numpy arrays for `decode.prefill`; the rows beyond
  them are empty.
  """
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
  """The branches of one collected lane, numpy arrays of their own."""
  branches = []
  for item in range(num_items):
    place = (row, item, slice(collected.size[row, item]))
    branches.append(
      Generation(
        ids=collected.token[place].copy(),
        logp=collected.logp[place].copy(),
        drawn_logp=collected.drawn_logp[place].copy(),
        finish=FINISH_REASONS[int(collected.finish[row, item])],
      )
    )
  return branches
