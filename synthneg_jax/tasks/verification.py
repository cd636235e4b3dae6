"""Verdicts without the grader: by a user's verifier, or by reasoning-gym's scorers."""

import functools
import importlib
from collections.abc import Callable

from synthneg_jax.data.records import Problem
from synthneg_jax.grading.answers import Verdict
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import reasoning

Verifier = Callable[[str, Problem], bool]  # (response, problem) -> whether the response is right
_MAX_EXTRACTED = 200  # characters of an answer kept in a verdict


@functools.lru_cache(maxsize=8)
def _imported(name: str) -> Verifier:
  """The function that task.verifier names.

  Raises:
    UserError: it cannot be imported.
  """
  module, _, function = name.partition(":")
  try:
    verifier = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    raise UserError(f"task.verifier={name!r} cannot be imported ({error}).") from None
  if not callable(verifier):
    raise UserError(f"task.verifier={name!r} is not a function.")
  return verifier


def _scorer_verdict(task, response: str, problem: Problem) -> Verdict:
  """The dataset's verdict on the text after the last ####; right if and only if its score is 1."""
  answer = reasoning.stated(response)
  if not answer:
    return Verdict(False, "no_answer", None)
  correct = reasoning.score(task, problem, answer) == 1.0
  return Verdict(correct, "right" if correct else "wrong", answer[:_MAX_EXTRACTED])


def verdict(task, response: str, problem: Problem) -> Verdict | None:
  """The verdict on a response; None if the grader is responsible for it.

  Raises:
    UserError: task.verifier cannot be imported.
  """
  if task.verifier:
    correct = bool(_imported(task.verifier)(response, problem))
    return Verdict(correct, "right" if correct else "wrong", None)
  if task.name == "reasoning_gym" and not reasoning.is_number(problem.answer):
    return _scorer_verdict(task, response, problem)
  return None
