"""Which step to blame: the first pit of a wrong response, the spurious step of a right one.

The *first pit* is the earliest step from which the policy no longer recovers; `first_pit`
implements several definitions. Functions take one response of S steps; `vmap` them over a batch.
`known_S` is True where a step has an estimate; no rule selects a step without one. Register a new
rule as a choice of pairs.pit_rule in runtime/config_schema.py, which states the schedules that
leave it enough values. docs/method.md lists the sources.
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
    lowest_value      the first step with the lowest Q (the paper's Algorithm 1);
    first_zero        the first step with Q = 0 (Self-Explore, https://arxiv.org/abs/2404.10346);
    first_dead        the first step with Q = 0 after which all known steps have Q = 0: a success
                      from y_1:j is one from y_1:i for i < j, so it shows that an earlier zero was
                      chance;
    least_advantage   the first step with the lowest A (https://arxiv.org/abs/2410.08146, app. A);
    relative_drop     the first step with Q <= drop_ratio · Q_before and Q_before >= min_before.

  The last step of a wrong response has Q = 0, so lowest_value and first_zero agree if all steps are
  known.

  Args:
    q_S: [S] values; those of unknown steps are ignored.
    known_S: bool [S].
    v0: scalar, value of the bare problem.
    rule: one of the above, fixed at compile time.
    drop_ratio, min_before: parameters of relative_drop.

  Returns:
    int32 scalar, the index of the step from 0, or -1 if the rule selects none.

  Raises:
    ValueError: unknown rule.
  """
  before_S = values_before(q_S, v0)
  before_known_S = jnp.concatenate([jnp.ones(1, bool), known_S[:-1]])
  both_known_S = known_S & before_known_S
  if rule == "lowest_value":
    return _first_lowest(q_S, known_S)
  if rule == "least_advantage":
    return _first_lowest(q_S - before_S, both_known_S)
  if rule == "first_zero":
    is_pit_S = known_S & (q_S <= 0)
  elif rule == "first_dead":
    step_S = jnp.arange(q_S.size)
    is_pit_S = known_S & (step_S > jnp.max(jnp.where(known_S & (q_S > 0), step_S, -1)))
  elif rule == "relative_drop":
    is_pit_S = both_known_S & (q_S <= drop_ratio * before_S) & (before_S >= min_before)
  else:
    raise ValueError(
      f"Unknown pit rule {rule!r}: must be lowest_value, first_zero, first_dead, least_advantage "
      "or relative_drop."
    )
  return jnp.where(jnp.any(is_pit_S), jnp.argmax(is_pit_S), -1).astype(jnp.int32)


def _first_lowest(value_S: jax.Array, known_S: jax.Array) -> jax.Array:
  """Index of the first lowest known value, or -1 if none is known."""
  lowest = jnp.argmin(jnp.where(known_S, value_S, jnp.inf))
  return jnp.where(jnp.any(known_S), lowest, -1).astype(jnp.int32)


def spurious_step(
  q_S: jax.Array, known_S: jax.Array, v0: jax.Array, *, below: float = 0.0
) -> jax.Array:
  """The first step of a right response with the lowest advantage, if that is < `below`.

  A right response may contain steps that make no progress. Figure 10 of
  https://arxiv.org/abs/2406.14532 adds the advantages of right responses to per-step DPO.

  Args:
    q_S, known_S, v0: as in `first_pit`.
    below: bound on the advantage, usually <= 0.

  Returns:
    int32 scalar, the index of the step from 0, or -1.
  """
  step = first_pit(q_S, known_S, v0, rule="least_advantage")
  return jnp.where((step >= 0) & (step_advantages(q_S, v0)[step] < below), step, -1)
