"""Known defects and pains of other trainers, each pinned on our own path from text to tokens to
loss.

Every test names its public source: the file or the thread (repository#number on GitHub) in which it
was seen.
"""

import dataclasses
import functools
import itertools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from absl.testing import absltest, parameterized
from etils import epath
from tokenizers import processors

from synthneg_jax.core import losses
from synthneg_jax.core import pairs as core_pairs
from synthneg_jax.core import tree as tree_lib
from synthneg_jax.core.tree import Branch, Tree, sees
from synthneg_jax.data import prompts, token_text
from synthneg_jax.data.records import Pair
from synthneg_jax.decoding.policy import EMBEDDED
from synthneg_jax.grading import answers
from synthneg_jax.pipeline import train_policy
from synthneg_jax.tasks import arithmetic
from synthneg_jax.training import batch as batch_lib
from synthneg_jax.training import objectives, pair_trees, reference
from synthneg_jax.training.batch import Example, PairInTree, Shape
from tests import tiny_model
from tests.models import smollm2

EOS = 1
BETA, PENALTY, NLL = 0.5, 5.0, 0.25
SHAPE = Shape(rows=2, length=24, scored=16, pairs=3, branches=6)


# Tokens


@functools.cache
def tokenizer(family: str):
  """Three families: "embedded" knows no BOS; "smollm2" has one, the mark that opens every turn, and
  never writes it of itself, and its padding is EOS; "opening" is that tokenizer made to open every
  text with BOS, as those of Llama 3 and Gemma do, with a chat template that writes BOS too.
  """
  if family == "embedded":
    return transformers.AutoTokenizer.from_pretrained(str(EMBEDDED))
  found = transformers.AutoTokenizer.from_pretrained(str(smollm2.smollm2_dir()))
  if family == "opening":
    bos = "<|endoftext|>"
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", special_tokens=[(bos, found.convert_tokens_to_ids(bos))]
    )
    found.bos_token = bos
    found.chat_template = "{{ bos_token }}" + found.chat_template
  return found


WORDS = (
  "Ann has 48 clips and sells half of them. How many are left?",
  "She sells 48/2 = 24.\n48 - 24 = 24 are left.\n#### 24",
  "She sells 48/2 = 23.\n48 - 23 = 25 are left.\n#### 25",
)


def texts(family: str) -> tuple[str, str, str]:
  """A problem, a solution, and a wrong response of three lines."""
  if family != "embedded":
    return WORDS
  puzzle = arithmetic.make_puzzle(np.random.default_rng(0), 3, 4, (2, 2))
  solution = arithmetic.teach(np.random.default_rng(0), puzzle, skip_step_prob=0.0)
  return puzzle.prompt, solution, solution.replace("= 2", "= 7").replace("= 1", "= 8")[:-1] + "0"


FAMILIES = (
  ("embedded", "raw"),
  ("smollm2", "plain"),
  ("smollm2", "chat"),
  ("opening", "plain"),
  ("opening", "chat"),
)


def work(family: str, style: str):
  """(trunk, solution's ids, the wrong response as the model drew it)."""
  fast = tokenizer(family)
  problem, solution, wrong = texts(family)
  drawn = [*fast.encode(wrong, add_special_tokens=False), fast.eos_token_id]
  ends = token_text.step_ends(drawn, token_text.TokenText(fast))
  response = core_pairs.Response(drawn, ends)
  return (
    prompts.encode_prompt(fast, problem, style),
    prompts.encode_solution(fast, solution),
    response,
  )


def algorithm1(trunk, solution, response, pit: int) -> core_pairs.TokenPair:
  counts = {"after": core_pairs.Count(0, 4), "before": core_pairs.Count(3, 4)}
  return core_pairs.algorithm1(trunk, solution, response, pit=pit, **counts)


def trees_of(pairs, length: int = 400) -> pair_trees.PairTrees:
  """Token pairs as stage dpo turns them into trees."""
  records = [
    Pair(
      id=str(n),
      problem_id="p",
      trace_id="t",
      trunk=pair.trunk,
      chosen=pair.chosen,
      rejected=pair.rejected,
      pair_mode="algorithm1",
      pit=0,
      p_flipped=0.0,
    )
    for n, pair in enumerate(pairs)
  ]
  return pair_trees.build(records, max_branches=5, max_pairs=99, length=length)


def batch_of(trees):
  examples = [Example(tree) for tree in trees]
  return batch_lib.build(examples, batch_lib.measure(examples, 512))


@pytest.mark.slow  # SmolLM2's tokenizer is fetched by a process
class TokensTest(parameterized.TestCase):
  @parameterized.parameters(*FAMILIES)
  def test_bos_and_eos(self, family, style):
    # BOS before the response too, and scored, and EOS never appended (google/tunix,
    # tests/sft/dpo/dpo_trainer_test.py: the rows that it expects hold two BOS and no EOS); BOS
    # doubled by template and tokenizer (axolotl#1616, axolotl#1733) or missing where a family has
    # none (trl#1885); EOS appended to every rejected response (TRL 1.16, DPOTrainer). Fails if a
    # prompt is encoded with special tokens after its template, if BOS is prepended always or never,
    # if a branch is encoded with special tokens, if the solution's EOS is left out or doubled, or
    # if a prefix gets one.
    fast = tokenizer(family)
    bos, eos = fast.bos_token_id, fast.eos_token_id
    text = token_text.TokenText(fast)
    problem, solution, wrong = texts(family)
    trunk, solution_ids, response = work(family, style)
    examples, _, _ = train_policy.solution_trees(
      {"p": trunk}, {"p": [solution_ids]}, max_branches=4, max_tokens=400
    )
    rejected = algorithm1(trunk, solution_ids, response, 0)
    trees = trees_of([rejected]).trees
    batch = batch_of([examples[0].tree, *trees])
    parts = []
    for end in batch.branch_end[0]:
      path = np.flatnonzero(sees(np.array([end]), np.arange(512), batch.trees.leave[0])[0])
      at, in_trunk = path[len(trunk) :], path[: len(trunk)]
      parts.append(batch.trees.token[0, at].tolist())
      self.assertTrue(np.all(batch.trees.scored[0, at]))
      self.assertEqual(batch.trees.token[0, in_trunk].tolist(), trunk)
      self.assertFalse(np.any(batch.trees.scored[0, in_trunk]))

    trained, chosen, prefix = parts
    self.assertEqual(trained, chosen)  # the solution, in SFT and as the chosen branch
    self.assertEqual((trained.count(eos), trained[-1]), (1, eos))
    self.assertEqual(text.text(trained), solution)
    self.assertEqual(text.text(prefix), wrong[: wrong.index("\n") + 1])
    self.assertNotIn(eos, prefix)
    for ids in parts:
      self.assertNotIn(bos, ids)
    if style == "chat":
      written = fast.apply_chat_template(
        [{"role": "user", "content": problem}], tokenize=False, add_generation_prompt=True
      )
      self.assertEqual(fast.decode(trunk), written)
      self.assertEqual(trunk.count(bos), written.count(fast.bos_token))
      self.assertNotEqual(trunk[0], trunk[1])
    else:
      self.assertEqual(
        text.text(trunk), problem if style == "raw" else f"Question: {problem}\nAnswer:\n"
      )
      self.assertEqual(trunk.count(bos), family == "opening")
      self.assertNotIn(eos, trunk)
    self.assertEqual(trunk[0] == bos, family == "opening" or style == "chat")

  def test_eos_is_scored_where_it_is_the_padding(self):
    # Masks written as ids != pad_id lose the EOS of every tokenizer that pads with it
    # (google/tunix, tunix/sft/dpo/dpo_trainer.py, `_generate_ids_and_masks`). Fails if any mask is
    # made from ids: SmolLM2 pads with EOS, and id 0 fills the empty places of packed rows.
    fast = tokenizer("smollm2")
    self.assertEqual(fast.pad_token_id, fast.eos_token_id)
    trunk, solution_ids, _ = work("smollm2", "chat")
    zero_ends = Tree((4, 0, 5), (Branch(3, (6, 7, 0)), Branch(3, (0,))))
    for tree in (Tree(trunk, (Branch(len(trunk), solution_ids),)), zero_ends):
      batch = batch_of([tree])
      lengths = [len(branch.ids) for branch in tree.branches]
      self.assertEqual(float(batch.num_scored), sum(lengths))
      self.assertTrue(np.all(batch.scored_at[0, : sum(lengths)] > 0))
      ends = batch.scored_at[0, np.cumsum(lengths) - 1]
      self.assertEqual(
        batch.trees.token[0, ends].tolist(), [branch.ids[-1] for branch in tree.branches]
      )

  def test_nothing_is_truncated(self):
    # Prompts cut at the wrong end, so that the question's last words go (google/tunix, same
    # function: ids[:max_length]). Fails if anything is cut instead of left out whole, or if what is
    # left out is not counted.
    trunk, other = list(range(2, 12)), list(range(12, 17))
    solutions = {"long": [[1, 2, 3], list(range(20, 31))], "short": [[4, 5], list(range(15, 30))]}
    examples, names, dropped = train_policy.solution_trees(
      {"long": trunk, "short": other}, solutions, max_branches=4, max_tokens=20
    )
    self.assertEqual(dropped, 1)  # 10 + 11 tokens
    self.assertEqual(names, ["long", "short", "short"])  # 5 + 15 fits, in a tree of its own
    kept = [
      (list(e.tree.trunk), [list(branch.ids) for branch in e.tree.branches]) for e in examples
    ]
    self.assertEqual(
      kept, [(trunk, [[1, 2, 3]]), (other, [[4, 5]]), (other, [list(range(15, 30))])]
    )

    token_pairs = [
      core_pairs.TokenPair(trunk, [1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]),  # 21 tokens
      core_pairs.TokenPair(trunk, [1, 2, 3, 4, 5], [7, 8, 9, 10, 11]),  # 20
    ]
    with self.assertRaisesRegex(
      ValueError, "has 21 tokens, more than 20"
    ):  # stage pairs has left it out and counted it
      trees_of(token_pairs, length=20)
    (tree,), numbered, _ = trees_of(token_pairs[1:], length=20)
    self.assertEqual((numbered, list(tree.trunk)), ([[(0, 1)]], trunk))
    self.assertEqual(
      [list(branch.ids) for branch in tree.branches], [[1, 2, 3, 4, 5], [7, 8, 9, 10, 11]]
    )

  def test_nothing_is_tokenised_again(self):
    # Prompt and completion tokenised together have other tokens at the seam than the prompt alone
    # (trl#2054, trl#2209, trl#5555). Fails if a trunk depends on what follows it, or if drawn ids
    # go through text.
    fast = tokenizer("smollm2")
    text = token_text.TokenText(fast)
    encode = functools.partial(fast.encode, add_special_tokens=False)
    problem, solution = "48 halved gives ", "clips: 24\n#### 24"
    trunk = prompts.encode_prompt(fast, problem, "raw")
    solution_ids = prompts.encode_solution(fast, solution)
    joined = encode(problem + solution)
    self.assertNotEqual(joined[: len(trunk)], trunk)  # the space and "clips" would become one token
    examples, _, _ = train_policy.solution_trees(
      {"p": trunk}, {"p": [solution_ids]}, max_branches=4, max_tokens=400
    )
    self.assertEqual(list(examples[0].tree.trunk), encode(problem))
    self.assertEqual(list(examples[0].tree.branches[0].ids), encode(solution) + [fast.eos_token_id])

    # A model may draw " clip" + "s" for " clips"; its ids stay as they were drawn, in the trunk and
    # in the branches.
    drawn = [
      *encode("48"),
      *encode(" clip"),
      *encode("s"),
      *encode("\n24"),
      *encode(" clip"),
      *encode("s"),
      *encode("\n7"),
    ]
    self.assertNotEqual(encode(text.text(drawn)), drawn)
    response = core_pairs.Response(drawn, token_text.step_ends(drawn, text))
    self.assertLen(response.step_ends, 3)
    rollout = core_pairs.Sibling([*encode("24"), fast.eos_token_id], [3], True)
    pairs = [
      algorithm1(trunk, solution_ids, response, 1),
      core_pairs.shared_prefix(
        trunk,
        response,
        1,
        siblings=[rollout],
        after=core_pairs.Count(0, 4),
        rule=core_pairs.ChosenRule("rollout", "random", np.random.default_rng(0)),
      ),
    ]
    trees = trees_of(pairs).trees
    first, second = response.step_ends[:2]
    self.assertEqual(list(trees[0].branches[1].ids), drawn[:second])
    self.assertEqual(list(trees[1].trunk), trunk + drawn[:first])
    self.assertEqual(list(trees[1].branches[1].ids), drawn[first:second])
    self.assertEqual(list(trees[1].branches[0].ids), list(rollout.ids))

  def test_a_step_is_no_finished_answer(self):
    # Stock trainers take a step for a whole answer and append EOS, so that the policy learns to
    # stop after it (Step-DPO#25; TRL 1.16 appends EOS to every response). Fails if a prefix, a
    # rejected step or a chosen step gets an EOS that the model did not draw, or loses one that it
    # did.
    fast = tokenizer("smollm2")
    eos = fast.eos_token_id
    trunk, solution_ids, response = work("smollm2", "plain")
    right = [*fast.encode(WORDS[1], add_special_tokens=False), eos]
    sibling = core_pairs.Sibling(
      right, token_text.step_ends(right, token_text.TokenText(fast)), True
    )
    last = len(response.step_ends) - 1
    for pit in range(last + 1):
      pair = algorithm1(trunk, solution_ids, response, pit)
      self.assertEqual(
        pair.rejected.count(eos), int(pit == last)
      )  # at the last step the model itself stopped
      for continuation in ("step", "rollout"):
        pair = core_pairs.shared_prefix(
          trunk,
          response,
          pit,
          siblings=[sibling],
          after=core_pairs.Count(0, 4),
          rule=core_pairs.ChosenRule(continuation, "shortest", np.random.default_rng(0)),
        )
        self.assertNotIn(eos, pair.trunk)
        self.assertEqual(pair.rejected.count(eos), int(pit == last))
        self.assertEqual(pair.chosen.count(eos), int(continuation == "rollout"))
        (tree,) = trees_of([pair]).trees
        self.assertEqual(
          [list(branch.ids) for branch in tree.branches], [pair.chosen, pair.rejected]
        )


# Losses

MODEL = tiny_model.model(num_layers=1, dtype="float64", param_dtype="float64")


def preference(model, loss, **settings):
  given = objectives.Preference(loss=loss, beta=BETA, **settings)
  objective = objectives.make_preference(model, given, eos_ids=(EOS,))
  return jax.jit(jax.value_and_grad(objective, has_aux=True))


DPO = functools.partial(losses.dpo_loss, beta=BETA)
dpo = preference(MODEL, DPO)
dpo_and_nll = preference(MODEL, DPO, nll_weight=NLL)
dpop = preference(
  MODEL, functools.partial(losses.dpop_loss, beta=BETA, penalty=PENALTY), penalty=PENALTY
)


@jax.jit
def next_logprobs(params, token_NL):
  """(log π of each possible next token [N, L, V], hidden states [N, L, D]) of sequences; each is
  one trunk.
  """
  num, length = token_NL.shape
  packed = tree_lib.pack([[Tree([0] * length)]] * num, length)
  h_NLD, _ = MODEL.hidden(params, dataclasses.replace(packed, token=token_NL))
  return jax.nn.log_softmax(MODEL.logits(params, h_NLD)), h_NLD


def average(metrics, name: str) -> float:
  total, count = metrics[name]
  return float(total) / float(count)


class LossesTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(jax.enable_x64(True))
    cls.params = tiny_model.make_params(MODEL)

  def logprobs(self, params, trunk, *branches):
    """(log π of each branch's tokens, hidden state at the fork), from two sequences that know
    nothing of trees.
    """
    token = np.zeros((2, 12), np.int32)
    for n, ids in enumerate(branches):
      token[n, : len(trunk) + len(ids)] = (*trunk, *ids)
    logp_NLV, h_NLD = map(np.asarray, next_logprobs(params, token))
    at = len(trunk) - 1
    return [
      np.array([logp_NLV[n, at + i, token_id] for i, token_id in enumerate(ids)])
      for n, ids in enumerate(branches)
    ], h_NLD[0, at]

  def nudged(self, token: int, direction_D, amount: float):
    """The policy with one token's logit raised by `amount` at the given hidden state."""
    step = amount * direction_D / np.sum(direction_D**2)
    ends = self.params["ends"]
    return {**self.params, "ends": {**ends, "unembedding": ends["unembedding"].at[token].add(step)}}

  @parameterized.parameters(((7,), (9,)), ((7, 12, 13), (9, 12, 13)))
  def test_first_response_token_counts(self, chosen, rejected):
    # The first response token dropped by an off-by-one, so that pairs that differ there have no
    # gradient (fw-ai/cookbook#388, minimind#621); steps from one prefix differ there as a rule.
    # Fails if a branch's first token is not scored, is predicted by anything but the trunk's token
    # before the fork, or has no gradient.
    trunk = (2, 3, 4, 5, 6)
    tree = Tree(trunk, (Branch(5, chosen), Branch(5, rejected)))
    batch = batch_lib.build([Example(tree, (PairInTree(0, 1, -2.5, -3.25),))], SHAPE)
    (loss, metrics), grads = dpo(self.params, batch)
    (chosen_logp, rejected_logp), h_D = self.logprobs(self.params, trunk, chosen, rejected)
    h = chosen_logp.sum() - rejected_logp.sum() + 2.5 - 3.25
    self.assertGreater(abs(chosen_logp[0] - rejected_logp[0]), 0.5)
    self.assertAlmostEqual(float(loss), np.log1p(np.exp(-BETA * h)), delta=1e-12)
    self.assertAlmostEqual(average(metrics, "margin/per_pair"), h, delta=1e-12)

    def central(amount):
      plus, minus = (dpo(self.nudged(7, h_D, sign * amount), batch)[0][0] for sign in (1, -1))
      return float(plus - minus) / (2 * amount)

    slope = np.asarray(grads["ends"]["unembedding"])[7] @ h_D / np.sum(h_D**2)
    self.assertAlmostEqual(slope, central(1e-5), delta=1e-8)
    self.assertLess(slope, -0.01)
    if len(chosen) == 1:
      # Both first tokens share their predictor, so that the softmax's sum falls out of the margin.
      pull = BETA / (1 + np.exp(BETA * h))
      expected = np.zeros_like(grads["ends"]["unembedding"])
      expected[7], expected[9] = -pull * h_D, pull * h_D
      np.testing.assert_allclose(grads["ends"]["unembedding"], expected, rtol=0, atol=1e-12)
      (_, metrics), _ = dpo(self.nudged(7, h_D, 0.375), batch)
      self.assertAlmostEqual(average(metrics, "margin/per_pair"), h + 0.375, delta=1e-12)

  def test_both_may_fall(self):
    # The chosen response becomes less likely along with the rejected one, unseen
    # (direct-preference-optimization#8, trl#800). Here an update has given their mass to a third
    # token. DPO's loss does not move, nor does its gradient pull them back; metrics tell, and DPOP
    # and the chosen's next-token loss pull. Fails if a shift is reported against anything but the
    # reference, if the two are mixed up, or if DPOP or NLL have their sign turned.
    trunk, chosen, rejected, third = (2, 3, 4, 5, 6), (7,), (9,), 20
    before, h_D = self.logprobs(self.params, trunk, chosen, rejected)
    fallen = self.nudged(third, h_D, 9.0)
    after, _ = self.logprobs(fallen, trunk, chosen, rejected)
    fall = float((after[0] - before[0])[0])
    self.assertLess(fall, -1.0)
    refs = [round(8 * float(logp[0])) / 8 for logp in before]  # what float32 holds exactly
    tree = Tree(trunk, (Branch(5, chosen), Branch(5, rejected)))
    batch = batch_lib.build([Example(tree, (PairInTree(0, 1, *refs),))], SHAPE)

    (loss, metrics), grads = dpo(fallen, batch)
    (start, _), _ = dpo(self.params, batch)
    self.assertAlmostEqual(float(loss), float(start), delta=1e-12)
    for name, logp, ref in zip(("chosen", "rejected"), after, refs, strict=True):
      self.assertAlmostEqual(
        average(metrics, f"{name}_shift/per_pair"), float(logp[0]) - ref, delta=1e-12
      )
      self.assertLess(average(metrics, f"{name}_shift/per_pair"), -0.9)

    def slope(grads):
      """What the loss gains for each nat that the third token's logit rises, which is what lowers
      both responses.
      """
      return float(np.asarray(grads["ends"]["unembedding"])[third] @ h_D / np.sum(h_D**2))

    (third_logp, _), _ = self.logprobs(fallen, trunk, (third,), (third,))
    third_prob = float(np.exp(third_logp[0]))
    self.assertAlmostEqual(slope(grads), 0.0, delta=1e-12)
    self.assertAlmostEqual(slope(dpo_and_nll(fallen, batch)[1]), NLL * third_prob, delta=1e-9)
    margin = average(metrics, "margin/per_pair") + PENALTY * average(
      metrics, "chosen_shift/per_pair"
    )
    pull = BETA * PENALTY / (1 + np.exp(BETA * margin))
    self.assertAlmostEqual(slope(dpop(fallen, batch)[1]), pull * third_prob, delta=1e-9)

  def test_early_eos_is_reported(self):
    # Will a policy that is trained on steps stop after them (Step-DPO#25)? Fails if the probability
    # is read anywhere but at the last token of a branch without EOS, or if finished branches count.
    trunk, chosen, rejected = (2, 3, 4, 5, 6), (7, 8, EOS), (9, 10)
    tree = Tree(trunk, (Branch(5, chosen), Branch(5, rejected)))
    batch = batch_lib.build([Example(tree, (PairInTree(0, 1),))], SHAPE)
    (_, metrics), _ = dpo(self.params, batch)
    with_eos, _ = self.logprobs(self.params, trunk, (*rejected, EOS), (*rejected, EOS))
    total, count = metrics["early_eos/per_unfinished_branch"]
    self.assertEqual(int(count), 1)
    self.assertAlmostEqual(float(total), np.exp(with_eos[0][-1]), delta=1e-12)

  def test_early_eos_by_hand(self):
    # Fails if several ids that end a response are not added up, or if logits are taken for
    # probabilities.
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.125, 0.125], [0.125, 0.125, 0.25, 0.5]])) + 3.0
    np.testing.assert_allclose(losses.early_eos(logits, (1,)), [0.25, 0.125], rtol=1e-12)
    np.testing.assert_allclose(losses.early_eos(logits, (0, 3)), [0.625, 0.625], rtol=1e-12)


class FirstStepTest(absltest.TestCase):
  def test_policy_is_the_reference(self):
    # Log-probs of policy and reference that differ at step 0 (NVIDIA/NeMo-Aligner#227). Fails if
    # `reference.score` and the objective read other tokens, places or branches, in float32 and in
    # another packing of the rows.
    model = tiny_model.model(num_layers=1)
    params = tiny_model.make_params(model)
    pairs = [
      core_pairs.TokenPair([2, 3, 4, 5], [6, 7, EOS], [8, 7, 9]),
      core_pairs.TokenPair([2, 3, 4, 5], [6, 7, EOS], [10]),
      core_pairs.TokenPair([2, 3, 11], [12, EOS], [13, 14, 15]),
    ]
    made = trees_of(pairs)
    store = reference.Store(
      epath.Path(self.enterContext(tempfile.TemporaryDirectory())) / "reference.npz"
    )
    packing = reference.Packing(tiny_model.one_device_mesh(), 11)  # each tree in a row of its own
    reference.score(model, params, made.trees, store=store, packing=packing)
    batch = batch_lib.build(pair_trees.examples(made, store), SHAPE)
    self.assertEqual(np.sum(batch.branch_end >= 0, axis=1).tolist(), [5, 0])
    self.assertLess(np.min(batch.ref_chosen), -1.0)
    (loss, metrics), grads = preference(model, DPO)(params, batch)
    self.assertEqual(loss.dtype, np.float32)
    self.assertAlmostEqual(float(loss), np.log(2.0), delta=1e-5)
    for name in ("margin/per_pair", "chosen_shift/per_pair", "rejected_shift/per_pair"):
      self.assertAlmostEqual(average(metrics, name), 0.0, delta=1e-5)
    self.assertGreater(max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(grads)), 1e-2)


# Verdicts


class VerdictsTest(parameterized.TestCase):
  @parameterized.parameters(
    *itertools.product(("9007199254740992", "9,007,199,254,740,992.0"), ("9007199254740993",)),
    ("100001", "100000"),
    ("1,2", "12"),
  )
  def test_near_is_not_equal(self, answer, gold):
    # Integers compared as floats: 2^53 + 1 equals 2^53 (`_str_to_int` of openai/prm800k and
    # google/tunix); answers within 1e-4 of each other are equal, and "1,2" is 12
    # (QwenLM/Qwen2.5-Math). Fails if a float is compared, a tolerance allowed, or a comma dropped
    # that separates no thousands.
    self.assertFalse(answers.grade(f"So it is that.\n#### {answer}", gold).correct)
    self.assertTrue(answers.grade(f"#### {gold}", gold).correct)

  @parameterized.parameters(
    "#### 7 or 8",
    "#### 7 or eight",
    "#### 8 or seven",
    "#### 7 \\text{ or } 8",
    "#### \\boxed{7 \\text{ or } 8}",
    "\\boxed{7 \\text{ or } 8}",
    "#### 8 = 7",
    "#### 8 or 7",
    "#### 8\n#### 7",
    "#### 7, 8",
  )
  def test_a_hedge_is_not_right(self, response):
    # "7 \text{ or } 8" is right where 7 is wanted, because text is cut away as a unit, and so is
    # "8=7" (hendrycks/math, openai/prm800k, google/tunix). Fails if the first or the last of
    # several numbers is taken for the answer.
    for gold in ("7", "8"):
      self.assertFalse(answers.grade(response, gold).correct)


if __name__ == "__main__":
  absltest.main()
