"""What a capable model is asked for D_syn, how its replies are read, and which problems are kept.

The paper's prompts, filters and thresholds are not known from public sources; all of these are
ours.
"""

import collections
import dataclasses
import hashlib
import re
from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein

from synthneg_jax.data import problem_files
from synthneg_jax.grading import answers, response_text
from synthneg_jax.runtime import config_files
from synthneg_jax.runtime.errors import UserError

_PROBLEM = re.compile(r"<problem>[ \t]*\n?(.*?)</problem>", re.DOTALL)
_STATED = {"integer": "#### {}", "math": "\\boxed{{{}}}"}  # how an answer is put to the grader
_ANSWER_LINE = re.compile(r"(?m)^[ *]*#{4,}.*$")


@dataclasses.dataclass(frozen=True)
class Templates:
  """Two prompt files of a folder.

  Attributes:
    problems: asks for new problems; holds {seeds} and {count}.
    solution: asks for one worked solution; holds {problem}.
  """

  problems: str
  solution: str

  @classmethod
  def read(cls, folder: str) -> "Templates":
    """Reads problems.txt and solution.txt of a folder; configs/prompts/... comes with the project,
    wherever this runs.

    Raises:
      UserError: a file is missing, or a placeholder in it.
    """
    path = config_files.shipped_path(folder)
    if not path.is_dir():
      raise UserError(f"synthesis.prompts={folder!r} is no folder; configs/prompts/gsm8k is one.")
    texts = []
    for name, placeholders in (("problems", ("{seeds}", "{count}")), ("solution", ("{problem}",))):
      file = path / f"{name}.txt"
      if not file.exists():
        raise UserError(f"The prompt file {file} does not exist.")
      text = file.read_text()
      for placeholder in placeholders:
        if placeholder not in text:
          raise UserError(f"The prompt file {file} does not hold {placeholder}.")
      texts.append(text.removesuffix("\n"))
    return cls(*texts)

  @property
  def identity(self) -> str:
    """Tells one set of prompts from another."""
    return hashlib.sha256(f"{self.problems}\0{self.solution}".encode()).hexdigest()[:16]

  def ask_problems(self, seeds: Sequence[str], count: int) -> str:
    """The prompt that asks for `count` new problems like the seeds."""
    blocks = "\n".join(f"<problem>\n{seed.removesuffix(chr(10))}\n</problem>" for seed in seeds)
    return self.problems.replace("{count}", str(count)).replace("{seeds}", blocks)

  def ask_solution(self, problem: str) -> str:
    """The prompt that asks for a worked solution."""
    return self.solution.replace("{problem}", problem)


def _said(reply: str, raw: bool) -> str:
  """A reply without its thoughts and the marks of its turn; "" where it never leaves its thought."""
  said = reply if raw else response_text.answer_text(reply) or ""
  return said if said == reply else said.strip()


def read_problems(reply: str, raw: bool) -> list[str]:
  """The problems between tags, in order; what stands outside of tags is no problem.

  Args:
    reply: what the model wrote.
    raw: spaces and the last line's end belong to the problem (the embedded task); else they are
      trimmed.
  """
  found = [match.group(1) for match in _PROBLEM.finditer(_said(reply, raw))]
  return [text if raw else text.strip() for text in found if text.strip()]


def read_solution(reply: str, raw: bool, kind: str = "integer") -> tuple[str, str] | None:
  """A reply as (solution in step format, its answer), or None where it states no answer.

  What the model thought before it answered is no part of it. In step format every line is a step
  and none is blank; what follows the line of the answer is cut. The answer stands alone on the last
  line behind `####` (integer, and readable by the grader), or in the last \\boxed{} (math).

  Args:
    reply: what the model wrote.
    raw: nothing is trimmed (the embedded task).
    kind: as task.answers.
  """
  reply = _said(reply, raw)
  if kind == "math":
    answer, end = problem_files.last_box(reply), reply.rfind("\\boxed")
    lines = (reply[:end] + reply[end:].partition("\n")[0]).splitlines()
    # A formula that the answer ends may close on a line of its own.
    closing = reply[end:].partition("\n")[2].splitlines()[:1]
    lines += [line for line in closing if line.strip() in ("$$", "\\]", "\\end{align*}")]
    return (
      ("\n".join(line.rstrip() for line in lines if line.strip()), answer)
      if answer and end >= 0
      else None
    )
  lines = list(_ANSWER_LINE.finditer(reply))
  if not lines:
    return None
  text = reply[: lines[-1].end()]
  if not raw:
    body = [line.rstrip() for line in text[: lines[-1].start()].splitlines()]
    last = re.sub(r"#{4,}\s*", "#### ", lines[-1].group().replace("**", "").strip())
    text = "\n".join([*(line for line in body if line.strip()), last])
  try:
    return text, answers.extract_gold(text)
  except UserError:
    return None


def same(answer: str, gold: str, kind: str) -> bool:
  """Whether the grader takes one answer for the other; False where it cannot read the gold one."""
  try:
    return answer == gold or answers.grade(_STATED[kind].format(answer), gold, kind=kind).correct
  except UserError:
    return False


@dataclasses.dataclass(frozen=True)
class Vote:
  """What several solutions of one problem say.

  Attributes:
    answer: the one that most of them state; the first stated of equally frequent ones.
    agreement: share of all draws that state it; those without a readable answer count against it.
    chosen: index of the first draw that states it; that is the known solution (ours).
    difficulty: median number of lines of the draws that state it, the answer's among them. The more
      there is to do, the harder (ours; the agreement of a capable model is near 1 on nearly all
      that is kept, and tells little).
  """

  answer: str
  agreement: float
  chosen: int
  difficulty: int


def vote(
  solutions: Sequence[tuple[str, str] | None], gold: str | None = None, kind: str = "integer"
) -> Vote | None:
  """The majority's answer; with a known answer, that answer if any draw states it.

  Args:
    solutions: as `read_solution` gives them, one a draw.
    gold: the known answer, if there is one.
    kind: as task.answers.

  Returns:
    None where no draw states an answer (or the known one).
  """
  voters = {}  # answer as first stated -> the draws that state it, in whatever form
  if gold is not None:
    voters[gold] = []
  for index, solution in enumerate(solutions):
    if solution:
      answer = next((known for known in voters if same(solution[1], known, kind)), solution[1])
      voters.setdefault(answer, []).append(index)
  answer = gold if gold is not None else max(voters, key=lambda key: len(voters[key]), default=None)
  if not voters.get(answer):
    return None
  agreeing = voters[answer]
  sizes = sorted(solutions[i][0].strip().count("\n") + 1 for i in agreeing)
  return Vote(answer, len(agreeing) / len(solutions), agreeing[0], sizes[(len(sizes) - 1) // 2])


_BUCKETS = 256  # of the bigrams that bound a distance from below


def _bigrams(text: str) -> np.ndarray:
  """How many of a text's pairs of neighbouring characters fall into each bucket; int16 [_BUCKETS]."""
  codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
  pairs = (codes[:-1] * np.uint64(31) + codes[1:] * np.uint64(7)) % np.uint64(_BUCKETS)
  return (
    np.bincount(pairs.astype(np.int64), minlength=_BUCKETS).clip(max=2**15 - 1).astype(np.int16)
  )


class NearDuplicates:
  """Texts that are kept only if they are far from every one kept before.

  The distance is that of `core.selection.deduplicate_by_edit_distance`: Levenshtein's over the
  longer length. An edit changes at most two bigrams into others, so that a quarter of the
  difference in their counts bounds it from below (Ukkonen's q-gram lemma); nearly all texts are
  told apart by that.
  """

  def __init__(self, threshold: float):
    """threshold: in [0, 1); 0 drops exact repeats only."""
    self._threshold, self._kept = threshold, []
    self._counts, self._lengths = np.zeros((64, _BUCKETS), np.int16), np.zeros(64, np.int64)

  def add(self, text: str) -> bool:
    """Keeps a text, unless it is near one that is kept; says which."""
    count, mine = len(self._kept), _bigrams(text)
    lengths = self._lengths[:count]
    most = self._threshold * np.maximum(lengths, len(text))  # edits that are still near
    close = np.flatnonzero(np.abs(lengths - len(text)) <= most)
    bound = np.abs(self._counts[close] - mine).sum(axis=1) / 4
    for other in close[bound <= most[close]]:
      near = (
        Levenshtein.normalized_distance(text, self._kept[other], score_cutoff=self._threshold)
        <= self._threshold
      )
      if near:
        return False
    if count == len(self._lengths):
      self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
      self._lengths = np.concatenate([self._lengths, np.zeros_like(self._lengths)])
    self._counts[count], self._lengths[count] = mine, len(text)
    self._kept.append(text)
    return True


def balance(difficulties: Sequence[int], count: int) -> list[int]:
  """Indices of `count` items whose difficulties are as evenly spread as the items allow, rising.

  One item of each difficulty in turn, the first ones first, until there are enough; all where there
  are not more (ours).
  """
  queues = {}
  for index, difficulty in enumerate(difficulties):
    queues.setdefault(difficulty, collections.deque()).append(index)
  chosen = []
  while queues and len(chosen) < count:
    for difficulty in sorted(queues):
      if len(chosen) < count:
        chosen.append(queues[difficulty].popleft())
      if not queues[difficulty]:
        del queues[difficulty]
  return sorted(chosen)
