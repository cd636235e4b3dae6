"""SmolLM2 from PyPI, our SFT, our export, and transformers' `generate` on it: the same tokens as
our engine's.
"""

import pathlib
import shutil
import tempfile

import jax
import torch
import transformers
from absl.testing import absltest

from tests.models import smollm2
from tests.pipeline import smollm2_test

QUESTIONS = ("Ann has 50 pears and buys 51. How many now?", "What is the capital of France?")


class GenerateTest(absltest.TestCase):
  def test_generate_says_what_our_engine_says(self):
    # Fails if training, exporting and reading again change a weight, an ending or the prompt's ids.
    root = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, root)
    with jax.debug_nans(False):
      experiment = smollm2_test.trained_and_exported(root, smollm2.smollm2_dir())
      policy = experiment.policy("sft")
      ours = smollm2_test.greedy(experiment, policy, QUESTIONS)
      base = smollm2_test.greedy(experiment, experiment.base(), QUESTIONS)
    folder = root / "run/export/sft/policy"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = []
    for question in QUESTIONS:
      asked = [{"role": "user", "content": question}]
      ids = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_dict=True, return_tensors="pt"
      )
      whole = model.generate(**ids, do_sample=False, max_new_tokens=smollm2_test.NEW)[0]
      theirs.append(whole[ids["input_ids"].shape[1] :].tolist())
    print(f"SmolLM2 after SFT and export: {[tokenizer.decode(ids) for ids in theirs]}")
    self.assertEqual(ours, theirs)
    self.assertNotEqual(ours, base)


if __name__ == "__main__":
  absltest.main()
