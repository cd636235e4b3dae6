"""Do the imported weights compute what the original does? A few logits beside those of transformers
with torch.
"""

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
# Root mean square of the differences over that of the logits. Ours: float32 leaves some 1e-6; two
# bfloat16 programs that round at different places stay within some per cent, and swapped or missing
# weights are far beyond.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def check(folder: epath.PathLike, model: Model, params: Params) -> float:
  """Compares logits of 16 tokens at all places; the original is read a second time, on the host, in
  model.dtype.

  Windows longer than the text, and stretched positions beyond it, are not seen by it.

  Args:
    folder: the Hugging Face folder that the parameters were read from.
    model, params: as imported.

  Returns:
    The largest difference of two logits.

  Raises:
    UserError: torch is not installed, transformers cannot read the folder, or the logits differ.
  """
  try:
    import torch  # Never a requirement: only who asks for this check needs it.
    import transformers
  except ImportError as error:
    raise UserError(
      "--check_parity compares with torch, which is not installed: pip install torch."
    ) from error
  c = model.config
  if (
    c.rope_scaling is not None and c.rope_scaling.is_long
  ):  # transformers takes the short factors for 16 tokens
    model = Model(
      dataclasses.replace(c, rope_scaling=dataclasses.replace(c.rope_scaling, is_long=False))
    )
  ids = np.random.RandomState(0).randint(0, c.vocab_size, _TOKENS).tolist()
  try:
    original = transformers.AutoModelForCausalLM.from_pretrained(
      os.fspath(folder), dtype=getattr(torch, c.dtype), local_files_only=True
    )
  except (OSError, ValueError, RuntimeError) as error:
    raise UserError(
      f"--check_parity: transformers cannot read {folder}: {str(error).splitlines()[0]}"
    ) from error
  with torch.no_grad():
    theirs = original.eval()(torch.tensor([ids])).logits[0].float().numpy()
  del original
  forward = jax.jit(lambda params, trees: model.logits(params, model.hidden(params, trees)[0][0]))
  ours = np.asarray(forward(params, tree_lib.pack([[tree_lib.Tree(ids)]], _TOKENS)), np.float32)
  difference, share = (
    float(np.max(np.abs(ours - theirs))),
    float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)),
  )
  logging.info(
    "Parity with torch: %d logits of %s differ by %.1e at most, %.1e of their size.",
    ours.size,
    folder,
    difference,
    share,
  )
  if not share <= _TOLERANCE[c.dtype]:  # NaN differs, too
    raise UserError(
      f"--check_parity: logits of {folder} differ from torch's by {share:.2g} of their size (root "
      "mean squares), more "
      f"than {_TOLERANCE[c.dtype]:g}."
    )
  return difference
