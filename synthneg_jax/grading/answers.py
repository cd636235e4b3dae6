"""The grader's public interface. docs/grading.md documents its rules, conventions and accuracy.

    grade(response, gold, kind="math")            grades one response
    grade_many(responses, golds, kind="math")     grades many, each with a deadline

Model text is never evaluated: only regexes and our own parser read it, and every size is capped
before a value is computed. Answers of kind "integer" are graded in the calling process, in time
linear in their length. Answers of kind "math" are graded in worker processes
(grading/grading_pool.py), which are killed and replaced if they hang or die.
"""

import atexit
import dataclasses
import os
import threading
from collections.abc import Sequence

from synthneg_jax.grading import grading_pool
from synthneg_jax.grading.answer_equality import Conventions
from synthneg_jax.grading.response_text import opens_thought
from synthneg_jax.grading.verdicts import MAX_EXTRACTED, extract_gold, grade_response, stated_answer
from synthneg_jax.runtime import errors

__all__ = (
  "KINDS", "MAX_EXTRACTED", "REASONS", "Conventions", "Verdict", "extract_gold", "grade",
  "grade_many", "opens_thought", "stated_answer",
)  # fmt: skip

KINDS = ("integer", "math", "exact")

# docs/grading.md explains each reason. `grade` never returns "truncated": callers set it for
# responses that reached the length limit.
REASONS = (
  "right", "wrong", "no_answer", "ambiguous", "unparsable", "timeout", "too_large", "truncated",
)  # fmt: skip

DEFAULT = Conventions()


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The grade of one response.

  Attributes:
    correct: True exactly if `reason` is "right".
    reason: one of `REASONS`.
    extracted: a rational answer as a reduced fraction ("1080", "-5", "3/4"), so that equal answers
      have equal strings; any other answer as its first `MAX_EXTRACTED` characters (kind "math":
      without layout and spaces); None if the response states no answer.
  """

  correct: bool
  reason: str
  extracted: str | None


def grade(
  response: str,
  gold: str,
  *,
  kind: str = "integer",
  timeout_s: float = 2.0,
  rules: Conventions = DEFAULT,
  thought_open: bool = False,
) -> Verdict:
  r"""Grades a response against a gold answer.

  Except for kind "exact", grading/statements.py extracts the stated answer. Contradictory
  statements are ambiguous; repeating an equal answer is fine.

  Args:
    response: the response's text; any string, including hostile ones.
    gold: the gold answer alone, for example "1,080" or r"\frac{3}{4}", or a text that ends with it
      in a box.
    kind: how to compare answers. "integer", despite its name, compares rationals exactly (72.0
      equals 72, 3/4 equals 0.75, 20% is 20) and uses no floats. "math" compares mathematical
      expressions (docs/grading.md). "exact" compares the whole response with the gold answer,
      ignoring whitespace.
    timeout_s: processor seconds after which grading an answer of kind "math" ends in "timeout".
    rules: which answers count as equal; kind "integer" uses only `extraction` and `retractions`.
    thought_open: whether the response starts inside a thought that the prompt opened
      (`opens_thought`).

  Raises:
    UserError: the kind is not supported, or the gold answer cannot be read.
  """
  settings = {"kind": kind, "timeout_s": timeout_s, "rules": rules, "thought_open": thought_open}
  return grade_many([response], [gold], **settings)[0]


def grade_many(
  responses: Sequence[str],
  golds: Sequence[str],
  *,
  kind: str = "integer",
  timeout_s: float = 2.0,
  rules: Conventions = DEFAULT,
  thought_open: bool = False,
) -> list[Verdict]:
  """`grade` for many responses and gold answers, in order. Works in any thread and in notebooks."""
  if kind not in KINDS:
    raise errors.UserError(f'Unknown answer kind "{kind}"; must be one of {", ".join(KINDS)}.')
  if len(responses) != len(golds):
    raise ValueError(f"{len(responses)} responses and {len(golds)} gold answers")
  if thought_open:
    responses = [f"<think>{response}" for response in responses]
  pairs = list(zip(responses, golds, strict=True))
  if kind == "exact":
    graded = [_exact(response.split(), gold.split()) for response, gold in pairs]
  elif kind == "integer":
    graded = [grade_response(response, gold, kind=kind, rules=rules) for response, gold in pairs]
  else:
    graded = _pool().grade(pairs, rules, timeout_s)
  return [Verdict(reason == "right", reason, extracted) for reason, extracted in graded]


def _exact(words: list[str], gold: list[str]) -> tuple[str, str | None]:
  if not words:
    return "no_answer", None
  return "right" if words == gold else "wrong", " ".join(words)[:MAX_EXTRACTED]


_POOL_LOCK = threading.Lock()
_shared: dict[int, grading_pool.GradingPool] = {}


def _pool() -> grading_pool.GradingPool:
  """The process-wide worker pool, created by the first answer of kind "math"."""
  with _POOL_LOCK:
    if os.getpid() not in _shared:
      _shared.clear()  # inherited from the parent of a fork
      _shared[os.getpid()] = grading_pool.GradingPool()
      atexit.register(_shared[os.getpid()].close)
    return _shared[os.getpid()]
