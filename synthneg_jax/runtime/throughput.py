"""What a program costs while it runs: time, tokens, memory, compilations; and the profiler over
some of its steps.
"""

import resource
import sys
import time

import jax
from absl import logging
from etils import epath

from synthneg_jax.runtime import distributed
from synthneg_jax.runtime.errors import UserError

# what jax tells of each program that it compiles or loads
_COMPILED = "/jax/core/compile/backend_compile_duration"
_compiled = {"count": 0, "seconds": 0.0, "listening": False}


def _listen(event: str, seconds: float, **_) -> None:
  if event == _COMPILED:
    _compiled["count"] += 1
    _compiled["seconds"] += seconds


def count_compilations() -> None:
  """From here on `compilations` counts; to be called before the first program is compiled."""
  if not _compiled["listening"]:
    jax.monitoring.register_event_duration_secs_listener(_listen)
    _compiled["listening"] = True


def compilations() -> tuple[int, float]:
  """(programs compiled, or read from the compilation cache, since counting began; seconds that this
  took).
  """
  return _compiled["count"], _compiled["seconds"]


def memory_peak() -> tuple[str, int]:
  """("device" or "host", bytes): the most that a device of this process has held, where devices
  tell, else the process.
  """
  peaks = [
    (device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()
  ]
  if any(peaks):
    return "device", max(peaks)
  unit = 1 if sys.platform == "darwin" else 1024
  return "host", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Meter:
  """Measures updates by the times at which their figures have come."""

  def __init__(self):
    count_compilations()
    self._start = self._last = time.perf_counter()
    self._before, self._tokens, self._steps = compilations(), 0, 0

  def step(self, tokens: int, places: int) -> dict[str, float]:
    """Figures of an update that is done: run/step_s, run/tokens_per_s and the rest, as docs/data.md
    names them.

    Args:
      tokens: in the update's batch, over all processes; padding does not count.
      places: for tokens in the batch.
    """
    now = time.perf_counter()
    seconds, self._last = now - self._last, now
    self._tokens, self._steps = self._tokens + tokens, self._steps + 1
    count, compile_s = compilations()
    where, peak = memory_peak()
    return {
      "run/step_s": round(seconds, 6),
      "run/tokens_per_s": round(tokens / seconds, 2),
      "run/padding_share": round(1 - tokens / places, 5),
      f"run/{where}_memory_peak_bytes": peak,
      "run/compilations": count - self._before[0],
      "run/compile_s": round(compile_s - self._before[1], 3),
    }

  def total(self) -> dict[str, float]:
    """Figures of all updates since the meter was made; none without an update."""
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
  """ "a:b" as (a, b), updates a to b - 1.

  Raises:
    UserError: it is no such range.
  """
  first, colon, last = text.partition(":")
  if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
    raise UserError(
      f"--profile_steps={text!r} is no range of updates: a:b, two numbers, traces updates a to b - "
      "1."
    )
  return int(first), int(last)


class Profiler:
  """jax's profiler over a range of updates of one training, in the first process.

  What it writes lies below folder/plugins/profile/, where TensorBoard's profile plugin, XProf and
  Perfetto find it.
  """

  def __init__(self, steps: str, folder: epath.Path, first_step: int, num_steps: int):
    """Plans a trace.

    Args:
      steps: "a:b", or empty for none.
      folder: takes the trace.
      first_step, num_steps: the updates that will be made; of the range, those among them are
        traced.
    """
    a, b = parse_steps(steps) if steps and distributed.first() else (0, 0)
    self._folder, self._on = folder, False
    self._first, self._after = max(a, first_step), min(b, num_steps)
    if steps and distributed.first() and self._first >= self._after:
      logging.info(
        "--profile_steps=%s: updates %d to %d are made here; none is traced.",
        steps,
        first_step,
        num_steps - 1,
      )

  def before(self, step: int):
    """To be called before an update is dispatched; returns a context in which to dispatch it, which
    names it.
    """
    if step == self._first < self._after:
      jax.profiler.start_trace(str(self._folder))
      self._on = True
    return jax.profiler.StepTraceAnnotation("train", step_num=step)

  def after(self, step: int, state) -> None:
    """To be called after it; waits for the state only where the trace ends."""
    if self._on and step + 1 == self._after:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    """Ends a trace that is under way."""
    if self._on:
      self._on = False
      jax.profiler.stop_trace()
      logging.info("Updates %d to %d are traced in %s.", self._first, self._after - 1, self._folder)
