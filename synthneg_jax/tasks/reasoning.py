"""Problems of reasoning-gym (https://github.com/open-thought/reasoning-gym), any of its datasets.

All problems are items of one dataset with one seed, since neighbouring seeds share items: test
problems are the first indices, and each seed of a run has a block of indices of its own behind
them. Items whose question stands there already are passed over.

Solutions are those that the dataset writes (gsm_symbolic), a running sum (chain_sum), or the bare
answer; they end in `#### answer`. Answers that are numbers are graded as those of other tasks;
others by the dataset's own `score_answer`, if that was read and evaluates no text.
"""

import dataclasses
import difflib
import functools
import re

from synthneg_jax.data.records import Problem
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError

_SEED = 0
_TEST_INDICES = 100_000  # indices before the first seed's block
_BLOCK = 50_000  # indices of a seed
_LARGEST_SEED = 99  # some datasets draw something for every index at once
_PASSED_OVER = 20  # items looked at for every one wanted, at most
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_MARK = re.compile(r"^\s*####[ \t]*", re.MULTILINE)

# Scorers of version 0.1.25 that were read: they compare texts, numbers, JSON or tables, evaluate
# nothing, and give full marks to right answers alone. The datasets of the first list have the base
# class's comparison of texts.
_COMPARED_AS_TEXT = frozenset(
  "acre aiw arc_1d base_conversion basic_arithmetic bf binary_alternation caesar_cipher "
  "count_bits count_primes course_schedule gcd isomorphic_strings largest_island lcm "
  "leg_counting letter_counting list_functions mahjong_puzzle maze modulo_grid "
  "number_filtering number_sequence ransom_note rotate_matrix rotten_oranges simple_equations "
  "simple_geometry string_manipulation string_splitting string_synthesis syllogism "
  "word_sequence_reversal".split()
)
REVIEWED = _COMPARED_AS_TEXT | frozenset(
  "ab circuit_logic color_cube_rotation dice family_relationships group_anagrams "
  "knights_knaves needle_haystack palindrome_generation palindrome_partitioning path_star "
  "self_reference shortest_path spell_backward time_intervals word_sorting zebra_puzzles".split()
)
_EVALUATING = (
  "binary_matrix bitwise_arithmetic codeio countdown intermediate_integration n_queens "
  "number_sorting polynomial_multiplication propositional_logic puzzle24 simple_integration "
  "spiral_matrix string_insertion".split()
)
REFUSED = {
  **dict.fromkeys(
    _EVALUATING, "its scorer may evaluate the answer's text as code or as an expression"
  ),
  "figlet_font": "its scorer gives full marks for ten matching letters",
  "game_of_life_halting": "its scorer takes any text for True",
  "letter_jumble": "its scorer takes any text that begins with the right words",
}


def _registered(name: str) -> tuple[type, type]:
  """A dataset's class and its config's class.

  Raises:
    UserError: reasoning-gym is not installed, or has no such dataset.
  """
  try:
    from reasoning_gym.factory import DATASETS
  except ImportError:
    raise UserError(
      "task.name=reasoning_gym needs: pip install 'synthneg_jax[reasoning]'."
    ) from None
  if name not in DATASETS:
    near = difflib.get_close_matches(name, DATASETS, n=3)
    names = ", ".join(sorted(DATASETS))
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {names}."
    raise UserError(
      f"task.reasoning_gym.dataset={name!r}: reasoning-gym has no such dataset; {hint}"
    )
  return DATASETS[name]


@functools.lru_cache(maxsize=8)
def dataset(name: str, params: str, size: int):
  """A dataset of reasoning-gym with these parameters.

  Raises:
    UserError: there is no such dataset or parameter, or its config refuses the values.
  """
  kind, config_kind = _registered(name)
  chosen, known = (
    config_schema.literals(params),
    {field.name for field in dataclasses.fields(config_kind)} - {"seed", "size"},
  )
  if unknown := [parameter for parameter in chosen if parameter not in known]:
    raise UserError(
      f"task.reasoning_gym.params: {name} has no parameter {unknown[0]!r}; it has "
      f"{', '.join(sorted(known)) or 'none'}."
    )
  try:
    config = config_kind(**chosen, seed=_SEED, size=size)
    config.validate()
    return kind(config)
  except (AssertionError, TypeError, ValueError) as error:
    raise UserError(f"task.reasoning_gym.params={params!r}: {name} refuses it ({error}).") from None


def _running_sum(item: dict) -> str:
  """A solution of chain_sum: one addition or subtraction a line."""
  first, *rest = item["metadata"]["expression"].split()
  total, lines = int(first), []
  for operator, term in zip(rest[::2], map(int, rest[1::2]), strict=True):
    after = total + term if operator == "+" else total - term
    lines.append(f"{total} {operator} {term} = {after}\n")
    total = after
  return "".join(lines)


def _solution(name: str, item: dict) -> str:
  steps = _running_sum(item) if name == "chain_sum" else item["metadata"].get("answer_cot", "")
  steps = steps.rpartition("\n####")[0] if "\n####" in steps else steps.rstrip("\n")
  return f"{steps}\n#### {item['answer']}".lstrip("\n")


def _dataset_with(task, index: int):
  """The task's dataset, large enough for an index; of few sizes, since some are slow to make."""
  section = task.reasoning_gym
  return dataset(section.dataset, section.params, -(-(index + 1) // _BLOCK) * _BLOCK)


def _problem(task, split: str, index: int) -> Problem:
  """An item as a problem; its source names the template where the dataset has templates."""
  name, of_index = task.reasoning_gym.dataset, _dataset_with(task, index)
  item, templates = of_index[index], getattr(of_index, "task_indices", None)
  source = "/".join([task.name, split, name, *([str(templates[index])] if templates else [])])
  solution, answer = _solution(name, item), str(item["answer"])
  return Problem(f"{task.name}/{name}/{index:07d}", item["question"], solution, answer, source)


def load(task, seed: int, split: str, count: int) -> list[Problem]:
  """The first `count` problems of a split with different questions.

  Test problems are the same whatever the seed.

  Raises:
    UserError: a dataset, parameter or scorer that cannot be used, too large a seed, or too few
      different questions.
  """
  if seed > _LARGEST_SEED:
    raise UserError(
      f"seed={seed}: task.name=reasoning_gym has problems for seeds up to {_LARGEST_SEED}."
    )
  if split == "test":
    first, end = task.test_start, _TEST_INDICES
  else:
    first = _TEST_INDICES + seed * _BLOCK
    end = first + _BLOCK
  found: dict[str, Problem] = {}
  for index in range(first, min(first + _PASSED_OVER * count, end)):
    problem = _problem(task, split, index)
    _check_answer(task, problem.answer)
    found.setdefault(problem.prompt, problem)
    if len(found) == count:
      return list(found.values())
  raise UserError(
    f"task.reasoning_gym.dataset={task.reasoning_gym.dataset} has {len(found)} different questions "
    f"with these parameters; {count} {split} problems are asked for."
  )


def _check_answer(task, answer: str) -> None:
  """Refuses an answer that nothing here can judge.

  Raises:
    UserError: says why.
  """
  name = task.reasoning_gym.dataset
  if task.verifier or name in REVIEWED or is_number(answer):
    return
  reason = REFUSED.get(name, "its scorer was not reviewed")
  raise UserError(
    f"task.reasoning_gym.dataset={name}: {reason}, and answers such as {answer[:60]!r} are no "
    "numbers; bring a verifier by task.verifier=module:function."
  )


def is_number(answer: str) -> bool:
  """Whether an answer is one that the project's own grader compares."""
  return _NUMBER.fullmatch(answer) is not None


def stated(response: str) -> str | None:
  """What a response states behind its last ####, several lines perhaps; None without any."""
  marks = list(_MARK.finditer(response))
  return response[marks[-1].end() :].strip() if marks else None


def score(task, problem: Problem, answer: str) -> float:
  """What the dataset's own scorer says of an answer, from 0 to 1; 0 where it fails.

  For datasets of `REVIEWED` only.
  """
  index = int(problem.id.rpartition("/")[2])
  of_index = _dataset_with(task, index)
  assert task.reasoning_gym.dataset in REVIEWED
  try:
    return float(of_index.score_answer(answer, of_index[index]))
  except Exception:  # of what a model wrote, anything
    return 0.0
