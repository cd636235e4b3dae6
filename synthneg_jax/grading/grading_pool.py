"""Many answers graded in worker processes: each with a deadline, each lost worker replaced, memory
bounded.

A worker is a fresh Python (`grading_worker.py`), started as a program: it shares nothing with the
process that asks, so that the pool works from threads, in notebooks and beside jax, without
`__main__` guards or signals. One thread here feeds one worker. A worker that overruns its deadline
or dies is killed and replaced: the answer at hand is a "timeout", and those sent after it are sent
again.
"""

import collections
import contextlib
import os
import pathlib
import selectors
import subprocess
import sys
import threading
from collections.abc import Sequence

from synthneg_jax.grading import grading_worker
from synthneg_jax.grading.answer_equality import Conventions
from synthneg_jax.runtime import errors

MAX_CHARS = 1_000_000  # of a response; a longer one is too large and is not sent
# bytes sent to a worker ahead of its answers: less than a pipe holds, so that no side waits on the
# other
_IN_FLIGHT = 32_000
_AT_ONCE = 64  # answers sent at once
_START_S = 120.0  # seconds for a worker to start
# wall-clock deadline: the processor time that an answer may take so many times, and 3 s; machines
# are busy
_PATIENCE = 5.0
_PACKAGE = pathlib.Path(__file__).parents[3]


class _Lost(Exception):
  """The worker hung or died."""


class _Worker:
  """One process and the pipe to it."""

  def __init__(self, command: Sequence[str]):
    path = os.pathsep.join(filter(None, [str(_PACKAGE), os.environ.get("PYTHONPATH")]))
    self.process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env=os.environ | {"PYTHONPATH": path},
      bufsize=0,
    )
    self._rest = b""
    self._selector = selectors.DefaultSelector()
    self._selector.register(self.process.stdout, selectors.EVENT_READ)
    if self.receive(_START_S)[0] != "ready":
      raise _Lost

  def send(self, data: bytes) -> None:
    try:
      view = memoryview(data)
      while view:
        view = view[self.process.stdin.write(view) :]
    except OSError:
      raise _Lost from None

  def receive(self, seconds: float) -> tuple[str, str | None]:
    """The next answer, waited for so long at most."""
    while b"\n" not in self._rest:
      if not self._selector.select(seconds):
        raise _Lost
      chunk = os.read(self.process.stdout.fileno(), 1 << 16)
      if not chunk:
        raise _Lost
      self._rest += chunk
    line, _, self._rest = self._rest.partition(b"\n")
    reason, extracted = grading_worker.json.loads(line)
    return reason, extracted

  def kill(self) -> None:
    self._selector.close()
    self.process.kill()
    with contextlib.suppress(OSError):
      self.process.stdin.close()
    self.process.stdout.close()
    self.process.wait()


class GradingPool:
  """Worker processes that grade answers of kind "math".

  Attributes:
    replaced: workers that hung or died so far.
  """

  def __init__(
    self,
    num_workers: int | None = None,
    memory_mb: int = 1024,
    command: Sequence[str] | None = None,
  ):
    """
    Args:
      num_workers: processes; None takes the processors that this process may use, at most 8.
      memory_mb: MiB that each may take.
      command: what starts a worker, for tests; None is `grading_worker`.
    """
    self.num_workers = num_workers or min(8, len(os.sched_getaffinity(0)))
    self.replaced = 0
    self._command = command or [
      sys.executable,
      "-P",
      "-m",
      "synthneg_jax.grading.grading_worker",
      str(memory_mb),
    ]
    self._idle: list[_Worker] = []
    self._lock = threading.Lock()
    self._slots = threading.Semaphore(self.num_workers)

  def grade(
    self, items: Sequence[tuple[str, str]], rules: Conventions, timeout_s: float
  ) -> list[tuple[str, str | None]]:
    """(reason, extracted) of each (response, gold), in order.

    Raises:
      UserError: a gold answer cannot be read; or a worker does not start.
    """
    made: list = [None] * len(items)
    waiting = collections.deque()
    for index, (response, gold) in enumerate(items):
      if len(response) > MAX_CHARS:
        made[index] = ("too_large", None)
      else:
        waiting.append((index, grading_worker.request(response, gold, rules, timeout_s)))
    failures: list[BaseException] = []

    def work():
      try:
        self._work(waiting, made, timeout_s * _PATIENCE + 3)
      except BaseException as error:  # handed on to the thread that asked
        failures.append(error)

    threads = [
      threading.Thread(target=work, daemon=True)
      for _ in range(min(self.num_workers, -(-len(waiting) // _AT_ONCE)) - 1)
    ]
    for thread in threads:
      thread.start()
    work()
    for thread in threads:
      thread.join()
    if failures:
      raise failures[0]
    for made_one in made:
      if made_one[0] == "error":
        raise errors.UserError(made_one[1])
    return made

  def _work(self, waiting: collections.deque, made: list, seconds: float) -> None:
    """Feeds one worker until nothing waits."""
    with self._slots:
      worker = None
      try:
        while chunk := self._chunk(waiting):
          worker = worker or self._start()
          done = 0
          try:
            worker.send(b"".join(data for _, data in chunk))
            for index, _ in chunk:
              made[index] = worker.receive(seconds)
              done += 1
          except _Lost:
            made[chunk[done][0]] = ("timeout", None)
            waiting.extendleft(reversed(chunk[done + 1 :]))
            worker.kill()
            worker = None
            with self._lock:
              self.replaced += 1
      except BaseException:
        if worker:
          worker.kill()
        raise
      if worker:
        with self._lock:
          self._idle.append(worker)

  def _chunk(self, waiting: collections.deque) -> list[tuple[int, bytes]]:
    """The next answers to send: few enough that the pipe takes them all; a single one may be
    longer.
    """
    found, size = [], 0
    with self._lock:
      while (
        waiting and len(found) < _AT_ONCE and (not found or size + len(waiting[0][1]) <= _IN_FLIGHT)
      ):
        found.append(waiting.popleft())
        size += len(found[-1][1])
    return found

  def _start(self) -> _Worker:
    with self._lock:
      while self._idle:
        worker = self._idle.pop()
        if worker.process.poll() is None:
          return worker
        worker.kill()
    try:
      return _Worker(self._command)
    except (_Lost, OSError) as error:
      raise errors.UserError(
        f"A grading worker does not start ({' '.join(self._command)}): {error}."
      ) from None

  def close(self) -> None:
    """Ends the idle workers; the pool may be used again."""
    with self._lock:
      idle, self._idle = self._idle, []
    for worker in idle:
      worker.kill()

  def __enter__(self) -> "GradingPool":
    return self

  def __exit__(self, *_) -> None:
    self.close()
