"""The star graph: find the path from the centre to a goal, with a single decision at the centre.

Several arms leave the centre. The prompt lists their edges in random order, then the centre and the
goal, which is the leaf of one arm. The solution is the path, one node per step, after Bachmann &
Nagarajan (https://arxiv.org/abs/2403.06963):

     3 11 |7 5 |3 7 |11 2 |?3 2 =        3 11 2

The node after the centre is the critical token: every other node is one lookup in the list of
edges, but this one requires tracing the path back from the goal. Walking a random arm to its end is
correct with probability 1/degree.

Unlike in that paper, the base model is pretrained on lookups in both directions of the edges,
without planning; the form of these documents is ours. The prompt ends with a mark: `=` asks for the
path (the base model walks some arm), `<` for the walk from the goal back to the centre. Node names
are the integers below `num_nodes`. Shape letters: N graphs, A arms, L nodes of a path, E edges, C
tokens of a prompt, T tokens of a response, M indices.
"""

import dataclasses

import numpy as np
import tokenizers

from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import word_tokenizer
from synthneg_jax.tasks.word_tokenizer import EOS, PAD

PATH, BACK = "=", "<"
_BAR, _ASK = "|", "?"
WORDS = (PAD, EOS, _BAR, _ASK, PATH, BACK)  # in the order of ids; node v has id len(WORDS) + v


@dataclasses.dataclass(frozen=True)
class Graphs:
  """N star graphs.

  Attributes:
    arm_NAL: int, the nodes of each arm from the centre to its leaf.
    edge_NE2: int, the (from, to) nodes of each edge, in the order of the prompt.
    goal_N: int, the index of the arm whose leaf is the goal.
  """

  arm_NAL: np.ndarray
  edge_NE2: np.ndarray
  goal_N: np.ndarray

  def __len__(self) -> int:
    return len(self.goal_N)

  def take(self, index_M) -> "Graphs":
    """The graphs with these indices."""
    return Graphs(self.arm_NAL[index_M], self.edge_NE2[index_M], self.goal_N[index_M])

  @property
  def path_NL(self) -> np.ndarray:
    """The correct paths: centre, critical node, ..., goal."""
    return self.arm_NAL[np.arange(len(self)), self.goal_N]


def draw(
  rng: np.random.Generator, count: int, degree: int, path_nodes: int, num_nodes: int
) -> Graphs:
  """Star graphs with random node names, edge order and goal.

  Args:
    rng: random generator.
    count: number of graphs.
    degree: number of arms.
    path_nodes: nodes of an arm, including the centre.
    num_nodes: number of node names, at least 1 + degree · (path_nodes - 1).
  """
  inner = degree * (path_nodes - 1)
  name_NV = np.argsort(rng.random((count, num_nodes)), axis=1)[:, : 1 + inner]
  center_NA1 = np.repeat(name_NV[:, :1, None], degree, axis=1)
  arm_NAL = np.concatenate(
    [center_NA1, name_NV[:, 1:].reshape(count, degree, path_nodes - 1)], axis=2
  )
  edge_NE2 = np.stack([arm_NAL[:, :, :-1], arm_NAL[:, :, 1:]], axis=-1).reshape(count, inner, 2)
  order_NE = np.argsort(rng.random((count, inner)), axis=1)
  edge_NE2 = np.take_along_axis(edge_NE2, order_NE[:, :, None], axis=1)
  return Graphs(arm_NAL, edge_NE2, rng.integers(degree, size=count))


def tokens(node: np.ndarray) -> np.ndarray:
  """Token ids of nodes."""
  return np.asarray(node) + len(WORDS)


def prompt_ids(graphs: Graphs, mark: str | np.ndarray = PATH) -> np.ndarray:
  """Token ids of the prompts, [N, C].

  Args:
    graphs: the graphs.
    mark: PATH or BACK, for all graphs or one per graph.
  """
  count, edges = graphs.edge_NE2.shape[:2]

  def column(value):
    return np.broadcast_to(value, count)[:, None]

  bar_NE1 = np.full((count, edges, 1), WORDS.index(_BAR))
  listed_NC = np.concatenate([tokens(graphs.edge_NE2), bar_NE1], axis=2).reshape(count, -1)
  path_NL = graphs.path_NL
  marks_N = np.array([WORDS.index(each) for each in np.atleast_1d(mark)])
  asked = [
    column(WORDS.index(_ASK)),
    column(tokens(path_NL[:, 0])),
    column(tokens(path_NL[:, -1])),
    column(marks_N),
  ]
  return np.concatenate([listed_NC, *asked], axis=1)


def with_eos(ids_NT: np.ndarray) -> np.ndarray:
  """Appends EOS: [N, T] to [N, T + 1]."""
  return np.concatenate([ids_NT, np.full((len(ids_NT), 1), WORDS.index(EOS))], axis=1)


def solution_ids(graphs: Graphs) -> np.ndarray:
  """Token ids of the correct paths with EOS, [N, L + 1]."""
  return with_eos(tokens(graphs.path_NL))


def tours(rng: np.random.Generator, graphs: Graphs) -> tuple[np.ndarray, np.ndarray]:
  """Documents with all arms in random order, along the edges or (`<`) against them, without EOS.

  Returns:
    (prompts [N, C], responses [N, A·L]).
  """
  count, degree, nodes = graphs.arm_NAL.shape
  back_N = rng.random(count) < 0.5
  order_NA = np.argsort(rng.random((count, degree)), axis=1)
  arm_NAL = np.take_along_axis(graphs.arm_NAL, order_NA[:, :, None], axis=1)
  arm_NAL = np.where(back_N[:, None, None], arm_NAL[:, :, ::-1], arm_NAL)
  return prompt_ids(graphs, np.where(back_N, BACK, PATH)), tokens(
    arm_NAL.reshape(count, degree * nodes)
  )


def walks(rng: np.random.Generator, graphs: Graphs) -> tuple[np.ndarray, np.ndarray]:
  """Documents of one walk with EOS: a random arm (`=`), or the goal's arm from its leaf (`<`).

  Returns:
    (prompts [N, C], responses [N, L + 1]).
  """
  count, degree, _ = graphs.arm_NAL.shape
  back_N = rng.random(count) < 0.5
  some_NL = graphs.arm_NAL[np.arange(count), rng.integers(degree, size=count)]
  walked_NL = np.where(back_N[:, None], graphs.path_NL[:, ::-1], some_NL)
  return prompt_ids(graphs, np.where(back_N, BACK, PATH)), with_eos(tokens(walked_NL))


def judge(prompt: str, response: str) -> str:
  """Classifies a response, for diagnosis only: "right", "other_arm" (a whole arm) or "illegal".

  Args:
    prompt: a decoded prompt with mark PATH.
    response: a decoded response without EOS.
  """
  listed, asked = prompt.split(_ASK)
  successors = {}
  for edge in listed.split(_BAR)[:-1]:
    start, end = edge.split()
    successors.setdefault(start, set()).add(end)
  center, goal = asked.removesuffix(PATH).split()
  nodes = response.split()
  legal = nodes[:1] == [center] and all(
    b in successors.get(a, ()) for a, b in zip(nodes, nodes[1:], strict=False)
  )
  if not legal or len(nodes) < 2 or nodes[-1] in successors:
    return "illegal"
  return "right" if nodes[-1] == goal else "other_arm"


def problem(rng: np.random.Generator, task) -> tuple[str, str, str]:
  """Draws a problem: (prompt, path, path as the answer)."""
  graph = _drawn(task, rng, 1)
  solution = text(tokens(graph.path_NL[0]))
  return text(prompt_ids(graph)[0]), solution, solution.strip()


def document(rng: np.random.Generator, task, section) -> tuple[str, str, str]:
  """Draws a pretraining document: with section.random_step_fraction of `tours`, else of `walks`."""
  tour = rng.random() < section.random_step_fraction
  prompt_NC, response_NT = (tours if tour else walks)(rng, _drawn(task, rng, 1))
  return text(prompt_NC[0]), text(response_NT[0]), ""


def _drawn(task, rng: np.random.Generator, count: int) -> Graphs:
  check(task)
  c = task.star_graph
  return draw(rng, count, c.degree, c.path_nodes, c.num_nodes)


def check(task) -> None:
  """Raises UserError if the configured sizes do not make a star."""
  c = task.star_graph
  if c.degree < 2 or c.path_nodes < 3 or c.num_nodes < 1 + c.degree * (c.path_nodes - 1):
    raise UserError(
      f"task.star_graph.degree={c.degree}, task.star_graph.path_nodes={c.path_nodes}, "
      f"task.star_graph.num_nodes={c.num_nodes}: must satisfy degree >= 2, path_nodes >= 3 and "
      "num_nodes >= 1 + degree * (path_nodes - 1)."
    )


def build_tokenizer(num_nodes: int) -> tokenizers.Tokenizer:
  """One token per mark and per node (`7 `, with its space, so that each node is a step)."""
  words = [*WORDS, *(f"{node} " for node in range(num_nodes))]
  return word_tokenizer.build(words, r"[0-9]+ |[|?=<]")


def text(ids) -> str:
  """Decodes the ids of one prompt or response, without special tokens."""
  words = []
  for i in ids:
    if i >= len(WORDS):
      words.append(f"{i - len(WORDS)} ")
    elif WORDS[i] not in (PAD, EOS):
      words.append(WORDS[i])
  return "".join(words)
