"""Adapters beside PEFT on tiny models: our files in PEFT, and one gradient of each."""

import pathlib
import tempfile

import jax
import numpy as np
import peft
import torch
from absl.testing import absltest, parameterized

from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.models import adapter as adapter_lib
from synthneg_jax.models import hf_configs
from synthneg_jax.models.adapter import Adapter
from synthneg_jax.training import batch as batch_lib
from synthneg_jax.training import objectives
from synthneg_jax.training.batch import Example
from tests.models import adapter_test, tiny_families
from tests.parity.families_test import read_by_torch
from tests.parity.logits_test import TOLERANCE, load, our_logits, torch_logits


class PeftTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  @parameterized.parameters("llama", "qwen2, windows", "gemma3, linear rope", "phi3", "olmo2")
  def test_peft_computes_what_we_saved(self, name):
    # Fails if PEFT does not find a tensor, counts it with another scale, or merges to other weights
    # than ours.
    tiny_families.write_folder(name, self.folder / "base")
    model, base = load(self.folder / "base")
    first, second = (
      Adapter(model, 3, 6.0, adapter_lib.TARGETS),
      Adapter(model, 2, 1.0, ("query", "value")),
    )
    chain = [(adapter, adapter_test.drawn(adapter)) for adapter in (first, second)]
    adapter_lib.save_peft(self.folder / "adapter", chain, str(self.folder / "base"))
    for adapter, params in chain:
      base = adapter.merge(base, params)
    ids = tiny_families.ids(name)
    plain = torch_logits(read_by_torch(self.folder / "base"), ids)
    theirs = peft.PeftModel.from_pretrained(
      read_by_torch(self.folder / "base"), self.folder / "adapter"
    ).eval()
    ours, adapted = our_logits(model, base, ids), torch_logits(theirs, ids)
    merged = torch_logits(theirs.merge_and_unload(), ids)
    print(
      f"| {name}, adapter | {np.abs(ours - adapted).max():.1e} | {np.abs(ours - merged).max():.1e} "
      "|"
    )
    self.assertGreater(np.abs(adapted - plain).max(), 0.5)
    np.testing.assert_allclose(adapted, ours, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(merged, ours, rtol=0, atol=TOLERANCE)

  @parameterized.parameters(
    (
      "llama",
      ["q_proj", "down_proj"],
      {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 20}},
    ),
    ("llama", ["v_proj"], {"use_rslora": True, "layers_to_transform": [1]}),
    ("phi3", ["qkv_proj", "gate_up_proj", "o_proj"], {}),
  )
  def test_we_compute_what_peft_saved(self, name, modules, changes):
    # Fails if a scale, a rank of its own, a layer or a part of a fused matrix is read wrongly.
    tiny_families.write_folder(name, self.folder / "base")
    config = peft.LoraConfig(
      r=3, lora_alpha=12, target_modules=modules, lora_dropout=0.0, **changes
    )
    theirs = peft.get_peft_model(read_by_torch(self.folder / "base"), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
      for key, value in theirs.named_parameters():
        if "lora_" in key:
          value.copy_(0.3 * torch.randn_like(value))
    theirs.save_pretrained(self.folder / "adapter")
    model, base = load(self.folder / "base")
    adapter, params = adapter_lib.load_peft(self.folder / "adapter", model)
    ids = tiny_families.ids(name)
    plain = our_logits(model, base, ids)
    ours, expected = our_logits(model, adapter.merge(base, params), ids), torch_logits(theirs, ids)
    print(f"| {name}, adapter of PEFT | {np.abs(ours - expected).max():.1e} |")
    self.assertGreater(np.abs(expected - plain).max(), 0.5)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)

  @parameterized.parameters("llama", "qwen3")
  def test_gradients_are_those_of_peft(self, name):
    # Fails if our SFT of an adapter takes another gradient than PEFT's of the same adapter on the
    # same text.
    tiny_families.write_folder(name, self.folder / "base")
    model, base = load(self.folder / "base")
    adapter = Adapter(model, 3, 12.0, ("query", "output", "gate", "down"))
    params = adapter_test.drawn(adapter)
    text = tiny_families.ids(name)
    example = Example(Tree(text[:6], (Branch(6, text[6:]),)))
    batch = batch_lib.build([example], batch_lib.measure([example], len(text)))
    objective = objectives.make_sft(model)

    def of_params(params):
      return objective(adapter.join(base, params), batch)

    (loss, _), grads = jax.jit(jax.value_and_grad(of_params, has_aux=True))(params)

    modules = {
      target: hf_configs.tensor_names(model.config)[f"layers/{target}"][: -len(".weight")]
      for target in params
    }
    config = peft.LoraConfig(
      r=3,
      lora_alpha=12,
      target_modules=[module.rpartition(".")[2] for module in modules.values()],
      lora_dropout=0.0,
    )
    theirs = peft.get_peft_model(read_by_torch(self.folder / "base"), config)
    found = dict(theirs.named_parameters())

    def place(module, layer, part):
      return found[f"base_model.model.{module.format(layer)}.lora_{part}.default.weight"]

    with torch.no_grad():
      for target, module in modules.items():
        for layer in range(model.config.num_layers):
          for part, ours in (("A", "a"), ("B", "b")):
            place(module, layer, part).copy_(
              torch.tensor(np.asarray(params[target][ours][layer].T))
            )
    labels = [-100] * 6 + text[6:]
    their_loss = theirs(torch.tensor([text]), labels=torch.tensor([labels])).loss
    their_loss.backward()
    self.assertAlmostEqual(float(loss), their_loss.item(), delta=1e-5)
    self.assertEqual(
      {key for key, value in found.items() if value.grad is None}
      & {k for k in found if "lora" in k},
      set(),
    )
    for target, module in modules.items():
      for layer in range(model.config.num_layers):
        for part, ours in (("A", "a"), ("B", "b")):
          expected = place(module, layer, part).grad.numpy().T
          scale = np.abs(expected).max()
          np.testing.assert_allclose(
            grads[target][ours][layer], expected, rtol=0, atol=2e-3 * scale
          )


if __name__ == "__main__":
  absltest.main()
