"""Remaining time on a terminal, in a notebook's kernel, and in a log."""

import contextlib
import os
import pathlib
import pty
import subprocess
import sys
import termios
from unittest import mock

import pytest
from absl import logging
from absl.testing import absltest
from jupyter_client.manager import start_new_kernel

from synthneg_jax.runtime import distributed, progress

pytestmark = pytest.mark.slow  # starts processes

ROOT = pathlib.Path(__file__).parents[2]
WORK = (
  "import time\nfrom synthneg_jax.runtime.progress import Progress\n"
  "with Progress('sft', 4, 'steps') as p:\n  for i in range(4):\n    time.sleep(0.15); p.update(1, "
  "loss=0.5)\n"
)


class ProgressTest(absltest.TestCase):
  def test_log(self):
    # Fails if a log gets a bar, a line at every update, no line at the end, or a wrong rest.
    clock = iter([100.0, 110.0, 120.0, 120.0, 130.0])
    with (
      mock.patch.object(progress.time, "monotonic", lambda: next(clock)),
      mock.patch.object(sys.stderr, "isatty", lambda: False, create=True),
      mock.patch.object(logging, "info") as said,
    ):
      with progress.Progress("sft", 4, "steps") as bar:
        bar.update(1)  # 10 s after the start: not yet
        bar.update(1, loss=0.25)
        bar.update(2)
    lines = [call.args[0] % call.args[1:] for call in said.call_args_list]
    self.assertEqual(lines, ["sft: 2/4 steps, 20 s, 20 s left, loss 0.25", "sft: 4/4 steps, 30 s"])

  def test_log_leaves_compilation_out_of_the_rest(self):
    # Fails if the first update's time, most of it compilation, is taken for what each of the others
    # will take.
    clock = iter([100.0, 130.0, 150.0, 151.0, 151.0])
    with (
      mock.patch.object(progress.time, "monotonic", lambda: next(clock)),
      mock.patch.object(sys.stderr, "isatty", lambda: False, create=True),
      mock.patch.object(logging, "info") as said,
    ):
      with progress.Progress("sft", 122, "steps") as bar:
        bar.update(1)
        bar.update(40)
        bar.update(81)
    lines = [call.args[0] % call.args[1:] for call in said.call_args_list]
    self.assertEqual(
      lines,
      ["sft: 1/122 steps, 30 s", "sft: 41/122 steps, 50 s, 40 s left", "sft: 122/122 steps, 51 s"],
    )

  def test_terminal(self):
    # Fails if a terminal gets no bar, or one without the time that remains.
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with subprocess.Popen(
      [sys.executable, "-c", WORK], cwd=ROOT, stderr=theirs, stdout=subprocess.DEVNULL
    ):
      os.close(theirs)
      text = b""
      with contextlib.suppress(OSError):  # the program has ended
        while part := os.read(ours, 4096):
          text += part
    os.close(ours)
    self.assertRegex(text.decode(), r"sft: +50%.*2/4 \[00:00<00:00.*loss=0.5")

  def test_notebook(self):
    # Fails if a kernel, whose stderr is no terminal, is taken for a log: absl's lines are not shown
    # there.
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT))
    said = []
    try:
      client.execute_interactive(
        WORK,
        timeout=60,
        output_hook=lambda message: said.append(message["content"].get("text", "")),
      )
    finally:
      client.stop_channels()
      manager.shutdown_kernel(now=True)
    self.assertRegex("".join(said), r"sft: +\d+%.*\d/4 \[00:\d\d<")

  def test_other_processes_are_silent(self):
    # Fails if each process of a pod draws a bar.
    with (
      mock.patch.object(distributed, "is_primary", lambda: False),
      mock.patch.object(sys.stderr, "isatty", lambda: True),
    ):
      self.assertIsNone(progress._bar("sft", 4, "steps"))


if __name__ == "__main__":
  absltest.main()
