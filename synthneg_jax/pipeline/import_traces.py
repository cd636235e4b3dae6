"""Traces sampled elsewhere in the place of stage sample's own: read, tokenised once if need be,
graded, and counted.

A row says whose response it is (`problem_id`, or `problem`, its text), what it is (`ids`, or
`text`), and how it ended (`finish`); docs/interchange.md lists all fields. Rows become Trace
records, so that rft, credit and dpo take them as their own. Nothing is tokenised that came with
ids.
"""

import collections
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.data.credited_traces import by_problem
from synthneg_jax.data.records import Problem, Shards, Trace
from synthneg_jax.decoding.engine import Generation
from synthneg_jax.decoding.policy import Policy, resolve
from synthneg_jax.pipeline import record_io, traces, train_policy
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import distributed
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.runtime.manifest import write_json
from synthneg_jax.training import reference

_SHARD = 4096  # traces a shard
# Our names and what others call the same.
_NAMES = {
  "ids": ("ids", "token_ids"),
  "text": ("text", "response", "completion"),
  "finish": ("finish", "finish_reason"),
  "logps": ("logps", "logprobs", "token_logprobs"),
  "drawn_logps": ("drawn_logps",),
  "tokens": ("tokens",),
  "index": ("index",),
  "policy": ("policy",),
  "problem_id": ("problem_id",),
  "problem": ("problem", "prompt"),
}
_ROW_TYPES = {
  "ids": list,
  "text": str,
  "finish": str,
  "logps": list,
  "drawn_logps": list,
  "tokens": list,
  "index": int,
}
_FINISHES = ("eos", "stop", "length")


def adopt_sft(experiment: Experiment, folder: str) -> dict:
  """Takes a policy that was trained elsewhere for π_sft: stage sft is then done.

  Raises:
    UserError: no such folder, or a model that does not fit; or stage sft was done with other
      weights.
  """
  stage = experiment.stage("sft", ["task", "model", "sft"], ["synthesize"], reads_base=True)
  policy = Policy.load(resolve(folder), experiment.config.model, experiment.mesh)
  if stage.done:
    if experiment.policy("sft").fingerprint != policy.fingerprint:
      raise UserError(
        f"Stage sft in {experiment.workdir} is done, with other weights than {folder}; take "
        "another --workdir."
      )
    return {}
  return stage.finish(
    {"adopted": str(folder)}, identity=policy.save(stage.folder / "policy", policy.params)
  )


@dataclasses.dataclass
class _Response:
  """One row, understood. `logp` is None where it has to be worked out."""

  problem: Problem
  index: int
  ids: list[int]
  finish: str
  logp: Sequence[float] | None
  drawn_logp: Sequence[float]
  policy: str


def _boundaries(pieces: Sequence[bytes]) -> set[int]:
  """Byte offsets within a text at which a token starts; those of the text's two ends left out."""
  return set(itertools.accumulate(len(piece) for piece in pieces if piece)) - {
    sum(map(len, pieces))
  }


class _Reader:
  """Rows to responses, and the counts of the token-exactness report."""

  def __init__(self, experiment: Experiment, policy: Policy, assume_finish: str):
    self._run, self._policy, self._assume = experiment, policy, assume_finish
    self._problems = experiment.problems("train")
    self._by_text = {problem.prompt.strip(): problem for problem in self._problems.values()}
    self._prompts, self._next = {}, collections.Counter()
    self._taken = set()
    self._eos_ids = policy.eos_ids
    self.counts = collections.Counter()

  def prompt(self, problem: Problem) -> list[int]:
    """Its tokens, worked out once."""
    if problem.id not in self._prompts:
      self._prompts[problem.id] = train_policy.prompt_ids(
        self._run, self._policy.tokenizer, problem
      )
    return self._prompts[problem.id]

  def _encode(self, text: str) -> list[int]:
    return self._policy.tokenizer.encode(text, add_special_tokens=False)

  def read(self, row: dict) -> _Response:
    """One row; UserError, without the place, for one that cannot be taken."""
    row = {
      name: row[other]
      for name, others in _NAMES.items()
      for other in others
      if row.get(other) is not None
    }
    for name, kind in _ROW_TYPES.items():
      if name in row and (not isinstance(row[name], kind) or isinstance(row[name], bool)):
        raise UserError(
          f'the field "{name}" must be a {kind.__name__}, not a {type(row[name]).__name__}'
        )
    problem = self._problem(row)
    finish = row.get("finish", self._assume)
    if finish not in _FINISHES:
      raise UserError(
        f'"finish" is {finish!r}, none of {", ".join(_FINISHES)}'
        if finish
        else 'the field "finish" is missing: whether the response ended by itself decides whether '
        "EOS belongs to it; say "
        "for all rows without it by --assume_finish=eos or length"
      )
    logp = self._numbers(row, "logps")
    if "ids" in row:
      ids, logp = self._given(row, finish, logp)
    elif "text" in row:
      ids, logp = self._tokenised(row, finish, logp)
    else:
      raise UserError('neither "ids" nor "text" is there')
    self._check_seam(problem, ids)
    if any(eos in ids[:-1] for eos in self._eos_ids):
      raise UserError("EOS stands within the ids; a response ends there")
    room = self._run.config.model.max_length - len(self.prompt(problem))
    if not 0 < len(ids) <= room:
      raise UserError(
        f"the response has {len(ids)} tokens, and model.max_length leaves room for 1 to {room}"
      )
    drawn = self._numbers(row, "drawn_logps")
    index = row.get("index")
    if index is None:
      while (problem.id, self._next[problem.id]) in self._taken:
        self._next[problem.id] += 1
      index = self._next[problem.id]
    if (problem.id, index) in self._taken:
      raise UserError(f"trace {index} of problem {problem.id} stands twice")
    self._taken.add((problem.id, index))
    self.counts["rows"] += 1
    self.counts["without_logps"] += logp is None
    ended = "eos" if ids[-1] in self._eos_ids else finish if finish != "eos" else "stop"
    drawn = drawn if drawn is not None and len(drawn) == len(ids) else []
    return _Response(problem, index, ids, ended, logp, drawn, str(row.get("policy", "elsewhere")))

  def _problem(self, row: dict) -> Problem:
    if "problem_id" in row:
      if row["problem_id"] not in self._problems:
        raise UserError(f"problem_id {row['problem_id']!r} is no training problem of this workdir")
      return self._problems[row["problem_id"]]
    text = row.get("problem")
    if not isinstance(text, str) or text.strip() not in self._by_text:
      raise UserError('neither "problem_id" nor "problem" names a training problem of this workdir')
    return self._by_text[text.strip()]

  def _numbers(self, row: dict, name: str) -> list[float] | None:
    values = row.get(name)
    if values is None:
      return None
    if not all(type(value) in (int, float) and value <= 1e-6 for value in values if value == value):
      raise UserError(f'"{name}" must hold log-probs, numbers that are not above 0')
    if not all(map(math.isfinite, values)):
      raise UserError(
        f'"{name}" must hold finite log-probs; -inf and NaN are none of a token that was drawn'
      )
    return values

  def _given(self, row: dict, finish: str, logp) -> tuple[list[int], list[float] | None]:
    """Ids as they are; EOS where the response ended by itself and the server left it out."""
    ids, size = (
      list(row["ids"]),
      min(self._policy.token_text.vocab_size, self._policy.model.config.vocab_size),
    )
    if not all(type(i) is int and 0 <= i < size for i in ids):  # a bool is no id
      raise UserError(
        f'"ids" must hold whole numbers from 0 to {size - 1}, the vocabulary of this policy'
      )
    if logp is not None and len(logp) != len(ids):
      raise UserError(f'"logps" has {len(logp)} numbers for {len(ids)} ids')
    self.counts["with_ids"] += 1
    text = self._policy.token_text.text(ids)
    if "text" in row and row["text"] != text:
      self.counts["text_is_not_that_of_the_ids"] += 1
    # What would have come of these ids, had they come as text.
    self._compare(
      [i for i in ids if self._policy.token_text.bytes_of(i)], self._encode(text), "reencoded"
    )
    stopped = finish == "eos" or (
      finish == "stop" and not any(stop in text for stop in self._run.config.engine.stop)
    )
    if stopped and (not ids or ids[-1] not in self._eos_ids):
      self.counts["eos_restored"] += 1
      return [*ids, self._eos_ids[0]], None
    return ids, logp

  def _tokenised(self, row: dict, finish: str, logp) -> tuple[list[int], list[float] | None]:
    """Text as ids; its log-probs stand only if its tokens are those that were drawn."""
    text, bytes_of = row["text"], self._policy.token_text.bytes_of
    ids = self._encode(text)
    self.counts["with_text_alone"] += 1
    if self._policy.token_text.text(ids) != text:
      self.counts["text_does_not_survive_tokenising"] += 1
    same = None
    if "tokens" in row:
      if not all(isinstance(token, str) for token in row["tokens"]):
        raise UserError('"tokens" must hold the text of each token')
      drawn = [token.encode() for token in row["tokens"]]
      same = self._compare_pieces(drawn, [bytes_of(i) for i in ids], "retokenised")
      self.counts["with_tokens"] += 1
    stopped = finish == "eos" or (
      finish == "stop" and not any(stop in text for stop in self._run.config.engine.stop)
    )
    if stopped and (not ids or ids[-1] not in self._eos_ids):
      ids = [*ids, self._eos_ids[0]]
    if logp is not None and len(logp) != len(ids):
      same = False  # they are of other tokens, or there is none of EOS
    return ids, logp if same is not False else None

  def _compare(self, drawn: Sequence[int], again: Sequence[int], name: str) -> bool:
    bytes_of = self._policy.token_text.bytes_of
    equal = self._compare_pieces([bytes_of(i) for i in drawn], [bytes_of(i) for i in again], name)
    return equal and list(drawn) == list(again)

  def _compare_pieces(self, drawn: Sequence[bytes], again: Sequence[bytes], name: str) -> bool:
    """Counts boundaries between drawn tokens that are none between the others; True where all are
    the same.
    """
    before, after = _boundaries(drawn), _boundaries(again)
    self.counts[f"{name}_boundaries"] += len(before)
    self.counts[f"{name}_boundaries_moved"] += len(before - after)
    self.counts[f"{name}_rows_moved"] += before != after
    return before == after

  def _check_seam(self, problem: Problem, ids: Sequence[int]) -> None:
    """Counts responses whose first token merges with the prompt when both are tokenised as one
    text.
    """
    prompt, tokenizer = self.prompt(problem), self._policy.tokenizer
    text = tokenizer.decode(prompt, skip_special_tokens=False)
    if self._encode(text) != prompt:
      self.counts["seam_not_comparable"] += 1  # the prompt's own text does not give its tokens
      return
    whole = self._encode(text + self._policy.token_text.text(ids))
    self.counts["seam_moved"] += whole[: len(prompt)] != prompt


def _rows(paths: Sequence[epath.Path], reader: _Reader, skip_bad_rows: bool) -> Iterator[_Response]:
  for path in paths:
    for place, row in record_io.read(path):
      try:
        yield reader.read(row)
      except UserError as error:
        if not skip_bad_rows:
          raise UserError(f"{place}: {error}. --skip_bad_rows leaves such rows out.") from None
        reader.counts["skipped_rows"] += 1


def _score(
  experiment: Experiment,
  policy: Policy,
  reader: _Reader,
  responses: Sequence[_Response],
  path: epath.Path,
) -> None:
  """Works out the log-probs that did not come, under π_sft, by the trainer's own pass."""
  missing = [response for response in responses if response.logp is None]
  if not missing:
    return
  trees = {}
  for response in missing:
    trees.setdefault(response.problem.id, {})[tuple(response.ids)] = response
  made = []
  for group in trees.values():
    for response in group.values():
      prompt = reader.prompt(response.problem)
      made.append(Tree(prompt, (Branch(len(prompt), tuple(response.ids)),)))
  store = reference.Store(path)
  length = max(
    experiment.config.model.max_length,
    *(len(tree.trunk) + len(tree.branches[0].ids) for tree in made),
  )
  packing = reference.Packing(experiment.mesh, length, experiment.config.dpo.logit_chunk)
  reference.score(policy.model, policy.params, made, store=store, packing=packing)
  for response in missing:
    prompt = reader.prompt(response.problem)
    response.logp = store[reference.branch_key(prompt, len(prompt), response.ids)].tolist()
  path.unlink()


def run(
  experiment: Experiment, files: Sequence[str], assume_finish: str = "", skip_bad_rows: bool = False
) -> dict:
  """Writes sample/traces/ and sample/import_report.json from files; stage sample is then done.

  Args:
    experiment: the run; its stages synthesize and sft are done.
    files: .jsonl or .parquet.
    assume_finish: "eos" or "length", for rows that do not say; "" refuses them.
    skip_bad_rows: leave out, and count, rows that cannot be taken.

  Raises:
    UserError: a file, row or field that cannot be taken; a problem with fewer traces than
      credit.best_of.
  """
  distributed.alone("Taking traces from elsewhere")
  paths = [epath.Path(file).expanduser() for file in files]
  digest = hashlib.sha256()
  for path in paths:
    digest.update(record_io.content(path))
  stage = experiment.stage(
    "sample",
    ["task", "model", "engine", "sample"],
    ["synthesize", "sft"],
    given={"imported traces": digest.hexdigest()[:16]},
  )
  if stage.done:
    return {}
  policy = experiment.policy("sft")
  reader = _Reader(experiment, policy, assume_finish)
  responses = list(_rows(paths, reader, skip_bad_rows))
  if not responses:
    raise UserError(f"{', '.join(map(str, paths))}: no row can be taken.")
  counts = collections.Counter(response.problem.id for response in responses)
  few, k = min(counts, key=lambda key: counts[key]), experiment.config.credit.best_of
  if counts[few] < k:
    raise UserError(
      f"Problem {few} has {counts[few]} traces, less than credit.best_of={k}: Best-of-k needs k "
      "draws."
    )
  _score(experiment, policy, reader, responses, stage.folder / "scored.npz")
  shards = Shards(stage.folder / "traces", Trace)
  for path in shards.files():
    path.unlink()
  order = {key: number for number, key in enumerate(experiment.problems("train"))}
  responses.sort(key=lambda response: (order[response.problem.id], response.index))
  for start in range(0, len(responses), _SHARD):
    shards.write(_records(experiment, policy, responses[start : start + _SHARD]))
  report = _report(reader.counts)
  write_json(stage.folder / "import_report.json", report)
  groups = by_problem(shards.read())
  every = [trace for group in groups.values() for trace in group]
  figures = {
    "traces": len(every),
    "problems": len(groups),
    "tokens": sum(len(trace.ids) for trace in every),
    "pass_at_1": round(sum(trace.correct for trace in every) / len(every), 4),
    "reasons": dict(collections.Counter(trace.reason for trace in every).most_common()),
    "imported": report,
  }
  return stage.finish(figures, shards.files())


def _records(
  experiment: Experiment, policy: Policy, responses: Sequence[_Response]
) -> Iterator[Trace]:
  made = [
    Generation(np.asarray(one.ids), np.asarray(one.logp), np.asarray(one.drawn_logp), one.finish)
    for one in responses
  ]
  places = [
    (response.problem, response.index, one) for response, one in zip(responses, made, strict=True)
  ]
  for response, trace in zip(
    responses, traces.traces_of(experiment, policy, "sample", places), strict=True
  ):
    yield dataclasses.replace(trace, policy=response.policy)


def _report(counts: collections.Counter) -> dict:
  """The counts, and the shares that tell how much retokenising would change."""
  report = {name: int(count) for name, count in sorted(counts.items())}
  for name in ("reencoded", "retokenised"):
    if counts[f"{name}_boundaries"]:
      share = counts[f"{name}_boundaries_moved"] / counts[f"{name}_boundaries"]
      report[f"{name}_share_moved"] = round(share, 6)
  return report
