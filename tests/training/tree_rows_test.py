"""Loss and gradients of packed trees against their unpacked sequences, for every
kind of tree we use.

Each kind of work of the method is one case: a trunk with branches on one side, and on the other the
plain sequences (context, scored response), each alone in its own padded row under
causal attention. Trees of several problems share rows with padding. Log-probs of all scored tokens,
the loss, and its gradient with respect to every parameter must agree: to 1e-10 in float64 and to
1e-5 in float32, relative to the largest entry (of the gradient: of each parameter's own gradient),
or to 1 where it is a loss or a log-prob below 1. Reference log-probs are multiples of 1/8, which
float32 holds exactly.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.core import losses
from synthneg_jax.core import pairs as pairs_lib
from synthneg_jax.core import tree as tree_lib
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.training import batch as batch_lib
from synthneg_jax.training import objectives
from synthneg_jax.training.batch import Example, PairInTree, Shape
from tests import random_trees, tiny_model

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
VOCAB, EOS = tiny_model.CONFIG.vocab_size, 1
BETA, SMOOTHING, NLL, TAU, PENALTY = 0.3, 0.1, 0.2, 0.05, 4.0
SHAPE = Shape(rows=3, length=64, scored=56, pairs=12, branches=24)
KINDS = {
  "plain": {},
  "windowed": {"windowed": (True, True), "window": 3, "attention_cap": 2.0},
  "scanned": {"windowed": (True, False), "window": 4, "scan_layers": True, "remat": "full"},
}
NUM_ALONE, LONGEST = 24, 24  # unpacked sequences of a case, and their length, padded


@dataclasses.dataclass(frozen=True)
class Work:
  """The same work twice.

  Attributes:
    examples: trees with their pairs.
    sequences: (ids, which are scored) of each branch's sequence, in the order of the examples and
      their branches.
    pairs: (chosen, rejected, ref_chosen, ref_rejected) of each pair, by numbers of sequences.
  """

  examples: tuple[Example, ...]
  sequences: tuple[tuple[tuple[int, ...], tuple[bool, ...]], ...]
  pairs: tuple[tuple[int, int, float, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is known of one problem; every list of ids is a tuple."""

  prompt: tuple[int, ...]
  wrong: tuple[pairs_lib.Response, ...]
  right: tuple[tuple[int, ...], ...]
  rollouts: tuple[tuple[int, ...], ...]


def draw_problem(seed: int, prompt_size: int) -> Problem:
  """All prompts, and some responses, share a prefix, so that tokens have twins in other trees."""
  rng = np.random.default_rng(seed)

  def draw(size):
    return tuple(rng.integers(2, VOCAB, size).tolist())

  wrong = (
    pairs_lib.Response((7, *draw(6), EOS), (2, 5, 8)),
    pairs_lib.Response((*draw(5), EOS), (3, 6)),
    pairs_lib.Response(draw(4), (1, 4)),  # cut off: no EOS
  )
  right = ((*draw(5), EOS), (7, *draw(2), EOS))
  rollouts = ((*draw(3), EOS), (*draw(1), EOS), draw(2), (7, EOS))
  return Problem((5, 6, *draw(prompt_size - 2)), wrong, right, rollouts)


PROBLEMS = (draw_problem(0, 5), draw_problem(1, 3), draw_problem(2, 4))


def scored_behind(before, ids) -> tuple[tuple[int, ...], tuple[bool, ...]]:
  """A sequence whose second part is scored."""
  return (*before, *ids), (False,) * len(before) + (True,) * len(ids)


def one_tree(trunk, branches, pairs=()) -> Work:
  """A tree from (fork, ids) of its branches and (chosen, rejected) of its pairs."""
  references = [(-2.5 - 1.75 * n, -9.125 + 2.5 * n) for n in range(len(pairs))]
  tree = Tree(trunk, tuple(Branch(fork, ids) for fork, ids in branches))
  in_tree = tuple(PairInTree(*pair, *refs) for pair, refs in zip(pairs, references, strict=True))
  sequences = tuple(scored_behind(trunk[:fork], ids) for fork, ids in branches)
  return Work(
    (Example(tree, in_tree),),
    sequences,
    tuple((*p, *r) for p, r in zip(pairs, references, strict=True)),
  )


def on_prompt(problem: Problem, responses, pairs=()) -> Work:
  return one_tree(problem.prompt, [(len(problem.prompt), ids) for ids in responses], pairs)


def sampled_traces(problem: Problem) -> Work:
  """Sampling and evaluation: traces branch from the prompt."""
  return on_prompt(problem, [*(response.ids for response in problem.wrong), problem.right[0]])


def rollouts_from_steps(problem: Problem) -> Work:
  """Step-level Q: the trunk is prompt and trace; two rollouts fork after all steps but the last."""
  trace = problem.wrong[0]
  forks = [len(problem.prompt) + end for end in trace.step_ends[:-1] for _ in range(2)]
  work = one_tree((*problem.prompt, *trace.ids), list(zip(forks, problem.rollouts, strict=True)))
  expected = [tuple(trace.prefix(steps)) for steps in (1, 1, 2, 2)]
  before = [tuple(ids[len(problem.prompt) : -sum(scored)]) for ids, scored in work.sequences]
  assert before == expected
  return work


def solutions(problem: Problem) -> Work:
  """SFT and RFT: the kept solutions branch from the prompt."""
  return on_prompt(problem, problem.right)


def steps_of_one_trace(problem: Problem) -> Work:
  """Per-step DPO with a shared prefix: pairs at three pits of one trace; the trunk goes up to the
  last of them.

  The first two fork in mid-trunk, where the trunk's own next tokens are the rejected step over
  again.
  """
  trace, prompt = problem.wrong[0], problem.prompt
  trunk = (*prompt, *trace.prefix(2))
  branches, sequences, pairs = [], [], []
  for pit, chosen in enumerate((problem.right[0], problem.rollouts[0], problem.rollouts[3])):
    pairs.append((len(branches), len(branches) + 1))
    for ids in (chosen, tuple(trace.step(pit))):
      branches.append((len(prompt) + len(trace.prefix(pit)), ids))
      sequences.append(scored_behind((*prompt, *trace.prefix(pit)), ids))
  work = one_tree(trunk, branches, pairs)
  assert work.sequences == tuple(sequences)
  return work


def algorithm1(problem: Problem) -> Work:
  """Per-step DPO after Algorithm 1: the right solution once, and every rejected prefix."""
  rejected = [
    tuple(response.prefix(pit + 1)) for response, pit in zip(problem.wrong, (1, 0, 0), strict=True)
  ]
  return on_prompt(problem, [problem.right[0], *rejected], [(0, 1), (0, 2), (0, 3)])


def whole_responses(problem: Problem) -> Work:
  """Standard DPO, IPO, DPOP: whole right and wrong responses."""
  wrong = [response.ids for response in problem.wrong]
  return on_prompt(
    problem, [problem.right[0], wrong[0], problem.right[1], wrong[1]], [(0, 1), (2, 3)]
  )


@functools.cache
def deep_trees(depth: int) -> Work:
  """Random trees with random pairs, some between a branch and its own prefix."""
  rng, works = np.random.default_rng(depth), []
  while len(works) < 4:
    tree = random_trees.of_depth(rng, depth, high=VOCAB, most=30)
    scored = [any(mask) for _, mask in random_trees.sequences(tree)]
    if not 2 <= tree.num_branches <= 6 or not all(
      scored
    ):  # the NLL term is a mean over the chosen's tokens
      continue
    found = [tuple(rng.choice(tree.num_branches, 2, replace=False).tolist()) for _ in range(2)]
    refs = [tuple((rng.integers(-80, 0, 2) / 8).tolist()) for _ in found]
    pairs = tuple(PairInTree(*pair, *ref) for pair, ref in zip(found, refs, strict=True))
    sequences = tuple((tuple(ids), tuple(scored)) for ids, scored in random_trees.sequences(tree))
    of_pairs = tuple((*pair, *ref) for pair, ref in zip(found, refs, strict=True))
    works.append(Work((Example(tree, pairs),), sequences, of_pairs))
  return joined(works)


def joined(works) -> Work:
  """The work of several problems in one batch."""
  examples, sequences, pairs = [], [], []
  for work in works:
    start = len(sequences)
    examples += work.examples
    sequences += work.sequences
    pairs += [(start + chosen, start + rejected, *refs) for chosen, rejected, *refs in work.pairs]
  return Work(tuple(examples), tuple(sequences), tuple(pairs))


# The losses once more, from the log-probs of each sequence's tokens.


def _margins(sums_N, work: Work):
  chosen, rejected, ref_chosen, ref_rejected = (
    np.array(column) for column in zip(*work.pairs, strict=True)
  )
  return (sums_N[chosen] - ref_chosen) - (sums_N[rejected] - ref_rejected), chosen, ref_chosen


def sft_alone(logp_NL, scored_NL, work):
  return -jnp.sum(logp_NL) / np.sum(scored_NL)


def dpo_alone(logp_NL, scored_NL, work):
  sums_N = jnp.sum(logp_NL, axis=1)
  h_P, chosen, _ = _margins(sums_N, work)
  nll_P = -sums_N[chosen] / np.sum(scored_NL, axis=1)[chosen]
  right_P, flipped_P = jnp.log1p(jnp.exp(-BETA * h_P)), jnp.log1p(jnp.exp(BETA * h_P))
  return jnp.mean((1 - SMOOTHING) * right_P + SMOOTHING * flipped_P + NLL * nll_P)


def ipo_alone(logp_NL, scored_NL, work):
  h_P, _, _ = _margins(jnp.sum(logp_NL, axis=1), work)
  return jnp.mean((h_P - 1 / (2 * TAU)) ** 2)


def dpop_alone(logp_NL, scored_NL, work):
  sums_N = jnp.sum(logp_NL, axis=1)
  h_P, chosen, ref_chosen = _margins(sums_N, work)
  fallen_P = ref_chosen - sums_N[chosen]
  fallen_P = jnp.where(fallen_P > 0, fallen_P, 0.0)
  return jnp.mean(jnp.log1p(jnp.exp(-BETA * (h_P - PENALTY * fallen_P))))


# Each objective's name, its reference, and the weights of DPO, IPO, DPOP and NLL in the one
# preference objective that is compiled for them all.
ALONE = {"sft": sft_alone, "dpo": dpo_alone, "ipo": ipo_alone, "dpop": dpop_alone}
WEIGHTS = {"dpo": (1.0, 0.0, 0.0, NLL), "ipo": (0.0, 1.0, 0.0, 0.0), "dpop": (0.0, 0.0, 1.0, 0.0)}


def make_objective(model, name: str, weights):
  if name == "sft":
    return objectives.make_sft(model)

  def loss(*columns):
    found = (
      losses.dpo_loss(*columns, beta=BETA, label_smoothing=SMOOTHING),
      losses.ipo_loss(*columns, tau=TAU),
      losses.dpop_loss(*columns, beta=BETA, penalty=PENALTY),
    )
    return sum(weight * value for weight, value in zip(weights[:3], found, strict=True))

  preference = objectives.Preference(loss=loss, beta=BETA, nll_weight=weights[3])
  return objectives.make_preference(model, preference, eos_ids=(EOS,))


@functools.cache
def make_model(dtype: str, kind: str = "plain"):
  return tiny_model.model(dtype=dtype, param_dtype=dtype, **KINDS[kind])


@functools.cache
def _compiled(dtype: str, is_sft: bool, kind: str):
  model = make_model(dtype, kind)

  @jax.jit
  def program(params, batch, weights):
    objective = make_objective(model, "sft" if is_sft else "preference", weights)
    (loss, _), grads = jax.value_and_grad(objective, has_aux=True)(params, batch)
    return loss, grads, objectives.scored_logprobs(model, params, batch)[0]

  return program


def packed(params, batch, name: str, dtype: str, kind: str = "plain"):
  """(loss, gradients, log-probs of scored tokens [R, S]) of a batch of trees."""
  return _compiled(dtype, name == "sft", kind)(
    params, batch, np.array(WEIGHTS.get(name, (0.0,) * 4), dtype)
  )


@functools.cache
def alone_program(dtype: str, kind: str):
  """(params, tokens [N, L], their weights in a sum [N, L - 1]) -> (log-prob of each next token, the
  sum's gradients).
  """
  model = make_model(dtype, kind)

  def next_logprobs(params, token_NL):
    rows = tree_lib.empty_rows(*token_NL.shape)
    position = np.broadcast_to(np.arange(token_NL.shape[1], dtype=np.int32), token_NL.shape)
    rows = dataclasses.replace(
      rows, token=token_NL, position=position, leave=np.full_like(position, position.shape[1])
    )
    h_NLD, _ = model.hidden(params, rows)
    return losses.token_logprobs(model.logits(params, h_NLD[:, :-1]), token_NL[:, 1:])

  @jax.jit
  def program(params, token_NL, weight_NL):
    logp_NL, pull = jax.vjp(lambda params: next_logprobs(params, token_NL), params)
    return logp_NL, pull(weight_NL)[0]

  return program


def alone(params, work: Work, loss_fn, dtype: str, kind: str = "plain"):
  """(loss, gradients, log-probs of each response) of independent sequences."""
  token_NL = np.zeros((NUM_ALONE, LONGEST), np.int32)
  scored_NL = np.zeros((NUM_ALONE, LONGEST - 1), bool)
  for n, (ids, scored) in enumerate(work.sequences):
    token_NL[n, : len(ids)] = ids
    scored_NL[n, : len(ids) - 1] = scored[1:]
  program = alone_program(dtype, kind)
  logp_NL, _ = program(params, token_NL, np.zeros(scored_NL.shape, dtype))

  def masked(logp_NL):
    return jnp.where(scored_NL, logp_NL, 0.0)

  loss, weight_NL = jax.value_and_grad(lambda logp_NL: loss_fn(masked(logp_NL), scored_NL, work))(
    logp_NL
  )
  _, grads = program(params, token_NL, weight_NL)
  return (
    loss,
    grads,
    [np.asarray(logp)[scored] for logp, scored in zip(logp_NL, scored_NL, strict=True)],
  )


CASES = (
  ("sampled_traces", sampled_traces, "sft"),
  ("rollouts_from_steps", rollouts_from_steps, "sft"),
  ("solutions", solutions, "sft"),
  ("steps_of_one_trace", steps_of_one_trace, "dpo"),
  ("algorithm1", algorithm1, "dpo"),
  ("whole_responses_dpo", whole_responses, "dpo"),
  ("whole_responses_ipo", whole_responses, "ipo"),
  ("whole_responses_dpop", whole_responses, "dpop"),
)


class TreeRowsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    (f"{name}_{dtype}", make, objective, dtype)
    for dtype in TOLERANCE
    for name, make, objective in CASES
  )
  def test_equals_unpacked_sequences(self, make, objective, dtype):
    # Fails if a token sees another branch, another tree, padding, or the trunk beyond its fork; if
    # a position counts row indices; if a branch's first token is predicted from elsewhere
    # than its fork or not scored; if a trunk shared by branches passes back the gradient of only
    # one; or if a pair reads other branches than its own.
    self.assert_equal(joined(map(make, PROBLEMS)), objective, dtype, "plain")

  @parameterized.product(
    [{"objective": name, "kind": "plain"} for name in ALONE]
    + [{"objective": "dpo", "kind": kind} for kind in ("windowed", "scanned")],
    depth=(1, 2, 3, 4, 5, 6),
  )
  def test_trees_of_any_depth(self, depth, objective, kind):
    # Fails if, below the first branches, a token sees a sibling or not all of its path, if a window
    # counts row indices, if a shared scored token counts in one of its branches only, if a
    # branch's sum is of its own tokens only, or if a gradient of shared tokens is one branch's.
    self.assert_equal(deep_trees(depth), objective, "float64", kind)

  def assert_equal(self, work: Work, objective: str, dtype: str, kind: str):
    batch = batch_lib.build(work.examples, SHAPE)
    rows = batch_lib.assign_rows(work.examples, SHAPE.length)
    self.assertGreaterEqual(len(rows[0]), 2)  # with another problem's tree
    self.assertTrue(np.any(batch.trees.token[0] == 0))  # and padding
    self.assertLess(len(rows), SHAPE.rows)  # a row has nothing else
    tolerance = TOLERANCE[dtype]
    with jax.enable_x64(dtype == "float64"):
      params = tiny_model.make_params(make_model(dtype, kind))
      loss, grads, logp_RS = packed(params, batch, objective, dtype, kind)
      expected_loss, expected_grads, expected_logp = alone(
        params, work, ALONE[objective], dtype, kind
      )
    self.assertEqual(
      {leaf.dtype for leaf in jax.tree.leaves((loss, grads, logp_RS))}, {np.dtype(dtype)}
    )

    tokens_RBS = np.asarray(objectives.branch_tokens(batch))
    branches = [
      (r, b)
      for r in range(SHAPE.rows)
      for b in range(SHAPE.branches)
      if batch.branch_end[r, b] >= 0
    ]
    logp = [np.asarray(logp_RS[r])[tokens_RBS[r, b]] for r, b in branches]
    first = np.cumsum([0] + [example.tree.num_branches for example in work.examples])
    expected = [
      expected_logp[n] for row in rows for i in row for n in range(first[i], first[i + 1])
    ]
    np.testing.assert_allclose(
      np.concatenate(logp), np.concatenate(expected), rtol=tolerance, atol=tolerance
    )

    np.testing.assert_allclose(loss, expected_loss, rtol=tolerance, atol=tolerance)
    for (path, got), leaf in zip(
      jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    ):
      scale = np.max(np.abs(leaf))
      self.assertGreater(scale, 1e-4)
      name = jax.tree_util.keystr(path)
      np.testing.assert_allclose(got, leaf, rtol=0, atol=tolerance * scale, err_msg=name)


if __name__ == "__main__":
  absltest.main()
