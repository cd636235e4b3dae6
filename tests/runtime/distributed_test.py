"""Coordination of processes: values, deaths, failures, joint stops, and collectives in branches."""

import ast
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time

import pytest
from absl.testing import absltest, parameterized

from synthneg_jax.runtime import distributed

pytestmark = pytest.mark.slow  # starts processes

ROOT = pathlib.Path(__file__).parents[2]

# A process of three.
MEMBER = """
import os, pathlib, random, signal, sys, time
from synthneg_jax.runtime import distributed
index, count = int(sys.argv[1]), int(sys.argv[2])
folder, address = pathlib.Path(sys.argv[3]), sys.argv[4]
distributed.watch_signals()
distributed.start(address, count, index, bind_address=address, heartbeat_s=3, timeout_s=60)
(folder / f"joined{index}").touch()
while not all((folder / f"joined{other}").exists() for other in range(count)):
  time.sleep(0.01)
"""


def free_port() -> int:
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


class MembersTestCase(parameterized.TestCase):
  def process(self, source: str, index: int, count: int) -> subprocess.Popen:
    made = subprocess.Popen(
      [sys.executable, "-c", source, str(index), str(count), str(self.folder), self.address],
      cwd=ROOT,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    self.addCleanup(made.kill)
    return made

  def members(
    self, program: str, count: int = 3, before: str = "", heartbeat_s: int = 3
  ) -> list[subprocess.Popen]:
    """Starts processes that join and run `program`; `before` runs before they join."""
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.address = f"127.0.0.1:{free_port()}"
    member = MEMBER.replace("distributed.watch", f"{before}\ndistributed.watch").replace(
      "_s=3", f"_s={heartbeat_s}"
    )
    made = [self.process(member + textwrap.dedent(program), index, count) for index in range(count)]
    self.made = made
    until = time.monotonic() + 60
    while not all((self.folder / f"joined{index}").exists() for index in range(count)):
      self.assertLess(time.monotonic(), until, [process.poll() for process in made])
      time.sleep(0.02)
    return made

  def ends(self, made, timeout_s: float = 20.0) -> list[tuple[int, str, str]]:
    """Returns (status, stdout, last line of stderr) of each process."""
    found = []
    for process in made:
      out, err = process.communicate(timeout=timeout_s)
      found.append((process.returncode, out, (err.strip().splitlines() or [""])[-1]))
    return found


class ProcessesTest(MembersTestCase):
  def test_gather_and_agree(self):
    # Fails if values are not in the order of processes, or mix between rounds.
    made = self.members("""
      for n in range(50):
        time.sleep(random.random() / 100)
        assert distributed.gather([index, n]) == [[0, n], [1, n], [2, n]]
        assert distributed.broadcast("x" * n if index == 0 else index) == "x" * n
      big = "y" * 9_000_000
      assert distributed.gather(big) == [big] * 3
      distributed.finish()
      print("done")
    """)
    self.assertEqual(self.ends(made), [(0, "done\n", "")] * 3)

  @parameterized.parameters(0, 2)
  def test_a_death_is_heard_of(self, victim):
    # Fails if the other processes keep running, or do not name the dead one.
    made = self.members("distributed.gather() if index else time.sleep(60)")
    made[victim].kill()
    ends = self.ends(made, timeout_s=10)
    for index in {0, 1, 2} - {victim}:
      self.assertEqual(ends[index][0], distributed.LOST)
      self.assertIn(f"process {victim} of 3 died; process {index} stops.", ends[index][2])

  @parameterized.parameters(0, 1)
  def test_silence_is_death(self, victim):
    # Fails if processes wait for a host that vanished without closing its sockets.
    made = self.members("time.sleep(60)")
    made[victim].send_signal(19)  # SIGSTOP
    others = [process for index, process in enumerate(made) if index != victim]
    for status, _, line in self.ends(others, timeout_s=15):
      self.assertEqual(status, distributed.LOST)
      self.assertIn(f"process {victim} of 3 {'died' if victim else 'does not answer'}", line)

  def test_a_failure_stops_all_with_its_sentence(self):
    # Fails if other processes hang after a failure, or do not report its reason.
    made = self.members("""
      if index == 1:
        distributed.fail("the disk is full")
      distributed.gather()
    """)
    ends = self.ends(made)
    self.assertEqual([status for status, _, _ in ends], [1] * 3)
    self.assertTrue(ends[1][2].endswith(": the disk is full"), ends[1])
    for index in (0, 2):
      self.assertTrue(ends[index][2].endswith(": process 1 stopped: the disk is full"), ends[index])

  def test_waits_for_one_that_is_busy(self):
    # Fails if waiting for a live process times out, or does not name the process.
    self.wait_for_one_that_is_busy(8)

  @pytest.mark.long
  def test_waits_for_one_that_is_busy_for_a_minute(self):
    # As above, for longer than any heartbeat or time limit.
    self.wait_for_one_that_is_busy(60)

  def wait_for_one_that_is_busy(self, seconds: int):
    made = self.members(f"""
      distributed._WAIT_LOG_S = 2.0
      if index == 0:
        end = time.monotonic() + {seconds}
        while time.monotonic() < end:
          pass
      distributed.barrier()
      distributed.finish()
    """)
    for index, (status, _, line) in enumerate(self.ends(made, timeout_s=seconds + 32)):
      self.assertEqual(status, 0, line)
      if index:
        self.assertIn("Waiting for process 0 of 3 for", line)

  def test_a_difference_ends_all_before_any_work(self):
    # Fails if processes with different settings work together, or if the message does not name the
    # leaf and the process.
    made = self.members("""
      from synthneg_jax.runtime.errors import UserError
      try:
        distributed.require_same({"seed": 0, "sft.rate": 0.1 if index < 2 else 0.2})
      except UserError as error:
        distributed.fail(str(error))
      print("works")
    """)
    for status, out, line in self.ends(made):
      self.assertEqual((status, out), (1, ""))
      self.assertIn("The processes differ in sft.rate: 0.1 in process 0, 0.2 in process 2.", line)

  def test_the_grace_after_sigterm(self):
    # Fails if a process that cannot stop survives SIGTERM to another one, or if the end of process
    # 0, which hosts the service, counts as a death.
    made = self.members("time.sleep(60)", before="distributed.GRACE_S = 2.0")
    made[1].terminate()
    for status, _, line in self.ends(made):
      self.assertEqual(status, 75, line)
      self.assertIn("stopped 2 s after SIGTERM", line)

  def test_an_abort_of_its_own_is_none_of_process_0(self):
    # Fails if a crash in a library is reported as the death of process 0, and so retried forever.
    made = self.members("os.abort() if index == 1 else distributed.gather()")
    self.assertEqual(
      [status for status, _, _ in self.ends(made)],
      [distributed.LOST, -signal.SIGABRT, distributed.LOST],
    )

  def test_a_process_that_comes_twice(self):
    # Fails if a process with a process_id already in use, or a second process 0, hangs or ends
    # without a message; or if the processes that it shuts out do.
    made = self.members("distributed.gather() if index else time.sleep(60)", count=2)
    for index, sentence in ((0, "another job may use it"), (1, "came late or came twice")):
      source = MEMBER.replace("timeout_s=60", "timeout_s=3") + "\nprint('joined')"
      source = (
        "from synthneg_jax.runtime.errors import "
        f"UserError\ntry:\n{textwrap.indent(source, '  ')}\n"
      )
      source += "except UserError as error:\n  sys.exit(str(error))"
      late = self.process(source, index, 2)
      [(status, out, line)] = self.ends([late])
      self.assertEqual((status, out), (1, ""), line)
      self.assertIn(sentence, line)
    for status, _, line in self.ends(made):
      self.assertEqual(status, distributed.LOST, line)
      self.assertRegex(line, "joined with a process_id already in use|process 0 of 2 died")

  def test_the_others_never_come(self):
    # Fails if a process that waits in vain is aborted without a message, or exceeds its time limit.
    source = MEMBER.replace("timeout_s=60", "timeout_s=3")
    self.folder, self.address = (
      pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())),
      f"127.0.0.1:{free_port()}",
    )
    for status, _, line in self.ends(
      [self.process(source, index, 3) for index in (0,)], timeout_s=25
    ):
      self.assertEqual(status, 1, line)
      self.assertIn("did not find each other within 3 s", line)

  def test_nothing_of_ours_listens(self):
    # Fails if another port is open, or the coordinator's on other interfaces than requested.
    self.members("time.sleep(60)")
    rows = [
      line.split()
      for name in ("tcp", "tcp6")
      for line in pathlib.Path(f"/proc/net/{name}").read_text().splitlines()
    ]
    listening = {row[9]: row[1] for row in rows if row[3] == "0A"}
    found = []
    for process in self.made:
      for link in pathlib.Path(f"/proc/{process.pid}/fd").iterdir():
        inode = os.readlink(link)[8:-1] if os.readlink(link).startswith("socket:") else ""
        found += [listening[inode]] if inode in listening else []
    port = f"{int(self.address.split(':')[1]):04X}"
    self.assertNotEmpty(found)
    for address in found:
      # 127.0.0.1, also as an IPv6 address
      self.assertTrue(address.endswith(f"0100007F:{port}"), found)

  def test_all_stop_at_the_same_place(self):
    # Fails if processes stop at different calls, so that one waits forever; or if the end of a
    # disconnected process counts as a death.
    made = self.members("""
      for place in range(100_000):
        time.sleep(random.random() / 200 * (1 + index))
        if distributed.stopping():
          break
      assert distributed.stopping()
      print(distributed.gather(place))
      distributed.finish()
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
    # Fails if a single process waits.
    self.assertEqual(
      (distributed.index(), distributed.count(), distributed.is_primary()), (0, 1, True)
    )
    self.assertEqual(distributed.gather({"a": 1}), [{"a": 1}])
    self.assertEqual(distributed.broadcast(3), 3)
    self.assertTrue(all(map(distributed.owns, range(5))))
    distributed.barrier()
    self.assertFalse(distributed.stopping())


WAITS = {
  "gather",
  "broadcast",
  "barrier",
  "stopping",
  "finish",
  "whole",
  "fingerprint",
  "save_params",
  "load_params",
}
WAITS |= {
  "fit",
  "score",
  "train",
  "respond",
  "write_replicated",
  "clear",
  "restore",
  "place",
  "policy",
  "base",
  "stage",
  "resolve_for_all",
  "from_first",
  "require_same",
  "choose_once",
  "claim",
  "connect",
}


def waiting_behind(source: str) -> list[str]:
  """Calls that need all processes, in branches that only some processes take, with their lines."""
  found = []

  def some(test: ast.expr) -> bool:
    names = {node.attr for node in ast.walk(test) if isinstance(node, ast.Attribute)}
    return bool(
      names & {"is_primary", "owns", "process_index"}
      or ("index" in names and "distributed" in ast.dump(test))
    )

  def walk(node: ast.AST, behind: bool):
    if isinstance(node, ast.Call) and behind:
      name = (
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
      )
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
      guarded = (
        isinstance(node, ast.If | ast.IfExp | ast.While)
        and field in ("body", "orelse")
        and some(node.test)
      )
      for child in value if isinstance(value, list) else [value]:
        if isinstance(child, ast.AST):
          walk(child, behind or guarded)

  walk(ast.parse(source), False)
  return found


class WaitingTest(parameterized.TestCase):
  def test_nobody_waits_where_not_all_come(self):
    # Fails if a collective is in a branch that only some processes take: then all hang.
    for path in sorted((ROOT / "synthneg_jax").rglob("*.py")):
      if path.name not in ("distributed.py",):
        self.assertEqual(waiting_behind(path.read_text()), [], path)

  def test_every_collective_is_watched(self):
    # Fails if a function that says that every process must call it is not looked for above.
    named = set()
    for path in sorted((ROOT / "synthneg_jax").rglob("*.py")):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
          if "very process must call" in " ".join((ast.get_docstring(node) or "").split()):
            named.add(node.name)
    self.assertContainsSubset(["broadcast", "choose_once"], named)
    self.assertContainsSubset(named, WAITS)

  @parameterized.parameters(
    ("if distributed.is_primary():\n  distributed.barrier()", ["barrier at 2"]),
    (
      "if distributed.is_primary():\n  pass\nelse:\n  x = distributed.broadcast(1)",
      ["broadcast at 4"],
    ),
    (
      "def f():\n  if not distributed.is_primary():\n    return {}\n  experiment.policy('sft')",
      ["policy at 4"],
    ),
    ("def f():\n  if distributed.owns(3):\n    with a:\n      loop.fit()", ["fit at 4"]),
    ("x = mesh_lib.whole(y) if jax.process_index() == 0 else None", ["whole at 1"]),
    ("if distributed.is_primary():\n  write()\ndistributed.barrier()", []),
    ("def f():\n  if stage.done:\n    return {}\n  distributed.barrier()", []),
  )
  def test_the_check_sees(self, source, found):
    # Fails if the check above accepts anything.
    self.assertEqual(waiting_behind(source), found)


if __name__ == "__main__":
  absltest.main()
