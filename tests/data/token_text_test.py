"""Tests of token bytes, step ends and stop tables."""

import functools
import time
import types

import numpy as np
import tokenizers
import transformers
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from synthneg_jax.data import token_text
from synthneg_jax.runtime import errors

CORPUS = [
  "She sold 3 clips.\nThen 4 \u20ac more.\n\nIt makes 3 + 4 = 7.\n#### 7\n",
  "x\n\n\n  y\n",
] * 4


@functools.cache
def byte_level():
  """ByteLevel BPE with a special token, a silent control token and an added word."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  specials = ["<eos>", "<control>"]
  trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=specials, initial_alphabet=alphabet)
  tokenizer.train_from_iterator(CORPUS, trainer)
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
  fast.add_tokens(["\u00e9t\u00e9"])
  return fast


@functools.cache
def word_level():
  """A WordLevel tokenizer whose tokens contain their leading spaces."""
  words = [
    "<pad>",
    "</s>",
    " K:",
    " 3",
    "\n",
    "K:",
    "3",
    " ",
    "ab",
    "a\nb",
    "\n\n",
    "b\n",
    "\nb\n",
    "a\n ",
  ]
  tokenizer = tokenizers.Tokenizer(
    models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("\n| ?[^ \n]+"), "isolated")
  tokenizer.decoder = decoders.Fuse()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
  )


def wrapped(decoder, vocab):
  """The parts of a fast tokenizer that TokenText reads, for a vocabulary and a decoder."""
  backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=next(iter(vocab))))
  if decoder is not None:
    backend.decoder = decoder
  return types.SimpleNamespace(
    backend_tokenizer=backend, all_special_ids=[], get_vocab=backend.get_vocab
  )


@functools.cache
def texts():
  return {"byte": token_text.TokenText(byte_level()), "word": token_text.TokenText(word_level())}


def word_ids(*words):
  return [word_level().get_vocab()[word] for word in words]


class TokenTextTest(parameterized.TestCase):
  # Fails if the byte alphabet is shifted, or tokens are decoded one by one.
  def test_byte_level_agrees_with_the_tokenizer(self):
    fast, text = byte_level(), texts()["byte"]
    ids = map(fast.convert_tokens_to_ids, pre_tokenizers.ByteLevel.alphabet())
    self.assertEqual({text.bytes_of(i) for i in ids}, {bytes([b]) for b in range(256)})
    for sentence in [*CORPUS, "\x00\x7f\u00ad\u20ac\U0001f600 \u00e9t\u00e9"]:
      self.assertEqual(text.text(fast.encode(sentence)), sentence)
    euro = fast.encode("\U0001f600")
    self.assertEqual(text.text(euro[:1]), "\ufffd")

  # Fails if special tokens have text, added words use the byte alphabet, or added ids are not
  # counted.
  def test_special_and_added_tokens(self):
    fast, text = byte_level(), texts()["byte"]
    ids = fast.convert_tokens_to_ids(["<eos>", "<control>", "\u00e9t\u00e9"])
    self.assertEqual([text.bytes_of(i) for i in ids], [b"", b"", "\u00e9t\u00e9".encode()])
    self.assertEqual(text.vocab_size, len(fast))
    with self.assertRaises(IndexError):
      text.bytes_of(-1)

  # Fails if Fuse is refused, or adds spaces between words.
  def test_word_level(self):
    ids = word_level().encode(" K: 3\n K:")
    self.assertEqual(ids, word_ids(" K:", " 3", "\n", " K:"))
    self.assertEqual(texts()["word"].text([*ids, 1]), " K: 3\n K:")

  # Fails if byte tokens keep their names, or the leading space is lost.
  @parameterized.parameters(
    decoders.Metaspace(),
    decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]),
  )
  def test_metaspace(self, decoder):
    text = token_text.TokenText(
      wrapped(decoder, {"\u2581a": 0, "\u2581\u2581": 1, "<0x0A>": 2, "<0xE2>": 3, "b": 5})
    )
    self.assertEqual(
      [text.bytes_of(i) for i in range(6)], [b" a", b"  ", b"\n", b"\xe2", b"", b"b"]
    )
    self.assertEqual(text.text([0, 2, 5]), " a\nb")

  # Fails if an unknown decoder is read as plain text.
  @parameterized.parameters(
    None, decoders.WordPiece(), decoders.Sequence([decoders.Replace("x", " ")])
  )
  def test_unknown_kind(self, decoder):
    with self.assertRaisesRegex(errors.UserError, "is not supported"):
      token_text.TokenText(wrapped(decoder, {"a": 0}))
    with self.assertRaisesRegex(errors.UserError, "not a fast tokenizer"):
      token_text.TokenText(object())


class StepEndsTest(parameterized.TestCase):
  # Fails if blank lines or EOS become steps, or a token with text of the next step ends one.
  @parameterized.parameters(
    ([], []),
    (["K:"], [1]),
    (["K:", " 3", "\n", "3", "\n"], [3, 5]),
    (["K:", "\n", "3", "\n", "</s>"], [2, 5]),
    (["K:", "\n", "</s>", "<pad>"], [4]),
    (["</s>"], [1]),
    (["\n", "\n"], [2]),
    (["K:", "\n", "\n", " ", "\n", "3"], [5, 6]),
    (["K:", "\n\n", "3"], [2, 3]),
    (["\n", "K:", "\n", "3"], [3, 4]),
    (["3", "a\nb", "3"], [3]),
    (["3", "a\nb", "\n", "3"], [3, 4]),
    (["3", "\nb\n", "3"], [2, 3]),
    (["b\n", "\nb\n", "3"], [1, 2, 3]),
    (["a\n ", "3"], [1, 2]),
    (["K:", "\n", "<pad>", "3"], [2, 4]),
  )
  def test_newline(self, words, expected):
    self.assertEqual(token_text.step_ends(word_ids(*words), texts()["word"]), expected)

  # Fails if a delimiter must lie in one token, or a longer run of it makes a step.
  @parameterized.parameters(
    ("\n\n", ["K:", "\n", "3", "\n", "\n", "3"], [5, 6]),
    ("\n\n", ["K:", "\n", "\n", "\n", "3"], [3, 5]),
    ("\n\n", ["K:", "\n", "\n", "\n", "\n", "3"], [5, 6]),
    ("\n\n", ["K:", "\n", "</s>", "\n", "3"], [4, 5]),
    ("b\n", ["3", "ab", "\n", "3"], [3, 4]),
    ("b\n", ["3", "b\n", "b\n", "3", "a\nb"], [3, 5]),
  )
  def test_other_delimiters(self, delimiter, words, expected):
    self.assertEqual(
      token_text.step_ends(np.array(word_ids(*words)), texts()["word"], delimiter), expected
    )

  def test_empty_delimiter(self):  # Fails if an empty delimiter ends a step at every byte.
    with self.assertRaisesRegex(errors.UserError, "delimiter .. must not be empty"):
      token_text.step_ends([1], texts()["word"], "")

  # Fails if ends repeat, miss the last token, leave a step without text, or end without a
  # delimiter.
  @settings(max_examples=300, deadline=None, database=None)
  @given(st.sampled_from(["byte", "word"]), st.data(), st.sampled_from(["\n", "\n\n", " ", "b\n"]))
  def test_slices_concatenate(self, name, data, delimiter):
    text = texts()[name]
    likely = [i for i in range(text.vocab_size) if text.bytes_of(i).strip() != text.bytes_of(i)]
    ids = data.draw(
      st.lists(st.sampled_from(likely) | st.integers(0, text.vocab_size - 1), max_size=30)
    )
    ends = token_text.step_ends(ids, text, delimiter)
    steps = [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    self.assertEqual(sum(steps, []), ids)
    self.assertTrue(all(steps))
    for step in steps[:-1]:
      self.assertIn(delimiter, text.text(step))
    if len(steps) > 1 and not delimiter.strip():
      self.assertTrue(all(b"".join(map(text.bytes_of, step)).strip() for step in steps))


class StopTest(parameterized.TestCase):
  # Fails if a fail link is wrong, a stop inside a token is missed, or the accept state can be left.
  @settings(max_examples=300, deadline=None, database=None)
  @given(st.data())
  def test_table_against_search(self, data):
    pieces = data.draw(
      st.lists(st.text("ab\n\u20ac", max_size=4), min_size=1, max_size=8, unique=True)
    )
    text = token_text.TokenText(
      wrapped(decoders.Fuse(), {piece: i for i, piece in enumerate(pieces)})
    )
    stops = data.draw(st.lists(st.text("ab\n\u20ac", min_size=1, max_size=5), max_size=4))
    table, accept = token_text.stop_table(text, stops)
    self.assertEqual((table.dtype, table.shape), (np.int32, (accept + 1, len(pieces))))
    state, read = 0, ""
    for token in data.draw(st.lists(st.integers(0, len(pieces) - 1), max_size=20)):
      state, read = table[state, token], read + pieces[token]
      self.assertEqual(state == accept, any(stop in read for stop in stops))

  # Fails if the start state is not 0, or special tokens change the state.
  def test_newline_pair(self):
    table, accept = token_text.stop_table(texts()["word"], ["\n\n"])
    newline, eos, three = word_ids("\n", "</s>", "3")
    self.assertEqual(accept, 2)
    self.assertEqual([table[0, newline], table[1, eos], table[1, newline], table[1, three],
    table[2, three]],
                     [1, 1, 2, 0, 2])  # fmt: skip

  # Fails if the table is built token by token in Python. The bound is far above the measured time.
  def test_large_vocabulary_is_quick(self):
    rng = np.random.default_rng(0)
    pieces = [bytes(rng.integers(0, 256, size=n)) for n in rng.integers(1, 16, size=49152)]
    text = types.SimpleNamespace(vocab_size=len(pieces), bytes_of=pieces.__getitem__)
    start = time.process_time()
    table, _ = token_text.stop_table(text, ["\n\nQuestion:", "\n####", "</s>"])
    self.assertLess(time.process_time() - start, 3.0)
    self.assertEqual(table.shape[1], 49152)

  # Fails if an empty stop accepts at once, or a bare string counts as a list of letters.
  @parameterized.parameters(([""],), ("\n",), (["a", ""],))
  def test_bad_stops(self, stops):
    with self.assertRaisesRegex(errors.UserError, "nonempty strings"):
      token_text.stop_table(texts()["word"], stops)
    with self.assertRaisesRegex(errors.UserError, "nonempty strings"):
      token_text.cut_at_stop("a", stops)

  # Fails if the list's first stop wins over the text's first.
  @parameterized.parameters(
    ("abXcdY", ["Y", "X"], "ab"), ("ab", ["X"], "ab"), ("Xab", ["X"], ""), ("ab", [], "ab")
  )
  def test_cut_at_stop(self, text, stops, expected):
    self.assertEqual(token_text.cut_at_stop(text, stops), expected)


if __name__ == "__main__":
  absltest.main()
