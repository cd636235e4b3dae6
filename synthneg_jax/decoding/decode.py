"""The device side of the engine: lanes that hold trunks, slots that grow branches, all in one while loop.

A lane has one trunk, its cache, and a queue of items (fork, key). Its slots take items in order; a slot that finishes
takes the lane's next one at the same step. The first token of every item is drawn at prefill from the trunk's hidden
state at fork - 1, so that taking an item costs nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding

from synthneg_jax.core import tree as tree_lib
from synthneg_jax.decoding.sampling import Sampling, pick, uniforms
from synthneg_jax.models import layer_stacking
from synthneg_jax.models.attention import Cache
from synthneg_jax.models.decoder import Model
from synthneg_jax.runtime import device_mesh

UNFINISHED, EOS, STOP, LENGTH = range(4)


@dataclasses.dataclass(frozen=True)
class Geometry:
  """The sizes that programs are compiled for.

  Attributes:
    lanes, slots: as above.
    trunk: C, most tokens of a trunk.
    items: Q, most items of a lane.
    new: L, most new tokens of a branch.
    refill: lanes that are filled together.
  """

  lanes: int
  slots: int
  trunk: int
  items: int
  new: int
  refill: int


@dataclasses.dataclass(frozen=True)
class Stops:
  """When a branch ends, and which tokens it may hold.

  Attributes:
    eos_ids: tokens that end a branch.
    table: int32 [states, V], the automaton of the stop strings, whose last state accepts; None for none.
    num_tokens: ids from here on are no tokens (output matrices are often padded) and are never drawn; 0 for no bound.
  """

  eos_ids: tuple[int, ...]
  table: object = None
  num_tokens: int = 0

  def __hash__(self):
    return hash((self.eos_ids, id(self.table), self.num_tokens))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """Everything on the device. Q items, S slots, L new tokens; the first dimension is lanes but for the cache's layers.

  Attributes:
    cache: keys and values.
    item_fork: int32 [lanes, Q]; item_limit: int32 [lanes, Q], most tokens of it; item_uniform: float32 [lanes, Q, L],
      what each of its tokens will be drawn with.
    queue: int32 [lanes, Q], items in the order they are taken; queue_size, queue_next: int32 [lanes].
    slot_item: int32 [lanes, S], -1 idle; slot_fork: trunk tokens that its branch sees; slot_size: the branch's tokens so
      far; slot_token: the newest of them.
    item_stop: int32 [lanes, Q], state of the stop automaton.
    token: int32 [lanes, Q, L]; logp, drawn_logp: float32 [lanes, Q, L], nats, untempered and as drawn.
    size: int32 [lanes, Q], tokens of each item; finish: int32 [lanes, Q], why it ended.
    steps: int32 [], decode steps so far; busy: int32 [], slots that worked in them.
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
  """No trunk anywhere."""
  c = model.config
  dtype = jnp.dtype(c.dtype)

  def cache(*shape):
    if layer_stacking.unrolls(c):
      return tuple(jnp.zeros(shape, dtype) for _ in range(c.num_layers))
    return jnp.zeros((c.num_layers, *shape), dtype)

  ints = lambda *shape: jnp.zeros(shape, jnp.int32)
  floats = lambda *shape: jnp.zeros(shape, jnp.float32)
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
  """Lanes over the rows' axes; kv heads over "tensor".

  On TPU suffixes lie in memory as the decode loop writes them, a new token's heads side by side: laid out as they are
  named, all of them would be copied when the loop begins and when it ends, and there would be room for two. (One head alone
  would be padded to two, and lies well either way.)
  """
  lead = () if layer_stacking.unrolls(model.config) else ("layers",)
  sharding = lambda *names: NamedSharding(mesh, device_mesh.spec(*lead, *names))
  rows, replicated = device_mesh.rows(mesh), device_mesh.replicated(mesh)
  fields = {field.name: rows for field in dataclasses.fields(State)}
  trunk, suffix = sharding("rows", "kv_heads"), sharding("rows", None, "kv_heads")
  if mesh.devices.flat[0].platform == "tpu" and model.config.num_kv_heads > mesh.shape["tensor"]:
    order = tuple(range(len(lead))) + tuple(len(lead) + axis for axis in (0, 1, 3, 2, 4))
    suffix = Format(Layout(order), suffix)
  fields |= {"cache": Cache(trunk, trunk, suffix, suffix), "steps": replicated, "busy": replicated}
  return State(**fields)


@jax.named_scope("draw")
def _pick(logits, uniform, how: Sampling, stops: Stops):
  """Tokens for [lanes, n] places, each by its own uniform number."""
  if 0 < stops.num_tokens < logits.shape[-1]:
    logits = jnp.where(jnp.arange(logits.shape[-1])[None, None] < stops.num_tokens, logits, -jnp.inf)

  return jax.vmap(jax.vmap(lambda logits_V, uniform: pick(logits_V, uniform, how)))(logits, uniform)


def _ending(token, stop_state, size, limit, stops: Stops):
  """(the automaton's next state, why the branch ends with this token or UNFINISHED)."""
  if stops.table is not None:
    table = jnp.asarray(stops.table)
    stop_state = table[stop_state, token]
    stopped = stop_state == table.shape[0] - 1
  else:
    stopped = jnp.zeros(token.shape, bool)
  is_eos = functools.reduce(jnp.logical_or, [token == eos for eos in stops.eos_ids], jnp.zeros(token.shape, bool))
  finish = jnp.where(is_eos, EOS, jnp.where(stopped, STOP, jnp.where(size >= limit, LENGTH, UNFINISHED)))
  return stop_state, finish.astype(jnp.int32)


def _take_items(state: State) -> State:
  """Idle slots take their lane's next items."""
  idle = state.slot_item < 0
  place = state.queue_next[:, None] + jnp.cumsum(idle, axis=1) - 1
  takes = idle & (place < state.queue_size[:, None])
  item = jnp.take_along_axis(state.queue, jnp.where(takes, place, 0), axis=1)
  item = jnp.where(takes, item, state.slot_item)
  of_item = lambda field: jnp.take_along_axis(field, jnp.maximum(item, 0), axis=1)
  first = of_item(state.token[:, :, 0])
  return dataclasses.replace(
    state,
    slot_item=item,
    slot_fork=jnp.where(takes, of_item(state.item_fork), state.slot_fork),
    slot_size=jnp.where(takes, 1, state.slot_size),
    slot_token=jnp.where(takes, first, state.slot_token),
    queue_next=state.queue_next + jnp.sum(takes, axis=1, dtype=jnp.int32),
  )


def prefill(
  model: Model,
  g: Geometry,
  how: Sampling,
  stops: Stops,
  params,
  state: State,
  lane,
  token,
  length,
  item_fork,
  item_key,
  item_limit,
  num_items,
) -> State:
  """Puts new trunks with their items into lanes and draws every item's first token.

  Args:
    model, g, how, stops: fixed at compile time.
    params: the policy.
    state: as before; the lanes named here are overwritten.
    lane: int32 [R], where the trunks go; `g.lanes` for none.
    token: int32 [R, C]; length: int32 [R], the trunks and how many of their tokens count.
    item_fork: int32 [R, Q]; item_key: uint32 [R, Q, 2]; item_limit: int32 [R, Q], at most L; num_items: int32 [R].
  """
  rows, width = token.shape
  position = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), token.shape)
  zeros = jnp.zeros_like(token)
  trees = tree_lib.PackedTrees(
    token=token,
    position=position,
    tree=(position < length[:, None]).astype(jnp.int32),
    branch=zeros,
    fork=zeros,
    parent=zeros,
    scored=zeros.astype(bool),
  )
  h_RCD, (k, v) = model.hidden(params, trees, with_cache=True)

  h_RQD = jnp.take_along_axis(h_RCD, jnp.maximum(item_fork - 1, 0)[..., None], axis=1)
  uniform = jax.vmap(jax.vmap(lambda key_data: uniforms(key_data, g.new)))(item_key)
  first, logp, drawn = _pick(model.logits(params, h_RQD), uniform[..., 0], how, stops)
  stop, finish = _ending(first, jnp.zeros_like(first), 1, item_limit, stops)
  there = jnp.arange(g.items)[None] < num_items[:, None]
  waits = there & (finish == UNFINISHED)

  def put(field, new):
    return field.at[lane].set(new.astype(field.dtype), mode="drop")

  def put_trunk(field, new, axes):
    if isinstance(field, tuple):
      return tuple(put(part, part_new.transpose(axes)) for part, part_new in zip(field, new, strict=True))
    axes = (0, *(axis + 1 for axis in axes))
    return field.at[:, lane].set(new.transpose(axes).astype(field.dtype), mode="drop")

  at_start = lambda values: jnp.pad(values[..., None], ((0, 0), (0, 0), (0, g.new - 1)))
  state = dataclasses.replace(
    state,
    cache=dataclasses.replace(
      state.cache,
      trunk_k=put_trunk(state.cache.trunk_k, k, (0, 1, 3, 2)),
      trunk_v=put_trunk(state.cache.trunk_v, v, (0, 1, 2, 3)),
    ),
    item_fork=put(state.item_fork, item_fork),
    item_limit=put(state.item_limit, item_limit),
    item_uniform=put(state.item_uniform, uniform),
    queue=put(state.queue, jnp.argsort(~waits, axis=1, stable=True)),
    queue_size=put(state.queue_size, jnp.sum(waits, axis=1)),
    queue_next=put(state.queue_next, jnp.zeros(rows)),
    slot_item=put(state.slot_item, jnp.full((rows, g.slots), -1)),
    item_stop=put(state.item_stop, stop),
    token=put(state.token, at_start(first)),
    logp=put(state.logp, at_start(logp)),
    drawn_logp=put(state.drawn_logp, at_start(drawn)),
    size=put(state.size, there),
    finish=put(state.finish, jnp.where(there, finish, UNFINISHED)),
  )
  return _take_items(state)


def decode(model: Model, g: Geometry, how: Sampling, stops: Stops, params, state: State, enough) -> State:
  """Grows all branches until at least `enough` (traced int32) lanes have nothing left to do, or all have."""
  params = layer_stacking.apart(params) if layer_stacking.unrolls(model.config) else params
  lanes = jnp.arange(g.lanes)[:, None]

  def works(state: State):
    resting = jnp.sum(jnp.all(state.slot_item < 0, axis=1))
    return resting < jnp.minimum(enough, g.lanes)

  def step(state: State):
    active = state.slot_item >= 0
    item = jnp.maximum(state.slot_item, 0)
    index = jnp.where(active, state.slot_size - 1, 0)
    h_LSD, cache = model.hidden_step(params, state.slot_token, state.slot_fork, index, state.cache)
    uniform = state.item_uniform[lanes, item, index + 1]
    token, logp, drawn = _pick(model.logits(params, h_LSD), uniform, how, stops)
    size = state.slot_size + 1
    of_item = lambda field: jnp.take_along_axis(field, item, axis=1)
    stop, finish = _ending(token, of_item(state.item_stop), size, of_item(state.item_limit), stops)

    to = jnp.where(active, item, g.items)  # what idle slots computed is dropped
    write = lambda field, new: field.at[lanes, to, index + 1].set(new.astype(field.dtype), mode="drop")
    mark = lambda field, new: field.at[lanes, to].set(new, mode="drop")
    state = dataclasses.replace(
      state,
      cache=cache,
      token=write(state.token, token),
      logp=write(state.logp, logp),
      drawn_logp=write(state.drawn_logp, drawn),
      size=mark(state.size, size),
      finish=mark(state.finish, finish),
      item_stop=mark(state.item_stop, stop),
      slot_item=jnp.where(active & (finish == UNFINISHED), state.slot_item, -1),
      slot_size=jnp.where(active, size, state.slot_size),
      slot_token=token,
      steps=state.steps + 1,
      busy=state.busy + jnp.sum(active, dtype=jnp.int32),
    )
    return _take_items(state)

  return jax.lax.while_loop(works, step, state)


def collect(state: State, lane):
  """What the lanes [R] hold: (token, logp, drawn_logp [R, Q, L], size, finish [R, Q])."""
  fields = (state.token, state.logp, state.drawn_logp, state.size, state.finish)
  return tuple(jnp.take(field, lane, axis=0, mode="clip") for field in fields)


def resting(state: State):
  """bool [lanes], True where nothing is left to do."""
  return jnp.all(state.slot_item < 0, axis=1)
