"""Compares logits of the imported model with those of transformers and torch (--check_parity)."""

import dataclasses
import os

import jax
import numpy as np
from absl import logging
from etils import epath

from synthneg_jax.core import tree as tree_lib
from synthneg_jax.models.decoder import Model, Params
from synthneg_jax.runtime.errors import UserError

_TOKENS = 16
# Root mean square of the differences relative to that of the logits. Our choice: float32 differs by
# about 1e-6; bfloat16 programs that round at different points differ by a few per cent, and swapped
# or missing weights by far more.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def check(folder: epath.PathLike, model: Model, params: Params) -> float:
  """Compares all logits of 16 random tokens with those of transformers.

  The original is loaded once more, on the host, in `model.dtype`. The text is too short to reach
  the end of a window or scaled positions.

  Args:
    folder: the Hugging Face folder that the parameters were read from.
    model: the imported model.
    params: its parameters.

  Returns:
    The largest absolute difference between two logits.

  Raises:
    UserError: torch is not installed, transformers cannot read the folder, or the logits differ.
  """
  try:
    import torch  # optional: only this check needs it
    import transformers
  except ImportError as error:
    raise UserError(
      "--check_parity compares with torch, which is not installed: pip install torch."
    ) from error
  c = model.config
  if c.rope_scaling is not None and c.rope_scaling.is_long:
    # transformers uses the short factors for 16 tokens.
    short = dataclasses.replace(c.rope_scaling, is_long=False)
    model = Model(dataclasses.replace(c, rope_scaling=short))
  ids = np.random.RandomState(0).randint(0, c.vocab_size, _TOKENS).tolist()
  try:
    original = transformers.AutoModelForCausalLM.from_pretrained(
      os.fspath(folder), dtype=getattr(torch, c.dtype), local_files_only=True
    )
  except Exception as error:  # transformers validates with exceptions of its own
    raise UserError(
      f"--check_parity: transformers cannot read {folder}: {str(error).splitlines()[0]}"
    ) from error
  with torch.no_grad():
    theirs = original.eval()(torch.tensor([ids])).logits[0].float().numpy()
  del original

  @jax.jit
  def forward(params, trees):
    return model.logits(params, model.hidden(params, trees)[0][0])

  ours = np.asarray(forward(params, tree_lib.pack([[tree_lib.Tree(ids)]], _TOKENS)), np.float32)
  difference = float(np.max(np.abs(ours - theirs)))
  relative = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
  logging.info(
    "Parity with torch: %d logits of %s differ by at most %.1e, root mean square %.1e of theirs.",
    ours.size,
    folder,
    difference,
    relative,
  )
  if not relative <= _TOLERANCE[c.dtype]:  # also true for NaN
    raise UserError(
      f"--check_parity: logits of {folder} differ from torch's by {relative:.2g} of their root "
      f"mean square, more than {_TOLERANCE[c.dtype]:g}."
    )
  return difference
