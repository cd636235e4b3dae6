"""Problems of reasoning-gym's datasets (https://github.com/open-thought/reasoning-gym).

All problems are items of one dataset with one seed, because neighbouring seeds share items: test
problems have the first indices, and each seed of a run has its own block of indices after them.
Items with a repeated question are skipped.

Solutions are the dataset's own (gsm_symbolic), a running sum (chain_sum), or the bare answer; they
end in `#### answer`. The grader grades numeric answers; the dataset's `score_answer` scores others,
if it was reviewed and evaluates no text.
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
_BLOCK = 50_000  # indices per seed
_LARGEST_SEED = 99  # some datasets draw data for every index in advance
_MAX_ITEMS_PER_PROBLEM = 20  # items drawn per problem, to skip repeated questions
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_MARK = re.compile(r"^\s*####[ \t]*", re.MULTILINE)

# Reviewed scorers of version 0.1.25: they compare texts, numbers, JSON or tables, evaluate nothing,
# and return 1.0 only for correct answers. Datasets of the first list inherit the base class's
# comparison of texts.
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
  "figlet_font": "its scorer returns 1.0 for ten matching letters",
  "game_of_life_halting": "its scorer reads any text as True",
  "letter_jumble": "its scorer accepts any text that starts with the right words",
}


def _registered(name: str) -> tuple[type, type]:
  """The class of a dataset and the class of its config.

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
    hint = " or ".join(near) + "?" if near else ", ".join(sorted(DATASETS)) + "."
    hint = f"did you mean {hint}" if near else f"must be one of {hint}"
    raise UserError(f"task.reasoning_gym.dataset={name!r}: unknown dataset; {hint}")
  return DATASETS[name]


@functools.lru_cache(maxsize=8)
def dataset(name: str, params: str, size: int):
  """A dataset of reasoning-gym with these parameters.

  Raises:
    UserError: unknown dataset or parameter, or a value that the dataset rejects.
  """
  dataset_class, config_class = _registered(name)
  chosen = config_schema.literals(params)
  known = {field.name for field in dataclasses.fields(config_class)} - {"seed", "size"}
  if unknown := [parameter for parameter in chosen if parameter not in known]:
    raise UserError(
      f"task.reasoning_gym.params: {name} has no parameter {unknown[0]!r}; it has "
      f"{', '.join(sorted(known)) or 'none'}."
    )
  try:
    config = config_class(**chosen, seed=_SEED, size=size)
    config.validate()
    return dataset_class(config)
  except (AssertionError, TypeError, ValueError) as error:
    raise UserError(f"task.reasoning_gym.params={params!r}: {name} rejects it ({error}).") from None


def _running_sum(item: dict) -> str:
  """A solution of chain_sum: one addition or subtraction per line."""
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
  """The task's dataset with at least index + 1 items; sizes are rounded up to reuse the cache."""
  section = task.reasoning_gym
  return dataset(section.dataset, section.params, -(-(index + 1) // _BLOCK) * _BLOCK)


def _problem(task, split: str, index: int) -> Problem:
  """An item as a problem; its source includes the template if the dataset has templates."""
  name, items = task.reasoning_gym.dataset, _dataset_with(task, index)
  item, templates = items[index], getattr(items, "task_indices", None)
  source = "/".join([task.name, split, name, *([str(templates[index])] if templates else [])])
  solution, answer = _solution(name, item), str(item["answer"])
  return Problem(f"{task.name}/{name}/{index:07d}", item["question"], solution, answer, source)


def load(task, seed: int, split: str, count: int) -> list[Problem]:
  """The first `count` problems of a split with distinct questions.

  Test problems do not depend on the seed.

  Raises:
    UserError: an unusable dataset, parameter or scorer, a seed that is too large, or too few
      distinct questions.
  """
  if seed > _LARGEST_SEED:
    raise UserError(f"seed={seed}: task.name=reasoning_gym supports seeds up to {_LARGEST_SEED}.")
  if split == "test":
    first, end = task.test_start, _TEST_INDICES
  else:
    first = _TEST_INDICES + seed * _BLOCK
    end = first + _BLOCK
  problems: dict[str, Problem] = {}  # by question
  for index in range(first, min(first + _MAX_ITEMS_PER_PROBLEM * count, end)):
    problem = _problem(task, split, index)
    _check_answer(task, problem.answer)
    problems.setdefault(problem.prompt, problem)
    if len(problems) == count:
      return list(problems.values())
  raise UserError(
    f"task.reasoning_gym.dataset={task.reasoning_gym.dataset} has only {len(problems)} distinct "
    f"questions with these parameters; {count} {split} problems are needed."
  )


def _check_answer(task, answer: str) -> None:
  """Raises UserError for an answer that neither the grader nor a reviewed scorer can judge."""
  name = task.reasoning_gym.dataset
  if task.verifier or name in REVIEWED or is_number(answer):
    return
  reason = REFUSED.get(name, "its scorer was not reviewed")
  raise UserError(
    f"task.reasoning_gym.dataset={name}: {reason}, and answers such as {answer[:60]!r} are not "
    "numbers; set task.verifier=module:function."
  )


def is_number(answer: str) -> bool:
  """Whether the grader compares this answer."""
  return _NUMBER.fullmatch(answer) is not None


def stated(response: str) -> str | None:
  """The text after the last #### of a response, possibly several lines; None without ####."""
  marks = list(_MARK.finditer(response))
  return response[marks[-1].end() :].strip() if marks else None


def score(task, problem: Problem, answer: str) -> float:
  """The score of the dataset's own scorer, from 0 to 1; 0 if it raises.

  The dataset must be in `REVIEWED`.
  """
  index = int(problem.id.rpartition("/")[2])
  items = _dataset_with(task, index)
  assert task.reasoning_gym.dataset in REVIEWED
  try:
    return float(items.score_answer(answer, items[index]))
  except Exception:  # scorers may raise anything on model text
    return 0.0
