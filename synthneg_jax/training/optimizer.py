"""AdamW with warmup, learning-rate decay and clipping, from a config section `*.optimizer`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from synthneg_jax.runtime.errors import UserError


def make_schedule(config, num_steps: int):
  """Learning rate as a function of the step: linear warmup, then cosine, linear or constant."""
  warmup = min(round(config.warmup_fraction * num_steps), max(num_steps - 1, 0))
  rest = max(num_steps - warmup, 1)
  decays = {
    "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
    "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
    "constant": optax.constant_schedule(config.learning_rate),
  }
  if config.schedule not in decays:
    raise UserError(f"optimizer.schedule={config.schedule!r} must be one of {', '.join(decays)}.")
  if not warmup:
    return decays[config.schedule]
  # Starts above zero, so the first update has an effect.
  rise = optax.linear_schedule(config.learning_rate / (warmup + 1), config.learning_rate, warmup)
  return optax.join_schedules([rise, decays[config.schedule]], [warmup])


def learning_rates(config, num_steps: int) -> np.ndarray:
  """The learning rate of every update, float32 [num_steps]."""
  rates = jax.vmap(make_schedule(config, num_steps))(jnp.arange(num_steps))
  return np.asarray(jnp.broadcast_to(rates, (num_steps,)), np.float32)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm` with the same state, but scaling all gradients by one factor.

  optax divides each gradient by the norm. XLA stores that quotient, which several moments read, in
  an extra pass over memory.
  """

  def update(updates, state, params=None):
    del params
    norm = optax.tree.norm(updates)
    scale = jnp.where(norm < max_norm, 1.0, max_norm / norm)
    return jax.tree.map(lambda x: x * scale.astype(x.dtype), updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(config, num_steps: int) -> optax.GradientTransformation:
  """Clipping by global norm, then AdamW without weight decay on norm scales (named "scale")."""

  def decayed(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)

  return optax.chain(
    clip_by_global_norm(config.clip_norm),
    optax.adamw(
      make_schedule(config, num_steps),
      b1=config.beta1,
      b2=config.beta2,
      weight_decay=config.weight_decay,
      mask=decayed,
    ),
  )
