"""A pool of worker processes that grade answers of kind "math" with deadlines and a memory limit.

Each worker is a fresh Python process (`grading_worker.py`) that shares nothing with its parent, so
that the pool works from threads, in notebooks and beside jax, without `__main__` guards or signals.
One thread feeds each worker. A worker that misses its deadline or dies is killed and replaced; its
current answer gets the reason "timeout", and the answers queued behind it are sent again.
"""

import collections
import contextlib
import json
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

MAX_CHARS = 1_000_000  # longer responses are "too_large" and never sent
_MAX_BATCH_BYTES = 32_000  # less than a pipe holds, so that neither side blocks on writing
_MAX_BATCH = 64  # requests per batch
_START_S = 120.0  # seconds for a worker to start
_WALL_FACTOR = 5.0  # wall-clock deadline = this * timeout_s + 3 s, since machines may be busy
_PACKAGE = pathlib.Path(__file__).parents[3]


class _Lost(Exception):
  """The worker hung or died."""


class _Worker:
  """A worker process and its pipes."""

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
    """The next (reason, extracted) pair; raises _Lost if none arrives within this time."""
    while b"\n" not in self._rest:
      if not self._selector.select(seconds):
        raise _Lost
      chunk = os.read(self.process.stdout.fileno(), 1 << 16)
      if not chunk:
        raise _Lost
      self._rest += chunk
    line, _, self._rest = self._rest.partition(b"\n")
    reason, extracted = json.loads(line)
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
    replaced: number of workers that have hung or died.
  """

  def __init__(
    self,
    num_workers: int | None = None,
    memory_mb: int = 1024,
    command: Sequence[str] | None = None,
  ):
    """
    Args:
      num_workers: number of processes; None for the number of available processors, at most 8.
      memory_mb: memory limit of each worker in MiB.
      command: starts a worker instead of `grading_worker`, for tests.
    """
    self.num_workers = num_workers or min(8, len(os.sched_getaffinity(0)))
    self.replaced = 0
    module = "synthneg_jax.grading.grading_worker"
    self._command = command or [sys.executable, "-P", "-m", module, str(memory_mb)]
    self._idle: list[_Worker] = []
    self._lock = threading.Lock()
    self._slots = threading.Semaphore(self.num_workers)

  def grade(
    self, items: Sequence[tuple[str, str]], rules: Conventions, timeout_s: float
  ) -> list[tuple[str, str | None]]:
    """Grades each (response, gold) pair and returns (reason, extracted) pairs in order.

    Raises:
      UserError: a gold answer cannot be read, or a worker does not start.
    """
    results: list = [None] * len(items)
    queue = collections.deque()
    for index, (response, gold) in enumerate(items):
      if len(response) > MAX_CHARS:
        results[index] = ("too_large", None)
      else:
        queue.append((index, grading_worker.request(response, gold, rules, timeout_s)))
    failures: list[BaseException] = []

    def work():
      try:
        self._work(queue, results, timeout_s * _WALL_FACTOR + 3)
      except BaseException as error:  # re-raised in the calling thread
        failures.append(error)

    num_threads = min(self.num_workers, -(-len(queue) // _MAX_BATCH)) - 1
    threads = [threading.Thread(target=work, daemon=True) for _ in range(num_threads)]
    for thread in threads:
      thread.start()
    work()
    for thread in threads:
      thread.join()
    if failures:
      raise failures[0]
    for reason, sentence in results:
      if reason == "error":
        raise errors.UserError(sentence)
    return results

  def _work(self, queue: collections.deque, results: list, seconds: float) -> None:
    """Feeds one worker until the queue is empty."""
    with self._slots:
      worker = None
      try:
        while batch := self._next_batch(queue):
          worker = worker or self._start()
          done = 0
          try:
            worker.send(b"".join(data for _, data in batch))
            for index, _ in batch:
              results[index] = worker.receive(seconds)
              done += 1
          except _Lost:
            results[batch[done][0]] = ("timeout", None)
            queue.extendleft(reversed(batch[done + 1 :]))
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

  def _next_batch(self, queue: collections.deque) -> list[tuple[int, bytes]]:
    """The next requests that fit into the pipe together, and at least one."""
    batch, size = [], 0
    with self._lock:
      while queue and len(batch) < _MAX_BATCH:
        size += len(queue[0][1])
        if batch and size > _MAX_BATCH_BYTES:
          break
        batch.append(queue.popleft())
    return batch

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
      command = " ".join(self._command)
      reason = str(error) or "it exited or hung"
      raise errors.UserError(f"Cannot start a grading worker ({command}): {reason}.") from None

  def close(self) -> None:
    """Ends the idle workers; the pool remains usable."""
    with self._lock:
      idle, self._idle = self._idle, []
    for worker in idle:
      worker.kill()

  def __enter__(self) -> "GradingPool":
    return self

  def __exit__(self, *_) -> None:
    self.close()
