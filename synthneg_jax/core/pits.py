"""Which step to blame: the first pit of a wrong response, the spurious step of a right one.

The *first pit* is the earliest step from which the policy no longer recovers; `first_pit` has the
rules that make this precise. Functions take one response of S steps and are meant to be `vmap`ed;
`known_S` says which steps have an estimate, and no rule picks a step without one. A new rule is
also a choice of pairs.pit_rule in runtime/config_schema.py, which says which schedules leave it
enough values.
"""

import jax
import jax.numpy as jnp

from synthneg_jax.core.advantages import step_advantages, values_before


def first_pit(
  q_S: jax.Array,
  known_S: jax.Array,
  v0: jax.Array,
  *,
  rule: str,
  drop_ratio: float = 0.34,
  min_before: float = 0.25,
) -> jax.Array:
  """The first pit of a wrong response.

  Rules:
    lowest_value      the first step with the lowest Q (the paper's Algorithm 1, second-hand);
    first_zero        the first step with Q = 0 (Self-Explore, https://arxiv.org/abs/2404.10346);
    first_dead        the first step with Q = 0 after which all known steps have Q = 0: a later
                      success shows that the zero was chance, since a success from y_1:j is one
                      from y_1:i (ours);
    least_advantage   the first step with the lowest A (https://arxiv.org/abs/2410.08146, app. A);
    relative_drop     the first step with Q <= drop_ratio · Q before and Q before >= min_before
                      (ours).

  In a response whose last step is wrong Q_L = 0, so lowest_value and first_zero agree where all
  steps are known.

  Args:
    q_S: [S] values; whatever stands at unknown steps is ignored.
    known_S: bool [S].
    v0: scalar, value of the bare problem.
    rule: one of the above, fixed at compile time.
    drop_ratio, min_before: of relative_drop.

  Returns:
    int32 scalar, the step from 0, or -1 where the rule finds none.

  Raises:
    ValueError: no such rule.
  """
  before_S = values_before(q_S, v0)
  before_known_S = jnp.concatenate([jnp.ones(1, bool), known_S[:-1]])
  if rule == "lowest_value":
    return jnp.where(jnp.any(known_S), jnp.argmin(jnp.where(known_S, q_S, jnp.inf)), -1).astype(
      jnp.int32
    )
  if rule == "first_zero":
    found_S = known_S & (q_S <= 0)
  elif rule == "first_dead":
    step_S = jnp.arange(q_S.size)
    found_S = known_S & (step_S > jnp.max(jnp.where(known_S & (q_S > 0), step_S, -1)))
  elif rule == "least_advantage":
    both_S = known_S & before_known_S
    return jnp.where(
      jnp.any(both_S), jnp.argmin(jnp.where(both_S, q_S - before_S, jnp.inf)), -1
    ).astype(jnp.int32)
  elif rule == "relative_drop":
    found_S = known_S & before_known_S & (q_S <= drop_ratio * before_S) & (before_S >= min_before)
  else:
    raise ValueError(
      f"No pit rule {rule!r}: lowest_value, first_zero, first_dead, least_advantage or "
      "relative_drop."
    )
  return jnp.where(jnp.any(found_S), jnp.argmax(found_S), -1).astype(jnp.int32)


def spurious_step(
  q_S: jax.Array, known_S: jax.Array, v0: jax.Array, *, below: float = 0.0
) -> jax.Array:
  """The step of a right response that made no progress: the first with the lowest advantage, if
  that is < `below`.

  Right answers may hold wrong steps. That advantages of right responses improve per-step DPO is
  VERIFIED (figure 10's caption of https://arxiv.org/abs/2406.14532); that the step of least
  advantage is the rejected one is INFERRED.

  Args:
    q_S, known_S, v0: as `first_pit` takes them.
    below: bound on the advantage, <= 0 as a rule.

  Returns:
    int32 scalar, the step from 0, or -1.
  """
  step = first_pit(q_S, known_S, v0, rule="least_advantage")
  return jnp.where((step >= 0) & (step_advantages(q_S, v0)[step] < below), step, -1)
