"""The notebooks' figures: their contents, and gradients that equal the losses'."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from matplotlib.patches import FancyBboxPatch

from synthneg_jax.core import losses
from synthneg_jax.experiments.star_graph import plots
from synthneg_jax.report import figures, loss_figures, trace_figures
from synthneg_jax.report.trace_cards import ShownTrace, Step

pytestmark = pytest.mark.slow  # draws

HOSTILE = r"$\frac{ costs $5 and \x"  # no formula, and none that could be drawn


def shown(pit: int = 1) -> ShownTrace:
  steps = [
    Step("A: one\n", 4, 3, (0.3, 0.95), 0.75, 0.25, False),
    Step(HOSTILE + "\n", 4, 0, (0.0, 0.49), 0.0, -0.75, False),
    Step("#### 3", 0, 0, None, 0.0, 0.0, True),
  ]
  return ShownTrace("id", "problem", "4", "3", "wrong", 4, 8, 0.5, steps, pit, "B: two\nC: three")


def texts(figure) -> list[str]:
  return [text.get_text() for axes in figure.axes for text in axes.texts]


class TraceFigureTest(absltest.TestCase):
  def test_text_of_each_step(self):
    # Fails if counts, advantages, V or the verdict differ from the trace, or model text is parsed
    # as a formula.
    figure = trace_figures.credit(shown())
    figures.png(figure)  # a formula that cannot be parsed would raise here
    said = texts(figure)
    for text in (
      "V = 4/8",
      "Q = 3/4, A +0.25",
      "Q = 0/4, A −0.75",
      "Q = 0, the verdict, A 0.00",
      "2. " + HOSTILE,
    ):
      self.assertIn(text, said)

  def test_only_the_pit_is_framed(self):
    # Fails if the pit is not marked, or a mark appears without a pit.
    for pit in (-1, 0, 1):
      figure = trace_figures.credit(shown(pit))
      frames = [
        p for p in figure.axes[0].patches if isinstance(p, FancyBboxPatch) and p.get_linewidth() > 0
      ]
      self.assertLen(frames, int(pit >= 0))
      self.assertEqual(texts(figure).count("◀ pit"), int(pit >= 0))

  def test_colour_is_the_sign_of_the_advantage(self):
    # Fails if steps that lower Q are not orange and those that raise it not blue, or strength does
    # not follow the change.
    boxes = [
      p for p in trace_figures.credit(shown(-1)).axes[0].patches if isinstance(p, FancyBboxPatch)
    ]
    colors = [tuple(np.round(box.get_facecolor()[:3], 2)) for box in boxes]
    wanted = [
      tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
      for color in (figures.BLUE, figures.ORANGE, figures.GREY)
    ]
    np.testing.assert_allclose(colors, wanted, atol=0.01)
    self.assertGreater(boxes[1].get_alpha(), boxes[0].get_alpha())
    self.assertGreater(boxes[0].get_alpha(), boxes[2].get_alpha())

  def test_best_of_k_gives_share_and_value(self):
    # Fails if Q under Best-of-k is shown as the share of right rollouts.
    self.assertIn("3/4 right, Q 0.75, A +0.25", texts(trace_figures.credit(shown(), best_of=5)))

  def test_fork_shows_trunk_and_both_branches(self):
    # Fails if chosen and rejected are swapped, or the trunk contains the pit.
    figure = trace_figures.fork(trace_figures.pair_at_pit(shown(), (-1.0, -0.5), (-2.0, -3.0)))
    figures.png(figure)
    said = texts(figure)
    order = [
      said.index(t)
      for t in ("A: one", "B: two", "log p −1.00 → −0.50 nats", HOSTILE, "log p −2.00 → −3.00 nats")
    ]
    self.assertEqual(order, sorted(order))


class LossFigureTest(absltest.TestCase):
  def test_slopes_are_those_of_dpo(self):
    # Fails if the gradient has the wrong argument or sign: ∂/∂chosen = −β σ(−βh), ∂/∂rejected its
    # negative.
    chosen, rejected, beta = np.array([-1.0, 2.0]), np.array([1.0, -3.0]), 0.3
    value, by_chosen, by_rejected = loss_figures.slopes(
      functools.partial(losses.dpo_loss, beta=beta), jnp.asarray(chosen), jnp.asarray(rejected)
    )
    slope = beta / (1 + np.exp(beta * (chosen - rejected)))
    np.testing.assert_allclose(value, np.log1p(np.exp(-beta * (chosen - rejected))), rtol=1e-5)
    np.testing.assert_allclose(by_chosen, -slope, rtol=1e-5)
    np.testing.assert_allclose(by_rejected, slope, rtol=1e-5)

  def test_nll_adds_one_over_tokens(self):
    # Fails if the term is a sum instead of a mean per token, or its origin is not the reference.
    dpo = functools.partial(losses.dpo_loss, beta=0.3)
    both = loss_figures.with_nll(dpo, weight=2.0, num_tokens=8, ref_chosen=-4.0)
    at = jnp.array([-1.0]), jnp.array([0.5])
    (plain, plain_slope, _), (summed, slope, _) = (
      loss_figures.slopes(dpo, *at),
      loss_figures.slopes(both, *at),
    )
    np.testing.assert_allclose(summed - plain, 2.0 * 5.0 / 8, rtol=1e-6)
    np.testing.assert_allclose(slope - plain_slope, -2.0 / 8, rtol=1e-5)

  def test_by_step_pushes_the_rejected_steps_alone(self):
    # Fails if bars are not those of the rejected branch's steps, or their size is not β/2.
    dpo = functools.partial(losses.dpo_loss, beta=0.4)
    figure = loss_figures.by_step(
      [0.1, -0.5, 0.0], {"pit": loss_figures.rejecting(dpo, jnp.array([0.0, 1.0, 0.0]))}
    )
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure.axes[:2]]
    np.testing.assert_allclose(heights, [[0.1, -0.5, 0.0], [0.0, -0.2, 0.0]], atol=1e-6)

  def test_curves_are_one_at_the_start(self):
    # Fails if a curve is not relative to its value at h = 0.
    figure = loss_figures.by_margin(
      {
        "a": functools.partial(losses.dpo_loss, beta=0.1),
        "b": functools.partial(losses.ipo_loss, tau=0.05),
      },
      low=-10,
      high=10,
    )
    for axes in figure.axes:
      for line in [line for line in axes.lines if len(line.get_xdata()) == 301]:
        self.assertAlmostEqual(
          float(np.interp(0, line.get_xdata(), line.get_ydata())), 1.0, places=4
        )

  def test_arrows_of_dpop_point_to_the_chosen(self):
    # Fails if the axes are swapped: to the left of the origin DPOP pushes the chosen branch 1 + λ
    # times as hard as the rejected.
    dpop = functools.partial(losses.dpop_loss, beta=0.3, penalty=5.0)
    quiver = loss_figures.by_shifts({"DPOP": dpop}).axes[0].collections[-1]
    left = quiver.XY[:, 0] < 0
    np.testing.assert_allclose(-quiver.U[left] / quiver.V[left], 6.0, rtol=1e-3)


class StarGraphFigureTest(absltest.TestCase):
  def test_graph_values_of_each_arm(self):
    # Fails if values belong to another arm, the goal is at the wrong one, or a node is missing.
    figure = plots.draw_graph([[7, 1, 2], [7, 3, 4]], 1, [0.25, 0.75], [0.0, 0.5])
    figures.png(figure)
    at = {text.get_text(): text.xy for text in figure.axes[0].texts if text.get_text()}
    self.assertContainsSubset(("7", "1", "2", "3", "4"), at)
    self.assertEqual(at["π = 0.25, Q = 0.00"], at["1"])
    self.assertEqual(at["π = 0.75, Q = 0.50"], at["3"])
    self.assertEqual(at["goal"], at["4"])

  def test_cell_draws_training_solid_and_test_dashed(self):
    # Fails if splits or measures are swapped, or DPO's loss is labelled as SFT's.
    def split(base):
      return {"loss": base, "critical": base + 0.1, "error": base + 0.2}

    curve = [
      {"step": step, "train": split(0.1 + step / 100), "test": split(0.4 + step / 100)}
      for step in (0, 15)
    ]
    with_dpo = [{**point, "dpo_loss": 0.69 - point["step"] / 100} for point in curve]

    def drawn(axes):
      return [
        (line.get_linestyle(), *line.get_ydata())
        for line in axes.lines
        if len(line.get_xdata()) == 2
      ]

    def near(found, wanted):
      return self.assertEqual(
        [(style, round(a, 6), round(b, 6)) for style, a, b in found if a != b], wanted
      )

    loss, critical, error = plots.draw_cell({"curve": curve}, 0.5).axes
    near(drawn(loss), [("-", 0.1, 0.25), ("--", 0.4, 0.55)])
    near(drawn(critical), [("-", 0.2, 0.35), ("--", 0.5, 0.65)])
    near(drawn(error), [("--", 0.6, 0.75)])
    near(drawn(plots.draw_cell({"curve": with_dpo}, 0.5).axes[0]), [("-", 0.69, 0.54)])


class ReportFigureTest(absltest.TestCase):
  def test_verdict_bars_fill_the_row(self):
    # Fails if shares do not add up to 100 %, or right and wrong swap colours.
    figure = figures.verdicts(
      {"a": {"right": 1, "wrong": 2, "no_answer": 1}, "b": {"wrong": 5}},
      {"right": "r", "wrong": "w", "no_answer": "n"},
    )
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(widths, [25, 50, 25, 0, 100, 0])

  def test_shifts_colour_by_margin(self):
    # Fails if a pair with a negative margin is drawn as a positive one.
    dots = figures.shifts([1.0, -2.0], [0.5, -1.0]).axes[0].collections[0]
    np.testing.assert_array_equal(dots.get_offsets(), [[1.0, 0.5], [-2.0, -1.0]])
    self.assertGreater(dots.get_facecolors()[0][2], dots.get_facecolors()[1][2])


if __name__ == "__main__":
  absltest.main()
