"""Loading of tokenizers: ids of tokenizer.json, ids within the embedding, ids that end a turn."""

import json
import pathlib
import re
import shutil
import tempfile

import numpy as np
import safetensors.numpy
import tokenizers
from absl.testing import absltest, parameterized
from tokenizers import decoders, pre_tokenizers
from tokenizers import models as token_models

from synthneg_jax.core.geometry import Lanes
from synthneg_jax.data import prompts
from synthneg_jax.decoding import policy as policy_lib
from synthneg_jax.decoding.decode import Stops
from synthneg_jax.decoding.engine import Engine, Trunk
from synthneg_jax.decoding.policy import Policy
from synthneg_jax.decoding.sampling import Sampling
from synthneg_jax.models import hf_tokenizers, huggingface
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError
from tests import tiny_model

TEMPLATE = (
  "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"
  "{% if add_generation_prompt %}<|start|>{% endif %}"
)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ("<eos>", "<|start|>", "<|end|>", "<image>")
# The ids follow those of the bytes and of the merge "12".
EOS, START, END, IMAGE = range(len(ALPHABET) + 1, len(ALPHABET) + 5)


def make_backend(digits: bool = True) -> tokenizers.Tokenizer:
  """A byte-level tokenizer with one merge, "12", which the pre-tokenizer Digits disables."""
  vocab = {c: i for i, c in enumerate([*ALPHABET, "12"])}
  backend = tokenizers.Tokenizer(token_models.BPE(vocab=vocab, merges=[("1", "2")]))
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  parts = [pre_tokenizers.Digits(individual_digits=True), byte_level] if digits else [byte_level]
  backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(
    [tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL]
  )
  return backend


class FolderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory())) / "base"

  def write(self, *, rows=IMAGE + 1, config=None, generation=None, tokenizer=None, model=None):
    """Writes a tiny Hugging Face folder; the arguments change its configs."""
    shutil.rmtree(self.folder, ignore_errors=True)
    model = model or tiny_model.model(vocab_size=rows)
    huggingface.save(self.folder, model, tiny_model.make_params(model))
    make_backend().save(str(self.folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    settings |= tokenizer or {}
    (self.folder / "tokenizer_config.json").write_text(
      json.dumps({key: value for key, value in settings.items() if value is not None})
    )
    raw = json.loads((self.folder / "config.json").read_text()) | (config or {})
    (self.folder / "config.json").write_text(json.dumps(raw))
    (self.folder / "generation_config.json").write_text(json.dumps(generation or {}))

  def load(self) -> Policy:
    return Policy.load(self.folder, config_schema.default().model, tiny_model.one_device_mesh())

  def assert_refused(self, sentence):
    with self.assertRaisesRegex(UserError, sentence) as caught:
      self.load()
    self.assertNotIn("\n", str(caught.exception))


class TokenizerTest(FolderTest):
  @parameterized.parameters(
    "GPT2Tokenizer",
    "GPTNeoXTokenizer",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "Qwen2Tokenizer",
    "TokenizersBackend",
  )
  def test_ids_equal_tokenizer_json(self, label):
    # Fails if the class in tokenizer_config.json is used: it would merge 12, or lose the spaces.
    self.write(tokenizer={"tokenizer_class": label})
    tokenizer = self.load().tokenizer
    text = "Add 12 and 3, then  211.\n"
    self.assertEqual(
      tokenizer.encode(text, add_special_tokens=False), make_backend().encode(text).ids
    )
    self.assertNotIn(len(ALPHABET), tokenizer.encode(text))
    self.assertEqual(tokenizer.decode(tokenizer.encode(text)), text)

  def test_without_tokenizer_config(self):
    # Fails if tokenizer.json is not sufficient.
    self.write(config={"eos_token_id": EOS})
    (self.folder / "tokenizer_config.json").unlink()
    self.assertEqual(self.load().eos_ids, (EOS,))

  @parameterized.parameters("<|start|>", None)
  def test_plain_prompts_start_as_the_tokenizer_starts_texts(self, name):
    # Fails if a prompt loses the BOS that tokenizer.json adds but no config names.
    self.write(tokenizer={"bos_token": name})
    path = self.folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    start = {"SpecialToken": {"id": "<|start|>", "type_id": 0}}
    raw["post_processor"] = {
      "type": "TemplateProcessing",
      "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
      "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
      "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [START], "tokens": ["<|start|>"]}},
    }
    path.write_text(json.dumps(raw))
    tokenizer = self.load().tokenizer
    ids = prompts.encode_prompt(tokenizer, "1 + 2", "plain")
    self.assertEqual(ids.count(START), 1)
    self.assertEqual(ids[0], START)

  def test_a_tokenizer_of_a_newer_version(self):
    # Fails if the bare Exception of tokenizers becomes a traceback.
    self.write()
    path = self.folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["pre_tokenizer"] = {"type": "Quantum"}
    path.write_text(json.dumps(raw))
    self.assert_refused(
      r"tokenizer\.json cannot be read by tokenizers [\d.]+.*pip install --upgrade tokenizers"
    )

  def test_no_tokenizer(self):
    # Fails if a missing tokenizer is not reported.
    self.write()
    for name in ("tokenizer.json", "tokenizer_config.json"):
      (self.folder / name).unlink()
    self.assert_refused("base has no tokenizer that transformers can load")

  def test_a_template_that_raises(self):
    # Fails if a broken template prevents the use of plain prompts.
    self.write(tokenizer={"chat_template": "{{ 1 / 0 }}"})
    policy = self.load()
    from synthneg_jax.data import prompts

    with self.assertRaisesRegex(UserError, "the tokenizer's chat template fails: division by zero"):
      prompts.encode_prompt(policy.tokenizer, "x", "chat")


class EmbeddingTest(FolderTest):
  def test_unused_ids_may_exceed_the_embedding(self):
    # Fails if the largest id is checked: published models have image tokens, which no text uses.
    self.write(rows=IMAGE, tokenizer={"chat_template": TEMPLATE})
    self.assertGreater(self.load().token_text.vocab_size, IMAGE)

  @parameterized.parameters(
    (
      END,
      TEMPLATE,
      "<eos>",
      "chat template uses '<|end|>', id 259, but the model's embedding has 259 rows",
    ),
    (EOS, None, "<eos>", "base: the tokenizer's EOS uses '<eos>', id 257"),
    (40, None, "!", "base: the tokenizer's text uses '"),
  )
  def test_used_ids_must_not_exceed_the_embedding(self, rows, template, eos, sentence):
    # Fails if the embedding is read beyond its rows.
    self.write(rows=rows, tokenizer={"chat_template": template, "eos_token": eos})
    self.assert_refused(re.escape(sentence))

  def test_a_small_vocabulary(self):
    # Fails if a vocabulary that cannot encode the probe is refused.
    self.write()
    for model in (
      token_models.WordLevel({"a": 0, "<eos>": 1}),
      token_models.BPE({"a": 0, "<eos>": 1}, []),
    ):
      tokenizers.Tokenizer(model).save(str(self.folder / "tokenizer.json"))
      self.assertEqual(hf_tokenizers.load(self.folder).eos_token_id, 1)
      hf_tokenizers.check(self.folder, hf_tokenizers.load(self.folder), 2)

  def test_prompts_and_examples(self):
    # Fails if ids beyond the embedding are looked up, which would clamp them.
    model = tiny_model.model()
    engine = Engine(
      model, tiny_model.one_device_mesh(), Stops((3,)), lanes=Lanes(1, 1), max_new_tokens=2
    )
    trunk = Trunk([1, 31], [2], np.zeros((1, 2), np.uint32))
    with self.assertRaisesRegex(
      UserError, "A prompt holds token id 31, but the model's embedding has 31 rows"
    ):
      list(engine.run(tiny_model.params(), [trunk], Sampling(temperature=0.0)))
    model.config.check_ids([], "x")
    with self.assertRaisesRegex(UserError, "p1: its text holds token id -1"):
      model.config.check_ids([3, -1], "p1: its text")


class EndingsTest(FolderTest):
  @parameterized.parameters(
    ({}, {}, (EOS,)),
    ({"eos_token_id": END}, {}, (EOS, END)),
    ({}, {"eos_token_id": [END, EOS]}, (EOS, END)),
    ({"eos_token_id": [START]}, {"eos_token_id": END}, (EOS, END, START)),
    ({"eos_token_id": f"{END}.0"}, {"eos_token_id": None}, (EOS, END)),
    ({"eos_token_id": 99999}, {}, (EOS,)),  # tiny copies of large models often keep the id
    ({"text_config": {"eos_token_id": END}, "eos_token_id": None}, {}, (EOS, END)),
  )
  def test_eos_ids(self, config, generation, expected):
    # Fails if a file or a list is not read, or if an id that the model cannot generate is kept.
    self.write(config=config, generation=generation)
    self.assertEqual(self.load().eos_ids, expected)

  def test_a_tokenizer_without_eos(self):
    # Fails if solutions end in None, or in an id that no config has.
    self.write(tokenizer={"eos_token": None}, config={"eos_token_id": [END, EOS]})
    policy = self.load()
    self.assertEqual((policy.tokenizer.eos_token_id, policy.eos_ids), (END, (END, EOS)))
    self.write_config(eos_token_id=None)
    self.assert_refused(
      "base: the tokenizer has no EOS, and the configs have none; set eos_token in"
    )
    self.write_config(eos_token_id=99999)
    self.assert_refused("eos_token_id 99999 is not one of its ids")
    self.write_config(eos_token_id=-1)
    self.assert_refused("eos_token_id -1 is not one of its ids")
    self.write_config(eos_token_id="end")
    self.assert_refused('config.json: eos_token_id "end" is not an integer')

  def write_config(self, **changes):
    path = self.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  def test_eos_is_not_text(self):
    # Fails if graded responses contain the token that ends a turn, because the tokenizer does not
    # mark it as special.
    self.write(generation={"eos_token_id": [END]})
    path = self.folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    for token in raw["added_tokens"]:
      token["special"] &= token["content"] != "<|end|>"
    path.write_text(json.dumps(raw))
    for token_text in (self.load().token_text, policy_lib.load_token_text(self.folder)[1]):
      self.assertEqual(token_text.text([0, END]), make_backend().decode([0]))

  def test_exports_have_all_eos_ids(self):
    # Fails if other programs that load an export end turns at one token only.
    self.write(config={"eos_token_id": START}, generation={"eos_token_id": [END], "top_k": 5})
    model = tiny_model.model(vocab_size=IMAGE + 1)
    out = self.folder.parent / "out"
    huggingface.save(out, model, tiny_model.make_params(model), tokenizer_folder=self.folder)
    for name in hf_tokenizers.CONFIG_FILES:
      self.assertEqual(json.loads((out / name).read_text())["eos_token_id"], [EOS, END, START])
    self.assertEqual(json.loads((out / "generation_config.json").read_text())["top_k"], 5)


class TiedTest(FolderTest):
  @parameterized.parameters(True, False)
  def test_keeps_a_separate_head(self, differs):
    # Fails if a trained head is dropped because config.json still ties the embeddings.
    self.write(model=tiny_model.model(vocab_size=IMAGE + 1, tie_embeddings=True))
    path = self.folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding + differs * np.eye(*embedding.shape)
    safetensors.numpy.save_file(tensors | {"lm_head.weight": head.astype(np.float32)}, path)
    policy = self.load()
    self.assertEqual(policy.model.config.tie_embeddings, not differs)
    if differs:
      np.testing.assert_array_equal(policy.params["ends"]["unembedding"], head.astype(np.float32))
    policy.save(self.folder.parent / "saved", policy.params)
    saved = Policy.load(
      self.folder.parent / "saved", config_schema.default().model, tiny_model.one_device_mesh()
    )
    self.assertEqual(saved.fingerprint, policy.fingerprint)


if __name__ == "__main__":
  absltest.main()
