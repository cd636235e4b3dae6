"""--check_parity without torch, and its place before all stages."""

import pathlib
import sys
import tempfile
from unittest import mock

from absl.testing import absltest

from synthneg_jax.decoding.policy import EMBEDDED
from synthneg_jax.models import torch_parity
from synthneg_jax.pipeline import stages
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError
from tests import tiny_model


class CheckParityTest(absltest.TestCase):
  def test_without_torch(self):
    # Fails if a requested check is silently skipped.
    with mock.patch.dict(sys.modules, {"torch": None}):
      with self.assertRaisesRegex(UserError, "--check_parity .* pip install torch"):
        torch_parity.check(EMBEDDED, tiny_model.model(), None)

  def test_runs_before_the_stages(self):
    # Fails if the leaf set by the flag is not read, if it is on by default, or if a model other
    # than the base is compared.
    config = config_schema.default()
    config.mesh.data = 1
    config.mesh.fsdp = -1
    order = []
    stage = {"sft": lambda _: order.append("sft") or {}}
    with mock.patch.object(torch_parity, "check") as check:
      check.side_effect = lambda *_: order.append("check")
      stages.run(config, tempfile.mkdtemp(), ["sft"], overrides=stage)
      check.assert_not_called()
      config.model.check_parity = True
      stages.run(config, tempfile.mkdtemp(), ["sft"], overrides=stage)
    self.assertEqual(order, ["sft", "check", "sft"])
    ((folder, model, params),) = [call.args for call in check.call_args_list]
    self.assertEqual(pathlib.Path(folder), EMBEDDED)
    self.assertEqual(
      params["ends"]["embedding"].shape, (model.config.vocab_size, model.config.d_model)
    )


if __name__ == "__main__":
  absltest.main()
