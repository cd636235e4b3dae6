"""Tests of prompts: plain and chat, with an instruction and with worked problems."""

import functools

import pytest
import transformers
from absl.testing import absltest, parameterized

from synthneg_jax.data import prompts
from synthneg_jax.runtime import errors
from tests.data import token_text_test
from tests.models import smollm2

SHOTS = (("What is 1+1?", "It is 2.\n#### 2"), ("What is 2+2?", "It is 4.\n#### 4"))


@functools.cache
def tokenizer():
  return transformers.AutoTokenizer.from_pretrained(smollm2.smollm2_dir())


@pytest.mark.slow  # SmolLM2's tokenizer is fetched by a process
class PromptsTest(parameterized.TestCase):
  def _text(self, style, **how):
    return tokenizer().decode(prompts.encode_prompt(tokenizer(), "What is 3+3?", style, **how))

  # Fails if worked problems have another format than the question, or run into each other.
  def test_plain(self):
    self.assertEqual(self._text("plain"), "Question: What is 3+3?\nAnswer:\n")
    self.assertEqual(
      self._text("plain", shots=SHOTS, instruction="Be brief."),
      "Question: What is 1+1?\nBe brief.\nAnswer:\nIt is 2.\n#### 2\n\n"
      "Question: What is 2+2?\nBe brief.\nAnswer:\nIt is 4.\n#### 4\n\n"
      "Question: What is 3+3?\nBe brief.\nAnswer:\n",
    )

  # Fails if a worked problem is not a separate turn, a role is wrong, or the generation prompt is
  # missing.
  def test_chat(self):
    turns = [
      ("user", "What is 1+1?\nBe brief."),
      ("assistant", "It is 2.\n#### 2"),
      ("user", "What is 3+3?\nBe brief."),
    ]
    written = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    text = self._text("chat", shots=SHOTS[:1], instruction="Be brief.")
    self.assertEndsWith(text, f"{written}<|im_start|>assistant\n")
    self.assertEqual(text.count("<|im_start|>user"), 2)

  # Fails if the template's special tokens are encoded as text, or added twice.
  def test_chat_ids(self):
    ids = prompts.encode_prompt(tokenizer(), "Hi", "chat", shots=SHOTS)
    start, end = tokenizer().convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    self.assertEqual(ids.count(start), ids.count(end) + 1)
    self.assertEqual(ids[0], start)

  # Fails if the embedded task's text gets an instruction or a prefix.
  def test_raw(self):
    ids = prompts.encode_prompt(tokenizer(), "What is 3+3?", "raw", instruction="x", shots=SHOTS)
    self.assertEqual(tokenizer().decode(ids), "What is 3+3?")

  # Fails if a tokenizer without template or an unknown style passes.
  def test_refusals(self):
    with self.assertRaisesRegex(errors.UserError, "no chat template"):
      prompts.encode_prompt(token_text_test.byte_level(), "Hi", "chat")
    with self.assertRaisesRegex(errors.UserError, "must be one of raw, plain, chat"):
      prompts.encode_prompt(tokenizer(), "Hi", "poem")

  # Fails if the final EOS is missing or doubled.
  def test_solution(self):
    ids = prompts.encode_solution(tokenizer(), "It is 6.")
    self.assertEqual((ids[-1], ids.count(tokenizer().eos_token_id)), (tokenizer().eos_token_id, 1))
    self.assertEqual(tokenizer().decode(ids[:-1]), "It is 6.")


if __name__ == "__main__":
  absltest.main()
