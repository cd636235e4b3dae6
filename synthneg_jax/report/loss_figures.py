"""Plots of preference losses: by margin, over both shifts, and by step of one response.

A loss is a function of `core.losses` with its settings bound; it takes (chosen, rejected,
ref_chosen, ref_rejected), [P] nats each. Gradients are computed by jax from the functions that
training uses.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from synthneg_jax.core import losses
from synthneg_jax.report import figures

Loss = Callable[..., jax.Array]
_COLORS = (figures.BLUE, figures.ORANGE, "#4f9a5d", "#a05fb4", figures.GREY)
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def with_nll(loss: Loss, *, weight: float, num_tokens: int, ref_chosen: float) -> Loss:
  """loss + weight · `losses.nll_term` of the chosen branch, as in training.

  Args:
    loss: of shifts, with the reference at 0.
    weight: dpo.nll_weight.
    num_tokens: of the chosen branch.
    ref_chosen: log π_ref(y⁺) in nats, the chosen branch's log-prob at shift 0.
  """

  def total(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P):
    term_P = losses.nll_term(chosen_P - ref_chosen_P + ref_chosen, jnp.asarray(num_tokens))
    return loss(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P) + weight * term_P

  return total


def slopes(
  loss: Loss, chosen_P: jax.Array, rejected_P: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(loss, ∂loss/∂ log π(y⁺), ∂loss/∂ log π(y⁻)), [P] each, with the reference at 0."""

  def values(c_P, r_P):
    return loss(c_P, r_P, jnp.zeros_like(c_P), jnp.zeros_like(r_P))

  def total(c_P, r_P):
    return jnp.sum(values(c_P, r_P))

  by_chosen_P, by_rejected_P = jax.grad(total, argnums=(0, 1))(chosen_P, rejected_P)
  return values(chosen_P, rejected_P), by_chosen_P, by_rejected_P


def rejecting(loss: Loss, step_S: jax.Array) -> Callable[[jax.Array], jax.Array]:
  """The loss of one pair as a function of the shifts [S] of one response's steps.

  Args:
    loss: of pairs.
    step_S: 1 for a step of the rejected branch, else 0. The chosen branch is another response's.
  """

  def step_loss(shift_S):
    zero_1 = jnp.zeros(1)
    return loss(zero_1, jnp.sum(step_S * shift_S)[None], zero_1, zero_1)[0]

  return step_loss


def by_margin(
  named: Mapping[str, Loss], *, low: float = -20.0, high: float = 40.0, most: float = 3.0
) -> Figure:
  """Each loss and, below, its pull −∂loss/∂h by margin h, relative to their values at h = 0.

  The margin varies with the rejected branch; the chosen branch stays at the reference.

  Args:
    named: label -> loss, at most five; neither the loss nor its pull may be 0 at h = 0.
    low, high: range of margins, nats.
    most: upper limit of the vertical axes.
  """
  margin_P = jnp.linspace(low, high, 301)
  chosen_P, zero_1 = jnp.zeros_like(margin_P), jnp.zeros(1)
  with matplotlib.rc_context(figures.STYLE):
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for (name, loss), color, dash in zip(named.items(), _COLORS, _DASHES, strict=False):
      value_P, _, by_rejected_P = slopes(loss, chosen_P, chosen_P - margin_P)
      value_1, _, pull_1 = slopes(loss, zero_1, zero_1)
      above.plot(
        margin_P, value_P / value_1, color=color, linestyle=dash, linewidth=1.8, label=name
      )
      # h falls as the rejected branch's log-prob grows.
      below.plot(margin_P, by_rejected_P / pull_1, color=color, linestyle=dash, linewidth=1.8)
    for axes in (above, below):
      axes.axvline(0, color=figures.INK, linewidth=0.8, alpha=0.5)
      axes.grid(axis="y")
    above.set_ylim(0, most)
    above.set_ylabel("loss / loss at 0")
    above.legend(frameon=False, fontsize=8, loc="upper right")
    below.axhline(0, color=figures.INK, linewidth=0.8, alpha=0.5)
    below.set_ylim(-0.7 * most, most)
    below.set_ylabel("pull / pull at 0")
    below.set_xlabel("margin h, nats (0: where training starts)")
    figure.align_ylabels()
    return figure


def by_shifts(named: Mapping[str, Loss], *, size: float = 8.0) -> Figure:
  """Each loss over the plane of both shifts: shading for its value, arrows for its push.

  Args:
    named: panel's title -> loss, at most four.
    size: largest shift in each direction, nats.
  """
  grid_G = jnp.linspace(-size, size, 241)
  coarse_G = jnp.linspace(-0.85 * size, 0.85 * size, 9)
  with matplotlib.rc_context(figures.STYLE):
    figure = Figure(figsize=(2.35 * len(named) + 0.3, 2.9), layout="constrained")
    panels = figure.subplots(1, len(named), sharey=True, squeeze=False)[0]
    for axes, (name, loss) in zip(panels, named.items(), strict=True):
      x_GG, y_GG = jnp.meshgrid(grid_G, grid_G)
      value_P, _, _ = slopes(loss, x_GG.reshape(-1), y_GG.reshape(-1))
      shade_GG = jnp.log1p(value_P - jnp.min(value_P)).reshape(x_GG.shape)
      shade_GG = jnp.floor(15.99 * shade_GG / jnp.max(shade_GG))  # discrete, like contour lines
      extent = (-size, size, -size, size)
      axes.imshow(
        shade_GG,
        cmap="Greys",
        alpha=0.5,
        origin="lower",
        extent=extent,
        aspect="auto",
        interpolation="nearest",
      )
      x_P, y_P = (part.reshape(-1) for part in jnp.meshgrid(coarse_G, coarse_G))
      _, by_chosen_P, by_rejected_P = slopes(loss, x_P, y_P)
      length_P = jnp.sqrt(by_chosen_P**2 + by_rejected_P**2) + 1e-12
      # Arrow lengths grow with the root of the gradient, which keeps weak pulls visible.
      shown_P = jnp.sqrt(length_P / jnp.max(length_P)) / length_P
      arrows = {
        "color": figures.BLUE,
        "angles": "xy",
        "scale_units": "xy",
        "scale": 9 / size,
        "width": 0.008,
      }
      axes.quiver(x_P, y_P, -by_chosen_P * shown_P, -by_rejected_P * shown_P, **arrows)
      axes.plot([0], [0], "o", color=figures.ORANGE, markersize=5)
      axes.set_title(name, loc="left", fontsize=9, fontweight="bold")
      axes.set_aspect("equal")
      axes.set_xlabel("shift of the chosen, nats")
      axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panels[0].set_ylabel("shift of the rejected, nats")
    return figure


def by_step(
  advantage_S: Sequence[float], named: Mapping[str, Callable[[jax.Array], jax.Array]]
) -> Figure:
  """How hard each loss pushes each step of a wrong response at the start: −∂loss/∂ log π(step).

  Args:
    advantage_S: A of each step, drawn first.
    named: panel's title -> loss as a function of the steps' shifts [S], 0 at the start.
  """
  steps = np.arange(1, len(advantage_S) + 1)
  columns = 4
  rows = -(-(len(named) + 1) // columns)
  with matplotlib.rc_context(figures.STYLE):
    figure = Figure(figsize=(8.8, 1.75 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).reshape(-1)
    bars = {"the steps' advantages A": np.asarray(advantage_S)}
    bars |= {
      name: -np.asarray(jax.grad(loss)(jnp.zeros(len(advantage_S)))) for name, loss in named.items()
    }
    for axes, (name, height_S) in zip(panels, bars.items(), strict=False):
      axes.bar(
        steps,
        height_S,
        color=[figures.BLUE if h >= 0 else figures.ORANGE for h in height_S],
        width=0.65,
      )
      axes.axhline(0, color=figures.INK, linewidth=0.8)
      axes.set_title(name, loc="left", fontsize=8.5, fontweight="bold")
      axes.set_xticks(steps)
      axes.yaxis.set_major_locator(MaxNLocator(4))
      axes.grid(axis="y")
    for axes in panels[len(bars) :]:
      axes.axis("off")
    for axes in panels[max(0, len(bars) - columns) : len(bars)]:
      axes.set_xlabel("step")
      axes.tick_params(labelbottom=True)
    return figure
