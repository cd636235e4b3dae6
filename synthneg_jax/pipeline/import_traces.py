"""Imports traces that were sampled elsewhere, in place of stage sample.

A row names its problem (`problem_id` or `problem`), the response (`ids` or `text`) and how the
response ended (`finish`); docs/interchange.md lists all fields. Rows are graded here and become
Trace records like those of stage sample. Ids are kept as they are; text is tokenised once.
"""

import collections
import dataclasses
import hashlib
import itertools
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

_SHARD = 4096  # traces per shard
# our field names, and the names that are accepted for them
_NAMES = {
  "ids": ("ids", "token_ids"),
  "text": ("text", "response", "completion"),
  "finish_reason": ("finish_reason", "finish"),
  "logps": ("logps", "logprobs", "token_logprobs"),
  "drawn_logps": ("drawn_logps",),
  "tokens": ("tokens",),
  "index": ("index",),
  "policy": ("policy",),
  "problem_id": ("problem_id",),
  "problem": ("problem", "prompt"),
}
_ROW_TYPES = {
  "problem_id": str,
  "ids": list,
  "text": str,
  "finish_reason": str,
  "logps": list,
  "drawn_logps": list,
  "tokens": list,
  "index": int,
}
_FINISHES = ("eos", "stop", "length")


def adopt_sft(experiment: Experiment, folder: str) -> dict:
  """Uses a policy that was trained elsewhere as π_sft; this completes stage sft.

  Raises:
    UserError: the folder does not exist, the model does not fit, or stage sft is done with other
      weights.
  """
  stage = experiment.stage("sft", ["task", "model", "sft"], ["synthesize"], reads_base=True)
  policy = Policy.load(resolve(folder), experiment.config.model, experiment.mesh)
  if stage.done:
    if experiment.policy("sft").fingerprint != policy.fingerprint:
      raise UserError(
        f"Stage sft in {experiment.workdir} is done, with other weights than those in {folder}; "
        "take another --workdir."
      )
    return {}
  return stage.finish(
    {"adopted": str(folder)}, identity=policy.save(stage.folder / "policy", policy.params)
  )


@dataclasses.dataclass
class _Response:
  """A validated row; `logp` is None if it must be computed."""

  problem: Problem
  index: int
  ids: list[int]
  finish_reason: str
  logp: Sequence[float] | None
  drawn_logp: Sequence[float]
  policy: str


def _boundaries(pieces: Sequence[bytes]) -> set[int]:
  """Byte offsets at which a token starts, without the two ends of the text."""
  ends = set(itertools.accumulate(len(piece) for piece in pieces if piece))
  return ends - {sum(map(len, pieces))}


def _has_surrogate(text: str) -> bool:
  """Whether a text cannot be written as UTF-8."""
  return any("\ud800" <= char <= "\udfff" for char in text)


class _Reader:
  """Converts rows to responses and counts what the token-exactness report states."""

  def __init__(self, experiment: Experiment, policy: Policy, assume_finish: str):
    self._config, self._policy, self._assume_finish = experiment.config, policy, assume_finish
    self._experiment = experiment
    self._problems = experiment.problems("train")
    self._by_text = {problem.prompt.strip(): problem for problem in self._problems.values()}
    self._prompts, self._next_index = {}, collections.Counter()
    self._used = set()  # (problem id, index)
    self._eos_ids = policy.eos_ids
    self.counts = collections.Counter()

  def prompt(self, problem: Problem) -> list[int]:
    """Token ids of a problem's prompt, cached."""
    if problem.id not in self._prompts:
      self._prompts[problem.id] = train_policy.prompt_ids(
        self._experiment, self._policy.tokenizer, problem
      )
    return self._prompts[problem.id]

  def _encode(self, text: str) -> list[int]:
    return self._policy.tokenizer.encode(text, add_special_tokens=False)

  def read(self, row: dict) -> _Response:
    """Validates one row.

    Raises:
      UserError: the row is invalid; the message does not name file and line.
    """
    fields = {}
    for name, aliases in _NAMES.items():
      for alias in aliases:
        if row.get(alias) is not None:
          fields[name] = row[alias]
    for name, kind in _ROW_TYPES.items():
      if name in fields and (not isinstance(fields[name], kind) or isinstance(fields[name], bool)):
        raise UserError(
          f'the field "{name}" must be a {kind.__name__}, not a {type(fields[name]).__name__}'
        )
    texts = [fields.get("text", ""), *fields.get("tokens", ())]
    if any(_has_surrogate(text) for text in texts if isinstance(text, str)):
      raise UserError('"text" or "tokens" holds an unpaired surrogate')
    problem = self._problem(fields)
    finish = fields.get("finish_reason", self._assume_finish)
    if not finish:
      raise UserError(
        'the field "finish_reason" is missing; it determines whether the response ends in EOS. For '
        "rows without it, set --assume_finish=eos or --assume_finish=length"
      )
    if finish not in _FINISHES:
      raise UserError(f'"finish_reason" is {finish!r} but must be one of {", ".join(_FINISHES)}')
    logp = self._numbers(fields, "logps")
    if "ids" in fields:
      ids, logp = self._from_ids(fields, finish, logp)
    elif "text" in fields:
      ids, logp = self._from_text(fields, finish, logp)
    else:
      raise UserError('the row has neither "ids" nor "text"')
    self._check_seam(problem, ids)
    if any(eos in ids[:-1] for eos in self._eos_ids):
      raise UserError("EOS occurs before the end of the ids")
    room = self._config.model.max_length - len(self.prompt(problem))
    if not 0 < len(ids) <= room:
      raise UserError(
        f"the response has {len(ids)} tokens, but model.max_length leaves room for 1 to {room}"
      )
    drawn = self._numbers(fields, "drawn_logps")
    index = self._index(problem, fields.get("index"))
    self.counts["rows"] += 1
    self.counts["without_logps"] += logp is None
    if ids[-1] in self._eos_ids:
      finish = "eos"
    elif finish == "eos":
      finish = "stop"
    drawn = drawn if drawn is not None and len(drawn) == len(ids) else []
    policy = str(fields.get("policy", "elsewhere"))
    return _Response(problem, index, ids, finish, logp, drawn, policy)

  def _index(self, problem: Problem, index: int | None) -> int:
    """Reserves an index among the problem's traces; None takes the next free one."""
    if index is None:
      while (problem.id, self._next_index[problem.id]) in self._used:
        self._next_index[problem.id] += 1
      index = self._next_index[problem.id]
    if (problem.id, index) in self._used:
      raise UserError(f"trace {index} of problem {problem.id} occurs twice")
    self._used.add((problem.id, index))
    return index

  def _problem(self, row: dict) -> Problem:
    if "problem_id" in row:
      if row["problem_id"] not in self._problems:
        raise UserError(
          f"problem_id {row['problem_id']!r} is not a training problem of this workdir"
        )
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
      raise UserError(f'"{name}" must hold log-probs, numbers of at most 0')
    if not all(value > -1e30 for value in values):  # also False for NaN
      raise UserError(
        f'"{name}" must hold finite log-probs; a sampled token cannot have -inf or NaN'
      )
    return values

  def _lacks_eos(self, ids: Sequence[int], finish: str, text: str) -> bool:
    """Whether a response ended by itself and its ids do not end in EOS."""
    stop_strings = self._config.engine.stop
    ended = finish == "eos" or (finish == "stop" and not any(s in text for s in stop_strings))
    return ended and (not ids or ids[-1] not in self._eos_ids)

  def _from_ids(self, row: dict, finish: str, logp) -> tuple[list[int], list[float] | None]:
    """The row's ids, with EOS added if a server left it out, and their log-probs."""
    ids, token_text = list(row["ids"]), self._policy.token_text
    size = min(token_text.vocab_size, self._policy.model.config.vocab_size)
    if not all(type(i) is int and 0 <= i < size for i in ids):  # excludes bool, a subtype of int
      raise UserError(
        f'"ids" must hold whole numbers from 0 to {size - 1}, the vocabulary of this policy'
      )
    if logp is not None and len(logp) != len(ids):
      raise UserError(f'"logps" has {len(logp)} numbers for {len(ids)} ids')
    self.counts["with_ids"] += 1
    text = token_text.text(ids)
    if "text" in row and row["text"] != text:
      self.counts["text_differs_from_ids"] += 1
    # what tokenising their text would have changed
    drawn_bytes = [token_text.bytes_of(i) for i in ids]
    encoded_bytes = [token_text.bytes_of(i) for i in self._encode(text)]
    self._compare(drawn_bytes, encoded_bytes, "reencoded")
    if self._lacks_eos(ids, finish, text):
      self.counts["eos_restored"] += 1
      return [*ids, self._eos_ids[0]], None
    return ids, logp

  def _from_text(self, row: dict, finish: str, logp) -> tuple[list[int], list[float] | None]:
    """The ids of the row's text, and its log-probs unless they belong to other tokens."""
    text, token_text = row["text"], self._policy.token_text
    ids = self._encode(text)
    self.counts["with_text_alone"] += 1
    if token_text.text(ids) != text:
      self.counts["text_not_reproduced"] += 1
    same_tokens = True
    if "tokens" in row:
      if not all(isinstance(token, str) for token in row["tokens"]):
        raise UserError('"tokens" must hold the text of each token')
      drawn = [token.encode() for token in row["tokens"]]
      same_tokens = self._compare(drawn, [token_text.bytes_of(i) for i in ids], "retokenised")
      self.counts["with_tokens"] += 1
    if self._lacks_eos(ids, finish, text):
      ids = [*ids, self._eos_ids[0]]
    # lengths differ if log-probs belong to other tokens or lack that of EOS
    usable = same_tokens and logp is not None and len(logp) == len(ids)
    return ids, logp if usable else None

  def _compare(self, drawn: Sequence[bytes], encoded: Sequence[bytes], name: str) -> bool:
    """Counts the drawn token boundaries that encoding moved; True if all boundaries are equal."""
    before, after = _boundaries(drawn), _boundaries(encoded)
    self.counts[f"{name}_boundaries"] += len(before)
    self.counts[f"{name}_boundaries_moved"] += len(before - after)
    self.counts[f"{name}_rows_moved"] += before != after
    return before == after

  def _check_seam(self, problem: Problem, ids: Sequence[int]) -> None:
    """Counts responses whose first token merges with the prompt if both are encoded as one text."""
    prompt, tokenizer = self.prompt(problem), self._policy.tokenizer
    text = tokenizer.decode(prompt, skip_special_tokens=False)
    if self._encode(text) != prompt:
      self.counts["seam_not_comparable"] += 1  # the prompt's text does not reproduce its tokens
      return
    whole = self._encode(text + self._policy.token_text.text(ids))
    self.counts["seam_moved"] += whole[: len(prompt)] != prompt


def _rows(paths: Sequence[epath.Path], reader: _Reader, skip_bad_rows: bool) -> Iterator[_Response]:
  for path in paths:
    for location, row in record_io.read(path):
      try:
        yield reader.read(row)
      except UserError as error:
        if not skip_bad_rows:
          raise UserError(f"{location}: {error}. --skip_bad_rows skips invalid rows.") from None
        reader.counts["skipped_rows"] += 1


def _score(
  experiment: Experiment, policy: Policy, reader: _Reader, responses: Sequence[_Response]
) -> None:
  """Computes missing log-probs under π_sft by the trainer's forward pass."""
  missing = [response for response in responses if response.logp is None]
  if not missing:
    return
  by_problem_id = {}
  for response in missing:
    prompt, ids = reader.prompt(response.problem), tuple(response.ids)
    group = by_problem_id.setdefault(response.problem.id, {})  # scores equal responses once
    group[ids] = Tree(prompt, (Branch(len(prompt), ids),))
  trees = [tree for group in by_problem_id.values() for tree in group.values()]
  path = experiment.workdir / "sample" / "scored.npz"
  store = reference.Store(path)
  length = max(
    experiment.config.model.max_length,
    *(len(tree.trunk) + len(tree.branches[0].ids) for tree in trees),
  )
  packing = reference.Packing(experiment.mesh, length, experiment.config.dpo.logit_chunk)
  reference.score(policy.model, policy.params, trees, store=store, packing=packing)
  for response in missing:
    prompt = reader.prompt(response.problem)
    response.logp = store[reference.branch_key(prompt, len(prompt), response.ids)].tolist()
  path.unlink()


def run(
  experiment: Experiment, files: Sequence[str], assume_finish: str = "", skip_bad_rows: bool = False
) -> dict:
  """Writes sample/traces/ and sample/import_report.json from files; this completes stage sample.

  Args:
    experiment: stages synthesize and sft are done.
    files: .jsonl or .parquet files.
    assume_finish: "eos" or "length" for rows without `finish`; "" refuses them.
    skip_bad_rows: skip and count invalid rows.

  Raises:
    UserError: an invalid file, row or field, or a problem with fewer traces than credit.best_of.
  """
  distributed.require_single_process("Taking traces from elsewhere")
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
    raise UserError(f"{', '.join(map(str, paths))}: no valid rows.")
  counts = collections.Counter(response.problem.id for response in responses)
  fewest, k = min(counts, key=lambda key: counts[key]), experiment.config.credit.best_of
  if counts[fewest] < k:
    raise UserError(
      f"Problem {fewest} has {counts[fewest]} traces, less than credit.best_of={k}: Best-of-k "
      "needs k samples."
    )
  _score(experiment, policy, reader, responses)
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
  figures = traces.figures(every) | {"problems": len(groups), "imported": report}
  return stage.finish(figures, shards.files())


def _records(
  experiment: Experiment, policy: Policy, responses: Sequence[_Response]
) -> Iterator[Trace]:
  generated = []
  for r in responses:
    arrays = np.asarray(r.ids), np.asarray(r.logp), np.asarray(r.drawn_logp)
    generated.append((r.problem, r.index, Generation(*arrays, r.finish_reason)))
  records = traces.to_records(experiment, policy, "sample", generated)
  for response, trace in zip(responses, records, strict=True):
    yield dataclasses.replace(trace, policy=response.policy)


def _report(counts: collections.Counter) -> dict:
  """The counts, and the fraction of token boundaries that tokenising moved or would move."""
  report = {name: int(count) for name, count in sorted(counts.items())}
  for name in ("reencoded", "retokenised"):
    if counts[f"{name}_boundaries"]:
      share = counts[f"{name}_boundaries_moved"] / counts[f"{name}_boundaries"]
      report[f"{name}_share_moved"] = round(share, 6)
  return report
