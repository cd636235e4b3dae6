"""TensorBoard event files with scalars, histograms, images and text, without TensorFlow.

The protocol buffers are tensorboardX's. The records are TFRecords (length, masked CRC-32C, data,
masked CRC-32C), encoded here because tensorboardX's RecordWriter opens files itself and needs boto3
or google-cloud-storage for buckets. Writing is synchronous and takes tenths of a millisecond per
update, so a full disk raises at the update that fills it.
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
# (E edges, E + 1 counts); the first and last buckets are unbounded. Fixed edges are our choice.
Histogram = tuple[Sequence[float], Sequence[float]]


def _record(event: Event) -> bytes:
  data = event.SerializeToString()

  def masked(part):
    return struct.pack("<I", (((crc := crc32c(part)) >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

  length = struct.pack("<Q", len(data))
  return length + masked(length) + data + masked(data)


def read(path: epath.Path) -> Iterator[Event]:
  """Reads the events of a file; an incomplete record at the end, left by a kill, is skipped."""
  with path.open("rb") as file:
    while len(head := file.read(12)) == 12:
      data = file.read(struct.unpack("<Q", head[:8])[0])
      if len(file.read(4)) < 4:
        return
      event = Event()
      event.ParseFromString(data)
      yield event


def _truncate(folder: epath.Path, first_step: int) -> None:
  """Removes summaries of `first_step` and later from the folder's event files."""
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
  """A histogram without its empty outer buckets; sums are computed from bucket midpoints."""
  edges, counts = np.asarray(edges, float), np.asarray(counts, float)
  limits = np.concatenate(
    [edges, [2 * edges[-1] - edges[-2]]]
  )  # the last bucket needs a limit, too
  lowest = np.concatenate([[2 * edges[0] - edges[1]], edges])
  nonempty = np.flatnonzero(counts)
  if not len(nonempty):
    return HistogramProto(bucket_limit=[edges[0]], bucket=[0.0])
  span = slice(nonempty[0], nonempty[-1] + 1)
  midpoints = (lowest + limits)[span] / 2
  return HistogramProto(
    min=lowest[nonempty[0]],
    max=limits[nonempty[-1]],
    num=counts.sum(),
    sum=float(counts[span] @ midpoints),
    sum_squares=float(counts[span] @ midpoints**2),
    bucket_limit=limits[span],
    bucket=counts[span],
  )


class EventFile:
  """A new event file in a folder; steps of earlier starts' files never overlap its own.

  On a local disk an event is saved when `write` returns; in a bucket, where files cannot be
  appended to, when `keep` returns.
  """

  def __init__(self, folder: epath.Path, first_step: int = 0):
    """Removes steps from `first_step` on from earlier files, and starts a new file.

    Raises:
      UserError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _truncate(folder, first_step)
    name = f"events.out.tfevents.{time.time_ns() // 1000:016d}.{socket.gethostname()}.{os.getpid()}"
    self._path, self._file, self._pending = folder / name, None, io.BytesIO()
    with writing(self._path):
      if "://" not in os.fspath(folder):
        self._file = self._path.open("wb")
    self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
    if first_step:  # makes a running TensorBoard discard later steps that it has read
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
    """Writes one event.

    Args:
      step: index of the update, from 0.
      scalars: by tag.
      histograms: by tag; (edges [E], counts [E + 1]), the first count for values below all edges.
      images: by tag; the bytes of a PNG file.
      texts: by tag; Markdown.

    Raises:
      UserError: the event cannot be written.
    """
    values = [
      Summary.Value(tag=tag, simple_value=float(value)) for tag, value in (scalars or {}).items()
    ]
    values += [
      Summary.Value(tag=tag, histo=_bucketed(edges, counts))
      for tag, (edges, counts) in (histograms or {}).items()
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

  def save(self) -> None:
    """Saves all events written so far.

    Raises:
      UserError: the file cannot be written.
    """
    if self._file is None:
      with writing(self._path):
        self._path.write_bytes(self._pending.getvalue())

  def close(self) -> None:
    """Saves all events and closes the file."""
    if self._file is not None:
      self._file.close()
      self._file = None
      return
    self.save()
