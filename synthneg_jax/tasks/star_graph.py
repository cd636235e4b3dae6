"""The star graph: which way from the centre leads to the goal? One decision, after which the path
can only be followed.

Several arms leave a centre; the prompt lists their edges in random order and names centre and goal,
the leaf of one arm. The solution is the path, one node a step, after Bachmann & Nagarajan
(https://arxiv.org/abs/2403.06963):

     3 11 |7 5 |3 7 |11 2 |?3 2 =        3 11 2

The node next to the centre is the critical token: the others are copied from the list of edges, one
look-up each, but for it the goal must be traced back. A model that walks any arm to its end is
right with probability 1/degree: chance.

What a base model is taught here, and they are not: every look-up, along the edges and against them,
without a plan. Marks say what is asked: `=` the path (a base walks some arm), `<` a walk from the
goal back to the centre. The form of the base's documents is ours. Node names are numbers below
`num_nodes`; arrays hold them as they are. Shape letters: N graphs, A arms, L nodes of a path, E
edges, C tokens of a prompt.
"""

import dataclasses

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from synthneg_jax.runtime.errors import UserError

EOS, PAD = "<eos>", "<pad>"
PATH, BACK = "=", "<"
_BAR, _ASK = "|", "?"
WORDS = (
  PAD,
  EOS,
  _BAR,
  _ASK,
  PATH,
  BACK,
)  # their ids are their places; node v is the token len(WORDS) + v


@dataclasses.dataclass(frozen=True)
class Graphs:
  """N star graphs.

  Attributes:
    arm_NAL: int, the nodes of every arm from the centre, which is the first node of each, to its
      leaf.
    edge_NE2: int, (from, to) of every edge, in the order of the prompt.
    goal_N: int, the arm whose leaf is asked for.
  """

  arm_NAL: np.ndarray
  edge_NE2: np.ndarray
  goal_N: np.ndarray

  def __len__(self) -> int:
    return len(self.goal_N)

  def take(self, index_M) -> "Graphs":
    """The graphs of these indices, in their order."""
    return Graphs(self.arm_NAL[index_M], self.edge_NE2[index_M], self.goal_N[index_M])

  @property
  def path_NL(self) -> np.ndarray:
    """The right path of each: centre, critical node, ..., goal."""
    return self.arm_NAL[np.arange(len(self)), self.goal_N]


def draw(
  rng: np.random.Generator, count: int, degree: int, path_nodes: int, num_nodes: int
) -> Graphs:
  """Star graphs with random node names, order of edges and goal; num_nodes is at least 1 + degree ·
  (path_nodes - 1).
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
    graphs: all of one size.
    mark: what is asked, one for all or one a graph.
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
  """The same with EOS behind."""
  return np.concatenate([ids_NT, np.full((len(ids_NT), 1), WORDS.index(EOS))], axis=1)


def solution_ids(graphs: Graphs) -> np.ndarray:
  """Token ids of the right paths, EOS last, [N, L + 1]."""
  return with_eos(tokens(graphs.path_NL))


def tours(rng: np.random.Generator, graphs: Graphs) -> tuple[np.ndarray, np.ndarray]:
  """Documents that show many look-ups: all arms in random order, along the edges or (`<`) against
  them; no EOS.

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
  """Documents of one walk each: some arm, whatever the goal (`=`), or the goal's arm from leaf to
  centre (`<`), EOS last.

  Returns:
    (prompts [N, C], responses [N, L + 1]).
  """
  count, degree, _ = graphs.arm_NAL.shape
  back_N = rng.random(count) < 0.5
  some_NL = graphs.arm_NAL[np.arange(count), rng.integers(degree, size=count)]
  walked_NL = np.where(back_N[:, None], graphs.path_NL[:, ::-1], some_NL)
  return prompt_ids(graphs, np.where(back_N, BACK, PATH)), with_eos(tokens(walked_NL))


def judge(prompt: str, response: str) -> str:
  """What a response is: "right", "other_arm" (a whole arm, not the goal's) or "illegal". For
  diagnosis, never training.

  Args:
    prompt: as the tokenizer writes it, asking for the path.
    response: the text of a response, EOS not included.
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
  """A problem of the config: (prompt, path, path as the answer)."""
  graph = _drawn(task, rng, 1)
  solution = text(tokens(graph.path_NL[0]))
  return text(prompt_ids(graph)[0]), solution, solution.strip()


def document(rng: np.random.Generator, task, section) -> tuple[str, str, str]:
  """What the base model reads: `tours` by section.random_step_fraction, else `walks`; no answer."""
  tour = rng.random() < section.random_step_fraction
  prompt_NC, response_NT = (tours if tour else walks)(rng, _drawn(task, rng, 1))
  return text(prompt_NC[0]), text(response_NT[0]), ""


def _drawn(task, rng: np.random.Generator, count: int) -> Graphs:
  check(task)
  c = task.star_graph
  return draw(rng, count, c.degree, c.path_nodes, c.num_nodes)


def check(task) -> None:
  """Refuses sizes that make no star.

  Raises:
    UserError: names the leaves.
  """
  c = task.star_graph
  if c.degree < 2 or c.path_nodes < 3 or c.num_nodes < 1 + c.degree * (c.path_nodes - 1):
    raise UserError(
      f"task.star_graph.degree={c.degree}, task.star_graph.path_nodes={c.path_nodes}, "
      f"task.star_graph.num_nodes={c.num_nodes}: "
      "there must be at least 2 arms, 3 nodes in a path, and 1 + degree * (path_nodes - 1) names."
    )


def build_tokenizer(num_nodes: int) -> tokenizers.Tokenizer:
  """One token a node (`7 `, its space included, so that each is a step of its own) and one a mark;
  text round-trips.
  """
  words = [*WORDS, *(f"{node} " for node in range(num_nodes))]
  tokenizer = tokenizers.Tokenizer(
    models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=PAD)
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[0-9]+ |[|?=<]"), behavior="isolated")
  tokenizer.decoder = decoders.Fuse()
  tokenizer.add_special_tokens([PAD, EOS])
  return tokenizer


def text(ids) -> str:
  """The text of one response's or prompt's ids, special tokens left out."""
  return "".join("" if i < 2 else WORDS[i] if i < len(WORDS) else f"{i - len(WORDS)} " for i in ids)
