"""Stage export: folders hold the policy's exact weights, tokenizer and stop tokens, in shards."""

import json
import pathlib
import shutil
import sys
import tempfile

import fsspec
import jax
import numpy as np
import pytest
import safetensors.numpy
import transformers
from absl.testing import absltest
from etils import epath

from synthneg_jax.decoding.policy import EMBEDDED, Policy
from synthneg_jax.models import model_hub
from synthneg_jax.pipeline import export
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import device_mesh
from synthneg_jax.runtime.errors import UserError
from tests import tiny_model
from tests.runtime import bucket_test

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "configs"))
import arithmetic  # noqa: E402

pytestmark = pytest.mark.slow  # trains

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def finished_sft(workdir: pathlib.Path, **export_section) -> Experiment:
  """A run whose stage sft wrote new weights and a tokenizer with all optional files."""
  config = arithmetic.get_config("smoke")
  config.model.path = str(workdir.parent / "base")
  config.evaluate.methods = ("base", "sft", "rft")  # rft was not trained here
  config.export.update(export_section)
  shutil.copytree(EMBEDDED, config.model.path)
  base_folder = pathlib.Path(config.model.path)
  generation = {"temperature": 0.6, "do_sample": True, "eos_token_id": [3]}
  (base_folder / "generation_config.json").write_text(json.dumps(generation))
  (base_folder / "chat_template.jinja").write_text(TEMPLATE)
  (base_folder / "additional_chat_templates").mkdir()
  (base_folder / "additional_chat_templates/terse.jinja").write_text("{{ messages[0]['content'] }}")
  experiment = Experiment(config, epath.Path(workdir), tiny_model.one_device_mesh())
  base = experiment.base()
  stage = experiment.stage("sft", ["sft"], reads_base=True)
  params = jax.tree.map(lambda leaf: 0.9 * leaf + 0.01, base.params)
  stage.finish({}, identity=base.save(stage.folder / "policy", params))
  return experiment


class ExportTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, self.root)

  def test_a_folder_for_every_trained_policy(self):
    # Fails if weights change, if a tokenizer file, template or stop token is lost, or if the base
    # model is exported.
    experiment = finished_sft(self.root / "run")
    policy = experiment.policy("sft")
    self.assertEqual(policy.eos_ids, (policy.tokenizer.eos_token_id, 3))
    figures = export.run(experiment)
    folder = self.root / "run/export/sft/policy"
    self.assertEqual(
      {method: figures[method]["folder"] for method in figures}, {"sft": str(folder)}
    )
    self.assertEqual([path.name for path in (self.root / "run/export").iterdir()], ["sft"])
    loaded = Policy.load(folder, experiment.config.model, experiment.mesh)
    self.assertEqual(loaded.fingerprint, policy.fingerprint)
    self.assertEqual(loaded.model.config, policy.model.config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    self.assertEqual(tokenizer.get_vocab(), policy.tokenizer.get_vocab())
    self.assertEqual(set(tokenizer.chat_template), {"default", "terse"})
    asked = [{"role": "user", "content": "a"}]
    self.assertEqual(tokenizer.apply_chat_template(asked, tokenize=False), "<user>a")
    generation = transformers.GenerationConfig.from_pretrained(folder)
    self.assertEqual(generation.eos_token_id, [policy.tokenizer.eos_token_id, 3])
    self.assertEqual(
      (generation.temperature, generation.pad_token_id), (0.6, policy.tokenizer.pad_token_id)
    )
    self.assertEqual(export.run(experiment), {})

  def test_large_weights_are_several_files(self):
    # Fails if export.max_shard_bytes is ignored, or the index misses a tensor.
    experiment = finished_sft(self.root / "run", max_shard_bytes=100_000)
    export.run(experiment)
    folder = self.root / "run/export/sft/policy"
    shards = sorted(folder.glob("*.safetensors"))
    self.assertGreater(len(shards), 4)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    held = {}
    for shard in shards:
      tensors = safetensors.numpy.load_file(shard)
      self.assertTrue(
        len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= 100_000
      )
      held |= dict.fromkeys(tensors, shard.name)
    self.assertEqual(index, held)
    self.assertEqual(
      Policy.load(folder, experiment.config.model, experiment.mesh).fingerprint,
      experiment.policy("sft").fingerprint,
    )

  def test_what_a_killed_call_left_is_written_anew(self):
    # Fails if a partial folder blocks the next call or counts as finished.
    experiment = finished_sft(self.root / "run")
    left = self.root / "run/export/sft/policy"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{}")
    export.run(experiment)
    self.assertEqual(json.loads((left / "config.json").read_text())["model_type"], "llama")
    weights = safetensors.numpy.load_file(left / "model.safetensors")
    np.testing.assert_array_equal(
      weights["model.norm.weight"], experiment.policy("sft").params["ends"]["norm"]["scale"]
    )

  def test_from_and_to_a_bucket(self):
    # Fails if a base model or an export must be on a local disk, if rows of a tensor are read from
    # a wrong offset, or if a truncated file in a bucket raises a traceback.
    fsspec.register_implementation("gcs", bucket_test.Bucket, clobber=True)
    bucket_test.Bucket.store.clear()
    config = arithmetic.get_config("smoke")
    config.model.path, config.evaluate.methods = "gs://bucket/base", ("base", "sft")
    config.export.max_shard_bytes = 100_000
    run = epath.Path("gs://bucket/run")
    experiment = Experiment(config, run, device_mesh.make_mesh(1, 2, 1, devices=jax.devices()[:2]))
    stage_folder = run / "sft/policy"
    for folder in (epath.Path(config.model.path), stage_folder):
      folder.mkdir(parents=True)
      for path in epath.Path(EMBEDDED).iterdir():
        if path.is_file():
          (folder / path.name).write_bytes(path.read_bytes())
      (folder / "additional_chat_templates").mkdir()
      (folder / "additional_chat_templates/terse.jinja").write_text(TEMPLATE)
    base = experiment.base()
    local = Policy.load(EMBEDDED, config.model, experiment.mesh)
    self.assertEqual((base.fingerprint, base.eos_ids), (local.fingerprint, local.eos_ids))
    stage = experiment.stage("sft", ["sft"], reads_base=True)
    # Its weights are in the other format because orbax needs a real bucket.
    (stage_folder / "fingerprint.json").write_text(json.dumps({"fingerprint": base.fingerprint}))
    stage.finish({}, identity=base.fingerprint)
    exported = export.run(experiment)["sft"]
    self.assertEqual(exported["folder"], "gs://bucket/run/export/sft/policy")
    written = epath.Path(exported["folder"])
    self.assertGreater(len(list(written.glob("*.safetensors"))), 4)
    self.assertEqual(
      Policy.load(written, config.model, experiment.mesh).fingerprint, local.fingerprint
    )
    pushed = []

    def push(folder, repo):
      pushed.extend(
        sorted(path.relative_to(folder).as_posix() for path in pathlib.Path(folder).rglob("*.*"))
      )
      return repo

    with absltest.mock.patch.object(model_hub, "push", push):
      export._push(stage.folder.parent / "export/sft", "me/policy")
    self.assertContainsSubset(
      ["config.json", "additional_chat_templates/terse.jinja", "tokenizer.json"], pushed
    )
    self.assertContainsSubset([path.name for path in written.glob("*.safetensors")], pushed)
    path = stage_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with self.assertRaisesRegex(UserError, "model.safetensors is missing or no safetensors file"):
      experiment.policy("sft")


if __name__ == "__main__":
  absltest.main()
