"""The train step: accumulates gradients of an objective and applies an update, under a mesh."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from synthneg_jax.models import layer_stacking
from synthneg_jax.models.adapter import Adapter
from synthneg_jax.models.config import ModelConfig
from synthneg_jax.models.decoder import Model
from synthneg_jax.runtime import device_mesh
from synthneg_jax.training.batch import Batch


def state_shardings(
  model: Model | Adapter,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  *,
  stacked: bool = False,
):
  """Shardings of the train state {"params", "opt_state", "step"}; moments follow their parameters.

  Args:
    model: what is trained.
    optimizer: of its parameters.
    mesh: of the devices.
    stacked: True for the layers of checkpoints, False for those of the train step
      (models/layer_stacking.py). Adapters are small and always stacked.
  """
  params = device_mesh.shardings(mesh, model.logical_axes())
  replicated = device_mesh.replicated(mesh)
  opt_state = optax.tree_map_params(
    optimizer,
    lambda _, sharding: sharding,
    jax.eval_shape(optimizer.init, model.abstract_params()),
    params,
    transform_non_params=lambda _: replicated,
  )
  shardings = {"params": params, "opt_state": opt_state, "step": replicated}
  if isinstance(model, Model) and layer_stacking.unrolls(model.config) and not stacked:
    return layer_stacking.unstacked_shardings(shardings, model.config.num_layers)
  return shardings


def initial_state(optimizer: optax.GradientTransformation, params):
  """The train state before the first update."""
  return {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}


def make_init(optimizer: optax.GradientTransformation, shardings):
  """Returns init(stacked params) -> train state; donates parameters that stay stacked."""

  def init(params):
    return initial_state(optimizer, layer_stacking.like(shardings["params"], params))

  return jax.jit(
    init,
    out_shardings=shardings,
    donate_argnums=() if layer_stacking.is_unstacked(shardings) else 0,
  )


def make_relayout(shardings):
  """Returns relayout(state) -> the state with these shardings, stacked or unstacked as they are."""
  return jax.jit(functools.partial(layer_stacking.like, shardings), out_shardings=shardings)


def bytes_per_token(
  config: ModelConfig, length: int, *, chunk: int = 0, fused: bool = False
) -> float:
  """Estimates the bytes of activations per token that the backward pass needs.

  tests/training/step_test.py compares it with XLA's memory analysis.

  Args:
    config: of the model.
    length: tokens of a row.
    chunk: `chunk` of `objectives.scored_logprobs`.
    fused: attention stores no scores; otherwise one per token of the row and head.
  """
  c, size = config, jnp.dtype(config.dtype).itemsize
  layer = size * (8 * c.d_model + 4 * c.d_ff + 3 * (c.num_heads + c.num_kv_heads) * c.head_dim)
  if not fused:
    layer += c.num_heads * length * (4 + size)
  layers = {"none": c.num_layers * layer, "selective": (c.num_layers / 2 + 1) * layer}.get(
    c.remat, layer + c.num_layers * c.d_model * size
  )
  logits = 3 * 4 * c.vocab_size * (min(chunk, length) / length if chunk else 1)
  return layers + logits


def batch_shardings(mesh: Mesh) -> Batch:
  """Shardings of a batch, a tree prefix: rows are split, counts replicated."""
  rows, replicated = device_mesh.rows(mesh), device_mesh.replicated(mesh)
  return Batch(*[rows] * 8, num_scored=replicated, num_pairs=replicated)


def make_update(objective, optimizer: optax.GradientTransformation, *, num_microbatches: int = 1):
  """Returns the pure update(state, batch, *frozen) -> (state, metrics) of the train step.

  Args:
    objective: from training/objectives.py.
    optimizer: of the parameters.
    num_microbatches: number of sequential microbatches that a batch's rows are split into.

  Returns:
    The update. Metrics are pairs (sum, count) of scalars.
  """

  def split(x):
    """Splits rows [R, ...] into [num_microbatches, ...]; repeats scalars."""
    if not x.ndim:
      return jnp.broadcast_to(x, num_microbatches)
    return x.reshape(num_microbatches, x.shape[0] // num_microbatches, *x.shape[1:])

  def gradients(params, batch: Batch, *frozen):
    grad = jax.value_and_grad(lambda params, batch: objective(params, batch, *frozen), has_aux=True)
    if num_microbatches == 1:
      (_, metrics), grads = grad(params, batch)
      return grads, metrics

    def sums(params, part):
      (_, metrics), grads = grad(params, part)
      return grads, metrics

    def add(total, part):
      return jax.tree.map(jnp.add, total, sums(params, part)), None

    parts = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sums, params, first))
    return jax.lax.scan(add, zeros, parts)[0]

  def update(state, batch: Batch, *frozen):
    grads, metrics = gradients(state["params"], batch, *frozen)
    with jax.named_scope("update"):
      updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
      metrics["grad_norm"] = (optax.tree_utils.tree_norm(grads), jnp.ones(()))
      params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

  return update


def make_step(
  objective,
  optimizer: optax.GradientTransformation,
  shardings,
  *,
  mesh: Mesh,
  num_microbatches: int = 1,
  frozen=(),
):
  """Returns a jitted step(state, batch, *frozen) -> (state, metrics), which donates the state.

  Args:
    objective, optimizer, num_microbatches: as in `make_update`.
    shardings: of the state, from `state_shardings`.
    mesh: of the devices.
    frozen: shardings of the untrained parameters that the objective takes after the batch.
  """
  return jax.jit(
    device_mesh.under(mesh, make_update(objective, optimizer, num_microbatches=num_microbatches)),
    in_shardings=(shardings, batch_shardings(mesh), *frozen),
    out_shardings=(shardings, device_mesh.replicated(mesh)),
    donate_argnums=0,
  )
