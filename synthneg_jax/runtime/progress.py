"""Progress: a bar on a terminal or in a notebook, plain lines in a log."""

import importlib.util
import sys
import time

from absl import logging
from tqdm import tqdm

from synthneg_jax.runtime import distributed


def _bar(name: str, total: int, unit: str):
  """A bar where a person watches one, else None. A notebook has one of text unless ipywidgets can
  draw it.
  """
  if not distributed.first():
    return None
  if sys.stderr.isatty():
    return tqdm(total=total, desc=name, unit=unit, leave=False)
  shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
  if shell is None or not hasattr(shell, "kernel"):
    return None
  if importlib.util.find_spec("ipywidgets") is None:
    return tqdm(total=total, desc=name, unit=unit, mininterval=1.0, file=sys.stdout)
  from tqdm.notebook import tqdm as drawn

  return drawn(total=total, desc=name, unit=unit)


class Progress:
  """Counts work done out of a total and says how long the rest will take.

  On a terminal and in a notebook it draws one bar; elsewhere it writes a line at most every
  `every_s` seconds, and one at the end. Of several processes the first alone does either. The first
  update, which compiles, counts for no rate: a log tells what is left from the second on.
  """

  def __init__(self, name: str, total: int, unit: str, every_s: float = 15.0):
    self._name, self._total, self._unit, self._every_s = name, total, unit, every_s
    self._done, self._start, self._notes = 0, time.monotonic(), {}
    self._said, self._first = self._start, None
    self._bar = _bar(name, total, unit)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    if self._bar:
      self._bar.close()
    if error[0] is None:
      self._say(time.monotonic())

  def update(self, count: int = 1, **notes):
    """`count` more are done; notes are figures to show beside, such as a loss."""
    now = time.monotonic()
    self._done += count
    self._notes = notes
    self._first = self._first or (now, self._done)
    if self._bar:
      self._bar.set_postfix({name: f"{value:.4g}" for name, value in notes.items()}, refresh=False)
      self._bar.update(count)
    elif now - self._said > self._every_s:
      self._say(now)

  def _say(self, now: float):
    self._said, left = now, ""
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
