"""Random keys that depend on what is drawn, never on how draws are batched."""

import hashlib
from collections.abc import Sequence

import numpy as np


def hash_ids(ids: Sequence[int]) -> str:
  """A stable hash of token ids (16 hex digits)."""
  return hashlib.blake2b(np.asarray(ids, "<i4").tobytes(), digest_size=8).hexdigest()


def draw_key(
  seed: int, purpose: str, round_: int, problem_id: str, prefix_hash: str, index: int
) -> np.ndarray:
  """The key of one item: a hash of the arguments, as uint32 [2] (threefry key data).

  The engine folds in the position of each token, so a preempted, re-sharded or re-batched run draws
  the same tokens.

  Args:
    seed: of the run.
    purpose: "sample", "credit", "evaluate", ...; traces and rollouts from them never share draws.
    round_: on-policy round.
    problem_id: stable id of the problem.
    prefix_hash: `hash_ids` of the prefix that the item continues.
    index: of the trace or rollout.
  """
  text = f"{seed}|{purpose}|{round_}|{problem_id}|{prefix_hash}|{index}"
  return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint32)
