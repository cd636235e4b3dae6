"""Prompts as ids: every family's chat template renders as by apply_chat_template."""

import pytest
import tokenizers
import transformers
from absl.testing import absltest, parameterized
from tokenizers import decoders, pre_tokenizers, processors
from tokenizers import models as token_models

from synthneg_jax.data import prompts
from synthneg_jax.runtime.errors import UserError
from tests.models import smollm2

SPECIAL = (
  "<bos>",
  "<eos>",
  "<|im_start|>",
  "<|im_end|>",
  "<|start_header_id|>",
  "<|end_header_id|>",
  "<|eot_id|>",
  "[INST]",
  "[/INST]",
  "<start_of_turn>",
  "<end_of_turn>",
)
_TURN = "{% for m in messages %}"
# Our own templates in the formats of the families' templates.
TEMPLATES = {
  "llama 2 and mistral": "{{ bos_token }}"
  + _TURN
  + "{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
  + "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}",
  "llama 3": "{{ bos_token }}"
  + _TURN
  + "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% "
  "endfor %}"
  + "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
  "deepseek math": "{{ bos_token }}"
  + _TURN
  + "{% if m['role'] == 'user' %}User: {{ m['content'] }}\n\n{% endif %}{% endfor %}"
  + "{% if add_generation_prompt %}Assistant:{% endif %}",
  "qwen 2.5 math": "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nReason step by "
  "step.<|im_end|>\n{% endif %}"
  + _TURN
  + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
  + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
  "qwen 3": _TURN
  + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
  + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
  "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system "
  "turn') }}{% endif %}"
  + _TURN
  + "<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
  + "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
}
QUESTION = " Ann has 3 pears.\nShe eats <eos> 1; how many are left?  \n"


def make_tokenizer(adds_bos: bool):
  """Byte-level tokenizer; `adds_bos` prepends BOS to every encoded text, as for Llama and Gemma."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  backend = tokenizers.Tokenizer(
    token_models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
  )
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(
    [tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL]
  )
  if adds_bos:
    bos = ("<bos>", backend.token_to_id("<bos>"))
    backend.post_processor = processors.TemplateProcessing(
      single="<bos> $A", pair="<bos> $A $B", special_tokens=[bos]
    )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>"
  )


class ChatTest(parameterized.TestCase):
  def assert_renders(self, tokenizer, question=QUESTION):
    asked = [{"role": "user", "content": question}]
    rendered = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)[
      "input_ids"
    ]
    ids = prompts.encode_prompt(tokenizer, question, "chat")
    self.assertEqual(ids, rendered)
    return ids

  @parameterized.product(name=list(TEMPLATES), adds_bos=[True, False])
  def test_formats_of_templates(self, name, adds_bos):
    # Fails if BOS is duplicated, the generation prompt is missing, or our code trims the question.
    tokenizer = make_tokenizer(adds_bos)
    tokenizer.chat_template = TEMPLATES[name]
    ids = self.assert_renders(tokenizer)
    self.assertEqual(ids.count(tokenizer.bos_token_id), 1 if "bos_token" in TEMPLATES[name] else 0)
    text = tokenizer.decode(ids)
    self.assertIn(QUESTION.strip(), text)
    open_turn = (
      "[/INST]",
      "assistant<|end_header_id|>\n\n",
      "Assistant:",
      "assistant\n",
      "model\n",
    )
    self.assertEndsWith(text, next(end for end in open_turn if text.endswith(end)))

  def test_template_args(self):
    # Fails if an argument does not reach the template.
    tokenizer = make_tokenizer(False)
    tokenizer.chat_template = TEMPLATES["qwen 3"]
    thinks, does_not = (
      tokenizer.decode(prompts.encode_prompt(tokenizer, "Hi", "chat", template_args=args))
      for args in (None, {"enable_thinking": False})
    )
    self.assertEqual(does_not, f"{thinks}<think>\n\n</think>\n\n")

  @parameterized.parameters(True, False)
  def test_template_without_assistant_turn(self, has_shots):
    # Fails if the prompt does not open the assistant's turn, or a template without generation
    # prompt is refused.
    tokenizer = make_tokenizer(False)
    shots = (("1+1?", "2"),) if has_shots else ()
    turn = _TURN + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    tokenizer.chat_template = turn
    with self.assertRaisesRegex(UserError, "does not open the assistant's turn.*task.prompt=plain"):
      prompts.encode_prompt(tokenizer, QUESTION, "chat", shots=shots)
    for opened in (turn + "<|im_start|>assistant\n", _TURN + "{{ m['content'] }}\n{% endfor %}"):
      tokenizer.chat_template = opened
      prompts.encode_prompt(tokenizer, QUESTION, "chat", shots=shots)

  def test_named_templates(self):
    # Fails if a tokenizer with named templates is refused, or another than "default" is used.
    tokenizer = make_tokenizer(False)
    tokenizer.chat_template = {"tool_use": "{{ 'x' }}", "default": TEMPLATES["qwen 3"]}
    self.assertIn(tokenizer.convert_tokens_to_ids("<|im_start|>"), self.assert_renders(tokenizer))

  @pytest.mark.slow  # SmolLM2's tokenizer is fetched by a process
  def test_smollm2_template(self):
    # Fails if SmolLM2's own template, with its system turn, renders differently.
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2.smollm2_dir())
    ids = self.assert_renders(tokenizer, "What is 12 + 30?")
    self.assertStartsWith(tokenizer.decode(ids), "<|im_start|>system\n")
    self.assertEndsWith(tokenizer.decode(ids), "<|im_start|>assistant\n")

  def test_failing_template(self):
    # Fails if a template's error ends in a traceback.
    tokenizer = make_tokenizer(False)
    for template, sentence in (
      ("{{ raise_exception('no user turn') }}", "chat template fails: no user turn"),
      ("{{ messages[7]['content'].split() }}", "chat template fails: list object has no element 7"),
      ("{% if %}", "chat template fails: Expected an expression"),
    ):
      tokenizer.chat_template = template
      with self.assertRaisesRegex(UserError, sentence):
        prompts.encode_prompt(tokenizer, QUESTION, "chat")
    tokenizer.chat_template = None
    with self.assertRaisesRegex(UserError, "the tokenizer has no chat template"):
      prompts.encode_prompt(tokenizer, QUESTION, "chat")


class PlainTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_bos(self, adds_bos):
    # Fails if BOS is missing for a base model trained with it, or added for another.
    tokenizer = make_tokenizer(adds_bos)
    ids = prompts.encode_prompt(tokenizer, "2 + 2?", "plain")
    self.assertEqual(
      tokenizer.decode(ids), ("<bos>" if adds_bos else "") + "Question: 2 + 2?\nAnswer:\n"
    )
    self.assertNotIn(tokenizer.bos_token_id, prompts.encode_prompt(tokenizer, "2 + 2?", "raw"))
    self.assertEqual(prompts.encode_solution(tokenizer, "4")[-1], tokenizer.eos_token_id)
    self.assertLen(prompts.encode_solution(tokenizer, "4"), 2)

  def test_unknown_style(self):
    # Fails if an unknown style passes.
    with self.assertRaisesRegex(UserError, "task.prompt='poem' must be one of raw, plain, chat."):
      prompts.encode_prompt(make_tokenizer(False), "x", "poem")


if __name__ == "__main__":
  absltest.main()
