"""Locks a workdir: process 0 of a run holds the folder until the run ends.

On a file system it takes flock on run.lock, which the kernel releases when the process ends for any
reason. In a bucket, and where flock is not supported, it holds a lease: run.lease names the holder,
who renews it every BEAT_S seconds. Each write is conditional on the generation read before
(tensorstore's `if_equal`; in GCS ifGenerationMatch), so of two concurrent writes one fails. A lease
that was not renewed for LEASE_S seconds may be taken over. A holder whose lease was taken, or could
not be renewed for nearly LEASE_S seconds, ends its process.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import tensorstore as ts
from absl import logging
from etils import epath

from synthneg_jax.runtime import distributed
from synthneg_jax.runtime.errors import UserError, writing

BEAT_S, LEASE_S = 10.0, 60.0
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_BUCKETS = ("gs://", "s3://")
_UNKNOWN = {"host": "an unknown host", "pid": "?", "since": "a moment ago"}


def _identity() -> dict:
  since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
  return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


class Flock:
  """Holds a folder by flock on run.lock.

  The file is never removed: otherwise two runs could lock two different files.
  """

  def __init__(self, folder: epath.Path):
    self._path = folder / "run.lock"
    self._file = open(self._path, "a")  # noqa: SIM115  open while the lock is held

  def acquire(self) -> dict | None:
    """Returns None if acquired, or the current holder: host, pid and since.

    Raises:
      OSError: the file system does not support flock.
    """
    for _ in range(10):
      try:
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError:
        time.sleep(0.1)  # a new holder may be writing its identity, or an old one leaving
      if text := self._path.read_text():
        return json.loads(text)
    else:
      return _UNKNOWN
    self._file.truncate(0)
    self._file.write(json.dumps(_identity()))
    self._file.flush()
    os.fsync(self._file.fileno())  # for readers on other hosts (NFS)
    return None

  def release(self) -> None:
    """Releases the folder."""
    self._file.truncate(0)
    self._file.close()


class Lease:
  """Holds a folder by a record in a key-value store, renewed by a thread.

  `end(status, sentence)` is called when the lease is lost; `clock` and `sleep` are in seconds.
  """

  KEY = "run.lease"

  def __init__(
    self,
    store: ts.KvStore,
    end: Callable[[int, str], None],
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
  ):
    self._store, self._end, self._clock, self._sleep = store, end, clock, sleep
    self._record = {**_identity(), "token": uuid.uuid4().hex}
    self._generation, self._renewed = b"", 0.0
    self._released = threading.Event()
    self._thread = threading.Thread(target=self._renew_until_released, daemon=True, name="lease")

  def _read(self) -> tuple[bytes, dict | None]:
    stored = self._store.read(self.KEY).result(timeout=LEASE_S)
    return stored.stamp.generation, json.loads(stored.value) if stored.state == "value" else None

  def _write(self, generation: bytes) -> bool:
    """Writes the record if the stored one has this generation; returns whether we hold the lease.

    The stored record may already be ours, if the reply to an earlier write was lost.
    """
    now = self._clock()
    text = json.dumps({**self._record, "renewed": now})
    written = (
      self._store.write(self.KEY, text, if_equal=generation).result(timeout=BEAT_S).generation
    )
    if not written:
      written, holder = self._read()
      if not holder or holder["token"] != self._record["token"]:
        return False
    self._generation, self._renewed = written, now
    return True

  def acquire(self, patient: bool = False) -> dict | None:
    """Returns None if acquired, or the current holder.

    Args:
      patient: report a holder only after seeing it renew its lease, which takes up to BEAT_S
        seconds; if it has died, wait until its lease expires instead.
    """
    begin = self._clock()
    generation, holder = self._read()
    first = generation
    while holder and self._clock() - min(holder["renewed"], begin) <= LEASE_S:
      if generation != first or not patient:
        return holder
      self._sleep(1.0)
      generation, holder = self._read()
    if not self._write(generation):
      return self._read()[1] or self.acquire(
        patient
      )  # another run was faster, and may be done by now
    self._thread.start()
    return None

  def renew(self) -> None:
    """Renews the lease, or ends the process if it is lost."""
    try:
      if not self._write(self._generation):
        other = _name(self._read()[1] or _UNKNOWN)
        self._end(
          1,
          f"another run took over the workdir, {other}: this run did not renew its lease for "
          f"{LEASE_S:.0f} s.",
        )
    except Exception as error:  # tensorstore's errors have no common base
      if self._clock() - self._renewed > LEASE_S - 2 * BEAT_S:
        self._end(
          distributed.LOST,
          f"the lease on the workdir cannot be renewed ({error}). Re-run the same command "
          "to resume.",
        )
      logging.warning("The lease on the workdir was not renewed: %s", error)

  def _renew_until_released(self) -> None:
    while not self._released.wait(BEAT_S):
      self.renew()

  def release(self) -> None:
    """Releases the folder; if the store does not answer, the lease expires."""
    self._released.set()
    self._thread.join()
    try:
      self._store.write(self.KEY, None, if_equal=self._generation).result(timeout=BEAT_S)
    except Exception as error:
      logging.warning("The lease on the workdir was not released: %s", error)


def _name(holder: dict) -> str:
  return f"process {holder['pid']} on {holder['host']} since {holder['since']}"


def _end(status: int, sentence: str) -> None:
  """Ends this process from any thread."""
  if status == 1:
    distributed.fail(sentence)
  distributed.end_process(status, sentence)


def _acquire(folder: epath.Path, patient: bool) -> tuple[Flock | Lease | None, dict | None]:
  """Returns the lock (None where none is possible), and the holder if it is another run."""
  url = os.fspath(folder)
  if "://" not in url:
    with writing(folder):
      folder.mkdir(parents=True, exist_ok=True)
      lock = Flock(folder)
      try:
        return lock, lock.acquire()
      except OSError as error:
        if error.errno not in _NO_FLOCK:
          raise
    spec = {
      "driver": "file",
      "path": f"{os.path.abspath(url)}/",
      "file_io_locking": {"mode": "lockfile"},
    }
  elif url.startswith(_BUCKETS):
    spec = f"{url.rstrip('/')}/"
  else:
    logging.warning(
      "%s: no lock is possible here; make sure that only one run writes to it.", folder
    )
    return None, None
  try:
    lease = Lease(ts.KvStore.open(spec).result(timeout=LEASE_S), _end)
    return lease, lease.acquire(patient)
  except Exception as error:  # tensorstore's errors have no common base
    raise UserError(f"{folder}: the lease cannot be written ({error}).") from error


@contextlib.contextmanager
def claim(folder: epath.PathLike, *, patient: bool = False) -> Iterator[str]:
  """Tries to hold a folder during the body; every process must call it.

  Yields:
    "" if the folder is held, otherwise a description of the holder.

  Raises:
    UserError: the folder or its lease cannot be written.
  """
  lock, holder = _acquire(epath.Path(folder), patient) if distributed.is_primary() else (None, None)
  other = distributed.broadcast(_name(holder) if holder else "")
  try:
    yield other
    distributed.barrier()  # until every process has written its files
  except distributed.Stopped:
    distributed.barrier()
    raise
  finally:
    if lock and not other:
      lock.release()


@contextlib.contextmanager
def hold(workdir: epath.PathLike) -> Iterator[None]:
  """Holds a run's workdir during the body.

  Raises:
    UserError: another run holds the workdir, or it cannot be written.
  """
  with claim(workdir, patient=True) as other:
    if other:
      raise UserError(
        f"{workdir} is held by another run, {other}; wait until it ends, or use another --workdir."
      )
    yield
