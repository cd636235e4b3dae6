"""The bytes behind token ids: text of ids, ends of steps, and stop strings as a table for device
loops.
"""

import bisect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from synthneg_jax.runtime import config_schema, errors

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"  # the SentencePiece sign for a space


def _byte_alphabet() -> dict[str, int]:
  """Returns the ByteLevel alphabet of GPT-2: printable Latin-1 stands for itself, the rest for
  U+0100 onwards.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [b for b in range(256) if b not in set(printable)]
  return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _decoder_steps(decoder: dict | None) -> list[dict]:
  """Flattens the decoder of a tokenizer's JSON into the list of its steps."""
  if decoder is None:
    return []
  if decoder["type"] == "Sequence":
    return [step for inner in decoder["decoders"] for step in _decoder_steps(inner)]
  return [decoder]


def _decoder_kind(decoder: dict | None) -> str:
  """Returns "bytes" (ByteLevel), "spaces" (Metaspace, SentencePiece) or "plain" (Fuse); UserError
  for any other.
  """
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
    f"The tokenizer's decoder {json.dumps(decoder, ensure_ascii=False)[:200]} is of no known kind: "
    "ByteLevel, "
    "Metaspace, Replace of U+2581 by a space (with ByteFallback, Fuse, Strip) and Fuse are."
  )


class TokenText:
  """The bytes of every token of a fast tokenizer, so that text is the concatenation of its tokens'
  bytes.

  Special tokens (those of `all_special_ids`, the added tokens marked special, and all that end a
  response) have no bytes; neither have ids that no token uses. Other added tokens hold their text
  as it stands. A SentencePiece tokenizer drops the leading space when it decodes a whole text;
  `text` keeps it, because a slice of a response must not depend on what stands before it.

  Attributes:
    vocab_size: number of ids, added tokens included: the greatest id plus one.
  """

  def __init__(self, tokenizer, eos_ids: Iterable[int] = ()):
    """Precomputes the bytes of a transformers fast tokenizer; UserError if it is none or its
    decoder is unknown.

    Args:
      tokenizer: of transformers.
      eos_ids: further ids that end a response, which the tokenizer may hold for text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
      raise errors.UserError(
        f"{type(tokenizer).__name__} is not a fast tokenizer: no tokenizer.json is behind it."
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
    """Returns the bytes of one id; raises IndexError for an id outside the vocabulary."""
    if token_id < 0:
      raise IndexError(f"token id {token_id} is negative")
    return self._bytes[token_id]

  def text(self, ids: Iterable[int], special: bool = False) -> str:
    """Returns the text of ids, with special tokens spelled out if asked for; bytes that are not
    UTF-8 become U+FFFD.
    """
    spelled = self._special if special else {}
    return b"".join(spelled.get(i) or self.bytes_of(i) for i in ids).decode(
      "utf-8", errors="replace"
    )


def _ends_from_spans(
  data: bytes, offsets: list[int], spans: Iterable[tuple[int, int]]
) -> list[int]:
  """Turns separators into the ends of steps.

  `offsets` are the bytes at which the tokens start, then len(data); `spans` are the nonempty byte
  spans of the separators, increasing and without overlap.
  """
  ends, has_text, done, count = [], False, 0, len(offsets) - 1
  for start, stop in spans:
    has_text = has_text or bool(data[done:start].strip())
    done = stop
    end = bisect.bisect_left(offsets, stop)  # exclusive end of the token that holds byte stop - 1
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
  """Returns the exclusive token ends of the steps of a response.

  A step ends after the token that completes a separator, wherever in tokens the separator lies. If
  that token also holds text of the next step, the two steps are one. Steps without text do not
  exist: blank lines belong to the step before (to the first step at the start), and so do trailing
  whitespace, EOS and other special tokens. Text is any byte outside separators that is not ASCII
  whitespace.

  Args:
    ids: the response.
    token_text: of its tokenizer.
    separators: finds the nonempty byte spans of the separators in a text, increasing and without
      overlap.

  Returns:
    Strictly increasing ends, the last len(ids), so that the slices between them concatenate to
    `ids`; [] for no ids.
  """
  if len(ids) == 0:
    return []
  pieces = [token_text.bytes_of(int(i)) for i in ids]
  data = b"".join(pieces)
  return _ends_from_spans(data, [0, *itertools.accumulate(map(len, pieces))], separators(data))


def step_ends(ids: Sequence[int], token_text: TokenText, delimiter: str = "\n") -> list[int]:
  """Returns the ends of steps, as `ends_at`, where each delimiter separates two.

  Args:
    ids: the response.
    token_text: of its tokenizer.
    delimiter: text; or "re:" and a regular expression, whose matches separate steps.

  Raises:
    UserError: the delimiter is empty, or a pattern that is invalid or matches without text.
  """
  try:
    pattern = config_schema.step_pattern(delimiter)
  except errors.UserError as error:
    raise errors.UserError(f"The delimiter between steps, {delimiter!r}, {error}") from None

  def separators(data: bytes) -> Iterator[tuple[int, int]]:
    text = data.decode(
      "utf-8", "surrogateescape"
    )  # whose offsets are turned back into those of bytes
    done = at = 0
    for found in pattern.finditer(text):
      if not found.group():
        raise errors.UserError(
          f"task.step_delimiter={delimiter!r} matches without text, where no step can end."
        )
      start = at + len(text[done : found.start()].encode("utf-8", "surrogateescape"))
      at, done = start + len(found.group().encode("utf-8", "surrogateescape")), found.end()
      yield start, at

  return ends_at(ids, token_text, separators)


def _checked_stops(stop_strings: Sequence[str]) -> list[str]:
  """Returns the stop strings as a list; UserError for a bare string or an empty stop."""
  if isinstance(stop_strings, str) or not all(stop_strings):
    raise errors.UserError(
      f"Stop strings must be a list of nonempty strings, not {stop_strings!r}."
    )
  return list(stop_strings)


def _byte_automaton(stops: set[bytes]) -> np.ndarray:
  """Returns the Aho-Corasick automaton int32 [num_states, 256] of stops; 0 starts, the last state
  accepts for good.
  """
  # A stop that contains another never completes first. Without such stops only whole stops accept.
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
  """Compiles stop strings into a table for device loops: `state = table[state, token]`, from state
  0.

  Returns:
    table: int32 [num_states, vocab_size], the state after a token; it never accepts if there are no
    stop strings. accept: the absorbing state num_states - 1, reached exactly if the bytes since the
    start contain a stop string,
      be it in the middle of a token or across tokens.

  Raises:
    UserError: a stop string is empty, or a bare string was given for the list.
  """
  byte_steps = _byte_automaton({s.encode("utf-8") for s in _checked_stops(stop_strings)})
  pieces = [token_text.bytes_of(i) for i in range(token_text.vocab_size)]
  lengths = np.array([len(piece) for piece in pieces])
  order = np.argsort(
    -lengths, kind="stable"
  )  # longest first: the tokens that have a byte `at` are a prefix
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
  """Returns the text before the stop string that starts first, or the whole text; UserError as in
  `stop_table`.
  """
  found = [text.find(stop) for stop in _checked_stops(stop_strings)]
  return text[: min((at for at in found if at >= 0), default=len(text))]
