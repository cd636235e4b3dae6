"""Logits and greedy text against transformers with torch, both reading the same Hugging Face
folders.
"""

import pathlib
import tempfile

import jax
import numpy as np
import torch
import transformers
from absl.testing import absltest, parameterized

from synthneg_jax.core import tree as tree_lib
from synthneg_jax.core.geometry import Lanes
from synthneg_jax.decoding.decode import Stops
from synthneg_jax.decoding.engine import Engine, Trunk
from synthneg_jax.decoding.sampling import Sampling
from synthneg_jax.models import huggingface
from synthneg_jax.models.decoder import Model
from synthneg_jax.runtime import device_mesh
from tests import tiny_model
from tests.models import smollm2

TOLERANCE = 1e-4  # largest absolute difference of two logits
PLAIN = {
  "vocab_size": 61,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 4,
  "rms_norm_eps": 1e-5,
  "initializer_range": 0.3,
  "max_position_embeddings": 64,
  "bos_token_id": None,
  "eos_token_id": 3,
  "pad_token_id": 0,
}
VARIANTS = (
  {},
  {"num_key_value_heads": 2, "tie_word_embeddings": True},
  {"num_key_value_heads": 1, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
  {"head_dim": 12, "num_key_value_heads": 2, "rms_norm_eps": 0.05},
  {
    "head_dim": 4,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 30.0, "rope_type": "default"},
  },
)


def torch_model(seed, **changes):
  """A random float32 LlamaForCausalLM, its norms away from 1."""
  torch.manual_seed(seed)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**PLAIN | changes)).eval()
  with torch.no_grad():
    for name, value in model.named_parameters():
      if "norm" in name:
        value.add_(0.3 * torch.randn_like(value))
  return model


def torch_logits(model, ids):
  with torch.no_grad():
    return model(torch.tensor([ids])).logits[0].numpy()


def our_logits(model, params, ids):
  """Logits [len(ids), V] of one sequence."""
  forward = jax.jit(lambda params, trees: model.logits(params, model.hidden(params, trees)[0][0]))
  return np.asarray(forward(params, tree_lib.pack([[tree_lib.Tree(ids)]], len(ids))))


def load(folder, dtype="float32", scan_layers=False):
  how = {"dtype": dtype, "param_dtype": dtype, "scan_layers": scan_layers, "remat": "none"}
  config = huggingface.read_config(folder, **how, max_length=24)
  model = Model(config)
  return model, huggingface.load_params(
    folder, model, device_mesh.shardings(tiny_model.one_device_mesh(), model.logical_axes())
  )


class ParityTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)
    self.ids = np.random.default_rng(0).integers(0, PLAIN["vocab_size"], 24).tolist()

  @parameterized.parameters(*enumerate(VARIANTS))
  def test_we_compute_what_torch_saved(self, seed, changes):
    # Fails if an option of LlamaConfig is read wrongly, or a tensor goes to another place.
    theirs = torch_model(seed, **changes)
    theirs.save_pretrained(self.folder / "x")
    model, params = load(self.folder / "x")
    expected = torch_logits(theirs, self.ids)
    self.assertGreater(np.ptp(expected), 1.0)
    np.testing.assert_allclose(
      our_logits(model, params, self.ids), expected, rtol=0, atol=TOLERANCE
    )

  @parameterized.parameters(*enumerate(VARIANTS))
  def test_torch_computes_what_we_saved(self, seed, changes):
    # Fails if an option is written wrongly, or if transformers does not find a tensor and draws it
    # anew.
    torch_model(seed, **changes).save_pretrained(self.folder / "x")
    model, params = load(self.folder / "x")
    params = jax.tree.map(lambda leaf: 0.9 * leaf + 0.01, params)
    huggingface.save(self.folder / "y", model, params, max_shard_bytes=8000)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
      self.folder / "y", output_loading_info=True
    )
    self.assertIsInstance(theirs, transformers.LlamaForCausalLM)
    self.assertEqual({key: list(value) for key, value in report.items() if value}, {})
    expected = torch_logits(theirs.eval(), self.ids)
    self.assertGreater(np.ptp(expected), 1.0)
    np.testing.assert_allclose(
      our_logits(model, params, self.ids), expected, rtol=0, atol=TOLERANCE
    )

  def test_torch_reads_our_bfloat16(self):
    # Fails if bfloat16 bits are changed on the way into the file.
    model = tiny_model.model(param_dtype="bfloat16")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
      lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), model.abstract_params()
    )
    huggingface.save(self.folder / "x", model, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(self.folder / "x")
    state = theirs.state_dict()
    self.assertEqual({value.dtype for value in state.values()}, {torch.bfloat16})
    query = params["layers"]["query"][1].astype(np.float32)
    np.testing.assert_array_equal(
      state["model.layers.1.self_attn.q_proj.weight"].float().numpy(), query.T
    )

  def test_greedy_text_is_that_of_torch(self):
    # Fails if the engine's cache, positions or ending differ from those of `generate`.
    theirs = torch_model(7, num_key_value_heads=2)
    theirs.save_pretrained(self.folder / "x")
    model, params = load(self.folder / "x")
    rng = np.random.default_rng(1)
    prompts = [rng.integers(4, 61, size).tolist() for size in (1, 3, 6, 9, 12, 5, 7, 2)]
    trunks = [Trunk(ids, [len(ids)], np.zeros((1, 2), np.uint32)) for ids in prompts]
    engine = Engine(
      model, tiny_model.one_device_mesh(), Stops((3,)), lanes=Lanes(3, 1), max_new_tokens=20
    )
    ours = {
      i: generations[0] for i, generations in engine.run(params, trunks, Sampling(temperature=0.0))
    }
    sizes = set()
    for i, ids in enumerate(prompts):
      whole = theirs.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=20, pad_token_id=0
      )
      self.assertEqual(ours[i].ids.tolist(), whole[0, len(ids) :].tolist())
      sizes.add(len(ours[i].ids))
    self.assertGreater(len(sizes), 1)  # some end with EOS, some after 20 tokens
    self.assertIn(20, sizes)


class SmolLM2Test(absltest.TestCase):
  def test_logits(self):
    # Fails if the real model's equations differ from torch's at any place of the prompt. Float64
    # shows them without noise, but for the norms, which transformers computes in float32. In
    # float32, logits up to 38 carry noise of 1e-4 over a prompt's 2.6 million: 6e-5 of torch's and
    # 9e-5 of ours against float64, 7e-5 between torch's own attention kernels. So there the
    # absolute tolerance holds for the last place, and all places are held to the logits' scale.
    folder = smollm2.smollm2_dir()
    ids = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
      [
        {
          "role": "user",
          "content": "Natalia sold 48 clips in April and half as many in May. How many in all?",
        }
      ],
      add_generation_prompt=True,
      return_dict=True,
    )["input_ids"]
    found = {}
    for dtype in ("float32", "float64"):
      with jax.enable_x64(dtype == "float64"):
        theirs = transformers.LlamaForCausalLM.from_pretrained(
          folder, dtype=getattr(torch, dtype)
        ).eval()
        expected = torch_logits(theirs, ids)
        del theirs
        ours = our_logits(*load(folder, dtype=dtype, scan_layers=True), ids)
        self.assertEqual(ours.dtype, np.dtype(dtype))
        found[dtype] = np.abs(ours - expected).max(axis=1)
        print(
          f"SmolLM2 in {dtype}: largest difference {found[dtype].max():.1e} over {len(ids)} "
          f"places, {found[dtype][-1]:.1e} at the last; largest logit {np.abs(expected).max():.1f}."
        )
    self.assertLessEqual(found["float64"].max(), TOLERANCE)
    self.assertLessEqual(found["float32"][-1], TOLERANCE)
    self.assertLessEqual(found["float32"].max(), 1e-5 * np.abs(expected).max())


if __name__ == "__main__":
  absltest.main()
