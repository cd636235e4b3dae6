"""Loads tokenizers of Hugging Face folders and collects the ids that end a turn.

transformers' AutoTokenizer may rebuild a tokenizer from the class named in tokenizer_config.json,
with another pre-tokenizer than tokenizer.json's, and silently return other ids. That class is
therefore ignored if tokenizer.json exists.
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
  """The tokenizer files and chat templates in a folder, relative to it."""
  templates = [f"{_TEMPLATES}/{path.name}" for path in (folder / _TEMPLATES).glob("*.jinja")]
  return [name for name in FILES if (folder / name).exists()] + sorted(templates)


def load(folder: epath.PathLike) -> transformers.PreTrainedTokenizerFast:
  """Loads the tokenizer of a local folder; if it has no EOS, uses that of the model's configs.

  Raises:
    UserError: the tokenizer is missing or cannot be read, or neither it nor a config has an EOS.
  """
  folder = epath.Path(folder)
  path = folder / "tokenizer.json"
  if path.exists():
    try:
      tokenizers.Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # tokenizers raises no narrower class
      raise UserError(
        f"{path} cannot be read by tokenizers {tokenizers.__version__} ({_first_line(error)}); "
        "if a newer version wrote it, run pip install --upgrade tokenizers transformers."
      ) from error
  loader = transformers.PreTrainedTokenizerFast if path.exists() else transformers.AutoTokenizer
  try:
    tokenizer = loader.from_pretrained(os.fspath(folder), local_files_only=True)
  except Exception as error:  # transformers, tokenizers and sentencepiece share no class
    reason = _first_line(error)
    raise UserError(f"{folder} has no tokenizer that transformers can load: {reason}") from error
  if tokenizer.eos_token_id is None:
    tokenizer.eos_token = _default_eos(folder, tokenizer)
  return tokenizer


def eos_ids(folder: epath.PathLike, tokenizer_eos: int | None) -> list[int]:
  """All ids that end a turn: the tokenizer's EOS, then those of the configs.

  Chat models often end turns with a token other than their tokenizer's EOS.

  Raises:
    UserError: an eos_token_id is neither an integer nor a list of integers.
  """
  ids = [] if tokenizer_eos is None else [tokenizer_eos]
  for name in reversed(CONFIG_FILES):
    path = epath.Path(folder) / name
    if path.exists():
      ids += _config_eos(path)
  return list(dict.fromkeys(ids))


def ids_below(ids: Iterable[int], num_rows: int, folder: epath.PathLike) -> tuple[int, ...]:
  """The ids that have a row in the embedding; logs a warning about the others."""
  valid, invalid = [], []
  for i in ids:
    (valid if 0 <= i < num_rows else invalid).append(i)
  if invalid:
    logging.warning(
      "%s: ignoring eos_token_id %s, which exceeds the %d rows of the embedding.",
      folder,
      invalid,
      num_rows,
    )
  return tuple(valid)


def check(folder: epath.PathLike, tokenizer, num_rows: int) -> None:
  """Checks that the ids of EOS, BOS, chat template and plain text have rows in the embedding.

  Other ids may exceed the embedding: some vocabularies have more tokens than rows, for example
  image tokens.

  Raises:
    UserError: an id is too large; names its token.
  """
  probe = "Question: 0123456789 + 42 = ?\nAnswer: the sum is (x - 1) / 2.\n"
  used = [("EOS", [tokenizer.eos_token_id])]
  with contextlib.suppress(Exception):  # a task's own tokenizer may be unable to encode the probe
    used.append(("text", tokenizer.encode(probe)))  # includes BOS, if the tokenizer adds one
  if tokenizer.chat_template:
    messages = [{"role": "user", "content": probe}]
    try:
      rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
      used.append(("chat template", tokenizer.encode(rendered, add_special_tokens=False)))
    except Exception as error:  # a template may raise anything; only chat prompts need it
      logging.warning("%s: the chat template fails: %s", folder, _first_line(error))
  for what, ids in used:
    if ids and max(ids) >= num_rows:
      raise UserError(
        f"{folder}: the tokenizer's {what} uses {tokenizer.convert_ids_to_tokens(max(ids))!r}, "
        f"id {max(ids)}, but the model's embedding has {num_rows} rows: tokenizer and model do not "
        "belong together."
      )


def _config_eos(path: epath.Path) -> list[int]:
  """The values of eos_token_id in a config, or in the text_config of a wrapper."""
  try:
    raw = json.loads(path.read_text())
  except ValueError as error:  # invalid JSON or invalid UTF-8
    raise UserError(f"{path} is not valid JSON ({error}).") from error
  value = raw.get("eos_token_id") if isinstance(raw, dict) else None
  if value is None and isinstance(raw, dict) and isinstance(raw.get("text_config"), dict):
    value = raw["text_config"].get("eos_token_id")
  values = value if isinstance(value, list) else [value]
  return [_as_int(path, item) for item in values if item is not None]


def _as_int(path: epath.Path, value: Any) -> int:
  try:
    if not isinstance(value, bool) and float(value) == int(float(value)):
      return int(float(value))
  except (TypeError, ValueError, OverflowError):
    pass
  raise UserError(f"{path}: eos_token_id {json.dumps(value)} is not an integer.")


def _default_eos(folder: epath.Path, tokenizer) -> str:
  """The EOS for a tokenizer that has none: the first in config.json or generation_config.json."""
  path = epath.Path(folder) / CONFIG_FILES[0]
  ids = (_config_eos(path) if path.exists() else []) + eos_ids(folder, None)
  token = tokenizer.convert_ids_to_tokens(ids[0]) if ids and ids[0] >= 0 else None
  if token is None:
    reason = f"eos_token_id {ids[0]} is not one of its ids" if ids else "the configs have none"
    raise UserError(
      f"{folder}: the tokenizer has no EOS, and {reason}; set eos_token in "
      "tokenizer_config.json to the token that ends a text."
    )
  logging.info("%s: the tokenizer has no EOS; using the configs' %r.", folder, token)
  return token


def _first_line(error: BaseException) -> str:
  return next(iter(str(error).strip().splitlines()), "")[:300] or type(error).__name__
