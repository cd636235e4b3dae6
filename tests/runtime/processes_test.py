"""The link between processes: values, deaths, failures, and one place at which all stop; and who may wait for whom."""

import ast
import pathlib
import subprocess
import sys
import tempfile
import textwrap
import time

import pytest
from absl.testing import absltest, parameterized

from synthneg_jax.runtime import processes

pytestmark = pytest.mark.slow  # starts processes

ROOT = pathlib.Path(__file__).parents[2]

# A process of three: joins by a file that stands in for jax's key-value store.
MEMBER = """
import os, pathlib, random, signal, sys, time
from synthneg_jax.runtime import link, processes
index, count, folder = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
link._BEAT_S, link._SILENCE_S = 0.2, 2.0

def share(address):
  path = folder / "address"
  if address is not None:
    path.with_suffix(".tmp").write_text(address)
    path.with_suffix(".tmp").rename(path)
  while not path.exists():
    time.sleep(0.01)
  return path.read_text()

state = processes._state
state.index, state.count = index, count
processes.watch_signals()
state.link = link.Link(
  index, count, "127.0.0.1", share, lost=processes._lost, failed=processes._failed, asked=processes._asked
)
(folder / f"joined{index}").touch()
while not all((folder / f"joined{other}").exists() for other in range(count)):
  time.sleep(0.01)
time.sleep(0.1)
"""


class MembersTestCase(parameterized.TestCase):
  def members(self, program: str, count: int = 3) -> list[subprocess.Popen]:
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    source = MEMBER + textwrap.dedent(program)
    made = [
      subprocess.Popen(
        [sys.executable, "-c", source, str(index), str(count), str(self.folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for index in range(count)
    ]
    for process in made:
      self.addCleanup(process.kill)
    until = time.monotonic() + 60
    while not all((self.folder / f"joined{index}").exists() for index in range(count)):
      self.assertLess(time.monotonic(), until, [process.poll() for process in made])
      time.sleep(0.02)
    return made

  def ends(self, made, timeout_s: float = 20.0) -> list[tuple[int, str, str]]:
    """(status, what was printed, last line on stderr) of each."""
    found = []
    for process in made:
      out, err = process.communicate(timeout=timeout_s)
      found.append((process.returncode, out, (err.strip().splitlines() or [""])[-1]))
    return found


class LinkTest(MembersTestCase):
  def test_gather_and_agree(self):
    # Fails if values come in another order than the processes', or those of one round reach another.
    made = self.members("""
      for n in range(50):
        time.sleep(random.random() / 100)
        assert processes.gather([index, n]) == [[0, n], [1, n], [2, n]]
        assert processes.agree("x" * n if index == 0 else index) == "x" * n
      big = "y" * 300_000
      assert processes.gather(big) == [big] * 3
      processes.finish()
      print("done")
    """)
    self.assertEqual(self.ends(made), [(0, "done\n", "")] * 3)

  @parameterized.parameters(0, 2)
  def test_a_death_is_heard_of_at_once(self, victim):
    # Fails if the others live on, or end without naming the dead.
    made = self.members("processes.gather() if index else time.sleep(60)")
    made[victim].kill()
    ends = self.ends(made, timeout_s=10)
    for index in {0, 1, 2} - {victim}:
      self.assertEqual(ends[index][0], processes.LOST)
      self.assertIn(f"process {victim} of 3 died; process {index} stops.", ends[index][2])

  @parameterized.parameters(0, 1)
  def test_silence_is_death(self, victim):
    # Fails if a host that is gone without closing its sockets is waited for.
    made = self.members("time.sleep(60)")
    made[victim].send_signal(19)  # SIGSTOP
    others = [process for index, process in enumerate(made) if index != victim]
    for status, _, line in self.ends(others, timeout_s=15):
      self.assertEqual(status, processes.LOST)
      self.assertIn(f"process {victim} of 3 died", line)

  def test_a_failure_stops_all_with_its_sentence(self):
    # Fails if the others hang on one that failed, or do not say why they stop.
    made = self.members("""
      if index == 1:
        processes.fail("the disk is full")
      processes.gather()
    """)
    ends = self.ends(made)
    self.assertEqual([status for status, _, _ in ends], [1] * 3)
    self.assertTrue(ends[1][2].endswith(": the disk is full"), ends[1])
    for index in (0, 2):
      self.assertTrue(ends[index][2].endswith(": process 1 stopped: the disk is full"), ends[index])

  def test_leave_is_no_death(self):
    # Fails if a process that says that it leaves, as all do when the grace after SIGTERM is over, counts as dead.
    made = self.members("""
      if index == 1:
        state.link.leave()
        os._exit(75)
      time.sleep(1)
    """)
    self.assertEqual([status for status, _, _ in self.ends(made)], [0, 75, 0])

  def test_all_stop_at_the_same_place(self):
    # Fails if a process that is behind stops earlier than one ahead, so that one waits for the other for ever; or if the
    # end of one that has taken leave is called a death.
    made = self.members("""
      for place in range(100_000):
        time.sleep(random.random() / 200 * (1 + index))
        if processes.stopping():
          break
      assert processes.stopping()
      print(processes.gather(place))
      processes.finish()
      time.sleep(index / 4)
      sys.exit(75)
    """)
    time.sleep(0.5)
    made[2].terminate()
    ends = self.ends(made)
    self.assertEqual([status for status, _, _ in ends], [75] * 3, ends)
    places = ast.literal_eval(ends[0][1])
    self.assertLen(set(places), 1)
    self.assertBetween(places[0], 1, 99_998)

  def test_alone(self):
    # Fails if one process waits for others.
    self.assertEqual((processes.index(), processes.count(), processes.first()), (0, 1, True))
    self.assertEqual(processes.gather({"a": 1}), [{"a": 1}])
    self.assertEqual(processes.agree(3), 3)
    self.assertTrue(all(map(processes.mine, range(5))))
    processes.barrier()
    self.assertFalse(processes.stopping())


WAITS = {"gather", "agree", "barrier", "stopping", "finish", "whole", "fingerprint", "save_params", "load_params"}
WAITS |= {"fit", "score", "train", "respond", "write_shared", "clear", "restore", "place", "policy", "base", "stage"}


def waiting_behind(source: str) -> list[str]:
  """Calls that wait for all processes, or run on all devices, where only some processes come: `name` at its line."""
  found = []

  def some(test: ast.expr) -> bool:
    names = {node.attr for node in ast.walk(test) if isinstance(node, ast.Attribute)}
    return bool(names & {"first", "mine", "process_index"} or ("index" in names and "processes" in ast.dump(test)))

  def walk(node: ast.AST, behind: bool):
    if isinstance(node, ast.Call) and behind:
      name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
      if name in WAITS:
        found.append(f"{name} at {node.lineno}")
    if isinstance(node, ast.FunctionDef | ast.Module):
      for number, child in enumerate(node.body):
        left = any(isinstance(end, ast.Return | ast.Raise) for end in getattr(child, "body", []))
        walk(child, behind)
        if isinstance(child, ast.If) and some(child.test) and left:  # the rest is for the others
          for rest in node.body[number + 1 :]:
            walk(rest, True)
          return
      return
    for field, value in ast.iter_fields(node):
      guarded = isinstance(node, ast.If | ast.IfExp | ast.While) and field in ("body", "orelse") and some(node.test)
      for child in value if isinstance(value, list) else [value]:
        if isinstance(child, ast.AST):
          walk(child, behind or guarded)

  walk(ast.parse(source), False)
  return found


class WaitingTest(parameterized.TestCase):
  def test_nobody_waits_where_not_all_come(self):
    # Fails if a collective comes to stand behind a branch that only some processes take: then all hang.
    for path in sorted((ROOT / "synthneg_jax").rglob("*.py")):
      if path.name not in ("processes.py", "link.py"):
        self.assertEqual(waiting_behind(path.read_text()), [], path)

  @parameterized.parameters(
    ("if processes.first():\n  processes.barrier()", ["barrier at 2"]),
    ("if processes.first():\n  pass\nelse:\n  x = processes.agree(1)", ["agree at 4"]),
    ("def f():\n  if not processes.first():\n    return {}\n  experiment.policy('sft')", ["policy at 4"]),
    ("def f():\n  if processes.mine(3):\n    with a:\n      loop.fit()", ["fit at 4"]),
    ("x = mesh_lib.whole(y) if jax.process_index() == 0 else None", ["whole at 1"]),
    ("if processes.first():\n  write()\nprocesses.barrier()", []),
    ("def f():\n  if stage.done:\n    return {}\n  processes.barrier()", []),
  )
  def test_the_check_sees(self, source, found):
    # Fails if the check above passes on anything.
    self.assertEqual(waiting_behind(source), found)


if __name__ == "__main__":
  absltest.main()
