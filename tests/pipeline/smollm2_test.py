"""A real model: SmolLM2 from PyPI, SFT on a few rows, export, and import of the export."""

import json
import pathlib
import re
import shutil
import sys
import tempfile

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import transformers
from absl.testing import absltest
from etils import epath

from synthneg_jax.data import prompts
from synthneg_jax.decoding.engine import Trunk
from synthneg_jax.decoding.policy import Policy
from synthneg_jax.decoding.sampling import Sampling
from synthneg_jax.models import huggingface
from synthneg_jax.pipeline import export, sft, synthesize
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import device_mesh
from tests import tiny_model
from tests.models import smollm2

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "configs"))
import gsm8k  # noqa: E402

pytestmark = pytest.mark.slow  # a model of 135 million parameters

NEW = 12  # tokens of a greedy answer


def cut(folder: pathlib.Path, num_layers: int) -> pathlib.Path:
  """SmolLM2 with its first layers only; training all of them takes more than 2.2 GB."""
  whole = smollm2.smollm2_dir()
  shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
  config = json.loads((whole / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}))
  with safetensors.safe_open(whole / "model.safetensors", framework="np") as file:
    layer = {name: int(re.search(r"layers\.(\d+)\.|$", name).group(1) or 0) for name in file.keys()}  # noqa: SIM118
    kept = {name: file.get_tensor(name) for name in layer if layer[name] < num_layers}
  safetensors.numpy.save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
  return folder


def trained_and_exported(root: pathlib.Path, model: pathlib.Path) -> Experiment:
  """A run of synthesize, sft and export on four sums in GSM8K format, with three steps of SFT."""
  (root / "data/gsm8k").mkdir(parents=True)
  for split, first in (("train", 3), ("test", 50)):
    rows = [
      {
        "question": f"Ann has {n} pears and buys {n + 1}. How many now?",
        "answer": f"{n} + {n + 1}\n#### {2 * n + 1}",
      }
      for n in range(first, first + 4)
    ]
    (root / f"data/gsm8k/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = gsm8k.get_config("model=smollm2_135m,smoke")
  config.model.path, config.model.scan_layers = str(model), True
  config.task.path, config.task.train_problems, config.task.test_problems = (
    str(root / "data/gsm8k"),
    4,
    4,
  )
  config.sft.row_length, config.sft.batch_size, config.sft.max_steps, config.sft.num_epochs = (
    128,
    2,
    3,
    2,
  )
  config.sft.optimizer.learning_rate, config.sft.optimizer.schedule = 1e-4, "constant"
  config.export.max_shard_bytes = 50_000_000
  config.evaluate.methods, config.model.max_length = ("sft",), 128
  experiment = Experiment(config, epath.Path(root / "run"), tiny_model.one_device_mesh())
  for stage in (synthesize, sft, export):
    stage.run(experiment)
  return experiment


def greedy(experiment: Experiment, policy: Policy, questions) -> list[list[int]]:
  """Our engine's answers to questions in the chat template."""
  asked = [prompts.encode_prompt(policy.tokenizer, question, "chat") for question in questions]
  trunks = [Trunk(ids, [len(ids)], np.zeros((1, 2), np.uint32)) for ids in asked]
  experiment.config.engine.max_new_tokens = NEW
  engine = experiment.engine(policy, lanes=len(trunks), slots=1)
  generations = dict(engine.run(policy.params, trunks, Sampling(temperature=0.0)))
  return [generations[index][0].ids.tolist() for index in range(len(trunks))]


class SmolLM2Test(absltest.TestCase):
  # Fails if SFT does not change the weights, or the export has other weights, tokenizer or stop
  # tokens than the policy.
  def test_there_and_back(self):
    root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self._there_and_back(root, cut(root / "cut", 4))

  @pytest.mark.long
  def test_the_whole_model_there_and_back(self):
    self._there_and_back(
      pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())), smollm2.smollm2_dir()
    )

  def _there_and_back(self, root: pathlib.Path, model_folder: pathlib.Path):
    with jax.debug_nans(False):
      experiment = trained_and_exported(root, model_folder)
    losses = [
      json.loads(line)["loss/per_token"]
      for line in (root / "run/sft/metrics.jsonl").read_text().splitlines()
    ]
    self.assertLess(losses[-1], losses[0] - 0.1)
    folder = root / "run/export/sft/policy"
    self.assertGreater(len(list(folder.glob("*.safetensors"))), 1)
    policy = experiment.policy("sft")
    model = type(policy.model)(
      huggingface.read_config(
        folder,
        dtype="float32",
        param_dtype="float32",
        scan_layers=True,
        remat=tiny_model.CONFIG.remat,
      )
    )
    self.assertEqual(model.config, policy.model.config)
    layout = device_mesh.shardings(experiment.mesh, model.logical_axes())
    jax.tree.map(
      np.testing.assert_array_equal, huggingface.load_params(folder, model, layout), policy.params
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
      self.assertEqual((folder / name).read_bytes(), (smollm2.smollm2_dir() / name).read_bytes())
    generation = transformers.GenerationConfig.from_pretrained(folder)
    self.assertEqual(generation.eos_token_id, policy.tokenizer.eos_token_id)


if __name__ == "__main__":
  absltest.main()
