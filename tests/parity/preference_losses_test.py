"""Preference losses and a whole DPO step against TRL's DPOTrainer, by calling its own
`compute_loss`.

First with log-probs that we hand to it in place of a model's: the same numbers in, the same numbers
and gradients out. TRL names some losses otherwise, and one of them is another loss:

  DPO    its "sigmoid", which has no label smoothing (its "robust" with label_smoothing is robust
         DPO, another loss).
  cDPO   its "aot" with label_smoothing on one pair: it sorts margins over a batch.
  IPO    its "ipo" uses means per token where we sum. On responses of one token these agree; on
         responses of n tokens its loss at τ is ours at τ/n, divided by n².

Then with models: a tiny random Llama as policy and another as reference, TRL's padded batch of
[chosen, rejected] rows on one side, our packed trees on the other.
"""

import pathlib
import tempfile
import types

import datasets
import jax
import numpy as np
import safetensors.numpy
import torch
import transformers
import trl
from absl.testing import absltest, parameterized
from etils import epath
from trl.trainer import dpo_trainer

from synthneg_jax.core import losses
from synthneg_jax.core import tree as tree_lib
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.decoding.policy import EMBEDDED
from synthneg_jax.models import huggingface
from synthneg_jax.models.decoder import Model
from synthneg_jax.runtime import device_mesh
from synthneg_jax.training import batch as batch_lib
from synthneg_jax.training import objectives, reference
from synthneg_jax.training.batch import Example, PairInTree
from tests import tiny_model

EOS = 3
BETA = 0.3
LLAMA = {
  "vocab_size": 61,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "initializer_range": 0.3,
  "max_position_embeddings": 64,
  "bos_token_id": None,
  "eos_token_id": EOS,
  "pad_token_id": 0,
}


def llama(seed: int) -> transformers.LlamaForCausalLM:
  torch.manual_seed(seed)
  return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def make_trainer(folder: pathlib.Path, policy, ref_policy) -> trl.DPOTrainer:
  """A DPOTrainer in float32 on the CPU. Its data set is never read: batches are handed to
  `compute_loss`.
  """
  config = trl.DPOConfig(
    output_dir=str(folder),
    beta=BETA,
    loss_type="sigmoid",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    disable_dropout=True,
    report_to="none",
  )
  text = {"prompt": "Question", "chosen": " 1", "rejected": " 2"}
  return trl.DPOTrainer(
    model=policy,
    ref_model=ref_policy,
    args=config,
    train_dataset=datasets.Dataset.from_list([text]),
    processing_class=transformers.AutoTokenizer.from_pretrained(str(EMBEDDED)),
  )


def trl_loss(
  trainer,
  loss_type,
  chosen_PT,
  rejected_PT,
  ref_chosen_P,
  ref_rejected_P,
  beta,
  label_smoothing=0.0,
):
  """TRL's loss of one batch and its gradients, log-probs per token being given.

  Returns:
    (loss, gradient [P, T] to the chosen tokens, gradient [P, T] to the rejected ones), float64.
  """
  logp = torch.tensor(
    np.concatenate([chosen_PT, rejected_PT]), requires_grad=True
  )  # TRL's order of rows
  none = torch.zeros_like(logp)
  outputs = types.SimpleNamespace(
    log_probs=logp, entropy=none, mean_logits=none, is_top1=none.bool()
  )
  ones = torch.ones(logp.shape[0], logp.shape[1] + 1, dtype=torch.long)
  completion = ones.clone()
  completion[:, 0] = 0  # the prompt is one token
  trainer.loss_types, trainer.beta, trainer.label_smoothing = [loss_type], beta, label_smoothing
  trainer.precompute_ref_logps = True
  inputs = {
    "input_ids": ones,
    "attention_mask": ones,
    "completion_mask": completion,
    "ref_chosen_logps": torch.tensor(ref_chosen_P),
    "ref_rejected_logps": torch.tensor(ref_rejected_P),
  }
  loss = trainer.compute_loss(lambda **_: outputs, inputs)
  loss.backward()
  return (float(loss.detach()), *logp.grad.chunk(2))


def our_loss(loss_fn, chosen_PT, rejected_PT, ref_chosen_P, ref_rejected_P, **settings):
  """Ours of the same, the mean over pairs as TRL takes it."""

  def mean(chosen_PT, rejected_PT):
    return loss_fn(
      chosen_PT.sum(1), rejected_PT.sum(1), ref_chosen_P, ref_rejected_P, **settings
    ).mean()

  with jax.enable_x64(True):
    loss, grads = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(chosen_PT, rejected_PT)
  return (float(loss), *map(np.asarray, grads))


def draw(num_pairs: int, num_tokens: int):
  """Log-probs of tokens and references with margins of both signs, float64 nats."""
  rng = np.random.default_rng(0)
  chosen_PT, rejected_PT = -rng.exponential(2.0, (2, num_pairs, num_tokens))
  ref_chosen_P, ref_rejected_P = -rng.exponential(2.0 * num_tokens, (2, num_pairs))
  return chosen_PT, rejected_PT, ref_chosen_P, ref_rejected_P


class GivenLogprobsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.trainer = make_trainer(pathlib.Path(folder), llama(0), llama(1))

  def assert_same(self, ours, theirs):
    self.assertLen(ours, 3)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    for got, expected in zip(ours[1:], theirs[1:], strict=True):
      self.assertGreater(np.abs(expected).max(), 1e-4)
      np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-12)

  @parameterized.product(beta=(0.05, 0.3, 2.0), tokens=(1, 7))
  def test_dpo(self, beta, tokens):
    # Fails if log-probs are averaged, if a sign of the margin is turned, or if β stands elsewhere.
    args = draw(9, tokens)
    h = args[0].sum(1) - args[1].sum(1) - args[2] + args[3]
    self.assertLess(h.min(), 0.0)
    self.assertGreater(h.max(), 0.0)
    self.assert_same(
      our_loss(losses.dpo_loss, *args, beta=beta), trl_loss(self.trainer, "sigmoid", *args, beta)
    )

  @parameterized.product(epsilon=(0.1, 0.4), pair=(0, 1, 2))
  def test_conservative_dpo(self, epsilon, pair):
    # Fails if ε stands on the wrong term, or if the loss is divided by 1 - 2ε (that is robust DPO).
    args = tuple(column[pair : pair + 1] for column in draw(3, 5))
    ours = our_loss(losses.dpo_loss, *args, beta=0.3, label_smoothing=epsilon)
    self.assert_same(ours, trl_loss(self.trainer, "aot", *args, 0.3, label_smoothing=epsilon))
    robust, *_ = trl_loss(self.trainer, "robust", *args, 0.3, label_smoothing=epsilon)
    self.assertGreater(abs(robust - ours[0]), 1e-3)

  @parameterized.parameters(0.05, 0.3, 2.0)
  def test_ipo(self, tau):
    # Fails if the margin is drawn to another value than 1/(2τ), or if the square is halved.
    args = draw(9, 1)
    self.assert_same(
      our_loss(losses.ipo_loss, *args, tau=tau), trl_loss(self.trainer, "ipo", *args, tau)
    )

  def test_ipo_of_several_tokens_is_another_loss(self):
    # Fails if we begin to average log-probs over tokens: then both would be equal without the
    # factors.
    args, n, tau = draw(9, 7), 7, 0.3
    ours = our_loss(losses.ipo_loss, *args, tau=tau / n)
    self.assert_same(
      tuple(value / n**2 for value in ours), trl_loss(self.trainer, "ipo", *args, tau)
    )


# Two problems; the second and the third pair share a chosen response. One rejected is an unfinished
# prefix, without EOS.
PROMPTS = ([5, 6, 7, 8, 9], [5, 6, 10])
PAIRS = (
  (0, [11, 12, 13, EOS], [11, 14, 15]),
  (1, [16, 17, EOS], [18, 19, 20, 21, EOS]),
  (1, [16, 17, EOS], [22, EOS]),
)


class WholeStepTest(absltest.TestCase):
  def test_loss_and_gradients(self):
    # Fails if rows of trees score other tokens than padded rows of whole sequences do, if a shared
    # trunk or chosen response counts once too often or too seldom, if reference log-probs go to
    # other branches, or if the mean is not taken over pairs. Losses agree to 1e-4 and gradients to
    # 1e-4 of each tensor's largest entry, in float32.
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    policy, ref_policy = llama(0), llama(1)
    for name, model in (("policy", policy), ("reference", ref_policy)):
      model.save_pretrained(folder / name)
    trainer = make_trainer(folder / "trl", policy, ref_policy)
    collator = dpo_trainer.DataCollatorForPreference(pad_token_id=0)
    rows = [
      {"prompt_ids": PROMPTS[i], "chosen_ids": good, "rejected_ids": bad} for i, good, bad in PAIRS
    ]
    loss = trainer.compute_loss(policy, collator(rows))
    loss.backward()
    loss = float(loss.detach())
    theirs = {name: value.grad.numpy() for name, value in policy.named_parameters()}

    config = huggingface.read_config(
      folder / "policy", dtype="float32", param_dtype="float32", scan_layers=False, remat="none"
    )
    model, mesh = Model(config), tiny_model.one_device_mesh()

    def load(name):
      return huggingface.load_params(
        folder / name, model, device_mesh.shardings(mesh, model.logical_axes())
      )

    trees = (
      Tree(PROMPTS[0], tuple(Branch(5, ids) for ids in PAIRS[0][1:])),
      Tree(PROMPTS[1], tuple(Branch(3, ids) for ids in (*PAIRS[1][1:], PAIRS[2][2]))),
    )
    store = reference.Store(epath.Path(folder / "reference.npz"))
    reference.score(
      model, load("reference"), trees, store=store, packing=reference.Packing(mesh, 32)
    )

    def referenced(tree: tree_lib.Tree, *pairs) -> Example:
      keys = [reference.branch_key(tree.trunk, branch.fork, branch.ids) for branch in tree.branches]
      sums = [float(np.sum(store[key])) for key in keys]
      return Example(tree, tuple(PairInTree(a, b, sums[a], sums[b]) for a, b in pairs))

    examples = [referenced(trees[0], (0, 1)), referenced(trees[1], (0, 1), (0, 2))]
    shape = batch_lib.measure(examples, 32)
    self.assertEqual(shape.rows, 1)  # both trees in one row

    def dpo(*columns):
      return losses.dpo_loss(*columns, beta=BETA)

    preference = objectives.Preference(loss=dpo, beta=BETA)
    objective = objectives.make_preference(model, preference, eos_ids=(EOS,))
    batch = batch_lib.build(examples, shape)
    (ours, _), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(load("policy"), batch)
    self.assertGreater(abs(loss - np.log(2.0)), 0.1)  # policy and reference differ
    self.assertAlmostEqual(float(ours), loss, delta=1e-4)

    huggingface.save(folder / "grads", model, grads)  # gradients have their parameters' layout
    saved = {}
    for path in (folder / "grads").glob("*.safetensors"):
      saved |= safetensors.numpy.load_file(path)
    self.assertEqual(set(saved), set(theirs))
    for name, expected in theirs.items():
      scale = np.abs(expected).max()
      self.assertGreater(scale, 0.0)
      np.testing.assert_allclose(saved[name], expected, rtol=0, atol=1e-4 * scale, err_msg=name)


if __name__ == "__main__":
  absltest.main()
