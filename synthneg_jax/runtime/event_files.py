"""TensorBoard event files: scalars, histograms, images and text by update, written without
TensorFlow.

The protocol buffers are tensorboardX's; the records are TFRecords (length, masked CRC-32C, data,
masked CRC-32C). Writing is synchronous, some tenths of a millisecond an update, so that a full disk
is said where it happens.
"""

import io
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from etils import epath
from tensorboardX import summary
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import HistogramProto, Summary

from synthneg_jax.runtime.errors import writing

_PATTERN = "events.out.tfevents.*"
# Of fixed edges (ours): a value in the first or last bucket is known to lie beyond an edge only.
Histogram = tuple[Sequence[float], Sequence[float]]  # (E edges, E + 1 counts)


def _record(event: Event) -> bytes:
  data = event.SerializeToString()

  def masked(part):
    return struct.pack("<I", (((crc := crc32c(part)) >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

  length = struct.pack("<Q", len(data))
  return length + masked(length) + data + masked(data)


def read(path: epath.Path) -> Iterator[Event]:
  """The events of a file; what a killed process left unfinished at its end is passed over."""
  with path.open("rb") as file:
    while len(head := file.read(12)) == 12:
      data = file.read(struct.unpack("<Q", head[:8])[0])
      if len(file.read(4)) < 4:
        return
      event = Event()
      event.ParseFromString(data)
      yield event


def _cut(folder: epath.Path, first_step: int) -> None:
  """Takes what is of `first_step` or later out of the folder's event files: it is done again."""
  for path in folder.glob(_PATTERN):
    kept = [
      event for event in read(path) if event.step < first_step or not event.HasField("summary")
    ]
    if not any(event.HasField("summary") for event in kept):
      path.unlink()
      continue
    temporary = path.parent / f"tmp.{path.name}"
    with writing(path):
      temporary.write_bytes(b"".join(map(_record, kept)))
      temporary.replace(path)


def _bucketed(edges: Sequence[float], counts: Sequence[float]) -> HistogramProto:
  """A histogram of fixed edges, without its empty ends; its sums are of the buckets' middles."""
  edges, counts = np.asarray(edges, float), np.asarray(counts, float)
  limits = np.concatenate([edges, [2 * edges[-1] - edges[-2]]])  # the last bucket, too, gets an end
  lowest = np.concatenate([[2 * edges[0] - edges[1]], edges])
  there = np.flatnonzero(counts)
  if not len(there):
    return HistogramProto(bucket_limit=[edges[0]], bucket=[0.0])
  span = slice(there[0], there[-1] + 1)
  middles = (lowest + limits)[span] / 2
  return HistogramProto(
    min=lowest[there[0]],
    max=limits[there[-1]],
    num=counts.sum(),
    sum=float(counts[span] @ middles),
    sum_squares=float(counts[span] @ middles**2),
    bucket_limit=limits[span],
    bucket=counts[span],
  )


class EventFile:
  """One event file in a folder, beside those of earlier starts, none of which holds a step that
  this one will hold.

  On a local disk an event is there when `write` returns; elsewhere, where files cannot be added to,
  after `keep`.
  """

  def __init__(self, folder: epath.Path, first_step: int = 0):
    """Cuts what earlier starts wrote of `first_step` and later, and begins a file.

    Raises:
      UserError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _cut(folder, first_step)
    name = f"events.out.tfevents.{time.time_ns() // 1000:016d}.{socket.gethostname()}.{os.getpid()}"
    self._path, self._file, self._pending = folder / name, None, io.BytesIO()
    with writing(self._path):
      if "://" not in os.fspath(folder):
        self._file = self._path.open("wb")
    self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
    if first_step:  # a TensorBoard that is open drops what it had read beyond
      self._add(
        Event(
          wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)
        )
      )

  def _add(self, event: Event):
    (self._file or self._pending).write(_record(event))

  def write(
    self,
    step: int,
    *,
    scalars: Mapping[str, float] | None = None,
    histograms: Mapping[str, Histogram] | None = None,
    images: Mapping[str, bytes] | None = None,
    texts: Mapping[str, str] | None = None,
  ) -> None:
    """One event.

    Args:
      step: the update, from 0.
      scalars: by tag.
      histograms: by tag; (edges [E], counts [E + 1]), the first count of what is below all edges.
      images: by tag; the bytes of a PNG file.
      texts: by tag; Markdown.

    Raises:
      UserError: it cannot be written.
    """
    values = [
      Summary.Value(tag=tag, simple_value=float(value)) for tag, value in (scalars or {}).items()
    ]
    values += [
      Summary.Value(tag=tag, histo=_bucketed(*one)) for tag, one in (histograms or {}).items()
    ]
    for tag, png in (images or {}).items():
      width, height = struct.unpack(">II", png[16:24])
      image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
      values.append(Summary.Value(tag=tag, image=image))
    for tag, text in (texts or {}).items():
      values += summary.text(tag, text).value
    with writing(self._path):
      self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
      if self._file is not None:
        self._file.flush()

  def keep(self) -> None:
    """Everything up to here is on disk when it returns.

    Raises:
      UserError: it cannot be written.
    """
    if self._file is None:
      with writing(self._path):
        self._path.write_bytes(self._pending.getvalue())

  def close(self) -> None:
    """Keeps, and ends the file."""
    if self._file is not None:
      self._file.close()
      self._file = None
      return
    self.keep()
