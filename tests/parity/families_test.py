"""Logits of every family against transformers with torch, in and out; each direction's error is
printed.

python -m tests.parity.families_test record   writes tests/models/family_logits.json anew
"""

import dataclasses
import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
import torch
import transformers
from absl.testing import absltest, parameterized

from synthneg_jax.core.geometry import Lanes
from synthneg_jax.decoding.decode import Stops
from synthneg_jax.decoding.engine import Engine, Trunk
from synthneg_jax.decoding.sampling import Sampling
from synthneg_jax.models import huggingface
from synthneg_jax.models.decoder import Model
from tests import tiny_model
from tests.models import tiny_families
from tests.parity.logits_test import TOLERANCE, load, our_logits, torch_logits

transformers.utils.logging.disable_progress_bar()


def read_by_torch(folder):
  """The model of a folder, by the class that its config.json names; nothing may be missing or left
  over.
  """
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
    folder, output_loading_info=True, attn_implementation="eager"
  )
  left = {key: list(value) for key, value in report.items() if value}
  if left:
    raise AssertionError(f"transformers did not find its tensors: {left}")
  return model.eval()


def recorded_by_torch(name: str, folder: pathlib.Path) -> list[list[float]]:
  """Logits at PLACES of the model that numpy draws."""
  tiny_families.write_folder(name, folder)
  logits = torch_logits(read_by_torch(folder), tiny_families.ids(name))
  return [[round(float(value), 6) for value in logits[place]] for place in tiny_families.PLACES]


class FamiliesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def theirs(self, name):
    """A random model of transformers' own, saved by transformers."""
    raw = tiny_families.config_json(name) | {"initializer_range": 0.3}
    config = transformers.AutoConfig.for_model(**raw)
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(
      config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
      for parameter, value in model.named_parameters():
        if "norm" in parameter or "bias" in parameter:
          value.add_(0.3 * torch.randn_like(value))
    model.save_pretrained(self.folder / "theirs")
    return model

  @parameterized.parameters(*tiny_families.CASES)
  def test_in_and_out(self, name):
    # Fails if an option is read or written wrongly, a tensor goes to another place, or an equation
    # differs.
    ids = tiny_families.ids(name)
    expected = torch_logits(self.theirs(name), ids)
    self.assertGreater(np.ptp(expected), 1.0)
    model, params = load(self.folder / "theirs")
    self.assertEqual(model.config.family, tiny_families.CASES[name]["model_type"])
    way_in = np.abs(our_logits(model, params, ids) - expected).max()
    params = jax.tree.map(lambda leaf: 0.9 * leaf + 0.01, params)
    huggingface.save(self.folder / "ours", model, params, max_shard_bytes=8000)
    theirs = read_by_torch(self.folder / "ours")
    self.assertEqual(theirs.config.model_type, model.config.family)
    way_out = np.abs(our_logits(model, params, ids) - torch_logits(theirs, ids)).max()
    print(f"| {name} | {way_in:.1e} | {way_out:.1e} |")
    self.assertLessEqual(max(way_in, way_out), TOLERANCE)

  def test_gemma_3_with_images(self):
    # Fails if the text model is not found within the wrapper, or its sizes are not those of Gemma
    # 3's text config.
    text = tiny_families.config_json("gemma3") | {"initializer_range": 0.3}
    vision = {
      "hidden_size": 16,
      "intermediate_size": 16,
      "num_hidden_layers": 1,
      "num_attention_heads": 2,
    }
    config = transformers.Gemma3Config(
      text_config=text,
      vision_config=vision | {"image_size": 28, "patch_size": 14},
      image_token_index=60,
    )
    torch.manual_seed(3)
    theirs = transformers.Gemma3ForConditionalGeneration._from_config(
      config, attn_implementation="eager"
    ).eval()
    theirs.save_pretrained(self.folder / "theirs")
    ids = [i % 59 for i in tiny_families.ids("gemma3")]
    expected = torch_logits(theirs, ids)
    self.assertGreater(np.ptp(expected), 1.0)
    model, params = load(self.folder / "theirs")
    way_in = np.abs(our_logits(model, params, ids) - expected).max()
    huggingface.save(self.folder / "ours", model, params)
    out = read_by_torch(self.folder / "ours")
    self.assertIsInstance(out, transformers.Gemma3ForCausalLM)
    way_out = np.abs(torch_logits(out, ids) - expected).max()
    print(f"| gemma3, with images | {way_in:.1e} | {way_out:.1e} |")
    self.assertLessEqual(max(way_in, way_out), TOLERANCE)

  @parameterized.parameters((12, False), (24, True))
  def test_longrope_below_and_above_the_original_length(self, length, is_long):
    # Fails if a run's factors are not those that transformers takes for its longest text.
    name = "phi3, longrope, long"
    theirs = self.theirs(name)
    how = {"dtype": "float32", "param_dtype": "float32", "scan_layers": False, "remat": "none"}
    config = huggingface.read_config(self.folder / "theirs", **how, max_length=length)
    self.assertEqual(config.rope_scaling.is_long, is_long)
    _, params = load(self.folder / "theirs")
    ids = tiny_families.ids(name)[:length]
    ours, expected = our_logits(Model(config), params, ids), torch_logits(theirs, ids)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)
    other = dataclasses.replace(
      config, rope_scaling=dataclasses.replace(config.rope_scaling, is_long=not is_long)
    )
    self.assertGreater(np.abs(our_logits(Model(other), params, ids) - expected).max(), 0.1)

  @parameterized.parameters(*tiny_families.CASES)
  def test_recorded_logits_are_torchs(self, name):
    # Fails if what the plain suite holds our decoder against is not what transformers computes.
    recorded = json.loads(tiny_families.RECORDED.read_text())[name]
    np.testing.assert_allclose(
      recorded_by_torch(name, self.folder / "x"), recorded, rtol=0, atol=2e-5
    )

  @parameterized.parameters(
    "mistral",
    "qwen2, windows",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3, window",
    "olmo3",
    "smollm3",
    "granite",
    "gemma",
  )
  def test_greedy_text_is_that_of_torch(self, name):
    # Fails if a window, a cap or a rotary base is lost on the way through the engine's cache.
    theirs = self.theirs(name)
    model, params = load(self.folder / "theirs")
    rng = np.random.default_rng(1)
    prompts = [rng.integers(4, 61, size).tolist() for size in (2, 9, 14)]
    trunks = [Trunk(ids, [len(ids)], np.zeros((1, 2), np.uint32)) for ids in prompts]
    engine = Engine(
      model, tiny_model.one_device_mesh(), Stops((3,)), lanes=Lanes(3, 1), max_new_tokens=16
    )
    ours = {
      i: generations[0] for i, generations in engine.run(params, trunks, Sampling(temperature=0.0))
    }
    for i, ids in enumerate(prompts):
      whole = theirs.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=16, pad_token_id=0
      )
      self.assertEqual(ours[i].ids.tolist(), whole[0, len(ids) :].tolist())


def record():
  """Writes the recorded logits."""
  with tempfile.TemporaryDirectory() as folder:
    made = {
      name: recorded_by_torch(name, pathlib.Path(folder) / str(i))
      for i, name in enumerate(tiny_families.CASES)
    }
  lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(values)}" for name, values in made.items())
  tiny_families.RECORDED.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
  record() if sys.argv[1:] == ["record"] else absltest.main()
