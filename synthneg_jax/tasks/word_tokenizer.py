"""The tokenizer that generated tasks share: one token per word of a fixed vocabulary."""

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

EOS, PAD = "<eos>", "<pad>"


def build(words: list[str], pattern: str) -> tokenizers.Tokenizer:
  """A tokenizer whose decoded text equals the encoded text.

  Args:
    words: the vocabulary in the order of token ids, including EOS and PAD.
    pattern: regular expression of a word, including the space before it.
  """
  vocabulary = {word: i for i, word in enumerate(words)}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
  tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
  tokenizer.decoder = decoders.Fuse()
  tokenizer.add_special_tokens([PAD, EOS])
  return tokenizer
