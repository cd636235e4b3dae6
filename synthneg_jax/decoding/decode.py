"""Device side of the engine: lanes hold trunks, slots grow branches, in one while loop.

A lane has one trunk, its cache, and a queue of items (fork, key). Its slots take items in order; a
slot that finishes takes the lane's next item in the same step. Prefill draws the first token of
every item from the trunk's hidden state at fork - 1, so taking an item costs nothing.
"""

import dataclasses
import functools
import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding

from synthneg_jax.core import tree as tree_lib
from synthneg_jax.decoding.sampling import Sampling, pick, uniforms
from synthneg_jax.models import layer_stacking
from synthneg_jax.models.attention import Cache
from synthneg_jax.models.decoder import Model
from synthneg_jax.runtime import device_mesh

UNFINISHED, EOS, STOP, LENGTH = range(4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
  """The sizes that programs are compiled for.

  Attributes:
    lanes: trunks held at once.
    slots: S, branches of a trunk that grow at once.
    trunk: C, maximum tokens of a trunk.
    items: Q, maximum items of a lane.
    new: L, maximum new tokens of a branch.
    refill: R, lanes that are filled together.
  """

  lanes: int
  slots: int
  trunk: int
  items: int
  new: int
  refill: int


@dataclasses.dataclass(frozen=True, eq=False)
class Stops:
  """When a branch ends, and which tokens it may contain. Compared and hashed by content.

  Attributes:
    eos_ids: tokens that end a branch.
    table: int32 [states, V], the automaton of the stop strings, whose last state accepts; None for
      no stop strings. Stored as a read-only copy.
    num_tokens: V of the tokenizer. Ids from here on pad the output matrix and are never drawn; 0
      for no bound.
  """

  eos_ids: tuple[int, ...]
  table: np.ndarray | None = None
  num_tokens: int = 0

  def __post_init__(self):
    if self.table is not None:
      table = np.array(self.table, np.int32)
      table.setflags(write=False)
      object.__setattr__(self, "table", table)

  @functools.cached_property
  def _content(self) -> tuple:
    """The key for comparing and hashing; the table, maybe megabytes, enters as a digest."""
    table = None
    if self.table is not None:
      table = self.table.shape, hashlib.sha256(self.table.tobytes()).digest()
    return self.eos_ids, table, self.num_tokens

  def __eq__(self, other) -> bool:
    return isinstance(other, Stops) and self._content == other._content

  def __hash__(self) -> int:
    return hash(self._content)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeSpec:
  """Compile-time arguments of `prefill` and `decode`. Hashable: equal specs share programs."""

  model: Model
  geometry: Geometry
  sampling: Sampling
  stops: Stops


class TrunkBatch(NamedTuple):
  """New trunks with their items, to be put into lanes. R rows, C trunk tokens, Q items.

  Attributes:
    lane: int32 [R], destination lane; `Geometry.lanes` for an empty row.
    token: int32 [R, C], the trunks, padded.
    length: int32 [R], trunk lengths.
    item_fork: int32 [R, Q], number of trunk tokens that each item continues.
    item_key: uint32 [R, Q, 2], key of each item.
    item_limit: int32 [R, Q], maximum new tokens of each item, at most L.
    num_items: int32 [R], number of items; the rest is padding.
  """

  lane: jax.Array
  token: jax.Array
  length: jax.Array
  item_fork: jax.Array
  item_key: jax.Array
  item_limit: jax.Array
  num_items: jax.Array


class Collected(NamedTuple):
  """Results of finished lanes. R lanes, Q items, L new tokens.

  Attributes:
    token: int32 [R, Q, L].
    logp: float32 [R, Q, L], nats, under the untempered model.
    drawn_logp: float32 [R, Q, L], nats, under the sampling distribution.
    size: int32 [R, Q], tokens of each item.
    finish: int32 [R, Q], EOS, STOP or LENGTH.
  """

  token: jax.Array
  logp: jax.Array
  drawn_logp: jax.Array
  size: jax.Array
  finish: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """The engine's state on the device. Q items, S slots, L new tokens.

  Attributes:
    cache: keys and values.
    item_fork: int32 [lanes, Q], number of trunk tokens that each item continues.
    item_limit: int32 [lanes, Q], maximum new tokens of each item.
    item_uniform: float32 [lanes, Q, L], uniform numbers that draw its tokens.
    queue: int32 [lanes, Q], items in the order they are taken.
    queue_size, queue_next: int32 [lanes].
    slot_item: int32 [lanes, S], -1 if idle.
    slot_fork, slot_size, slot_token: int32 [lanes, S], the item's fork, its tokens so far, and the
      newest token.
    item_stop: int32 [lanes, Q], state of the stop automaton.
    token: int32 [lanes, Q, L].
    logp, drawn_logp: float32 [lanes, Q, L], as in `Collected`.
    size: int32 [lanes, Q], tokens of each item.
    finish: int32 [lanes, Q], why it ended, or UNFINISHED.
    steps: int32 [], decode steps so far.
    busy: int32 [], sum of busy slots over these steps.
  """

  cache: Cache
  item_fork: jax.Array
  item_limit: jax.Array
  item_uniform: jax.Array
  queue: jax.Array
  queue_size: jax.Array
  queue_next: jax.Array
  slot_item: jax.Array
  slot_fork: jax.Array
  slot_size: jax.Array
  slot_token: jax.Array
  item_stop: jax.Array
  token: jax.Array
  logp: jax.Array
  drawn_logp: jax.Array
  size: jax.Array
  finish: jax.Array
  steps: jax.Array
  busy: jax.Array


def empty_state(model: Model, g: Geometry) -> State:
  """The state without trunks."""
  c = model.config
  dtype = jnp.dtype(c.dtype)

  def cache(*shape):
    if layer_stacking.unrolls(c):
      return tuple(jnp.zeros(shape, dtype) for _ in range(c.num_layers))
    return jnp.zeros((c.num_layers, *shape), dtype)

  def ints(*shape):
    return jnp.zeros(shape, jnp.int32)

  def floats(*shape):
    return jnp.zeros(shape, jnp.float32)

  k, h = c.num_kv_heads, c.head_dim
  per_item = (g.lanes, g.items)
  return State(
    cache=Cache(
      cache(g.lanes, k, h, g.trunk),
      cache(g.lanes, k, g.trunk, h),
      cache(g.lanes, g.slots, k, g.new, h),
      cache(g.lanes, g.slots, k, g.new, h),
    ),
    item_fork=ints(*per_item),
    item_limit=ints(*per_item),
    item_uniform=floats(*per_item, g.new),
    queue=ints(*per_item),
    queue_size=ints(g.lanes),
    queue_next=ints(g.lanes),
    slot_item=jnp.full((g.lanes, g.slots), -1, jnp.int32),
    slot_fork=ints(g.lanes, g.slots),
    slot_size=ints(g.lanes, g.slots),
    slot_token=ints(g.lanes, g.slots),
    item_stop=ints(*per_item),
    token=ints(*per_item, g.new),
    logp=floats(*per_item, g.new),
    drawn_logp=floats(*per_item, g.new),
    size=ints(*per_item),
    finish=ints(*per_item),
    steps=ints(),
    busy=ints(),
  )


def state_shardings(model: Model, mesh: Mesh) -> State:
  """Shardings of the state: lanes over the row axes, kv heads over "tensor".

  On TPU, suffix caches get the memory layout in which the decode loop writes them, with a new
  token's heads adjacent. With the default layout, the loop would copy them when it starts and ends,
  and need twice their memory. (A single head would be padded to two, and is fast either way.)
  """
  lead = () if layer_stacking.unrolls(model.config) else ("layers",)

  def sharding(*names):
    return NamedSharding(mesh, device_mesh.spec(*lead, *names))

  rows, replicated = device_mesh.rows(mesh), device_mesh.replicated(mesh)
  fields = {field.name: rows for field in dataclasses.fields(State)}
  trunk, suffix = sharding("rows", "kv_heads"), sharding("rows", None, "kv_heads")
  if mesh.devices.flat[0].platform == "tpu" and model.config.num_kv_heads > mesh.shape["tensor"]:
    order = tuple(range(len(lead))) + tuple(len(lead) + axis for axis in (0, 1, 3, 2, 4))
    suffix = Format(Layout(order), suffix)
  fields |= {"cache": Cache(trunk, trunk, suffix, suffix), "steps": replicated, "busy": replicated}
  return State(**fields)


@jax.named_scope("draw")
def _pick(spec: DecodeSpec, logits, uniform):
  """`sampling.pick` for logits [lanes, n, V] and uniform numbers [lanes, n]."""
  num_tokens = spec.stops.num_tokens
  if 0 < num_tokens < logits.shape[-1]:
    logits = jnp.where(jnp.arange(logits.shape[-1])[None, None] < num_tokens, logits, -jnp.inf)

  def pick_one(logits_V, uniform):
    return pick(logits_V, uniform, spec.sampling)

  return jax.vmap(jax.vmap(pick_one))(logits, uniform)


def _ending(stops: Stops, token, stop_state, *, size, limit):
  """(the automaton's next state, the branch's finish after this token)."""
  if stops.table is not None:
    table = jnp.asarray(stops.table)
    stop_state = table[stop_state, token]
    stopped = stop_state == table.shape[0] - 1
  else:
    stopped = jnp.zeros(token.shape, bool)
  is_eos = functools.reduce(
    jnp.logical_or, [token == eos for eos in stops.eos_ids], jnp.zeros(token.shape, bool)
  )
  finish = jnp.where(
    is_eos, EOS, jnp.where(stopped, STOP, jnp.where(size >= limit, LENGTH, UNFINISHED))
  )
  return stop_state, finish.astype(jnp.int32)


def _at_item(field, item):
  """Entries of a field [lanes, Q] at items [lanes, S]."""
  return jnp.take_along_axis(field, item, axis=1)


def _take_items(state: State) -> State:
  """Assigns each idle slot its lane's next item."""
  idle = state.slot_item < 0
  position = state.queue_next[:, None] + jnp.cumsum(idle, axis=1) - 1
  takes = idle & (position < state.queue_size[:, None])
  item = _at_item(state.queue, jnp.where(takes, position, 0))
  item = jnp.where(takes, item, state.slot_item)
  index = jnp.maximum(item, 0)
  first = _at_item(state.token[:, :, 0], index)
  return dataclasses.replace(
    state,
    slot_item=item,
    slot_fork=jnp.where(takes, _at_item(state.item_fork, index), state.slot_fork),
    slot_size=jnp.where(takes, 1, state.slot_size),
    slot_token=jnp.where(takes, first, state.slot_token),
    queue_next=state.queue_next + jnp.sum(takes, axis=1, dtype=jnp.int32),
  )


def prefill(spec: DecodeSpec, params, state: State, batch: TrunkBatch) -> State:
  """Puts new trunks with their items into lanes and draws every item's first token.

  Args:
    spec: fixed at compile time.
    params: the policy's parameters, stacked or unstacked.
    state: the current state; the batch's lanes are overwritten.
    batch: the trunks.

  Returns:
    The state after idle slots have taken new items.
  """
  model, g = spec.model, spec.geometry
  lane, token, length = batch.lane, batch.token, batch.length
  rows, width = token.shape
  position = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), token.shape)
  trees = tree_lib.PackedTrees(
    token=token,
    position=position,
    leave=jnp.maximum(length[:, None], position + 1),
    parent=position - 1,
    scored=jnp.zeros(token.shape, bool),
  )
  h_RCD, (k, v) = model.hidden(params, trees, with_cache=True)

  h_RQD = jnp.take_along_axis(h_RCD, jnp.maximum(batch.item_fork - 1, 0)[..., None], axis=1)
  uniform = jax.vmap(jax.vmap(lambda key_data: uniforms(key_data, g.new)))(batch.item_key)
  first, logp, drawn = _pick(spec, model.logits(params, h_RQD), uniform[..., 0])
  stop, finish = _ending(spec.stops, first, jnp.zeros_like(first), size=1, limit=batch.item_limit)
  valid = jnp.arange(g.items)[None] < batch.num_items[:, None]
  waiting = valid & (finish == UNFINISHED)

  def put(field, new):
    return field.at[lane].set(new.astype(field.dtype), mode="drop")

  def put_trunk(field, new, axes):
    if isinstance(field, tuple):
      return tuple(
        put(part, part_new.transpose(axes)) for part, part_new in zip(field, new, strict=True)
      )
    axes = (0, *(axis + 1 for axis in axes))
    return field.at[:, lane].set(new.transpose(axes).astype(field.dtype), mode="drop")

  def at_start(values):
    """Pads first tokens [R, Q] to [R, Q, L]."""
    return jnp.pad(values[..., None], ((0, 0), (0, 0), (0, g.new - 1)))

  state = dataclasses.replace(
    state,
    cache=dataclasses.replace(
      state.cache,
      trunk_k=put_trunk(state.cache.trunk_k, k, (0, 1, 3, 2)),
      trunk_v=put_trunk(state.cache.trunk_v, v, (0, 1, 2, 3)),
    ),
    item_fork=put(state.item_fork, batch.item_fork),
    item_limit=put(state.item_limit, batch.item_limit),
    item_uniform=put(state.item_uniform, uniform),
    queue=put(state.queue, jnp.argsort(~waiting, axis=1, stable=True)),
    queue_size=put(state.queue_size, jnp.sum(waiting, axis=1)),
    queue_next=put(state.queue_next, jnp.zeros(rows)),
    slot_item=put(state.slot_item, jnp.full((rows, g.slots), -1)),
    item_stop=put(state.item_stop, stop),
    token=put(state.token, at_start(first)),
    logp=put(state.logp, at_start(logp)),
    drawn_logp=put(state.drawn_logp, at_start(drawn)),
    size=put(state.size, valid),
    finish=put(state.finish, jnp.where(valid, finish, UNFINISHED)),
  )
  return _take_items(state)


def decode(spec: DecodeSpec, params, state: State, enough) -> State:
  """Grows all branches until at least `enough` lanes are idle, or all lanes are.

  Args:
    spec: fixed at compile time.
    params: the policy's parameters, stacked or unstacked.
    state: from `prefill`.
    enough: int32 scalar, traced.
  """
  model, g = spec.model, spec.geometry
  params = layer_stacking.unstack(params) if layer_stacking.unrolls(model.config) else params
  lanes = jnp.arange(g.lanes)[:, None]

  def should_continue(state: State):
    return jnp.sum(resting(state)) < jnp.minimum(enough, g.lanes)

  def step(state: State):
    active = state.slot_item >= 0
    item = jnp.maximum(state.slot_item, 0)
    index = jnp.where(active, state.slot_size - 1, 0)
    h_LSD, cache = model.hidden_step(
      params, state.slot_token, state.cache, fork=state.slot_fork, index=index
    )
    uniform = state.item_uniform[lanes, item, index + 1]
    token, logp, drawn = _pick(spec, model.logits(params, h_LSD), uniform)
    size = state.slot_size + 1
    stop_state, limit = _at_item(state.item_stop, item), _at_item(state.item_limit, item)
    stop, finish = _ending(spec.stops, token, stop_state, size=size, limit=limit)
    target = jnp.where(active, item, g.items)  # out of range for idle slots: dropped

    def set_token(field, new):
      """Sets the newest tokens' values in a field [lanes, Q, L]."""
      return field.at[lanes, target, index + 1].set(new.astype(field.dtype), mode="drop")

    def set_item(field, new):
      """Sets the items' values in a field [lanes, Q]."""
      return field.at[lanes, target].set(new, mode="drop")

    state = dataclasses.replace(
      state,
      cache=cache,
      token=set_token(state.token, token),
      logp=set_token(state.logp, logp),
      drawn_logp=set_token(state.drawn_logp, drawn),
      size=set_item(state.size, size),
      finish=set_item(state.finish, finish),
      item_stop=set_item(state.item_stop, stop),
      slot_item=jnp.where(active & (finish == UNFINISHED), state.slot_item, -1),
      slot_size=jnp.where(active, size, state.slot_size),
      slot_token=token,
      steps=state.steps + 1,
      busy=state.busy + jnp.sum(active, dtype=jnp.int32),
    )
    return _take_items(state)

  return jax.lax.while_loop(should_continue, step, state)


def collect(state: State, lane) -> Collected:
  """The results of lanes int32 [R]."""
  fields = {name: getattr(state, name) for name in Collected._fields}
  return Collected(
    **{name: jnp.take(field, lane, axis=0, mode="clip") for name, field in fields.items()}
  )


def resting(state: State):
  """bool [lanes], True where all slots are idle."""
  return jnp.all(state.slot_item < 0, axis=1)
