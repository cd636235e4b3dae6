"""A PEFT folder as model.path: base and adapter, tokenizer, and errors."""

import json
import shutil

import jax
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from synthneg_jax.decoding import policy as policy_lib
from synthneg_jax.decoding.policy import Policy
from synthneg_jax.models import adapter as adapter_lib
from synthneg_jax.models.adapter import Adapter
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError
from tests import tiny_model
from tests.models import hf_tokenizers_test


class PeftFolderTest(hf_tokenizers_test.FolderTest):
  def setUp(self):
    super().setUp()
    self.write(generation={"eos_token_id": hf_tokenizers_test.END})
    self.adapter_folder = self.folder.parent / "adapter"
    model = tiny_model.model(vocab_size=hf_tokenizers_test.IMAGE + 1)
    self.adapter = Adapter(model, 2, 6.0, ("query", "down"))
    rng = np.random.default_rng(0)
    self.params = jax.tree.map(
      lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), self.adapter.abstract_params()
    )
    adapter_lib.save_peft(self.adapter_folder, [(self.adapter, self.params)], str(self.folder))

  def load(self, folder=None) -> Policy:
    return Policy.load(
      folder or self.adapter_folder, config_schema.default().model, tiny_model.one_device_mesh()
    )

  def change(self, **changes):
    path = self.adapter_folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  def test_base_plus_adapter(self):
    # Fails if the adapter is ignored or scaled differently, or if a policy trained on top of it
    # loses it.
    policy, base = self.load(), self.load(self.folder)
    product = np.einsum("yir,yro->yio", self.params["query"]["a"], self.params["query"]["b"])
    query = np.asarray(base.params["layers"]["query"]) + 3.0 * product
    np.testing.assert_allclose(policy.params["layers"]["query"], query, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(policy.params["layers"]["up"], base.params["layers"]["up"])
    self.assertEqual(policy.eos_ids, (hf_tokenizers_test.EOS, hf_tokenizers_test.END))
    self.assertNotEqual(policy.fingerprint, base.fingerprint)
    second = Adapter(policy.model, 1, 1.0, ("up",))
    trained = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), second.abstract_params())
    fingerprint = policy.save(self.folder.parent / "saved", trained, second)
    saved = self.load(self.folder.parent / "saved")
    self.assertEqual(saved.fingerprint, fingerprint)
    self.assertLen(saved.adapters, 2)
    self.assertEqual(saved.base, self.folder)
    np.testing.assert_array_equal(saved.params["layers"]["query"], policy.params["layers"]["query"])

  def test_a_model_beside_the_adapter(self):
    # Fails if config.json, or a whole model, in the adapter's folder makes the adapter go
    # unnoticed; or if an adapter may name its own folder as its base.
    alone = self.load().fingerprint
    shutil.copy(self.folder / "config.json", self.adapter_folder)
    self.assertEqual(self.load().fingerprint, alone)
    shutil.copy(self.folder / "model.safetensors", self.adapter_folder)
    self.assertEqual(self.load().fingerprint, alone)
    self.change(base_model_name_or_path=str(self.adapter_folder))
    with self.assertRaisesRegex(UserError, "is the adapter's own folder"):
      self.load()

  def test_identity(self):
    # Fails if a change of the adapter's base goes unnoticed.
    before = policy_lib.files_identity(policy_lib.epath.Path(self.adapter_folder))
    self.write(generation={"eos_token_id": hf_tokenizers_test.START})
    self.assertNotEqual(
      policy_lib.files_identity(policy_lib.epath.Path(self.adapter_folder)), before
    )

  def test_own_tokenizer(self):
    # Fails if the adapter's chat template is ignored.
    for name in ("tokenizer.json", "tokenizer_config.json"):
      (self.adapter_folder / name).write_bytes((self.folder / name).read_bytes())
    (self.adapter_folder / "chat_template.jinja").write_text(hf_tokenizers_test.TEMPLATE)
    policy = self.load()
    self.assertEqual(policy.tokenizer.chat_template, hf_tokenizers_test.TEMPLATE)
    self.assertEqual(policy.eos_ids, (hf_tokenizers_test.EOS, hf_tokenizers_test.END))

  @parameterized.parameters(
    ({"peft_type": "IA3"}, 'peft_type "IA3" is not supported, only LORA is.'),
    ({"use_dora": True}, "use_dora true is not supported, only false is."),
    ({"init_lora_weights": "pissa_niter_4"}, 'init_lora_weights "pissa_niter_4" changes the base'),
    ({"use_qalora": True}, "use_qalora true is not supported, only false is."),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is not supported: merge"),
    ({"bias": "all"}, 'bias "all" is not supported, only "none" is.'),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported: merge the adapter"),
    ({"base_model_name_or_path": ""}, "base_model_name_or_path is empty; set it to the folder"),
    (
      {"base_model_name_or_path": "/nowhere/x"},
      "base_model_name_or_path='/nowhere/x'.*does not exist",
    ),
  )
  def test_refused(self, changes, sentence):
    # Fails if an option that a pair of matrices cannot represent is ignored.
    self.change(**changes)
    self.assert_refused(sentence)

  @parameterized.parameters(
    ("base_model.model.lm_head.lora_A.weight", (2, 16), "lm_head has only lora_A"),
    (
      "base_model.model.lm_head.weight",
      (3, 16),
      "lm_head.weight is neither lora_A nor lora_B of a matrix",
    ),
    (
      "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
      (2, 15),
      r"q_proj has lora_A \(2, 15\) and lora_B \(16, 2\), .* 16 inputs and 16 outputs",
    ),
  )
  def test_refused_tensors(self, name, shape, sentence):
    # Fails if a tensor of the adapter is silently ignored.
    path = self.adapter_folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path) | {name: np.zeros(shape, np.float32)}
    safetensors.numpy.save_file(tensors, path)
    self.assert_refused(sentence)

  def test_no_weights(self):
    # Fails if a folder without weights is loaded as an adapter without effect.
    (self.adapter_folder / "adapter_model.safetensors").unlink()
    self.assert_refused("neither adapter_model.safetensors nor adapter_model.bin")


if __name__ == "__main__":
  absltest.main()
