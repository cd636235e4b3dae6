"""Objectives over packed batches in float64, against unpacked sequences and numpy."""

import dataclasses
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from etils import epath

from synthneg_jax.core import losses
from synthneg_jax.core import tree as tree_lib
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.data.records import Pair
from synthneg_jax.training import batch as batch_lib
from synthneg_jax.training import objectives, pair_trees, reference
from synthneg_jax.training.batch import Example, PairInTree, Shape
from tests import random_trees, tiny_model

# Pairs 0 and 1 share a rejected branch; in both, chosen and rejected differ at their first token
# already.
A = Example(
  Tree([1, 2, 3, 4, 5], (Branch(5, [6, 7, 8]), Branch(5, [9, 10]), Branch(5, [11]))),
  (PairInTree(0, 1, -9.0, -4.0), PairInTree(2, 1, -1.0, -4.0)),
)
# A pair whose rejected is a prefix of the chosen, and a branch that forks early and belongs to no
# pair.
B = Example(
  Tree([12, 13, 14], (Branch(3, [15, 16]), Branch(3, [15]), Branch(1, [17, 18]))),
  (PairInTree(0, 1, -60.0, -2.0),),
)
# A branch of a branch, which shares a scored token and an unscored one; no pair.
C = Example(
  Tree(
    [19, 20, 21],
    (Branch(2, [23, 24, 25], scored=[True, False, True], branches=(Branch(4, [22]),)),),
  ),
)
EXAMPLES = (A, B, C)
SHAPE = Shape(rows=3, length=18, scored=10, pairs=2, branches=5)  # rows: A and C, B, padding
BETA, NLL, SMOOTHING = 0.3, 0.2, 0.1
EOS = (10, 25)  # the ends of A's rejected branch and of C's
LONGEST = 8

MODEL = tiny_model.model(dtype="float64", param_dtype="float64")
MESH = tiny_model.one_device_mesh()
sft = jax.jit(objectives.make_sft(MODEL))
dpo_loss = functools.partial(losses.dpo_loss, beta=BETA, label_smoothing=SMOOTHING)
dpo = jax.jit(
  objectives.make_preference(
    MODEL, objectives.Preference(loss=dpo_loss, beta=BETA, nll_weight=NLL), eos_ids=EOS
  )
)


@jax.jit
def _next_logprobs(params, token_NT):
  """log π of each next token of unpacked, right-padded sequences; [N, T - 1]."""
  packed = tree_lib.empty_rows(*token_NT.shape)
  position = np.broadcast_to(np.arange(token_NT.shape[1], dtype=np.int32), token_NT.shape)
  packed = dataclasses.replace(
    packed, token=token_NT, position=position, leave=np.full_like(position, position.shape[1])
  )
  h, _ = MODEL.hidden(params, packed)
  return losses.token_logprobs(MODEL.logits(params, h[:, :-1]), token_NT[:, 1:])


def unpacked(params, examples):
  """For each example, the log-probs of each branch's scored tokens, float64 nats."""
  rows = [random_trees.sequences(example.tree) for example in examples]
  flat = [row for of_example in rows for row in of_example]
  token = np.zeros((len(flat), LONGEST), np.int32)
  for n, (ids, _) in enumerate(flat):
    token[n, : len(ids)] = ids
  logp = np.asarray(_next_logprobs(params, token))
  parts = iter([logp[n, : len(ids) - 1][scored[1:]] for n, (ids, scored) in enumerate(flat)])
  return [[next(parts) for _ in of_example] for of_example in rows]


def averages(metrics) -> dict[str, float]:
  scalars = {
    name: pair for name, pair in metrics.items() if not name.startswith(objectives.HISTOGRAM)
  }
  return {name: float(total) / float(count) for name, (total, count) in scalars.items()}


class Bandit:
  """A policy of one state: its logits are its parameters, whatever the input."""

  def hidden(self, params, trees):
    return jnp.zeros((*trees.token.shape, 1), params.dtype), None

  def logits(self, params, h):
    return jnp.broadcast_to(params, (*h.shape[:-1], params.size))


class EquationFourTest(absltest.TestCase):
  def test_the_optimum_on_a_bandit(self):
    # Fails if the objective's optimum is not π ∝ π_sft exp(A/β), equation 4's: another β, a weight
    # that is normalised for each branch, or a cut where none is due; with a cut the optimum is that
    # of the cut weights.
    counts, advantage, beta = np.array([5, 3, 2]), np.array([-0.3, 0.1, 0.4]), 0.3
    branches = [
      Branch(1, [a], advantage=[advantage[a]]) for a in range(3) for _ in range(counts[a])
    ]
    example = Example(Tree([0], tuple(branches)))
    batch = batch_lib.build([example], batch_lib.measure([example], 16))
    for max_weight in (1e9, 1.2):
      objective = objectives.make_advantage_weighted(Bandit(), beta=beta, max_weight=max_weight)
      grad = jax.jit(jax.grad(lambda logits, objective=objective: objective(logits, batch)[0]))
      logits = jnp.zeros(3)
      for _ in range(400):
        logits -= grad(logits)
      target = counts * np.minimum(np.exp(advantage / beta), max_weight)
      np.testing.assert_allclose(jax.nn.softmax(logits), target / target.sum(), atol=1e-4)


class ObjectivesTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(jax.enable_x64(True))
    cls.params = tiny_model.make_params(MODEL)
    cls.batch = batch_lib.build(EXAMPLES, SHAPE)
    cls.alone = unpacked(cls.params, EXAMPLES)
    cls.sft_loss, cls.sft_metrics = sft(cls.params, cls.batch)
    cls.dpo_loss, cls.dpo_metrics = dpo(cls.params, cls.batch)

  def pair_sums(self):
    """(chosen, rejected, ref_chosen, ref_rejected, chosen tokens) of each unpacked pair."""
    found = []
    for example, branches in zip(EXAMPLES, self.alone, strict=True):
      for pair in example.pairs:
        chosen = branches[pair.chosen]
        found.append(
          (
            chosen.sum(),
            branches[pair.rejected].sum(),
            pair.ref_chosen,
            pair.ref_rejected,
            len(chosen),
          )
        )
    self.assertLen(found, 3)
    return np.array(found).T

  def early_eos(self):
    """P(EOS) after each of the six branches that do not end in it, from the unpacked sequences."""
    rows = [
      ids
      for example in EXAMPLES
      for ids, _ in random_trees.sequences(example.tree)
      if ids[-1] not in EOS
    ]
    self.assertLen(rows, 6)
    token = np.zeros((len(rows), len(EOS), LONGEST + 1), np.int32)
    for n, ids in enumerate(rows):
      for e, eos in enumerate(EOS):
        token[n, e, : len(ids) + 1] = [*ids, eos]
    logp = np.asarray(_next_logprobs(self.params, token.reshape(-1, LONGEST + 1))).reshape(
      len(rows), len(EOS), -1
    )
    return np.array([np.exp(logp[n, :, len(ids) - 1]).sum() for n, ids in enumerate(rows)])

  def test_sft_equals_unpacked_sequences(self):
    # Fails if a token's log-prob is read elsewhere than at its parent, if a branch's first token is
    # left out, if unscored tokens or padding count, if a token of two branches counts once, or if
    # the mean is taken per row or per sequence.
    scored = [value for branches in self.alone for logp in branches for value in logp.tolist()]
    self.assertLen(scored, 6 + 5 + (2 + 2))
    self.assertAlmostEqual(float(self.sft_loss), -np.mean(scored), delta=1e-6)
    total, count = self.sft_metrics["loss/per_token"]
    self.assertAlmostEqual(float(total), -np.sum(scored), delta=1e-10)
    self.assertEqual(int(count), 15)

  def test_dpo_equals_unpacked_sequences(self):
    # Fails if a pair reads another branch or row, if a sum misses the first response token or holds
    # trunk tokens, if padding counts as a pair, or if the loss is averaged over rows or
    # weights.
    chosen, rejected, ref_chosen, ref_rejected, tokens = self.pair_sums()
    h = (chosen - ref_chosen) - (rejected - ref_rejected)

    def log_sigmoid(x):
      return -np.log1p(np.exp(-x))

    dpo_P = -(1 - SMOOTHING) * log_sigmoid(BETA * h) - SMOOTHING * log_sigmoid(-BETA * h)
    self.assertAlmostEqual(
      float(self.dpo_loss), np.mean(dpo_P + NLL * -chosen / tokens), delta=1e-6
    )
    self.assertGreater(np.max(BETA * h), 5.0)  # one pair is saturated, one is on the wrong side
    self.assertLess(np.min(h), 0.0)
    expected = {
      "loss/per_pair": dpo_P.mean(),
      "nll_chosen/per_token": -chosen.sum() / tokens.sum(),
      "margin/per_pair": h.mean(),
      "accuracy/per_pair": (h > 0).mean(),
      "chosen_shift/per_pair": (chosen - ref_chosen).mean(),
      "rejected_shift/per_pair": (rejected - ref_rejected).mean(),
      "saturated/per_pair": (BETA * h > 5.0).mean(),
      "early_eos/per_unfinished_branch": self.early_eos().mean(),
    }
    got = averages(self.dpo_metrics)
    self.assertSameElements(got, expected)
    for name, value in expected.items():
      # Metrics name their unit: pairs are counted by the pair, the chosen's loss by the token.
      self.assertAlmostEqual(got[name], value, delta=1e-9, msg=name)
      counts = {"per_token": tokens.sum(), "per_unfinished_branch": 6}
      self.assertEqual(
        float(self.dpo_metrics[name][1]), counts.get(name.partition("/")[2], 3), name
      )

  def test_advantage_weighted_equals_unpacked_sequences(self):
    # Fails if a token bears another step's advantage, if a weight is not cut, an unknown step
    # (-inf) counts, a shared token counts once, weights divide the loss, or a gradient flows
    # otherwise than through log π.
    known = (0.4, 0.4, -0.2, -np.inf, 2.0)
    trees = [
      Tree(
        [1, 2, 3],
        (Branch(3, [6, 7, 8], advantage=known[:3]), Branch(3, [9, 10], advantage=known[3:])),
      ),
      tree_lib.merge_prefixes(
        [12, 13],
        [
          Branch(2, [15, 16, 17], advantage=(0.5, 0.5, -0.5)),
          Branch(2, [15, 16, 18], advantage=(0.5, -1.0, 0.0)),
        ],
      ),
    ]
    # 15 is shared, 16 is not: its advantages differ
    self.assertEqual(trees[1].num_tokens, 2 + 1 + 2 + 2)
    examples = [Example(tree) for tree in trees]
    batch = batch_lib.build(examples, batch_lib.measure(examples, 18))
    objective = jax.jit(objectives.make_advantage_weighted(MODEL, beta=0.25, max_weight=5.0))
    loss, metrics = objective(self.params, batch)
    alone = unpacked(
      self.params,
      [Example(Tree(tree.trunk, tuple(reference._whole_branches(tree)))) for tree in trees],
    )
    logp = np.concatenate([*alone[0], *alone[1]])
    advantage = np.array([*known, 0.5, 0.5, -0.5, 0.5, -1.0, 0.0])
    weight = np.minimum(np.exp(advantage / 0.25), 5.0)
    self.assertEqual(sorted(set(weight))[-1], 5.0)
    self.assertAlmostEqual(float(loss), -np.sum(weight * logp) / 11, delta=1e-6)
    self.assertAlmostEqual(averages(metrics)["loss/per_token"], -logp.mean(), delta=1e-9)
    self.assertAlmostEqual(averages(metrics)["weight/per_token"], weight.mean(), delta=1e-6)

  def test_without_advantages_it_is_the_next_token_loss(self):
    # Fails if the mean is over weights or rows, or if a step of advantage 0 has another weight than
    # 1.
    objective = jax.jit(objectives.make_advantage_weighted(MODEL, beta=0.25, max_weight=5.0))
    self.assertAlmostEqual(
      float(objective(self.params, self.batch)[0]), float(self.sft_loss), delta=1e-10
    )

  def test_no_tree_holds_more_pairs_than_a_step(self):
    # Fails if two pairs of the same two branches are one example, which a batch of one cannot take.
    pair = Pair("p", "p", "t", [1, 2], [6], [7], "shared_prefix", 0, 0.0)
    reversed_pair = dataclasses.replace(pair, id="q", chosen=[7], rejected=[6])
    for max_pairs, expected in ((1, [[(0, 1)], [(0, 1)]]), (2, [[(0, 1), (1, 0)]])):
      made = pair_trees.build([pair, reversed_pair], max_branches=2, max_pairs=max_pairs, length=9)
      self.assertEqual(made.pairs, expected)

  def test_context_of_a_rejected_branch_is_not_scored(self):
    # Fails if a pair's loss, its reference or a gradient holds a step before the pit, or leaves out
    # a token from the pit on.
    pair = Pair(
      "p", "p", "t", [1, 2, 3], [6, 7, 8], [9, 10, 11, 12], "prefix_protected", 1, 0.0, context=2
    )
    made = pair_trees.build(
      [pair, dataclasses.replace(pair, id="q", context=0)], max_branches=3, max_pairs=9, length=18
    )
    self.assertLen(made.trees, 1)
    store = reference.Store(epath.Path(tempfile.mkdtemp()) / "s.npz")
    reference.score(
      MODEL, self.params, made.trees, store=store, packing=reference.Packing(MESH, 18)
    )
    (example,) = pair_trees.examples(made, store)
    chosen, rejected, _ = unpacked(self.params, [example])[0]
    every = unpacked(self.params, [Example(Tree(pair.trunk, (Branch(3, pair.rejected),)))])[0][0]
    self.assertEqual([len(branch) for branch in unpacked(self.params, [example])[0]], [3, 2, 4])
    np.testing.assert_allclose(rejected, every[2:], rtol=1e-6)
    self.assertAlmostEqual(example.pairs[0].ref_rejected, every[2:].sum(), delta=1e-5)
    self.assertAlmostEqual(example.pairs[1].ref_rejected, every.sum(), delta=1e-5)
    self.assertAlmostEqual(example.pairs[0].ref_chosen, chosen.sum(), delta=1e-5)
    batch = batch_lib.build([example], batch_lib.measure([example], 18))
    _, metrics = dpo(self.params, batch)
    self.assertAlmostEqual(averages(metrics)["rejected_shift/per_pair"], 0.0, delta=1e-5)

  def test_the_loss_parts_add_up(self):
    # Fails if a part is divided by its own count: microbatches and devices sum their parts.
    parts = [
      jax.tree.map(
        lambda x, keep=keep: (
          x
          if np.ndim(x) == 0
          else np.where((np.arange(3) == keep).reshape(3, *[1] * (x.ndim - 1)), x, empty_like(x))
        ),
        self.batch,
      )
      for keep in range(3)
    ]
    self.assertAlmostEqual(
      sum(float(sft(self.params, part)[0]) for part in parts), float(self.sft_loss), delta=1e-10
    )
    self.assertAlmostEqual(
      sum(float(dpo(self.params, part)[0]) for part in parts), float(self.dpo_loss), delta=1e-10
    )

  @parameterized.parameters(1, 3, 4, 9)
  def test_chunks_change_nothing(self, chunk):
    # Fails if a chunk's tokens are held against another's logits, if the last, part empty one
    # counts its padding, or if the backward pass loses a chunk. 10 scored tokens a row.
    def loss(params, chunk):
      return objectives.make_sft(MODEL, chunk)(params, self.batch)[0]

    grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected, got = grad(self.params, 0), grad(self.params, chunk)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
      np.testing.assert_allclose(other, one, rtol=1e-9, atol=1e-12)

  def test_rows_may_change_places(self):
    # Fails if anything but a sum joins the rows, or if a row reads another row.
    order = np.array([2, 0, 1])
    permuted = jax.tree.map(lambda x: x if np.ndim(x) == 0 else x[order], self.batch)
    self.assertAlmostEqual(float(sft(self.params, permuted)[0]), float(self.sft_loss), delta=1e-12)
    loss, metrics = dpo(self.params, permuted)
    self.assertAlmostEqual(float(loss), float(self.dpo_loss), delta=1e-12)
    for name, value in averages(self.dpo_metrics).items():
      self.assertAlmostEqual(averages(metrics)[name], value, delta=1e-10, msg=name)

  def test_packing_changes_nothing(self):
    # Fails if trees of one row are mixed, or if branch numbers of a row's second tree are off.
    for examples in ((C, B, A), (B, C, A)):
      batch = batch_lib.build(examples, SHAPE)
      self.assertNotEqual(batch.trees.token.tolist(), self.batch.trees.token.tolist())
      self.assertAlmostEqual(float(sft(self.params, batch)[0]), float(self.sft_loss), delta=1e-12)
      self.assertAlmostEqual(float(dpo(self.params, batch)[0]), float(self.dpo_loss), delta=1e-12)

  def test_histograms_are_of_what_the_averages_are_of(self):
    # Fails if a histogram is of other values than its name's average, or if edges do not ascend.
    for edges in objectives.EDGES.values():
      self.assertEqual(list(edges), sorted(set(edges)))
    for metrics, name, mean in (
      (self.sft_metrics, "nll/per_token", "loss/per_token"),
      (self.dpo_metrics, "margin/per_pair", "margin/per_pair"),
    ):
      counts, number = metrics[f"histogram/{name}"]
      self.assertEqual((int(counts.sum()), int(number)), (int(metrics[mean][1]),) * 2)
      edges = objectives.EDGES[f"histogram/{name}"]
      low = np.sum(counts * np.array([2 * edges[0], *edges])) / number
      high = np.sum(counts * np.array([*edges, 2 * edges[-1]])) / number
      self.assertBetween(averages(metrics)[mean], low, high)

  def test_against_itself_the_margin_is_zero(self):
    # Fails if reference and objective score different tokens: A's pairs diverge at their first
    # token, so a first token that only one of them counts gives a margin of nats. A margin of 0
    # gives ln 2 under any smoothing.
    folder = self.enterContext(tempfile.TemporaryDirectory())
    store = reference.Store(epath.Path(folder) / "reference.npz")
    packing = reference.Packing(tiny_model.one_device_mesh(), 18)
    reference.score(
      MODEL, self.params, [example.tree for example in (A, B)], store=store, packing=packing
    )

    def referenced(example):
      tree = example.tree

      def value(number):
        return float(
          np.sum(
            store[reference.branch_keys(tree)[number]],
            dtype=np.float64,
          )
        )

      pairs = [
        PairInTree(p.chosen, p.rejected, value(p.chosen), value(p.rejected)) for p in example.pairs
      ]
      return Example(tree, tuple(pairs))

    _, metrics = dpo(self.params, batch_lib.build([referenced(A), referenced(B)], SHAPE))
    for name, value in averages(metrics).items():
      if name in ("margin/per_pair", "chosen_shift/per_pair", "rejected_shift/per_pair"):
        self.assertAlmostEqual(value, 0.0, delta=1e-5, msg=name)
    self.assertAlmostEqual(averages(metrics)["loss/per_pair"], np.log(2.0), delta=1e-5)
    key = functools.partial(reference.branch_key, A.tree.trunk, 5)
    np.testing.assert_allclose(store[key((6, 7, 8))], self.alone[0][0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(store[key((11,))], self.alone[0][2], rtol=0, atol=1e-5)


def empty_like(x):
  """What `batch_lib.build` puts in rows without trees (the fields are told apart by their padding
  value).
  """
  return np.full_like(x, x[2].reshape(-1)[0])


if __name__ == "__main__":
  absltest.main()
