"""Several processes that run one program in step: who they are, what they tell each other, and how they stop together.

All processes run the same host code on the same values, so that each enters every program on the devices as often as the
others. Where they could come to see different things (a folder's listing, a verdict's time limit, a signal) they ask here:
`agree` and `gather` go over the sockets of runtime/link.py, not over devices, and every process must call them. What
only one process does (writing a file that all share) stands behind `first()`, and nothing that waits for others does.

With one process everything here is immediate.
"""

import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from absl import logging

from synthneg_jax.runtime.errors import UserError
from synthneg_jax.runtime.link import Link

# Exit statuses besides 0 (done) and 1 (something that a person must put right): run the same command again.
PREEMPTED = 75  # SIGTERM came; all that was done is saved
LOST = 76  # another process died
GRACE_S = 25.0  # from SIGTERM to the end, whatever is under way
_HEARTBEAT_S = 100  # jax's own, after ours: it ends a process without a word


class Stopped(Exception):
  """SIGTERM came, and what was done is saved."""


class _State:
  """What is known of this process."""

  def __init__(self):
    self.index, self.count = 0, 1
    self.link: Link | None = None
    self.asked = threading.Event()  # SIGTERM came to this process or another


_state = _State()


def index() -> int:
  """The number of this process, from 0."""
  return _state.index


def count() -> int:
  """How many processes there are."""
  return _state.count


def first() -> bool:
  """True in the process that writes what all share."""
  return _state.index == 0


def mine(number: int) -> bool:
  """True where this process is the one that grades and writes item `number` of a list that all have."""
  return number % _state.count == _state.index


def alone(work: str) -> None:
  """Refuses work that is no use, or costs money, when every process does it.

  Args:
    work: what it is, the beginning of a sentence.

  Raises:
    UserError: there are several processes.
  """
  if count() > 1:
    raise UserError(f"{work} is one process's work: run that stage first, without --distributed.")


def gather(value: Any = None) -> list:
  """The value (JSON) of every process, in their order; all must call it, and it waits for all."""
  return [value] if _state.link is None else _state.link.gather(value)


def agree(value: Any) -> Any:
  """The first process's value (JSON), for every process; all must call it."""
  return gather(value if first() else None)[0]


def barrier() -> None:
  """Waits until all processes are here."""
  gather()


def stopping() -> bool:
  """True if all are to save and stop now.

  Every process calls it equally often, after each train step and each call of the decoding loop; all get True at the
  same call.
  """
  return _state.asked.is_set() if _state.link is None else _state.link.stopping()


def _leave(status: int, sentence: str) -> None:
  """Ends this process from any thread, without waiting for others."""
  sys.stdout.flush()
  os.write(2, f"{os.path.basename(sys.argv[0])}: {sentence}\n".encode())
  os._exit(status)


def _lost(process: int) -> None:
  _leave(LOST, f"process {process} of {_state.count} died; process {_state.index} stops. The same command goes on.")


def _failed(process: int, sentence: str) -> None:
  _leave(1, f"process {process} stopped: {sentence}")


def _asked() -> None:
  """SIGTERM came, here or elsewhere: whatever is under way, this process ends in time."""
  if _state.asked.is_set():
    return
  _state.asked.set()

  def late():
    if _state.link is not None:
      _state.link.leave()
    _leave(
      PREEMPTED, f"stopped {GRACE_S:.0f} s after SIGTERM; what was saved before is kept. The same command goes on."
    )

  timer = threading.Timer(GRACE_S, late)
  timer.daemon = True
  timer.start()


def watch_signals() -> None:
  """From here on SIGTERM makes `stopping` true, first here and then everywhere.

  The signal is read from a pipe by a thread, so that it is seen while the main thread compiles or waits for a device.
  """
  here, there = socket.socketpair()
  there.setblocking(False)
  signal.signal(signal.SIGTERM, lambda *_: None)
  signal.set_wakeup_fd(there.detach(), warn_on_full_buffer=False)

  def read():
    while data := here.recv(64):
      if signal.SIGTERM in data:
        logging.info("SIGTERM: saving and stopping.")
        _asked()
        if _state.link is not None:
          _state.link.ask_to_stop()

  threading.Thread(target=read, daemon=True, name="signals").start()


def start(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
  """Joins the other processes; before any array exists.

  Args:
    coordinator_address: host:port of the first process; None where jax can tell (TPU pods, Slurm, Open MPI).
    num_processes, process_id: likewise; all three are given or none.

  Raises:
    UserError: some are missing, or the others do not come.
  """
  import jax
  from jax._src import distributed  # its key-value store tells where the first process listens

  given = [value is not None for value in (coordinator_address, num_processes, process_id)]
  if any(given) and not all(given):
    raise UserError("--coordinator_address, --num_processes and --process_id are given together or not at all.")
  jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours
  if os.environ.get("JAX_PLATFORMS", "") == "cpu":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      heartbeat_timeout_seconds=_HEARTBEAT_S,
      cluster_detection_method="deactivate" if all(given) else None,
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f"--distributed: the processes did not find each other ({str(error).strip().splitlines()[0][:200]}); where jax "
      "cannot tell, give --coordinator_address=HOST:PORT, --num_processes and --process_id."
    ) from error
  known = distributed.global_state
  _state.index, _state.count = known.process_id, known.num_processes
  host = known.coordinator_address.rsplit(":", 1)[0].strip("[]")

  def share(address: str | None) -> str:
    if address is not None:
      known.client.key_value_set("synthneg_jax/link", address)
      return address
    return known.client.blocking_key_value_get("synthneg_jax/link", 300_000)

  _state.link = Link(_state.index, _state.count, host, share, lost=_lost, failed=_failed, asked=_asked)


def fail(sentence: str) -> None:
  """Says the sentence to all other processes, which stop with it, and ends this one with status 1; alone it returns."""
  if _state.link is not None:
    _state.link.fail(sentence)
    _leave(1, sentence)


def await_verdict(seconds: float = 3.0) -> None:
  """After an error that may be another process's death: gives the link time to hear of it, which ends this process."""
  if _state.link is not None:
    time.sleep(seconds)


def finish() -> None:
  """Waits for all to be done, and takes leave: from here on nobody's end is a death."""
  if _state.link is not None:
    _state.link.gather()
    _state.link.leave()
    _state.link = None
