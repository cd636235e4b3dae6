"""Coordination of processes that run one program in lockstep, and their joint shutdown.

All processes run the same host code on the same values, so each launches the same device programs
in the same order. Where they could observe different things (a directory listing, a verdict's time
limit, a signal), they agree through `broadcast` and `gather`. These use the key-value store of
jax's coordination service, not the devices, and every process must call them. Work that only one
process does, such as writing a shared file, is guarded by `is_primary()`; code under that guard
must not wait for other processes. jax's client of the store is private, and no other module uses
it.

A thread of each process writes a heartbeat to the store and reads the other processes' events: a
request to stop, a failure, a death. With a single process every function here returns immediately.
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

# Exit statuses besides 0 (done) and 1 (an error for the user to fix). After either of them, re-run
# the same command to resume.
PREEMPTED = 75  # SIGTERM was received, and all completed work is saved
LOST = 76  # another process died or hangs
GRACE_S = 25.0  # time from SIGTERM to the end of the process, whatever it is doing
HEARTBEAT_S = 10  # a process without a heartbeat for this long counts as dead
_POLL_S = 0.5
_WAIT_LOG_S = 30.0  # between log lines while waiting for another process
# Key prefixes in the store.
_EVENTS = "synthneg/event/"
_BEATS = "synthneg/heartbeat/"
_CALLS = "synthneg/calls/"
_ACKS = "synthneg/acknowledged/"


class Stopped(Exception):
  """SIGTERM was received, and all completed work is saved."""


class _State:
  """State of this process.

  Attributes:
    client: of the coordination service; None with a single process.
    service: host and port of the coordination service.
    join_error: message for a failure while joining the other processes.
    stop_requested: set when this or another process receives SIGTERM.
    late: GRACE_S have passed since then.
    gathers: number of calls of `gather`.
    calls: number of calls of `stopping`.
    paused: `stopping` waits until all processes have published their number of calls.
    stop_at: call of `stopping` that returns True in every process.
    heard: when the coordination service last answered.
  """

  def __init__(self):
    self.index, self.count, self.heartbeat_s = 0, 1, float(HEARTBEAT_S)
    self.client, self.service, self.join_error = None, ("", 0), ""
    self.stop_requested, self.late = threading.Event(), False
    self.gathers, self.calls, self.paused, self.stop_at = 0, 0, False, None
    self.changed = threading.Condition()
    self.heard = 0.0


_state = _State()


def index() -> int:
  """The index of this process, from 0."""
  return _state.index


def count() -> int:
  """The number of processes."""
  return _state.count


def is_primary() -> bool:
  """True in process 0, which writes shared files."""
  return _state.index == 0


def owns(number: int) -> bool:
  """Whether this process grades and writes item `number` of a list that all processes have."""
  return number % _state.count == _state.index


def require_single_process(work: str) -> None:
  """Refuses work that must not be repeated by every process.

  Args:
    work: subject of the error message.

  Raises:
    UserError: there is more than one process.
  """
  if count() > 1:
    raise UserError(f"{work} needs a single process: run that stage first, without --distributed.")


def gather(value: Any = None) -> list:
  """Returns every process's value (JSON), in order; waits until all processes have called it."""
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
    if number > 1:  # every process has reached this round, so all have read the previous one
      _state.client.key_value_delete(key(number - 1, _state.index))
    return values
  except Exception as error:
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
      raise
    await_verdict()
    raise


def _wait_for(key: str, other: int) -> Any:
  """Waits, without a time limit, for the value that process `other` writes under this key."""
  since = time.monotonic()
  while True:
    try:
      return json.loads(_state.client.blocking_key_value_get_bytes(key, int(_WAIT_LOG_S * 1000)))
    except Exception as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
    logging.warning(
      "Waiting for process %d of %d for %.0f s.", other, _state.count, time.monotonic() - since
    )


def broadcast(value: Any) -> Any:
  """Broadcasts process 0's value (JSON); every process must call it."""
  return gather(value if is_primary() else None)[0]


def barrier() -> None:
  """Waits until every process has called it."""
  gather()


def require_same(values: dict[str, Any]) -> None:
  """Checks that all processes were started with the same values; every process must call it.

  Args:
    values: JSON values by name, such as the leaves of the config.

  Raises:
    UserError: a value differs from process 0's; all processes raise the same message.
  """
  by_process = gather(values)
  for other, theirs in enumerate(by_process):
    for name in sorted(by_process[0].keys() | theirs.keys()):
      a, b = by_process[0].get(name, "nothing"), theirs.get(name, "nothing")
      if a != b:
        raise UserError(
          f"The processes differ in {name}: {a!r} in process 0, {b!r} in process {other}."
        )


def stopping() -> bool:
  """Whether all processes must save and stop now.

  Every process calls it equally often, after each train step and each call of the decoding loop. It
  returns True from the same call on in every process.
  """
  if _state.client is None:
    return _state.stop_requested.is_set()
  with _state.changed:
    _state.changed.wait_for(lambda: not _state.paused or _state.stop_at is not None)
    _state.calls += 1
    return _state.stop_at is not None and _state.calls >= _state.stop_at


def end_process(status: int, sentence: str) -> None:
  """Prints the sentence and ends this process, from any thread, without waiting for others."""
  sys.stdout.flush()
  os.write(2, f"{os.path.basename(sys.argv[0])}: {sentence}\n".encode())
  os._exit(status)


def _lost(process: int, what: str = "died") -> None:
  if _state.late:
    _leave_late()
  end_process(
    LOST,
    f"process {process} of {_state.count} {what}; process {_state.index} stops. Re-run the same "
    "command to resume.",
  )


def _leave_late() -> None:
  end_process(
    PREEMPTED,
    f"stopped {GRACE_S:.0f} s after SIGTERM; everything saved before is kept. Re-run the same "
    "command to resume.",
  )


def _request_stop() -> None:
  """Handles SIGTERM to any process: sets a deadline by which this process ends in any case."""
  if _state.stop_requested.is_set():
    return
  _state.stop_requested.set()

  def late():
    _state.late = True
    if _state.client is not None and is_primary():
      time.sleep(3 * _POLL_S)  # process 0 hosts the service, so it must end last
    _leave_late()

  timer = threading.Timer(GRACE_S, late)
  timer.daemon = True
  timer.start()


def watch_signals() -> None:
  """Makes SIGTERM to any process request a stop of all processes.

  A thread reads the signal from a socket, so it is handled even while the main thread compiles or
  waits for a device.
  """
  reader, writer = socket.socketpair()
  writer.setblocking(False)
  signal.signal(signal.SIGTERM, lambda *_: None)
  signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)

  def read():
    while data := reader.recv(64):
      if signal.SIGTERM in data:
        logging.info("SIGTERM: saving and stopping.")
        _request_stop()
        if _state.client is not None:
          _publish("stop", str(_state.index))

  threading.Thread(target=read, daemon=True, name="signals").start()


def _publish(name: str, value: str) -> None:
  """Publishes an event; later events of the same name are ignored."""
  try:
    _state.client.key_value_set(_EVENTS + name, value)
  except Exception as error:
    if "ALREADY_EXISTS" not in str(error):
      logging.debug("%s", error)  # the service is gone, so `_watch` ends this process


def _watch() -> None:
  """Sends heartbeats and handles events until the client is closed or this process ends."""
  client, beats, seen = _state.client, 0, {}
  while client is _state.client:
    try:
      beats += 1
      client.key_value_set(f"{_BEATS}{_state.index}", str(beats), allow_overwrite=True)
      events = {
        key.removeprefix(_EVENTS): value for key, value in client.key_value_dir_get(_EVENTS)
      }
      if is_primary():
        _check_heartbeats(client, seen)
      _handle(client, events)
      _state.heard = time.monotonic()
    except Exception as error:
      if "UNAVAILABLE" in str(error) and client is _state.client:
        _lost(0)
    time.sleep(_POLL_S)


def _check_heartbeats(client, seen: dict[int, tuple[str, float]]) -> None:
  """Publishes, in process 0, which process has sent no heartbeat for too long.

  Args:
    client: of the coordination service.
    seen: last heartbeat of each process, and the time at which it was first read; updated.
  """
  now = time.monotonic()
  for key, beat in client.key_value_dir_get(_BEATS):
    process = int(key.removeprefix(_BEATS))
    if seen.get(process, ("", now))[0] != beat:
      seen[process] = beat, now
    elif now - seen[process][1] > _state.heartbeat_s and client is _state.client:
      _publish("dead", str(process))


def _handle(client, events: dict[str, str]) -> None:
  """Handles published events."""
  if "failed" in events:
    process, sentence = json.loads(events["failed"])
    if process != _state.index:
      _end_with_others(f"process {process} stopped: {sentence}", 1)
  if "dead" in events:
    process = int(events["dead"])
    if process != _state.index:
      _acknowledge(process)
      _lost(process)
  if "stop" in events and not _state.paused:
    _request_stop()
    with _state.changed:
      _state.paused = True  # until every process has published its number of calls
      client.key_value_set(f"{_CALLS}{_state.index}", str(_state.calls))
  if _state.paused and _state.stop_at is None:
    published = client.key_value_dir_get(_CALLS)
    if len(published) == _state.count:
      with _state.changed:
        _state.stop_at = max(int(calls) for _, calls in published) + 1
        _state.changed.notify_all()


def _acknowledge(*gone: int) -> None:
  """Acknowledges an event; process 0, which hosts the service, waits for all but those gone."""
  try:
    _state.client.key_value_set(f"{_ACKS}{_state.index}", "", allow_overwrite=True)
    until = time.monotonic() + 5
    while is_primary() and len(_state.client.key_value_dir_get(_ACKS)) < _state.count - len(gone):
      if time.monotonic() > until:
        break
      time.sleep(_POLL_S / 5)
  except Exception as error:
    logging.debug("%s", error)
  if is_primary():
    time.sleep(_POLL_S)  # until the last process has ended


def _end_with_others(sentence: str, status: int) -> None:
  _acknowledge()
  end_process(status, sentence)


def _check_service() -> None:
  """Ends this process if the coordination service stops answering, as when process 0 hangs."""
  client, last = _state.client, time.monotonic()
  while client is _state.client:
    now = time.monotonic()
    if now - last > _state.heartbeat_s / 2:  # this process itself was suspended
      _state.heard = now
    last = now
    if now - _state.heard > _state.heartbeat_s + 2 and client is _state.client:
      _lost(0, "does not answer")
    time.sleep(_POLL_S)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
  """Handles SIGABRT, which jax's client raises when the service is gone; re-raises other aborts.

  The client is locked at this point, so a separate connection tests whether process 0 still
  listens.
  """
  if _state.join_error:
    end_process(1, _state.join_error)
  if _state.client is not None:
    try:
      socket.create_connection(_state.service, timeout=2 * _POLL_S).close()
    except OSError:
      _lost(0)
    heard = _state.heard
    time.sleep(4 * _POLL_S)
    if heard == _state.heard:  # the service no longer answers this process
      end_process(
        LOST,
        f"the coordination service of process 0 shut out process {_state.index}: another process "
        "joined with a process_id already in use. Re-run the same command on another port to "
        "resume.",
      )
  ctypes.CDLL(None).signal(number, None)


def _refuse_taken_port(address: str) -> None:
  """Raises UserError if the port is in use; gRPC would share it, and two jobs would mix."""
  host, port = address.rsplit(":", 1)
  try:
    socket.create_server(
      (host.strip("[]"), int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET
    ).close()
  except (OSError, ValueError) as error:
    raise UserError(
      f"--distributed: process 0 cannot listen at {address} ({error}): another job may use it; "
      "choose another port."
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
  """Joins the other processes; must be called before any array exists.

  Args:
    coordinator_address: host:port of process 0; None where jax detects it (TPU pods, Slurm,
      Open MPI).
    num_processes, process_id: likewise; give all three or none.
    bind_address: host:port at which process 0 listens; None for the coordinator's port on all
      interfaces.
    heartbeat_s: a process without a heartbeat for this long counts as dead.
    timeout_s: how long to wait for the other processes.

  Raises:
    UserError: some of the three are missing, or the other processes do not join.
  """
  import jax
  from jax._src import distributed

  given = [value is not None for value in (coordinator_address, num_processes, process_id)]
  if any(given) and not all(given):
    raise UserError(
      "--coordinator_address, --num_processes and --process_id must be given together or not at "
      "all."
    )
  jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM itself
  if os.environ.get("JAX_PLATFORMS", "") == "cpu":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if process_id == 0:
    _refuse_taken_port(bind_address or ":" + coordinator_address.rsplit(":", 1)[-1])
  ctypes.CDLL(None).signal(int(signal.SIGABRT), _on_abort)
  at = coordinator_address or "the address that jax found"
  _state.join_error = (
    f"--distributed: the processes did not find each other within {timeout_s} s at {at}: one was "
    "not started, came late or came twice, or the address is not that of process 0."
  )
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      heartbeat_timeout_seconds=2 * heartbeat_s + 5,  # after ours, which names the dead process
      shutdown_timeout_seconds=heartbeat_s,
      initialization_timeout=timeout_s,
      coordinator_bind_address=bind_address,
      cluster_detection_method="deactivate" if all(given) else None,
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(
      "--distributed: the processes did not find each other "
      f"({str(error).strip().splitlines()[0][:200]}); where jax "
      "cannot detect them, give --coordinator_address=HOST:PORT, --num_processes and --process_id."
    ) from error
  known = distributed.global_state
  _state.index, _state.count, _state.client = known.process_id, known.num_processes, known.client
  host, port = known.coordinator_address.rsplit(":", 1)
  _state.service = host.strip("[]"), int(port)
  _state.heartbeat_s, _state.heard = float(heartbeat_s), time.monotonic()
  _state.join_error = ""
  for target in (_watch, _check_service):
    threading.Thread(target=target, daemon=True, name=target.__name__).start()
  if _state.stop_requested.is_set():  # while waiting for the others
    _publish("stop", str(_state.index))


def fail(sentence: str) -> None:
  """Ends all processes with this sentence and status 1; returns if there is a single process."""
  if _state.client is not None:
    _publish("failed", json.dumps([_state.index, sentence]))
    _end_with_others(sentence, 1)


def await_verdict() -> None:
  """Waits until `_watch` would have ended this process because another process died."""
  if _state.client is not None:
    time.sleep(_state.heartbeat_s + 4 * _POLL_S)


def finish() -> None:
  """Waits for all processes and disconnects; from here on, the end of a process is no failure."""
  if _state.client is not None:
    import jax

    gather()
    _state.client = None
    jax.distributed.shutdown()
