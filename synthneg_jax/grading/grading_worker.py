"""Worker process of `grading_pool`: reads requests and writes verdicts, one JSON line each.

The worker does not import jax, limits its own memory, and gives up on an answer after `timeout_s`
processor seconds. It exits at the end of its input, so that it never outlives its parent.
"""

import dataclasses
import json
import os
import resource
import signal
import sys
from collections.abc import Callable

from synthneg_jax.grading.answer_equality import Conventions
from synthneg_jax.grading.verdicts import grade_response
from synthneg_jax.runtime import errors


class OutOfTime(BaseException):
  """The answer's timer ran out. Not an Exception, so that no other handler catches it."""


def _out_of_time(signum, frame):
  raise OutOfTime


def grade_line(
  response: str, gold: str, rules: Conventions, timeout_s: float
) -> tuple[str, str | None]:
  """Returns (reason, extracted), or ("error", sentence) if the gold answer cannot be read."""
  try:
    signal.setitimer(signal.ITIMER_VIRTUAL, timeout_s)
    try:
      return grade_response(response, gold, kind="math", rules=rules)
    finally:
      signal.setitimer(signal.ITIMER_VIRTUAL, 0)
  except OutOfTime:
    return "timeout", None
  except MemoryError:
    return "too_large", None
  except errors.UserError as error:
    return "error", str(error)


def serve(grade: Callable = grade_line, memory_mb: int = 1024) -> None:
  """Answers each request [response, gold, rules, timeout_s] with [reason, extracted].

  Args:
    grade: grades a request, like `grade_line`.
    memory_mb: limit of the address space in MiB.
  """
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
  signal.signal(signal.SIGVTALRM, _out_of_time)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles interrupts
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # anything else printed to stdout goes to stderr
  answers.write('["ready", null]\n')
  for line in sys.stdin.buffer:
    response, gold, rules, timeout_s = json.loads(line)
    try:
      result = grade(response, gold, Conventions(**rules), timeout_s)
    except OutOfTime:  # raised between the end of grading and the end of the timer
      result = ("timeout", None)
    answers.write(json.dumps(result) + "\n")


def request(response: str, gold: str, rules: Conventions, timeout_s: float) -> bytes:
  """Encodes a request for `serve`."""
  return json.dumps([response, gold, dataclasses.asdict(rules), timeout_s]).encode() + b"\n"


if __name__ == "__main__":
  serve(memory_mb=int(sys.argv[1]))
