"""Progress: a bar on a terminal or in a notebook, plain lines in a log."""

import importlib.util
import sys
import time

from absl import logging
from tqdm import tqdm

from synthneg_jax.runtime import processes


def _bar(name: str, total: int, unit: str):
  """A bar where a person watches one, else None. A notebook has one of text unless ipywidgets can draw it."""
  if not processes.first():
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

  On a terminal and in a notebook it draws one bar; elsewhere it writes a line at most every `every_s` seconds, and one
  at the end. Of several processes the first alone does either.
  """

  def __init__(self, name: str, total: int, unit: str, every_s: float = 15.0):
    self._name, self._total, self._unit, self._every_s = name, total, unit, every_s
    self._done, self._start, self._notes = 0, time.monotonic(), {}
    self._said = self._start
    self._bar = _bar(name, total, unit)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    if self._bar:
      self._bar.close()
    if error[0] is None:
      self._say()

  def update(self, count: int = 1, **notes):
    """`count` more are done; notes are figures to show beside, such as a loss."""
    self._done += count
    self._notes = notes
    if self._bar:
      self._bar.update(count)
      self._bar.set_postfix({name: f"{value:.4g}" for name, value in notes.items()})
    elif time.monotonic() - self._said > self._every_s:
      self._say()

  def _say(self):
    self._said = time.monotonic()
    taken = self._said - self._start
    rest = taken / self._done * (self._total - self._done) if self._done else float("nan")
    tail = "".join(f", {name} {value:.4g}" for name, value in self._notes.items())
    left = f", {rest:.0f} s left" if self._done < self._total else ""
    logging.info("%s: %d/%d %s, %.0f s%s%s", self._name, self._done, self._total, self._unit, taken, left, tail)
