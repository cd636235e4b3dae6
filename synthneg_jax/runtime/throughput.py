"""Throughput of a running program (time, tokens, memory, compilations), and its profiler."""

import resource
import sys
import time

import jax
from absl import logging
from etils import epath

from synthneg_jax.runtime import distributed
from synthneg_jax.runtime.errors import UserError

# jax's event for each program that it compiles or loads
_COMPILED = "/jax/core/compile/backend_compile_duration"
_compiled = {"count": 0, "seconds": 0.0, "listening": False}


def _listen(event: str, seconds: float, **_) -> None:
  if event == _COMPILED:
    _compiled["count"] += 1
    _compiled["seconds"] += seconds


def count_compilations() -> None:
  """Starts counting compilations; call before the first program is compiled."""
  if not _compiled["listening"]:
    jax.monitoring.register_event_duration_secs_listener(_listen)
    _compiled["listening"] = True


def compilations() -> tuple[int, float]:
  """Returns (programs compiled or loaded from the cache since counting began, seconds spent)."""
  return _compiled["count"], _compiled["seconds"]


def memory_peak() -> tuple[str, int]:
  """Returns ("device", the largest peak of the local devices in bytes).

  Where devices do not report memory, returns ("host", peak of this process in bytes).
  """
  peaks = [
    (device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()
  ]
  if any(peaks):
    return "device", max(peaks)
  unit = 1 if sys.platform == "darwin" else 1024
  return "host", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Meter:
  """Measures updates by the times at which their metrics arrive."""

  def __init__(self):
    count_compilations()
    self._start = self._last = time.perf_counter()
    self._before, self._tokens, self._steps = compilations(), 0, 0

  def step(self, tokens: int, capacity: int) -> dict[str, float]:
    """Metrics of a finished update: run/step_s, run/tokens_per_s and others (docs/data.md).

    Args:
      tokens: non-padding tokens in the update's batch, over all processes.
      capacity: tokens that the batch holds with padding.
    """
    now = time.perf_counter()
    seconds, self._last = now - self._last, now
    self._tokens, self._steps = self._tokens + tokens, self._steps + 1
    count, compile_s = compilations()
    where, peak = memory_peak()
    return {
      "run/step_s": round(seconds, 6),
      "run/tokens_per_s": round(tokens / seconds, 2),
      "run/padding_share": round(1 - tokens / capacity, 5),
      f"run/{where}_memory_peak_bytes": peak,
      "run/compilations": count - self._before[0],
      "run/compile_s": round(compile_s - self._before[1], 3),
    }

  def total(self) -> dict[str, float]:
    """Metrics over all updates since the meter was created; empty without an update."""
    if not self._steps:
      return {}
    count, compile_s = compilations()
    where, peak = memory_peak()
    return {
      "tokens_per_s": round(self._tokens / (time.perf_counter() - self._start), 1),
      f"{where}_memory_peak_bytes": peak,
      "compilations": count - self._before[0],
      "compile_s": round(compile_s - self._before[1], 2),
    }


def parse_steps(text: str) -> tuple[int, int]:
  """Parses "a:b", updates a to b - 1, as (a, b).

  Raises:
    UserError: the text is not a range.
  """
  first, colon, last = text.partition(":")
  if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
    raise UserError(
      f"--profile_steps={text!r} must be a range a:b of two numbers, which traces updates a to "
      "b - 1."
    )
  return int(first), int(last)


class Profiler:
  """Traces a range of updates of one training run with jax's profiler, in process 0.

  The trace is in folder/plugins/profile/, where TensorBoard's profile plugin, XProf and Perfetto
  look for it.
  """

  def __init__(self, steps: str, folder: epath.Path, first_step: int, num_steps: int):
    """Plans a trace.

    Args:
      steps: "a:b", or empty for none.
      folder: of the trace.
      first_step, num_steps: the run makes updates first_step to num_steps - 1; those within the
        range are traced.
    """
    a, b = parse_steps(steps) if steps and distributed.is_primary() else (0, 0)
    self._folder, self._on = folder, False
    self._first, self._after = max(a, first_step), min(b, num_steps)
    if steps and distributed.is_primary() and self._first >= self._after:
      logging.info(
        "--profile_steps=%s: this run makes updates %d to %d; none is traced.",
        steps,
        first_step,
        num_steps - 1,
      )

  def before(self, step: int):
    """Call before dispatching an update; returns a context manager that names it in the trace."""
    if step == self._first < self._after:
      jax.profiler.start_trace(str(self._folder))
      self._on = True
    return jax.profiler.StepTraceAnnotation("train", step_num=step)

  def after(self, step: int, state) -> None:
    """Call after dispatching an update; waits for the state only at the end of the trace."""
    if self._on and step + 1 == self._after:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    """Ends an active trace."""
    if self._on:
      self._on = False
      jax.profiler.stop_trace()
      logging.info("Traced updates %d to %d in %s.", self._first, self._after - 1, self._folder)
