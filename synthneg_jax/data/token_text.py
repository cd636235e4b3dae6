"""The bytes of token ids: their text, the ends of steps, and stop strings as a transition table."""

import bisect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from synthneg_jax.runtime import config_schema, errors

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"  # SentencePiece's symbol for a space


def _byte_alphabet() -> dict[str, int]:
  """GPT-2's ByteLevel alphabet: printable Latin-1 maps to itself, the rest to U+0100 onwards."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [b for b in range(256) if b not in set(printable)]
  return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _decoder_steps(decoder: dict | None) -> list[dict]:
  """Flattens the decoder of a tokenizer's JSON into a list of steps."""
  if decoder is None:
    return []
  if decoder["type"] == "Sequence":
    return [step for inner in decoder["decoders"] for step in _decoder_steps(inner)]
  return [decoder]


def _decoder_kind(decoder: dict | None) -> str:
  """Returns "bytes" (ByteLevel), "spaces" (SentencePiece) or "plain" (Fuse); else UserError."""
  steps = _decoder_steps(decoder)
  names = {step["type"] for step in steps}
  replaces = [step for step in steps if step["type"] == "Replace"]
  space_mark = all(
    step["pattern"] == {"String": _SPACE_MARK} and step["content"] == " " for step in replaces
  )
  if "ByteLevel" in names and names <= {"ByteLevel", "Fuse"}:
    return "bytes"
  if names & {"Metaspace", "Replace"} and names <= {
    "Metaspace",
    "Replace",
    "ByteFallback",
    "Fuse",
    "Strip",
  }:
    if space_mark and all(step.get("replacement", _SPACE_MARK) == _SPACE_MARK for step in steps):
      return "spaces"
  if names == {"Fuse"}:
    return "plain"
  raise errors.UserError(
    f"The tokenizer's decoder {json.dumps(decoder, ensure_ascii=False)[:200]} is not supported; "
    "supported are ByteLevel, Metaspace, Replace of U+2581 by a space (with ByteFallback, Fuse, "
    "Strip) and Fuse."
  )


class TokenText:
  """The bytes of every token of a fast tokenizer; a text is the concatenation of token bytes.

  Special tokens (`all_special_ids`, added tokens marked special, and every token that ends a
  response) and unused ids have no bytes. Other added tokens keep their literal text. SentencePiece
  drops the leading space when it decodes a whole text; `text` keeps it, because a slice of a
  response must not depend on its prefix.

  Attributes:
    vocab_size: number of ids including added tokens, i.e. the largest id plus one.
  """

  def __init__(self, tokenizer, eos_ids: Iterable[int] = ()):
    """Precomputes the bytes of all tokens.

    Args:
      tokenizer: a fast tokenizer of transformers.
      eos_ids: further ids that end a response, which the tokenizer may treat as text.

    Raises:
      UserError: a slow tokenizer, or an unsupported decoder.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
      raise errors.UserError(
        f"{type(tokenizer).__name__} is not a fast tokenizer: it has no tokenizer.json."
      )
    spec = json.loads(backend.to_str())
    kind = _decoder_kind(spec["decoder"])
    alphabet = _byte_alphabet()
    added = {token["id"]: token for token in spec["added_tokens"]}
    special = (
      set(tokenizer.all_special_ids)
      | {i for i, token in added.items() if token["special"]}
      | set(eos_ids)
    )

    def token_bytes(token: str, is_added: bool) -> bytes:
      if kind == "bytes" and not is_added and all(c in alphabet for c in token):
        return bytes(alphabet[c] for c in token)
      if kind == "spaces":
        if byte := _BYTE_TOKEN.fullmatch(token):
          return bytes([int(byte.group(1), 16)])
        token = token.replace(_SPACE_MARK, " ")
      return token.encode("utf-8")

    vocab = tokenizer.get_vocab()
    self.vocab_size = max(vocab.values()) + 1
    self._bytes = [b""] * self.vocab_size
    self._special = {i: token.encode("utf-8") for token, i in vocab.items() if i in special}
    for token, i in vocab.items():
      if i not in special:
        self._bytes[i] = token_bytes(token, i in added)

  def bytes_of(self, token_id: int) -> bytes:
    """The bytes of one id; raises IndexError for an id outside the vocabulary."""
    if token_id < 0:
      raise IndexError(f"token id {token_id} is negative")
    return self._bytes[token_id]

  def text(self, ids: Iterable[int], special: bool = False) -> str:
    """The text of ids; `special` spells out special tokens; invalid UTF-8 becomes U+FFFD."""
    spelled = self._special if special else {}
    return b"".join(spelled.get(i) or self.bytes_of(i) for i in ids).decode(
      "utf-8", errors="replace"
    )


def _ends_from_spans(
  data: bytes, offsets: list[int], spans: Iterable[tuple[int, int]]
) -> list[int]:
  """Turns separators into the ends of steps.

  Args:
    data: the text.
    offsets: the byte at which each token starts, then len(data).
    spans: nonempty byte spans of the separators, increasing and disjoint.
  """
  ends, has_text, done, count = [], False, 0, len(offsets) - 1
  for start, stop in spans:
    has_text = has_text or bool(data[done:start].strip())
    done = stop
    end = bisect.bisect_left(offsets, stop)  # exclusive end of the token with byte stop - 1
    if data[stop : offsets[end]].strip():
      continue
    if has_text:
      ends.append(end)
      has_text = False
    elif ends:
      ends[-1] = end
  if ends and not has_text and not data[done:].strip():
    ends[-1] = count
  else:
    ends.append(count)
  return ends


def ends_at(
  ids: Sequence[int],
  token_text: TokenText,
  separators: Callable[[bytes], Iterable[tuple[int, int]]],
) -> list[int]:
  """Returns the exclusive token ends of a response's steps.

  A step ends after the token that completes a separator. If that token also holds text of the next
  step, the two steps merge. Every step has text: blank lines, trailing whitespace, EOS and other
  special tokens belong to the previous step (leading ones to the first step). Text is any byte
  outside separators that is not ASCII whitespace.

  Args:
    ids: the response.
    token_text: of its tokenizer.
    separators: returns the nonempty byte spans of the separators in a text, increasing and
      disjoint.

  Returns:
    Strictly increasing ends, the last len(ids), so the slices between them concatenate to `ids`;
    [] for an empty response.
  """
  if len(ids) == 0:
    return []
  pieces = [token_text.bytes_of(int(i)) for i in ids]
  data = b"".join(pieces)
  return _ends_from_spans(data, [0, *itertools.accumulate(map(len, pieces))], separators(data))


def step_ends(ids: Sequence[int], token_text: TokenText, delimiter: str = "\n") -> list[int]:
  """Returns the ends of steps separated by a delimiter, as `ends_at`.

  Args:
    ids: the response.
    token_text: of its tokenizer.
    delimiter: literal text, or "re:" and a regular expression whose matches separate steps.

  Raises:
    UserError: the delimiter is empty, or its pattern is invalid or matches the empty string.
  """
  try:
    pattern = config_schema.step_pattern(delimiter)
  except errors.UserError as error:
    raise errors.UserError(f"The step delimiter {delimiter!r} {error}") from None

  def separators(data: bytes) -> Iterator[tuple[int, int]]:
    text = data.decode("utf-8", "surrogateescape")
    done = done_bytes = 0  # the same position as an offset in text and in bytes
    for match in pattern.finditer(text):
      if not match.group():
        raise errors.UserError(f"task.step_delimiter={delimiter!r} matches the empty string.")
      start = done_bytes + len(text[done : match.start()].encode("utf-8", "surrogateescape"))
      done_bytes = start + len(match.group().encode("utf-8", "surrogateescape"))
      done = match.end()
      yield start, done_bytes

  return ends_at(ids, token_text, separators)


def _checked_stops(stop_strings: Sequence[str]) -> list[str]:
  """The stop strings as a list; UserError for a bare string or an empty stop string."""
  if isinstance(stop_strings, str) or not all(stop_strings):
    raise errors.UserError(
      f"Stop strings must be a list of nonempty strings, not {stop_strings!r}."
    )
  return list(stop_strings)


def _byte_automaton(stops: set[bytes]) -> np.ndarray:
  """Aho-Corasick automaton int32 [num_states, 256]; starts in 0, the last state absorbs."""
  # A stop that contains another never completes first; drop it, so that only whole stops accept.
  stops = {s for s in stops if not any(o != s and o in s for o in stops)}
  prefixes = sorted(
    {s[:n] for s in stops for n in range(len(s))} | {b""}, key=lambda p: (len(p), p)
  )
  state_of = {prefix: state for state, prefix in enumerate(prefixes)}
  accept = len(prefixes)
  steps = np.zeros([accept + 1, 256], np.int32)
  for prefix, state in state_of.items():
    if prefix:
      suffix = next(prefix[n:] for n in range(1, len(prefix) + 1) if prefix[n:] in state_of)
      steps[state] = steps[state_of[suffix]]
    for longer in (s[: len(prefix) + 1] for s in stops if s.startswith(prefix)):
      steps[state, longer[-1]] = state_of.get(longer, accept)
  steps[accept] = accept
  return steps


def stop_table(token_text: TokenText, stop_strings: Sequence[str]) -> tuple[np.ndarray, int]:
  """Compiles stop strings into a transition table for device loops.

  Start with state = 0 and apply `state = table[state, token]`.

  Returns:
    table: int32 [num_states, vocab_size], the state after a token.
    accept: the absorbing state num_states - 1, reached exactly if the bytes so far contain a stop
      string, within a token or across tokens; never reached without stop strings.

  Raises:
    UserError: a stop string is empty, or `stop_strings` is a bare string.
  """
  byte_steps = _byte_automaton({s.encode("utf-8") for s in _checked_stops(stop_strings)})
  pieces = [token_text.bytes_of(i) for i in range(token_text.vocab_size)]
  lengths = np.array([len(piece) for piece in pieces])
  # Longest first, so that the tokens with a byte at position `at` are a prefix.
  order = np.argsort(-lengths, kind="stable")
  flat = np.frombuffer(b"".join(pieces), np.uint8)
  starts = (np.cumsum(lengths) - lengths)[order]
  num_states = len(byte_steps)
  states = np.repeat(np.arange(num_states, dtype=np.int32)[:, None], len(pieces), axis=1)
  for at in range(lengths.max()):
    live = int(np.count_nonzero(lengths > at))
    states[:, :live] = byte_steps[states[:, :live], flat[starts[:live] + at]]
  table = np.empty_like(states)
  table[:, order] = states
  return table, num_states - 1


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str:
  """The text before the earliest stop string, or the whole text; UserError as in `stop_table`."""
  starts = [text.find(stop) for stop in _checked_stops(stop_strings)]
  return text[: min((start for start in starts if start >= 0), default=len(text))]
