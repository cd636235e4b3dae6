"""The records that stages exchange, as sharded JSON lines. docs/data.md fixes every field, its type
and unit.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from etils import epath

from synthneg_jax.runtime import distributed
from synthneg_jax.runtime.errors import UserError, writing


@dataclasses.dataclass(frozen=True)
class Problem:
  """A problem with its known solution. Key: id."""

  id: str
  prompt: str  # what the model is given, as text
  solution: str  # the teacher's solution, answer last; empty where unknown
  answer: str  # the gold answer
  source: str  # split or author

  @property
  def key(self) -> str:
    """What tells it from others of its kind: its id."""
    return self.id


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A problem that a capable model wrote or solved, with all its solutions and what became of it.
  Key: id.
  """

  id: str
  prompt: str
  answer: str  # the majority's, or the known one; empty where there is none
  agreement: float  # share of the draws that state it
  difficulty: int  # median number of steps of the draws that state it; 0 where none does
  chosen: int  # the draw that is the known solution; -1 for none
  solutions: list[dict]  # text, answer (or None), finish, reply (name of its file) of every draw
  outcome: str  # kept, surplus, unsolved, near_duplicate, contaminated

  @property
  def key(self) -> str:
    """What tells it from others of its kind: its id."""
    return self.id


@dataclasses.dataclass(frozen=True)
class Trace:
  """A sampled or greedy response to a problem, with its verdict. Key: id."""

  id: str  # problem id / purpose / index
  problem_id: str
  index: int  # number among the problem's traces, from 0
  ids: list[int]  # response tokens as drawn; EOS last iff finish is "eos"
  step_ends: list[int]  # exclusive end of each step in ids; the last is len(ids)
  text: str
  correct: bool
  reason: str  # right, wrong, no_answer, ambiguous, unparsable, timeout, too_large, truncated
  extracted: str | None  # the answer that was graded
  finish: str  # eos, stop, length
  logps: list[float]  # nats, of each token under the untempered model
  drawn_logps: list[float]  # nats, of each token under the distribution it was drawn from
  policy: str  # fingerprint of the weights

  @property
  def key(self) -> str:
    """What tells it from others of its kind: its id."""
    return self.id


@dataclasses.dataclass(frozen=True)
class Rollout:
  """A continuation of a trace's prefix, with its verdict."""

  ids: list[int]  # tokens after the prefix
  correct: bool
  reason: str
  finish: str
  # nats, of its first step under the untempered model; None where a server did not say
  step_logp: float | None
  logp: float | None  # nats, of all its tokens under the untempered model


@dataclasses.dataclass(frozen=True)
class StepEstimate:
  """What is known of one step of a trace: how often rollouts after it came out right. Key: trace id
  and step.
  """

  trace_id: str
  problem_id: str
  step: int  # from 0; prefix = steps 0..step
  prefix_end: int  # tokens of the response up to and with this step
  rollouts: int  # how many; 0 where exact
  successes: int  # how many of them came out right
  exact: bool  # the last step: its value is the trace's verdict
  correct: bool  # verdict, where exact; else False
  # the rollouts (fields of Rollout); empty where another trace with this prefix holds them
  samples: list[dict]
  samples_at: str  # key of the estimate that holds them; its own key where it does

  @property
  def key(self) -> str:
    """What tells it from others: the trace's id and the step's number."""
    return f"{self.trace_id}/{self.step}"


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two branches of one trunk; the chosen is to become likelier than the rejected. Key: id."""

  id: str
  problem_id: str
  trace_id: str  # the trace that it comes from; a right one in mode positives_too only
  trunk: list[int]  # prompt, and in mode shared_prefix the trace up to the pit
  chosen: list[int]
  rejected: list[int]
  pair_mode: str
  pit: int  # step of the trace, from 0; -1 where none was used
  flip: float  # probability that the label is flipped, by the counts
  context: int = 0  # tokens at the beginning of rejected that are not scored

  @property
  def key(self) -> str:
    """What tells it from others of its kind: its id."""
    return self.id


Record = TypeVar("Record", Problem, Candidate, Trace, StepEstimate, Pair)


class Shards:
  """A folder of JSON-lines files of one record type, appended to in whole shards.

  A shard is written under a temporary name and renamed when complete, so a killed run leaves whole
  shards only. Of several processes each writes its own: 00003.jsonl by a process alone,
  00003-p00001.jsonl by process 1 of several. What all have written is read together, whatever
  number of processes wrote it.
  """

  def __init__(self, folder: epath.PathLike, kind: type[Record]):
    self._folder, self._kind = epath.Path(folder), kind

  def files(self) -> list[epath.Path]:
    """Complete shards in order."""
    return sorted(self._folder.glob("*.jsonl")) if self._folder.exists() else []

  def write(self, records: Iterable[Record]) -> None:
    """One more shard of this process, under its first number that is free: of a deleted shard, or
    after the last.

    Raises:
      UserError: the disk is full, or the folder cannot be written; nothing is left under the
        shard's name.
    """
    of_process = f"-p{distributed.index():05d}" if distributed.count() > 1 else ""
    with writing(self._folder):
      self._folder.mkdir(parents=True, exist_ok=True)
    path = next(
      p
      for n in itertools.count()
      if not (p := self._folder / f"{n:05d}{of_process}.jsonl").exists()
    )
    temporary = self._folder / f"{path.name}.{os.getpid()}.tmp"
    text = "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records)
    with writing(path):
      try:
        temporary.write_text(text)
        temporary.replace(path)
      except OSError:
        temporary.unlink(missing_ok=True)
        raise

  def clear(self) -> None:
    """Deletes all shards; every process calls it, and all are gone when it returns."""
    distributed.barrier()  # no process may still be reading
    if distributed.first():
      for path in self.files():
        path.unlink()
    distributed.barrier()

  def write_shared(self, records: Sequence[Record]) -> None:
    """Writes a list that all processes have in place of all that is there; each process writes its
    part.

    Read again, the records come in the list's order. All are there when it returns.
    """
    self.clear()
    size = -(-len(records) // distributed.count())
    self.write(records[distributed.index() * size :][:size])
    distributed.barrier()

  def read(self) -> Iterator[Record]:
    """All records, shard after shard.

    Raises:
      UserError: a line that is no whole record; names file and line.
    """
    every = dataclasses.fields(self._kind)
    names = {field.name for field in every}
    required = {field.name for field in every if field.default is dataclasses.MISSING}
    for path in self.files():
      text = path.read_text()
      for number, line in enumerate(text.splitlines(), start=1):
        try:
          fields = json.loads(line)
        except json.JSONDecodeError as error:
          raise UserError(
            f"{path}, line {number}: not a whole {self._kind.__name__} record ({error.msg}); the "
            "file was cut off or "
            "changed. Delete it and the stage's manifest.json to have it made again."
          ) from error
        if not isinstance(fields, dict) or not required <= set(fields) <= names:
          raise UserError(
            f"{path}, line {number}: the fields are not those of a {self._kind.__name__} record."
          )
        yield self._kind(**fields)
      if text and not text.endswith("\n"):
        raise UserError(
          f"{path}, line {len(text.splitlines())}: the last line has no end; the file was cut off."
        )

  def read_dict(self) -> dict[str, Record]:
    """All records by key, in file order.

    Raises:
      UserError: a key that stands twice.
    """
    records = {}
    for record in self.read():
      if record.key in records:
        raise UserError(f"{self._folder}: the key {record.key!r} stands twice.")
      records[record.key] = record
    return records
