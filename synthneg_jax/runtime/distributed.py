"""Several processes that run one program in step: who they are, what they tell each other, and how
they end together.

All processes run the same host code on the same values, so that each enters every program on the
devices as often as the others. Where they could come to see different things (a folder's listing, a
verdict's time limit, a signal) they ask here: `agree` and `gather` go through the key-value store
of jax's coordination service, not over devices, and every process must call them. What only one
process does (writing a file that all share) stands behind `first()`, and nothing that waits for
others does. jax's client of that store is private: no other module touches it.

A thread of each process writes a heartbeat into the store and reads what the others published: that
all must stop, that one failed, that one is dead. With one process everything here is immediate.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from absl import logging

from synthneg_jax.runtime.errors import UserError

# Exit statuses besides 0 (done) and 1 (something that a person must put right): run the same
# command again.
PREEMPTED = 75  # SIGTERM came; all that was done is saved
LOST = 76  # another process died or hangs
GRACE_S = 25.0  # from SIGTERM to the end, whatever is under way
HEARTBEAT_S = 10  # without a heartbeat for so long, a process counts as dead
_POLL_S = 0.5
_NEWS, _BEATS, _PLACES, _HEARD = (
  f"synthneg/{name}/" for name in ("news", "beat", "place", "heard")
)
_SAY_S = 30.0  # between lines that tell whom this process waits for


class Stopped(Exception):
  """SIGTERM came, and what was done is saved."""


class _State:
  """What is known of this process."""

  def __init__(self):
    self.index, self.count, self.heartbeat_s = 0, 1, float(HEARTBEAT_S)
    self.client = None  # of the coordination service
    self.service = ("", 0)  # its host and port
    self.joining = ""  # what is wrong if joining the others fails
    self.asked = threading.Event()  # SIGTERM came to this process or another
    self.late = False  # and GRACE_S have passed
    self.gathers, self.place, self.held, self.stop_at = 0, 0, False, None
    self.changed = threading.Condition()
    self.heard = 0.0  # when the coordination service last answered


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
  """True where this process is the one that grades and writes item `number` of a list that all
  have.
  """
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
  if _state.client is None:
    return [value]
  _state.gathers += 1
  number = _state.gathers
  key = "synthneg/gather/{}/{}".format
  try:
    _state.client.key_value_set_bytes(key(number, _state.index), json.dumps(value).encode())
    values = [
      value if other == _state.index else _wait_for(key(number, other), other)
      for other in range(_state.count)
    ]
    if number > 1:  # all have come to this round, so all have read the one before
      _state.client.key_value_delete(key(number - 1, _state.index))
    return values
  except Exception as error:
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
      raise
    await_verdict()
    raise


def _wait_for(key: str, other: int) -> Any:
  """What process `other` writes under this key, however long it takes; says now and then whom it
  waits for.
  """
  since = time.monotonic()
  while True:
    try:
      return json.loads(_state.client.blocking_key_value_get_bytes(key, int(_SAY_S * 1000)))
    except Exception as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
    logging.warning(
      "Waiting for process %d of %d since %.0f s.", other, _state.count, time.monotonic() - since
    )


def agree(value: Any) -> Any:
  """The first process's value (JSON), for every process; all must call it."""
  return gather(value if first() else None)[0]


def barrier() -> None:
  """Waits until all processes are here."""
  gather()


def require_same(values: dict[str, Any]) -> None:
  """Compares what each process was started with; all must call it.

  Args:
    values: JSON values by name, such as the leaves of the config.

  Raises:
    UserError: a process has another value than process 0; the sentence names both, and is the same
      everywhere.
  """
  mine_of_all = gather(values)
  for other, theirs in enumerate(mine_of_all):
    for name in sorted(set(mine_of_all[0]) | set(theirs)):
      a, b = mine_of_all[0].get(name, "nothing"), theirs.get(name, "nothing")
      if a != b:
        raise UserError(
          f"The processes differ in {name}: {a!r} in process 0, {b!r} in process {other}."
        )


def stopping() -> bool:
  """True if all are to save and stop now.

  Every process calls it equally often, after each train step and each call of the decoding loop;
  all get True at the same call, and from then on.
  """
  if _state.client is None:
    return _state.asked.is_set()
  with _state.changed:
    _state.changed.wait_for(lambda: not _state.held or _state.stop_at is not None)
    _state.place += 1
    return _state.stop_at is not None and _state.place >= _state.stop_at


def _leave(status: int, sentence: str) -> None:
  """Ends this process from any thread, without waiting for others."""
  sys.stdout.flush()
  os.write(2, f"{os.path.basename(sys.argv[0])}: {sentence}\n".encode())
  os._exit(status)


def _lost(process: int, what: str = "died") -> None:
  if _state.late:
    _leave_late()
  _leave(
    LOST,
    f"process {process} of {_state.count} {what}; process {_state.index} stops. The same command "
    "goes on.",
  )


def _leave_late() -> None:
  _leave(
    PREEMPTED,
    f"stopped {GRACE_S:.0f} s after SIGTERM; what was saved before is kept. The same command goes "
    "on.",
  )


def _asked() -> None:
  """SIGTERM came, here or elsewhere: whatever is under way, this process ends in time."""
  if _state.asked.is_set():
    return
  _state.asked.set()

  def late():
    _state.late = True
    if _state.client is not None and first():
      time.sleep(3 * _POLL_S)  # the service is here: when it ends, the others must be gone
    _leave_late()

  timer = threading.Timer(GRACE_S, late)
  timer.daemon = True
  timer.start()


def watch_signals() -> None:
  """From here on SIGTERM makes `stopping` true, first here and then everywhere.

  The signal is read from a pipe by a thread, so that it is seen while the main thread compiles or
  waits for a device.
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
        if _state.client is not None:
          _publish("stop", str(_state.index))

  threading.Thread(target=read, daemon=True, name="signals").start()


def _publish(name: str, value: str) -> None:
  """Writes a piece of news; the first of its name stands."""
  try:
    _state.client.key_value_set(_NEWS + name, value)
  except Exception as error:
    if "ALREADY_EXISTS" not in str(error):
      logging.debug("%s", error)  # the service is gone: the watch ends this process


def _watch() -> None:
  """Beats, and does what the news ask for; until the work is done or this process ends."""
  client, beats, seen = _state.client, 0, {}
  while client is _state.client:
    try:
      beats += 1
      client.key_value_set(f"{_BEATS}{_state.index}", str(beats), allow_overwrite=True)
      news = {key.removeprefix(_NEWS): value for key, value in client.key_value_dir_get(_NEWS)}
      if first():
        _look_for_the_dead(client, seen)
      _take(client, news)
      _state.heard = time.monotonic()
    except Exception as error:
      if "UNAVAILABLE" in str(error) and client is _state.client:
        _lost(0)
    time.sleep(_POLL_S)


def _look_for_the_dead(client, seen: dict[int, tuple[str, float]]) -> None:
  """Process 0: publishes which process has written no heartbeat for too long."""
  now = time.monotonic()
  for key, beat in client.key_value_dir_get(_BEATS):
    process = int(key.removeprefix(_BEATS))
    if seen.get(process, ("", now))[0] != beat:
      seen[process] = beat, now
    elif now - seen[process][1] > _state.heartbeat_s and client is _state.client:
      _publish("dead", str(process))


def _take(client, news: dict[str, str]) -> None:
  """Does what the news ask for."""
  if "failed" in news:
    process, sentence = json.loads(news["failed"])
    if process != _state.index:
      _end_with_others(f"process {process} stopped: {sentence}", 1)
  if "dead" in news:
    process = int(news["dead"])
    if process != _state.index:
      _acknowledge(process)
      _lost(process)
  if "stop" in news and not _state.held:
    _asked()
    with _state.changed:
      _state.held = True  # no further than this, until all have said where they are
      client.key_value_set(f"{_PLACES}{_state.index}", str(_state.place))
  if _state.held and _state.stop_at is None:
    places = client.key_value_dir_get(_PLACES)
    if len(places) == _state.count:
      with _state.changed:
        _state.stop_at = max(int(place) for _, place in places) + 1
        _state.changed.notify_all()


def _acknowledge(*gone: int) -> None:
  """Tells process 0, where the service is, that this process may be ended; process 0 waits for all
  but those gone.
  """
  try:
    _state.client.key_value_set(f"{_HEARD}{_state.index}", "", allow_overwrite=True)
    until = time.monotonic() + 5
    while first() and len(_state.client.key_value_dir_get(_HEARD)) < _state.count - len(gone):
      if time.monotonic() > until:
        break
      time.sleep(_POLL_S / 5)
  except Exception as error:
    logging.debug("%s", error)
  if first():
    time.sleep(_POLL_S)  # for the last one to end


def _end_with_others(sentence: str, status: int) -> None:
  _acknowledge()
  _leave(status, sentence)


def _check_service() -> None:
  """Ends this process when the coordination service does not answer, as when process 0 hangs."""
  client, ticked = _state.client, time.monotonic()
  while client is _state.client:
    now = time.monotonic()
    if now - ticked > _state.heartbeat_s / 2:  # this process itself was suspended
      _state.heard = now
    ticked = now
    if now - _state.heard > _state.heartbeat_s + 2 and client is _state.client:
      _lost(0, "does not answer")
    time.sleep(_POLL_S)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
  """jax's client aborts this process as soon as the service is gone; any other abort is a defect
  and stays one.

  The client is locked by then, so that a connection of our own must tell whether process 0 still
  listens.
  """
  if _state.joining:
    _leave(1, _state.joining)
  if _state.client is not None:
    try:
      socket.create_connection(_state.service, timeout=2 * _POLL_S).close()
    except OSError:
      _lost(0)
    heard = _state.heard
    time.sleep(4 * _POLL_S)
    if heard == _state.heard:  # the service answers this process no more
      _leave(
        LOST,
        f"the coordination service of process 0 shut process {_state.index} out: another process "
        "joined under a number that was taken. The same command goes on, on another port.",
      )
  ctypes.CDLL(None).signal(number, None)


def _refuse_taken_port(address: str) -> None:
  """gRPC shares a port with whoever listens there, so that two jobs would take each other's
  processes.
  """
  host, port = address.rsplit(":", 1)
  try:
    socket.create_server(
      (host.strip("[]"), int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET
    ).close()
  except (OSError, ValueError) as error:
    raise UserError(
      f"--distributed: process 0 cannot listen at {address} ({error}): another job may run there; "
      "give another port."
    ) from error


def start(
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
  *,
  bind_address: str | None = None,
  heartbeat_s: int = HEARTBEAT_S,
  timeout_s: int = 300,
) -> None:
  """Joins the other processes; before any array exists.

  Args:
    coordinator_address: host:port of the first process; None where jax can tell (TPU pods, Slurm,
      Open MPI).
    num_processes, process_id: likewise; all three are given or none.
    bind_address: host:port at which process 0 listens; None for the coordinator's port on all
      interfaces.
    heartbeat_s: a process that is silent for so long counts as dead.
    timeout_s: how long the others may take to come.

  Raises:
    UserError: some are missing, or the others do not come.
  """
  import jax
  from jax._src import distributed

  given = [value is not None for value in (coordinator_address, num_processes, process_id)]
  if any(given) and not all(given):
    raise UserError(
      "--coordinator_address, --num_processes and --process_id are given together or not at all."
    )
  jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
  if os.environ.get("JAX_PLATFORMS", "") == "cpu":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if process_id == 0:
    _refuse_taken_port(bind_address or ":" + coordinator_address.rsplit(":", 1)[-1])
  ctypes.CDLL(None).signal(int(signal.SIGABRT), _on_abort)
  at = coordinator_address or "the address that jax found"
  _state.joining = (
    f"--distributed: the processes did not find each other within {timeout_s} s at {at}: one was "
    "not started, came late or came twice, or the address is not that of process 0."
  )
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      heartbeat_timeout_seconds=2 * heartbeat_s + 5,  # after ours, which names who died
      shutdown_timeout_seconds=heartbeat_s,
      initialization_timeout=timeout_s,
      coordinator_bind_address=bind_address,
      cluster_detection_method="deactivate" if all(given) else None,
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(
      "--distributed: the processes did not find each other "
      f"({str(error).strip().splitlines()[0][:200]}); where jax "
      "cannot tell, give --coordinator_address=HOST:PORT, --num_processes and --process_id."
    ) from error
  known = distributed.global_state
  _state.index, _state.count, _state.client = known.process_id, known.num_processes, known.client
  host, port = known.coordinator_address.rsplit(":", 1)
  _state.service = host.strip("[]"), int(port)
  _state.heartbeat_s, _state.heard = float(heartbeat_s), time.monotonic()
  _state.joining = ""
  for target in (_watch, _check_service):
    threading.Thread(target=target, daemon=True, name=target.__name__).start()
  if _state.asked.is_set():  # while the others came
    _publish("stop", str(_state.index))


def fail(sentence: str) -> None:
  """Says the sentence to all other processes, which stop with it, and ends this one with status 1;
  alone it returns.
  """
  if _state.client is not None:
    _publish("failed", json.dumps([_state.index, sentence]))
    _end_with_others(sentence, 1)


def await_verdict() -> None:
  """After an error that may be another process's death: waits until the watch would know, which
  ends this process.
  """
  if _state.client is not None:
    time.sleep(_state.heartbeat_s + 4 * _POLL_S)


def finish() -> None:
  """Waits for all to be done, and takes leave: from here on nobody's end is a death."""
  if _state.client is not None:
    import jax

    gather()
    _state.client = None
    jax.distributed.shutdown()
