"""The embedded task's scripted teacher in the place of a capable model: it reads the prompts and
answers them.

It lets the whole way of D_syn be walked without a network, in this process or behind a server that
speaks the protocol.
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
  """The puzzle that a prompt states; None where it states none, or one that cannot be worked out."""
  query = _QUERY.search(prompt)
  if not query:
    return None
  found = {}
  for match in sorted(
    [*_LEAF.finditer(prompt), *_OPERATION.finditer(prompt)], key=lambda match: match.start()
  ):
    name, *definition = match.groups()
    if len(definition) == 3 and not {definition[0], definition[2]} <= set(found):
      return None
    found[name] = int(definition[0]) if len(definition) == 1 else tuple(definition)
  puzzle = arithmetic.Puzzle(found, query.group(1))
  return puzzle if puzzle.query in found and puzzle.prompt.strip() == prompt.strip() else None


def reply(task, messages: Sequence[tuple[str, str]], seed: int) -> str:
  """What the teacher writes: as many problems as are asked for, or the solution of the last problem
  between tags.

  Args:
    task: the config's section.
    messages: (role, text); only the last counts.
    seed: another one, another draw; with task.arithmetic.skip_step_prob = 0 every solution of a
      problem is the same.
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
  return (
    arithmetic.teach(rng, puzzle, task.arithmetic.skip_step_prob)
    if puzzle
    else "I see no problem here."
  )
