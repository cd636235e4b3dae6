"""The start-up check: passes on what was imported, and sees what was not."""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from synthneg_jax.models import torch_parity
from synthneg_jax.runtime.errors import UserError
from tests.models import tiny_families
from tests.parity.logits_test import load


class CheckParityTest(parameterized.TestCase):
  @parameterized.product(name=["qwen2", "gemma3"], dtype=["float32", "bfloat16"])
  def test_sees_one_matrix(self, name, dtype):
    # Fails if the tolerance is so wide that a matrix of another layer passes, or so narrow that
    # rounding does not.
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory())) / "x"
    tiny_families.write_folder(name, folder)
    model, params = load(folder, dtype=dtype)
    difference = torch_parity.check(folder, model, params)
    self.assertLess(difference, 1e-4 if dtype == "float32" else 2.0)
    swapped = {**params["layers"], "up": jnp.roll(params["layers"]["up"], 1, axis=0)}
    with self.assertRaisesRegex(UserError, "--check_parity: logits of .*x differ from torch's by"):
      torch_parity.check(folder, model, {**params, "layers": swapped})
    with jax.debug_nans(False), self.assertRaisesRegex(UserError, "differ from torch's by nan"):
      torch_parity.check(folder, model, jax.tree.map(lambda leaf: leaf * jnp.nan, params))

  def test_names_a_folder_that_transformers_cannot_read(self):
    # Fails if transformers' error comes as a traceback.
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory())) / "x"
    tiny_families.write_folder("llama", folder)
    model, params = load(folder)
    (folder / "model.safetensors").unlink()
    with self.assertRaisesRegex(UserError, "--check_parity: transformers cannot read .*x"):
      torch_parity.check(folder, model, params)


if __name__ == "__main__":
  absltest.main()
