"""SFT of an adapter on the embedded model: training, checkpoints, resume, stacking and export."""

import copy
import json
import pathlib
import shutil
import sys
import tempfile

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import absltest
from etils import epath

from synthneg_jax.decoding.policy import EMBEDDED
from synthneg_jax.pipeline import export, sft, synthesize, train_policy
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.training import objectives
from tests import tiny_model

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "configs"))
import arithmetic  # noqa: E402

pytestmark = pytest.mark.slow  # trains


def make_config():
  config = arithmetic.get_config("smoke")
  config.task.train_problems, config.sft.batch_size, config.sft.num_epochs = 24, 12, 4
  config.sft.optimizer.learning_rate = 3e-2
  config.sft.lora.rank, config.sft.lora.alpha = 1, 2.0
  config.sft.save_every_steps, config.sft.max_to_keep = 3, 3
  config.dpo.lora.rank, config.dpo.lora.targets = 2, ("query", "down")
  config.evaluate.methods = ("sft", "dpo")
  return config


def open_run(workdir) -> Experiment:
  return Experiment(make_config(), epath.Path(workdir), tiny_model.one_device_mesh())


def num_bytes(folder) -> int:
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class LoraTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(tempfile.mkdtemp())
    cls.experiment = open_run(cls.root / "run")
    synthesize.run(cls.experiment)
    cls.figures = sft.run(cls.experiment)
    cls.base_bytes = (pathlib.Path(EMBEDDED) / "model.safetensors").stat().st_size

  def copy_of_run(self) -> Experiment:
    workdir = pathlib.Path(tempfile.mkdtemp(dir=self.root)) / "moved"
    shutil.copytree(self.root / "run", workdir)
    return open_run(workdir)

  def test_learns(self):
    # Fails if the optimizer does not train the adapter: the loss would not fall.
    lines = [
      json.loads(line) for line in (self.root / "run/sft/metrics.jsonl").read_text().splitlines()
    ]
    self.assertLen(lines, 8)
    self.assertLess(lines[-1]["loss/per_token"], 0.8 * lines[0]["loss/per_token"])

  def test_only_the_adapter_is_kept(self):
    # Fails if checkpoints or the policy also contain the base model.
    params = self.experiment.policy("sft").adapters[0][1]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    self.assertEqual(self.figures["trained"], count)
    self.assertLess(count, 5000)
    steps = sorted((self.root / "run/sft/checkpoints").iterdir())
    self.assertEqual([path.name for path in steps], ["3", "6"])
    self.assertGreater(self.base_bytes, 500_000)
    for folder in (*steps, self.root / "run/sft/policy/params"):
      self.assertLess(num_bytes(folder), self.base_bytes / 4)

  def test_policy_is_base_and_adapter(self):
    # Fails if loading merges with another scale or into another base model.
    policy, base = self.experiment.policy("sft"), self.experiment.base()
    ((adapter, params),) = policy.adapters
    self.assertEqual((adapter.rank, adapter.scale, policy.base), (1, 2.0, base.folder))
    for name in base.params["layers"]:
      before, after = base.params["layers"][name], policy.params["layers"][name]
      if name in params:
        added = 2.0 * np.einsum("yir,yro->yio", params[name]["a"], params[name]["b"])
        self.assertGreater(np.abs(added).max(), 1e-3)
        np.testing.assert_allclose(after, before + added, rtol=0, atol=1e-5)
      else:
        jax.tree.map(np.testing.assert_array_equal, after, before)
    self.assertNotEqual(policy.fingerprint, base.fingerprint)

  def test_a_killed_run_goes_on(self):
    # Fails if a checkpoint lacks the adapter's moments, or resuming trains the adapter from step 0.
    experiment = self.copy_of_run()
    for name in ("manifest.json", "metrics.jsonl"):
      (experiment.workdir / "sft" / name).unlink()
    (experiment.workdir / "sft/policy").rmtree()
    sft.run(experiment)
    self.assertLen(
      (experiment.workdir / "sft/metrics.jsonl").read_text().splitlines(), 2
    )  # steps 7 and 8 alone
    self.assertEqual(
      experiment.policy("sft").fingerprint, self.experiment.policy("sft").fingerprint
    )

  def test_adapters_stack_move_and_are_exported(self):
    # Fails if the second adapter's base is not the first one's policy, if a moved workdir loses it,
    # or if the two exports have different weights.
    experiment = self.copy_of_run()
    policy, section = experiment.policy("sft"), copy.deepcopy(experiment.config.dpo)
    trees = train_policy.solution_trees(
      {"p": [5, 6, 7]}, {"p": [[8, 9], [9, 8, 7]]}, max_branches=4, max_tokens=64
    )
    stage = experiment.stage("dpo/dpo", ["dpo"], ["sft"])
    training = train_policy.make_run(
      experiment,
      stage,
      section,
      model=policy.model,
      objective=objectives.make_sft(policy.model),
      trees=trees,
    )
    identity, _ = train_policy.train(experiment, policy, training)
    stage.finish({}, identity=identity)
    moved = experiment.workdir.parent / "again"
    experiment.workdir.rename(moved)
    experiment = open_run(moved)
    policy = experiment.policy("dpo/dpo")
    self.assertEqual([adapter.targets for adapter, _ in policy.adapters][1], ("query", "down"))
    self.assertLen(policy.adapters, 2)
    figures = export.run(experiment)
    self.assertEqual(set(figures), {"sft", "dpo"})
    exported = safetensors.numpy.load_file(moved / "export/dpo/policy/model.safetensors")
    adapter = safetensors.numpy.load_file(moved / "export/dpo/adapter/adapter_model.safetensors")
    base = safetensors.numpy.load_file(pathlib.Path(EMBEDDED) / "model.safetensors")
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"):
      pair = [adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA"]
      self.assertEqual(pair[0].shape[1], 3 if "q_proj" in name else 1)
      np.testing.assert_allclose(
        exported[f"{name}.weight"], base[f"{name}.weight"] + pair[0] @ pair[1], atol=1e-5
      )
    query = policy.params["layers"]["query"]
    np.testing.assert_array_equal(exported["model.layers.1.self_attn.q_proj.weight"], query[1].T)

  def test_refuses(self):
    # Fails if pretrain accepts an adapter, or a misspelt matrix name is found only after data is
    # generated.
    config = make_config()
    with config.unlocked():
      config.pretrain.lora.rank = 4
    with self.assertRaisesRegex(UserError, "pretrain.lora.rank must be 0"):
      config_schema.check_values(config)
    config.pretrain.lora.rank, config.rft.lora.targets = 0, ("query", "q_proj")
    with self.assertRaisesRegex(
      UserError, "rft.lora.targets=.*q_proj.* must be one of query, key, "
    ):
      config_schema.check_values(config)


if __name__ == "__main__":
  absltest.main()
