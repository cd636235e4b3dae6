"""AdamW with warm-up, a decaying rate and clipping, from the config's section `*.optimizer`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from synthneg_jax.runtime.errors import UserError


def make_schedule(config, num_steps: int):
  """Learning rate as a function of the step: linear warm-up, then cosine, linear or constant."""
  warmup = min(round(config.warmup_fraction * num_steps), max(num_steps - 1, 0))
  rest = max(num_steps - warmup, 1)
  decays = {
    "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
    "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
    "constant": optax.constant_schedule(config.learning_rate),
  }
  if config.schedule not in decays:
    raise UserError(f"optimizer.schedule={config.schedule!r} is none of {', '.join(decays)}.")
  if not warmup:
    return decays[config.schedule]
  # The first update, too, has a rate above zero.
  rise = optax.linear_schedule(config.learning_rate / (warmup + 1), config.learning_rate, warmup)
  return optax.join_schedules([rise, decays[config.schedule]], [warmup])


def learning_rates(config, num_steps: int) -> np.ndarray:
  """The rate of every update, float32 [num_steps]."""
  rates = jax.vmap(make_schedule(config, num_steps))(jnp.arange(num_steps))
  return np.asarray(jnp.broadcast_to(rates, (num_steps,)), np.float32)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """optax's transformation of this name, state and all, as one factor for all gradients.

  Ours because optax divides each gradient by the norm: a division that several moments read is
  written out first, one more pass over memory than AdamW needs.
  """

  def update(updates, state, params=None):
    del params
    norm = optax.tree.norm(updates)
    scale = jnp.where(norm < max_norm, 1.0, max_norm / norm)
    return jax.tree.map(lambda x: x * scale.astype(x.dtype), updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(config, num_steps: int) -> optax.GradientTransformation:
  """Clipping by global norm, then AdamW; the weight decay spares norms' scales (arrays whose last
  name is "scale").
  """

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
