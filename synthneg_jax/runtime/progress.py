"""Progress: a bar on a terminal or in a notebook, plain lines in a log."""

import importlib.util
import sys
import time

from absl import logging
from tqdm import tqdm

from synthneg_jax.runtime import distributed


def _bar(name: str, total: int, unit: str):
  """A bar on a terminal or in a notebook (as text without ipywidgets), otherwise None."""
  if not distributed.is_primary():
    return None
  if sys.stderr.isatty():
    return tqdm(total=total, desc=name, unit=unit, leave=False)
  shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
  if shell is None or not hasattr(shell, "kernel"):
    return None
  if importlib.util.find_spec("ipywidgets") is None:
    return tqdm(total=total, desc=name, unit=unit, mininterval=1.0, file=sys.stdout)
  from tqdm.notebook import tqdm as notebook_tqdm

  return notebook_tqdm(total=total, desc=name, unit=unit)


class Progress:
  """Counts completed work and estimates the remaining time.

  On a terminal and in a notebook it draws a bar; elsewhere it logs a line at most every `every_s`
  seconds, and one at the end. Only the first process reports. The first update includes compilation
  and is excluded from the rate, so logs show the remaining time from the second update on.
  """

  def __init__(self, name: str, total: int, unit: str, every_s: float = 15.0):
    self._name, self._total, self._unit, self._every_s = name, total, unit, every_s
    self._done, self._start, self._notes = 0, time.monotonic(), {}
    self._logged, self._first = self._start, None
    self._bar = _bar(name, total, unit)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    if self._bar:
      self._bar.close()
    if error[0] is None:
      self._log(time.monotonic())

  def update(self, count: int = 1, **notes):
    """Adds `count` completed items; notes are figures to display, such as a loss."""
    now = time.monotonic()
    self._done += count
    self._notes = notes
    self._first = self._first or (now, self._done)
    if self._bar:
      self._bar.set_postfix({name: f"{value:.4g}" for name, value in notes.items()}, refresh=False)
      self._bar.update(count)
    elif now - self._logged > self._every_s:
      self._log(now)

  def _log(self, now: float):
    self._logged, left = now, ""
    since, before = self._first or (now, self._done)
    if before < self._done < self._total:
      left = f", {(now - since) / (self._done - before) * (self._total - self._done):.0f} s left"
    tail = "".join(f", {name} {value:.4g}" for name, value in self._notes.items())
    logging.info(
      "%s: %d/%d %s, %.0f s%s%s",
      self._name,
      self._done,
      self._total,
      self._unit,
      now - self._start,
      left,
      tail,
    )
