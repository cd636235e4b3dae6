"""Answers and verdicts: the face of the grader. docs/grading.md has its rules, conventions and
figures.

    grade(response, gold, kind="math")            one verdict
    grade_many(responses, golds, kind="math")     many of them, in worker processes with a deadline for each

Nothing evaluates model text: it reaches regexes and a parser of our own, and sizes are capped
before anything is computed. Answers of kind "integer" are graded within the calling process in time
linear in their length. Those of kind "math" are graded in worker processes
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
  "grade_many", "opens_thought",
  "stated_answer",
)  # fmt: skip

KINDS = ("integer", "math", "exact")

# right, wrong: an answer was read. no_answer: none is stated. ambiguous: more than one is, or a
# hedge. unparsable: text that no rule reads, or without a value. timeout: the clock ran out, or the
# worker died. too_large: beyond what is read or computed. truncated: for callers whose sampler hit
# the length limit; `grade` sees only text and never returns it.
REASONS = (
  "right",
  "wrong",
  "no_answer",
  "ambiguous",
  "unparsable",
  "timeout",
  "too_large",
  "truncated",
)

DEFAULT = Conventions()


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The grade of one response.

  Attributes:
    correct: True exactly if `reason` is "right".
    reason: one of `REASONS`.
    extracted: a rational answer as a reduced fraction ("1080", "-5", "3/4"), so that equal ones
      have equal strings; else the first `MAX_EXTRACTED` characters of the answer text (of kind
      "math" without layout and spaces); None where there is none.
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

  What a response states is read the same way for every kind but "exact" (grading/statements.py). A
  response should stop after its answer: statements that contradict each other are ambiguous, equal
  ones are fine.

  Args:
    response: the response's text; any string is allowed, hostile ones included.
    gold: the gold answer alone, for example "1,080" or r"\frac{3}{4}", or a text whose last boxes
      hold it.
    kind: how answers compare. "integer", despite its name, compares all rationals exactly: 72.0
      equals 72, 3/4 equals 0.75, and no float is involved; 20% is 20. "math" reads the grammar of
      docs/grading.md. "exact": the whole response is the answer, and equals the gold one but for
      whitespace.
    timeout_s: seconds of a processor after which an answer of kind "math" is given up ("timeout").
    rules: what counts as the same answer; extraction and retractions hold for kind "integer" too.
    thought_open: the prompt ends within a thought (`opens_thought`), so that the response begins in
      one.

  Returns:
    The verdict.

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
  """Grades responses against their gold answers, in order; else as `grade`. Of use from any thread,
  and in notebooks.
  """
  if kind not in KINDS:
    raise errors.UserError(
      f'The answer kind "{kind}" is not supported; the supported kinds: {", ".join(KINDS)}.'
    )
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
  """The workers that all grades of this process share; started at the first one of kind "math"."""
  with _POOL_LOCK:
    if os.getpid() not in _shared:
      _shared.clear()  # those of a process that this one was forked from
      _shared[os.getpid()] = grading_pool.GradingPool()
      atexit.register(_shared[os.getpid()].close)
    return _shared[os.getpid()]
