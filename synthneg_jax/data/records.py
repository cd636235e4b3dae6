"""The records that stages exchange, as sharded JSON lines; docs/data.md specifies every field."""

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
  prompt: str  # text shown to the model
  solution: str  # the teacher's solution, answer last; empty if unknown
  answer: str  # the gold answer
  source: str  # split or author

  @property
  def key(self) -> str:
    """Unique key."""
    return self.id


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A problem that a capable model wrote or solved, with all its solutions. Key: id."""

  id: str
  prompt: str
  answer: str  # the majority's, or the known one; empty if none
  agreement: float  # share of the draws that state the answer
  difficulty: int  # median number of steps of the draws that state the answer; 0 if none does
  chosen: int  # index of the draw that became the known solution; -1 for none
  solutions: list[dict]  # text, answer (or None), finish, reply (its file's name) of each draw
  outcome: str  # kept, surplus, unsolved, near_duplicate, contaminated

  @property
  def key(self) -> str:
    """Unique key."""
    return self.id


@dataclasses.dataclass(frozen=True)
class Trace:
  """A sampled or greedy response to a problem, with its verdict. Key: id."""

  id: str  # problem id / purpose / index
  problem_id: str
  index: int  # among the problem's traces, from 0
  ids: list[int]  # response tokens as drawn; EOS last iff finish is "eos"
  step_ends: list[int]  # exclusive end of each step in ids; the last is len(ids)
  text: str
  correct: bool
  reason: str  # right, wrong, no_answer, ambiguous, unparsable, timeout, too_large, truncated
  extracted: str | None  # the graded answer
  finish_reason: str  # eos, stop, length
  logps: list[float]  # nats, of each token under the untempered model
  drawn_logps: list[float]  # nats, of each token under the sampling distribution
  policy: str  # fingerprint of the weights

  @property
  def key(self) -> str:
    """Unique key."""
    return self.id


@dataclasses.dataclass(frozen=True)
class Rollout:
  """A continuation of a trace's prefix, with its verdict."""

  ids: list[int]  # tokens after the prefix
  correct: bool
  reason: str
  finish_reason: str
  step_logp: float | None  # nats, of its first step, untempered; None if a server omits it
  logp: float | None  # nats, of all its tokens, untempered


@dataclasses.dataclass(frozen=True)
class StepEstimate:
  """How often rollouts from the end of a step are correct. Key: trace id and step."""

  trace_id: str
  problem_id: str
  step: int  # from 0; prefix = steps 0..step
  prefix_end: int  # tokens of the response up to and including this step
  rollouts: int  # number of rollouts; 0 if exact
  successes: int  # number of correct rollouts
  exact: bool  # the last step: its value is the trace's verdict
  correct: bool  # the verdict if exact, else False
  samples: list[dict]  # Rollout fields; empty if another trace with this prefix holds them
  samples_at: str  # key of the estimate that holds the rollouts, possibly this one

  @property
  def key(self) -> str:
    """Unique key: the trace's id and the step."""
    return f"{self.trace_id}/{self.step}"


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two branches of one trunk; training raises chosen over rejected. Key: id."""

  id: str
  problem_id: str
  trace_id: str  # the source trace; a right one only in mode positives_too
  trunk: list[int]  # prompt; in modes that share a prefix also the trace up to the pit
  chosen: list[int]
  rejected: list[int]
  pair_mode: str
  pit: int  # step of the trace, from 0; -1 if no pit was used
  p_flipped: float  # estimated probability that the label is flipped
  context: int = 0  # tokens at the beginning of rejected that are not scored

  @property
  def key(self) -> str:
    """Unique key."""
    return self.id


Record = TypeVar("Record", Problem, Candidate, Trace, StepEstimate, Pair)


class Shards:
  """A folder of JSON-lines files of one record type, which grows by whole shards.

  A shard is written under a temporary name and renamed when complete, so a killed run leaves only
  whole shards. Each process writes its own shards: a single process writes 00003.jsonl, process 1
  of several writes 00003-p00001.jsonl. Reading returns the shards of all processes.
  """

  def __init__(self, folder: epath.PathLike, kind: type[Record]):
    self._folder, self._kind = epath.Path(folder), kind

  def files(self) -> list[epath.Path]:
    """Complete shards in order."""
    return sorted(self._folder.glob("*.jsonl")) if self._folder.exists() else []

  def write(self, records: Iterable[Record]) -> None:
    """Writes one shard of this process under the first free number.

    Raises:
      UserError: the disk is full or the folder is not writable; no partial shard remains.
    """
    suffix = f"-p{distributed.index():05d}" if distributed.count() > 1 else ""
    with writing(self._folder):
      self._folder.mkdir(parents=True, exist_ok=True)
    path = next(
      p for n in itertools.count() if not (p := self._folder / f"{n:05d}{suffix}.jsonl").exists()
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
    """Deletes all shards. Every process must call it; all shards are gone when it returns."""
    distributed.barrier()  # a process may still be reading
    if distributed.is_primary():
      for path in self.files():
        path.unlink()
    distributed.barrier()

  def write_replicated(self, records: Sequence[Record]) -> None:
    """Replaces all shards by a list that every process holds; each process writes its part.

    Reading returns the records in the list's order. All are written when it returns.
    """
    self.clear()
    size = -(-len(records) // distributed.count())
    self.write(records[distributed.index() * size :][:size])
    distributed.barrier()

  def read(self) -> Iterator[Record]:
    """All records, shard after shard.

    Raises:
      UserError: a line is not a complete record; names file and line.
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
            f"{path}, line {number}: not a complete {self._kind.__name__} record ({error.msg}); "
            "the file is truncated or edited. Delete it and the stage's manifest.json to remake it."
          ) from error
        if not isinstance(fields, dict) or not required <= set(fields) <= names:
          raise UserError(
            f"{path}, line {number}: the fields do not match a {self._kind.__name__} record."
          )
        yield self._kind(**fields)
      if text and not text.endswith("\n"):
        raise UserError(
          f"{path}, line {len(text.splitlines())}: no newline at the end; the file is truncated."
        )

  def read_dict(self) -> dict[str, Record]:
    """All records by key, in file order.

    Raises:
      UserError: a duplicate key, or as in `read`.
    """
    records = {}
    for record in self.read():
      if record.key in records:
        raise UserError(f"{self._folder}: duplicate key {record.key!r}.")
      records[record.key] = record
    return records
