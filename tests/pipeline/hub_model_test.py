"""The recipe on a Hub model, by the command line and a local server, with upload of its policy."""

import os
import pathlib
import subprocess
import sys
import tempfile

import pytest
from absl.testing import absltest

from tests.models import hf_tokenizers_test, model_hub_test
from tests.xla_flags import xla_flags

pytestmark = pytest.mark.slow  # starts processes, trains

ROOT = pathlib.Path(__file__).parents[2]
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


class HubModelTest(hf_tokenizers_test.FolderTest):
  def test_the_recipe(self):
    # Fails if a stage takes the model's name for a folder or downloads the model again, or if the
    # policy is not uploaded.
    root = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    self.write(
      generation={"eos_token_id": hf_tokenizers_test.END},
      tokenizer={"chat_template": hf_tokenizers_test.TEMPLATE},
    )
    (root / "gsm8k").mkdir()
    row = '{{"question": "What is {} and {}?", "answer": "They are {}.\\n#### {}"}}\n'
    for split, first in (("train", 1), ("test", 50)):
      rows = [row.format(n, n + 1, 2 * n + 1, 2 * n + 1) for n in range(first, first + 12)]
      (root / f"gsm8k/{split}.jsonl").write_text("".join(rows))
    files = {path.name: path.read_bytes() for path in self.folder.iterdir()}
    server = model_hub_test.Server({NAME: {model_hub_test.FIRST: files}})
    self.addCleanup(server.close)
    env = {
      "HF_ENDPOINT": server.url,
      "HF_HUB_DISABLE_XET": "1",
      "HF_HOME": str(root / "hf"),
      "HF_TOKEN": "hf_secret",
      "SYNTHNEG_DATA_DIR": str(root),
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": xla_flags(1),
      "PYTHONPATH": str(ROOT),
    }
    command = [
      *(
        sys.executable,
        "-m",
        "synthneg_jax.cli",
        "pipeline",
        "--config=gsm8k:smoke",
        f"--workdir={root / 'run'}",
      ),
      *(
        f"--config.model.path={NAME}",
        "--config.model.max_length=256",
        "--config.engine.max_new_tokens=8",
      ),
      *("--config.export.push_to_hub=me/policy", "--config.evaluate.methods=('base','sft')"),
      "--stages=synthesize,sft,sample,credit,evaluate,export",
    ]
    done = subprocess.run(
      command, env=os.environ | env, cwd=root, capture_output=True, text=True, check=False
    )
    self.assertEqual(done.returncode, 0, done.stderr[-3000:])
    fetched = [
      path
      for method, path in server.asked
      if method == "GET" and path.endswith("model.safetensors")
    ]
    self.assertLen(fetched, 1)
    ((files,),) = server.pushed.values()
    self.assertContainsSubset(
      ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"], files
    )
    self.assertIn(
      f'"eos_token_id": [\n    {hf_tokenizers_test.EOS},', files["config.json"].decode()
    )


if __name__ == "__main__":
  absltest.main()
