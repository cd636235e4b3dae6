"""Sockets between the processes of one run, in a star around process 0: values, deaths, failures, and the way to stop.

A process whose socket closes, or from which nothing comes for `_SILENCE_S`, has died; all others hear of it at once.
Lines of JSON go both ways; process 0 is a client of its own hub like the others.
"""

import json
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

_BEAT_S, _SILENCE_S = 2.0, 30.0
_CONNECT_S = 300.0  # how long the others may take to come


class _Peer:
  """One end of a connection; sends whole lines."""

  def __init__(self, connection: socket.socket):
    self.socket = connection
    self.process, self.left = -1, False
    self.heard = time.monotonic()
    self._rest, self._lock = b"", threading.Lock()

  def send(self, kind: str, *values) -> None:
    try:
      with self._lock:
        self.socket.sendall(json.dumps([kind, *values]).encode() + b"\n")
    except OSError:
      pass  # whoever reads from it will see that it is closed

  def receive(self) -> list[list] | None:
    """The whole lines that came; None if the other end is closed."""
    try:
      data = self.socket.recv(1 << 16)
    except OSError:
      data = b""
    if not data:
      return None
    self.heard = time.monotonic()
    *lines, self._rest = (self._rest + data).split(b"\n")
    try:
      return [json.loads(line) for line in lines]
    except ValueError:  # whoever it is, it is none of us
      return None


class _Hub(threading.Thread):
  """Runs in process 0: passes on what any process says."""

  def __init__(self, count: int):
    super().__init__(daemon=True, name="hub")
    self._listener = socket.create_server(("", 0), family=_family(), dualstack_ipv6=_family() == socket.AF_INET6)
    self.port = self._listener.getsockname()[1]
    self._count = count
    self._peers: dict[int, _Peer] = {}
    self._gathered: dict[int, dict[int, Any]] = {}
    self._places: dict[int, int] | None = None  # where each process was when it heard that all stop

  def run(self):
    connections, beaten = {self._listener: None}, time.monotonic()
    while True:
      for ready in select.select(list(connections), [], [], _BEAT_S)[0]:
        if ready is self._listener:
          connection = self._listener.accept()[0]
          connection.settimeout(_SILENCE_S)  # of sending: a process that takes nothing must not hold up the others
          connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
          connections[connection] = _Peer(connection)
          continue
        peer = connections[ready]
        messages = peer.receive()
        for message in messages or []:
          self._take(peer, *message)
        if messages is None:
          del connections[ready]
          if not peer.left and peer.process >= 0:
            self._say("lost", peer.process)
      now = time.monotonic()
      for peer in self._peers.values():
        if not peer.left and now - peer.heard > _SILENCE_S:
          peer.left = True
          self._say("lost", peer.process)
      if now - beaten > _BEAT_S:
        beaten = now
        self._say("beat")

  def _say(self, *message, but: int = -1):
    for process, peer in sorted(self._peers.items(), reverse=True):  # process 0 hears last: with it the hub may end
      if process != but and not peer.left:
        peer.send(*message)

  def _take(self, peer: _Peer, kind: str, *values):
    if kind == "hello":
      peer.process = values[0]
      self._peers[peer.process] = peer
      if len(self._peers) == self._count:
        self._say("ready")
    elif kind == "gather":
      number, value = values
      of_all = self._gathered.setdefault(number, {})
      of_all[peer.process] = value
      if len(of_all) == self._count:
        del self._gathered[number]
        self._say("gathered", number, [of_all[process] for process in range(self._count)])
    elif kind == "stop" and self._places is None:
      self._places = {}
      self._say("where")
    elif kind == "at":
      self._places[peer.process] = values[0]
      if len(self._places) == self._count:
        self._say("stop_at", max(self._places.values()) + 1)
    elif kind == "failed":
      peer.left = True
      self._say("failed", peer.process, *values, but=peer.process)
    elif kind == "bye":
      peer.left = True


class Link:
  """This process's connection to the hub."""

  def __init__(
    self,
    index: int,
    count: int,
    host: str,
    share: Callable[[str | None], str],
    *,
    lost: Callable[[int], None],
    failed: Callable[[int, str], None],
    asked: Callable[[], None],
  ):
    """Connects, and returns when all have.

    Args:
      index, count: of this process, of all.
      host: where process 0 can be reached.
      share: given the hub's host:port by process 0, and None by others, it returns it.
      lost: called with the number of a process that died; failed: with number and sentence of one that failed; asked:
        when some process was asked to stop. From a thread of the link.
    """
    self._index, self._lost, self._failed, self._asked = index, lost, failed, asked
    self._hub = None
    if index == 0:
      self._hub = _Hub(count)
      self._hub.start()
    address = share(f"{host}:{self._hub.port}" if self._hub else None)
    host, port = address.rsplit(":", 1)
    self._peer = _Peer(socket.create_connection((host, int(port)), timeout=_CONNECT_S))
    self._peer.socket.settimeout(None)
    self._peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    self._changed = threading.Condition()
    self._gathers, self._values = 0, {}
    self._place, self._held, self._stop_at = 0, False, None
    self._ready = self._closed = False
    threading.Thread(target=self._read, daemon=True, name="link").start()
    self._peer.send("hello", index)
    with self._changed:
      if not self._changed.wait_for(lambda: self._ready, _CONNECT_S):
        raise TimeoutError(f"not all of {count} processes came within {_CONNECT_S:.0f} s")

  def _read(self):
    beaten = time.monotonic()
    while not self._closed:
      if select.select([self._peer.socket], [], [], _BEAT_S)[0]:
        messages = self._peer.receive()
        if messages is None:
          if not self._closed:
            self._lost(0)
          return
        for message in messages:
          self._take(*message)
      now = time.monotonic()
      if now - self._peer.heard > _SILENCE_S and not self._closed:
        self._lost(0)
      if now - beaten > _BEAT_S:
        beaten = now
        self._peer.send("beat")

  def _take(self, kind: str, *values):
    if kind == "lost" and not self._closed:
      self._lost(values[0])
    elif kind == "failed" and not self._closed:
      self._failed(*values)
    elif kind == "where":
      self._asked()
      with self._changed:
        self._held = True  # no further than this, until all have said where they are
        self._peer.send("at", self._place)
    with self._changed:
      if kind == "ready":
        self._ready = True
      elif kind == "gathered":
        self._values[values[0]] = values[1]
      elif kind == "stop_at":
        self._stop_at = values[0]
      self._changed.notify_all()

  def gather(self, value: Any = None) -> list:
    """Every process's value, in their order."""
    self._gathers += 1
    number = self._gathers
    self._peer.send("gather", number, value)
    with self._changed:
      self._changed.wait_for(lambda: number in self._values)
      return self._values.pop(number)

  def stopping(self) -> bool:
    """True at one and the same call in every process, soon after one was asked to stop, and from then on."""
    with self._changed:
      self._changed.wait_for(lambda: not self._held or self._stop_at is not None)
      self._place += 1
      return self._stop_at is not None and self._place >= self._stop_at

  def ask_to_stop(self) -> None:
    """This process was asked to stop: all will."""
    self._peer.send("stop")

  def fail(self, sentence: str) -> None:
    """Tells all others that this process stops, and why."""
    self._closed = True
    self._peer.send("failed", sentence)
    time.sleep(0.5)  # for the hub to pass it on

  def leave(self) -> None:
    """Takes leave: that this process ends is then no death."""
    self._closed = True
    self._peer.send("bye")


def _family() -> socket.AddressFamily:
  return socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
