"""The process that grades answers of kind "math" for `grading_pool`: requests in, verdicts out, a
JSON line each.

It imports no jax, limits its own memory, and gives up an answer after so many seconds of processor
time. It ends with its input, so that it never outlives the process that started it; while it
computes, a limit of processor time sees to that.
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
  """The timer of the answer at hand ran out; not an Exception, so that no handler on the way takes
  it for its own.
  """


def _out_of_time(signum, frame):
  raise OutOfTime


def grade_line(
  response: str, gold: str, rules: Conventions, timeout_s: float
) -> tuple[str, str | None]:
  """(reason, extracted), or ("error", sentence) for a gold answer that cannot be read."""
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
  """Answers requests until the input ends. Each is [response, gold, rules, timeout_s]; each answer
  [reason, extracted].

  Args:
    grade: as `grade_line`.
    memory_mb: MiB of address space, at most.
  """
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
  signal.signal(signal.SIGVTALRM, _out_of_time)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # nothing else may write between the answers
  answers.write('["ready", null]\n')
  for line in sys.stdin.buffer:
    response, gold, rules, timeout_s = json.loads(line)
    try:
      made = grade(response, gold, Conventions(**rules), timeout_s)
    except OutOfTime:  # it ran out at the very end
      made = ("timeout", None)
    answers.write(json.dumps(made) + "\n")


def request(response: str, gold: str, rules: Conventions, timeout_s: float) -> bytes:
  """A request as the line that `serve` reads."""
  return json.dumps([response, gold, dataclasses.asdict(rules), timeout_s]).encode() + b"\n"


if __name__ == "__main__":
  serve(memory_mb=int(sys.argv[1]))
