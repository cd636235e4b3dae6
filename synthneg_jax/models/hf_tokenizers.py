"""Tokenizers of Hugging Face folders: tokenizer.json as it stands, and the ids that end a turn.

transformers' AutoTokenizer may rebuild a tokenizer from the class that tokenizer_config.json names,
with another pre-tokenizer than tokenizer.json has, and give other ids without a word. So the class
is not asked where there is a tokenizer.json.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from typing import Any

import tokenizers
import transformers
from absl import logging
from etils import epath

from synthneg_jax.runtime.errors import UserError

FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "tokenizer.model",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "chat_template.json",
)
CONFIG_FILES = ("config.json", "generation_config.json")
_TEMPLATES = "additional_chat_templates"


def files(folder: epath.Path) -> list[str]:
  """The names, within the folder, of a tokenizer's files and chat templates."""
  templates = [f"{_TEMPLATES}/{path.name}" for path in (folder / _TEMPLATES).glob("*.jinja")]
  return [name for name in FILES if (folder / name).exists()] + sorted(templates)


def load(folder: epath.PathLike) -> transformers.PreTrainedTokenizerFast:
  """Loads the tokenizer of a local folder; without an EOS of its own it takes the configs'.

  Raises:
    UserError: there is no tokenizer, it cannot be read, or nothing names a token that ends a text.
  """
  folder = epath.Path(folder)
  path = folder / "tokenizer.json"
  if path.exists():
    try:
      tokenizers.Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # tokenizers raises no narrower class
      raise UserError(
        f"{path} cannot be read by tokenizers {tokenizers.__version__} ({_first_line(error)}); "
        "if a newer version wrote it: pip install --upgrade tokenizers transformers."
      ) from error
  kind = transformers.PreTrainedTokenizerFast if path.exists() else transformers.AutoTokenizer
  try:
    tokenizer = kind.from_pretrained(os.fspath(folder), local_files_only=True)
  except Exception as error:  # of transformers, tokenizers, sentencepiece: no common class
    reason = _first_line(error)
    raise UserError(f"{folder} has no tokenizer that transformers can load: {reason}") from error
  if tokenizer.eos_token_id is None:
    tokenizer.eos_token = _eos_of_configs(folder, tokenizer)
  return tokenizer


def eos_ids(folder: epath.PathLike, tokenizer_eos: int | None) -> list[int]:
  """All ids that end a turn, the tokenizer's EOS first.

  Then come those of generation_config.json and of config.json. Chat models often end their turns
  with another token than the EOS of their tokenizer.

  Raises:
    UserError: an eos_token_id is neither a whole number nor a list of such numbers.
  """
  found = [] if tokenizer_eos is None else [tokenizer_eos]
  for name in reversed(CONFIG_FILES):
    path = epath.Path(folder) / name
    if path.exists():
      found += _eos_of(path)
  return list(dict.fromkeys(found))


def below(ids: Iterable[int], num_rows: int, folder: epath.PathLike) -> tuple[int, ...]:
  """The ids that have a row of the embedding; the others are logged and left out."""
  kept, other = [], []
  for i in ids:
    (kept if 0 <= i < num_rows else other).append(i)
  if other:
    logging.warning(
      "%s: eos_token_id names %s, beyond the %d rows of the embedding; left out.",
      folder,
      other,
      num_rows,
    )
  return tuple(kept)


def check(folder: epath.PathLike, tokenizer, num_rows: int) -> None:
  """Refuses a tokenizer whose EOS, BOS, chat template or plain text has ids beyond the embedding.

  What else its vocabulary holds does not matter: some have more tokens than rows, such as those of
  images.

  Raises:
    UserError: names the token.
  """
  probe = "Question: 0123456789 + 42 = ?\nAnswer: the sum is (x - 1) / 2.\n"
  used = [("EOS", [tokenizer.eos_token_id])]
  with contextlib.suppress(Exception):  # tokenizers of one task may have no token for it
    used.append(("text", tokenizer.encode(probe)))  # a BOS that opens texts is in it
  if tokenizer.chat_template:
    messages = [{"role": "user", "content": probe}]
    try:
      rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
      used.append(("chat template", tokenizer.encode(rendered, add_special_tokens=False)))
    except Exception as error:  # whatever a template raises; it matters only to prompts that use it
      logging.warning("%s: the chat template fails: %s", folder, _first_line(error))
  for what, ids in used:
    if ids and max(ids) >= num_rows:
      raise UserError(
        f"{folder}: the tokenizer's {what} uses {tokenizer.convert_ids_to_tokens(max(ids))!r}, "
        f"id {max(ids)}, but the model's embedding has {num_rows} rows: "
        "tokenizer and model do not belong together."
      )


def _eos_of(path: epath.Path) -> list[int]:
  try:
    raw = json.loads(path.read_text())
  except ValueError as error:  # of JSON or of UTF-8
    raise UserError(f"{path} is not valid JSON ({error}).") from error
  value = raw.get("eos_token_id") if isinstance(raw, dict) else None
  if value is None and isinstance(raw, dict) and isinstance(raw.get("text_config"), dict):
    value = raw["text_config"].get("eos_token_id")
  values = value if isinstance(value, list) else [] if value is None else [value]
  return [_whole(path, item) for item in values if item is not None]


def _whole(path: epath.Path, value: Any) -> int:
  try:
    if not isinstance(value, bool) and float(value) == int(float(value)):
      return int(float(value))
  except (TypeError, ValueError, OverflowError):
    pass
  raise UserError(f"{path}: eos_token_id holds {json.dumps(value)}, not a whole number.")


def _eos_of_configs(folder: epath.Path, tokenizer) -> str:
  """The token that a folder's configs name first as EOS, of a tokenizer that names none."""
  path = epath.Path(folder) / CONFIG_FILES[0]
  ids = (_eos_of(path) if path.exists() else []) + eos_ids(folder, None)
  token = tokenizer.convert_ids_to_tokens(ids[0]) if ids else None
  if token is None:
    named = "neither does config.json"
    if ids:
      named = f"the eos_token_id {ids[0]} of its configs is none of its ids"
    raise UserError(
      f"{folder}: the tokenizer names no EOS, and {named}; set eos_token in "
      "tokenizer_config.json to the token that ends a text."
    )
  logging.info("%s: the tokenizer names no EOS; it takes the configs' %r.", folder, token)
  return token


def _first_line(error: BaseException) -> str:
  return next(iter(str(error).strip().splitlines()), "")[:300] or type(error).__name__
