"""D_syn from a capable model: prompts, parsing of replies, and selection of problems.

The prompts, filters and thresholds are ours; the paper's are not public.
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
_STATED = {"integer": "#### {}", "math": "\\boxed{{{}}}"}  # an answer as the grader expects it
_ANSWER_LINE = re.compile(r"(?m)^[ *]*#{4,}.*$")


@dataclasses.dataclass(frozen=True)
class Templates:
  """The two prompt templates of a folder.

  Attributes:
    problems: asks for new problems; contains {seeds} and {count}.
    solution: asks for one worked solution; contains {problem}.
  """

  problems: str
  solution: str

  @classmethod
  def read(cls, folder: str) -> "Templates":
    """Reads problems.txt and solution.txt of a folder; configs/prompts/... ship with the package.

    Raises:
      UserError: a missing file or placeholder.
    """
    path = config_files.shipped_path(folder)
    if not path.is_dir():
      raise UserError(f"synthesis.prompts={folder!r} is not a folder; try configs/prompts/gsm8k.")
    texts = []
    for name, placeholders in (("problems", ("{seeds}", "{count}")), ("solution", ("{problem}",))):
      file = path / f"{name}.txt"
      if not file.exists():
        raise UserError(f"The prompt file {file} does not exist.")
      text = file.read_text()
      for placeholder in placeholders:
        if placeholder not in text:
          raise UserError(f"The prompt file {file} does not contain {placeholder}.")
      texts.append(text.removesuffix("\n"))
    return cls(*texts)

  @property
  def identity(self) -> str:
    """A hash of both templates, 16 hex digits."""
    return hashlib.sha256(f"{self.problems}\0{self.solution}".encode()).hexdigest()[:16]

  def ask_problems(self, seeds: Sequence[str], count: int) -> str:
    """The prompt for `count` new problems like the seeds."""
    blocks = "\n".join(f"<problem>\n{seed.removesuffix(chr(10))}\n</problem>" for seed in seeds)
    return self.problems.replace("{count}", str(count)).replace("{seeds}", blocks)

  def ask_solution(self, problem: str) -> str:
    """The prompt for a worked solution."""
    return self.solution.replace("{problem}", problem)


def _visible_text(reply: str, raw: bool) -> str:
  """A reply without thoughts and turn markers; "" if the thoughts never end."""
  text = reply if raw else response_text.answer_text(reply) or ""
  return text if text == reply else text.strip()


def read_problems(reply: str, raw: bool) -> list[str]:
  """The problems between <problem> tags, in order.

  Args:
    reply: the model's text.
    raw: keeps spaces and the final newline (for the embedded task); else they are trimmed.
  """
  texts = [match.group(1) for match in _PROBLEM.finditer(_visible_text(reply, raw))]
  return [text if raw else text.strip() for text in texts if text.strip()]


def read_solution(reply: str, raw: bool, kind: str = "integer") -> tuple[str, str] | None:
  """Parses a reply into (solution in step format, its answer); None if it states no answer.

  Thoughts are removed. In step format every line is a step, no line is blank, and the text ends
  with the line of the answer. That line is `#### ANSWER`, readable by the grader (integer), or
  holds the end of the last \\boxed{} (math).

  Args:
    reply: the model's text.
    raw: disables trimming (for the embedded task).
    kind: as task.answers.
  """
  reply = _visible_text(reply, raw)
  if kind == "math":
    boxed = problem_files.boxed_answer(reply)
    if boxed is None:
      return None
    answer, stop = boxed
    rest_of_line, _, below = reply[stop:].partition("\n")
    lines = (reply[:stop] + rest_of_line).splitlines()
    # The formula around the box may close on the next line.
    closing = below.splitlines()[:1]
    lines += [line for line in closing if line.strip() in ("$$", "\\]", "\\end{align*}")]
    return "\n".join(line.rstrip() for line in lines if line.strip()), answer
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
  """Whether the grader accepts `answer` for `gold`; False if it cannot read `gold`."""
  try:
    return answer == gold or answers.grade(_STATED[kind].format(answer), gold, kind=kind).correct
  except UserError:
    return False


@dataclasses.dataclass(frozen=True)
class Vote:
  """The majority vote over several solutions of one problem.

  Attributes:
    answer: the most frequent answer; the first stated if tied.
    agreement: share of all draws that state it, including draws without a readable answer.
    chosen: index of the first draw that states it, which becomes the known solution (ours).
    difficulty: median number of lines of the draws that state it, including the answer's line
      (ours; a capable model's agreement is near 1 on nearly all kept problems, so it says little).
  """

  answer: str
  agreement: float
  chosen: int
  difficulty: int


def vote(
  solutions: Sequence[tuple[str, str] | None], gold: str | None = None, kind: str = "integer"
) -> Vote | None:
  """Votes for the majority's answer or, if `gold` is given, for that answer.

  Args:
    solutions: results of `read_solution`, one per draw.
    gold: the known answer, if any.
    kind: as task.answers.

  Returns:
    None if no draw states an answer (or the known one).
  """
  voters = {}  # answer as first stated -> indices of the draws with an equal answer
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


_BUCKETS = 256  # for bigrams


def _bigrams(text: str) -> np.ndarray:
  """Number of a text's bigrams in each hash bucket; int16 [_BUCKETS]."""
  codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
  pairs = (codes[:-1] * np.uint64(31) + codes[1:] * np.uint64(7)) % np.uint64(_BUCKETS)
  counts = np.bincount(pairs.astype(np.int64), minlength=_BUCKETS)
  return counts.clip(max=2**15 - 1).astype(np.int16)


class NearDuplicates:
  """Collects texts that are far from every text kept before.

  The distance is that of `core.selection.deduplicate_by_edit_distance`: Levenshtein distance over
  the longer length. An edit replaces at most two bigrams, so a quarter of the L1 difference of
  bigram counts is a lower bound (Ukkonen's q-gram lemma), which settles nearly all comparisons.
  """

  def __init__(self, threshold: float):
    """threshold: in [0, 1); 0 drops only exact repeats."""
    self._threshold, self._kept = threshold, []
    self._counts, self._lengths = np.zeros((64, _BUCKETS), np.int16), np.zeros(64, np.int64)

  def add(self, text: str) -> bool:
    """Keeps a text unless it is near a kept one; returns whether it was kept."""
    count, bigrams = len(self._kept), _bigrams(text)
    lengths = self._lengths[:count]
    max_edits = self._threshold * np.maximum(lengths, len(text))
    close = np.flatnonzero(np.abs(lengths - len(text)) <= max_edits)
    bound = np.abs(self._counts[close] - bigrams).sum(axis=1) / 4
    for other in close[bound <= max_edits[close]]:
      distance = Levenshtein.normalized_distance(
        text, self._kept[other], score_cutoff=self._threshold
      )
      if distance <= self._threshold:
        return False
    if count == len(self._lengths):
      self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
      self._lengths = np.concatenate([self._lengths, np.zeros_like(self._lengths)])
    self._counts[count], self._lengths[count] = bigrams, len(text)
    self._kept.append(text)
    return True


def balance(difficulties: Sequence[int], count: int) -> list[int]:
  """Indices of `count` items with evenly spread difficulties, in increasing order (ours).

  Takes one item of each difficulty in turn, in input order; all items if there are fewer.
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
