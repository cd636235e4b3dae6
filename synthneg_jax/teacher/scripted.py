"""A scripted teacher for the embedded task, which answers prompts in place of a capable model.

It exercises the whole D_syn pipeline without a network, in process or behind an HTTP server.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from synthneg_jax.tasks import arithmetic

_LEAF = re.compile(r" ([A-Z])= (\d)(?!\d)")
_OPERATION = re.compile(r" ([A-Z]): ([A-Z])([-+*])([A-Z])")
_QUERY = re.compile(r" \? ([A-Z])=")
_BLOCK = re.compile(r"<problem>[ \t]*\n?(.*?)</problem>", re.DOTALL)
_COUNT = re.compile(r"Write (\d+) new problems")


def parse(prompt: str) -> arithmetic.Puzzle | None:
  """The puzzle that a prompt states; None if it states none or an unsolvable one."""
  query = _QUERY.search(prompt)
  if not query:
    return None
  definitions = {}
  matches = [*_LEAF.finditer(prompt), *_OPERATION.finditer(prompt)]
  for match in sorted(matches, key=lambda match: match.start()):
    name, *definition = match.groups()
    if len(definition) == 3 and not {definition[0], definition[2]} <= set(definitions):
      return None
    definitions[name] = int(definition[0]) if len(definition) == 1 else tuple(definition)
  puzzle = arithmetic.Puzzle(definitions, query.group(1))
  is_exact = puzzle.query in definitions and puzzle.prompt.strip() == prompt.strip()
  return puzzle if is_exact else None


def reply(task, messages: Sequence[tuple[str, str]], seed: int) -> str:
  """The teacher's reply: the requested number of problems, or a solution of the last problem.

  Args:
    task: the config's section.
    messages: (role, text); only the last is read.
    seed: selects the draw; with task.arithmetic.skip_step_prob = 0 all solutions of a problem are
      equal.
  """
  text = messages[-1][1]
  digest = hashlib.blake2b(f"{text}|{seed}".encode(), digest_size=8).digest()
  rng = np.random.default_rng(int.from_bytes(digest))
  wanted = _COUNT.search(text)
  if wanted:
    c = task.arithmetic
    sizes = (c.num_leaves, c.num_operations, (c.min_needed_ops, c.max_needed_ops))
    puzzles = (arithmetic.make_puzzle(rng, *sizes) for _ in range(int(wanted.group(1))))
    return "\n".join(f"<problem>\n{puzzle.prompt}</problem>" for puzzle in puzzles)
  blocks = _BLOCK.findall(text)
  puzzle = parse(blocks[-1]) if blocks else None
  if not puzzle:
    return "I see no problem here."
  return arithmetic.teach(rng, puzzle, task.arithmetic.skip_step_prob)
