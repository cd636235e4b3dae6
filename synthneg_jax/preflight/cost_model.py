"""What a config asks for, counted on paper: trees, batches, tokens, rollouts and bytes, from
assumed lengths.
"""

import dataclasses
import math

import jax

from synthneg_jax.models.config import ModelConfig
from synthneg_jax.models.decoder import Model
from synthneg_jax.pipeline import train_policy
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.training.batch import Shape

# share of a row that trees are assumed to fill where three or more go into one; else whole trees go
# in
PACKED = 0.95
_WIDEST = 1.1  # the fullest row's scored tokens over the mean's
_JSON_BYTES = 32  # of a drawn token: its id, two log-probs and its text, in a line of JSON
_ROLLOUT_BYTES = 7  # of a rollout's token: its id


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Means over problems and responses, before anything was drawn.

  Attributes:
    prompt, response: tokens; the longest are assumed to be twice as long.
    steps: of a response.
    pass_rate: share of the SFT policy's traces that are right.
  """

  prompt: float
  response: float
  steps: float
  pass_rate: float

  def __post_init__(self):
    if min(self.prompt, self.response, self.steps) < 1 or not 0 < self.pass_rate < 1:
      raise UserError(f"{self}: lengths must be 1 or more, and the pass rate between 0 and 1.")

  @property
  def longest_prompt(self) -> int:
    """Tokens, taken to be twice the mean."""
    return math.ceil(2 * self.prompt)


@dataclasses.dataclass(frozen=True)
class MeanTree:
  """A tree of mean size.

  Attributes:
    trunk: tokens.
    branches: tokens of each branch; all fork at the trunk's end.
    weight: what it counts in a batch: solutions, or pairs.
  """

  trunk: float
  branches: tuple[float, ...]
  weight: float

  @property
  def tokens(self) -> float:
    """Tokens of trunk and branches."""
    return self.trunk + sum(self.branches)

  @property
  def scored(self) -> float:
    """Tokens that are scored: those of the branches."""
    return sum(self.branches)

  @property
  def keys(self) -> float:
    """Keys that all its tokens together look at."""

    def triangle(size):
      return size * (size + 1) / 2

    return triangle(self.trunk) + sum(size * self.trunk + triangle(size) for size in self.branches)


def mean_tree(config, name: str, lengths: Lengths) -> MeanTree:
  """The trees of sft, rft, dpo/dpo (whole responses) and dpo/step_dpo; where a pit is needed it
  lies half-way.
  """
  prompt, response = lengths.prompt, lengths.response
  if name == "sft":
    return MeanTree(prompt, (response,), 1)
  if name == "rft":
    right = max(1.0, lengths.pass_rate * config.sample.num_traces)
    kept = min(config.rft.max_per_problem, right) + config.rft.with_teacher
    kept = max(1, round(min(kept, config.rft.max_branches_per_tree, config.rft.batch_size)))
    return MeanTree(prompt, (response,) * kept, kept)
  rejected = min(config.dpo.max_branches_per_tree - 1, config.pairs.max_per_problem)
  mode = config.pairs.outcome_mode if name == "dpo/dpo" else config.pairs.pair_mode
  if mode in ("algorithm1", "prefix_protected"):
    return MeanTree(prompt, (response, *(response / 2,) * rejected), rejected)
  if mode in ("shared_prefix", "positives_too"):
    step = response / lengths.steps
    chosen = step if config.pairs.continuation == "step" else response / 2
    return MeanTree(prompt + response / 2, (chosen, step), 1)
  return MeanTree(prompt, (response, response), 1)


def batch_shape(section, tree: MeanTree, row_shards: int) -> tuple[Shape, float]:
  """(the shape of a step's batch, trees in it)."""
  trees = section.batch_size / tree.weight
  per_row = section.row_length / tree.tokens
  if per_row < 1:
    raise UserError(
      f"A tree has {tree.tokens:.0f} tokens, more than row_length={section.row_length}."
    )
  held = per_row * PACKED if per_row >= 3 else float(int(per_row))
  multiple = row_shards * section.grad_accum_steps
  rows = math.ceil(math.ceil(trees / held) / multiple) * multiple
  in_a_row = math.ceil(per_row)
  paired = tree.weight if len(tree.branches) > 1 else 0
  return Shape(
    rows=rows,
    length=section.row_length,
    scored=min(section.row_length, math.ceil(_WIDEST * held * tree.scored)),
    pairs=in_a_row * paired,
    branches=in_a_row * len(tree.branches),
  ), trees


def matrix_params(model: ModelConfig) -> int:
  """Parameters that every token is multiplied by: all but embedding, output matrix and norms."""
  attention = model.d_model * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
  return model.num_layers * (attention + 3 * model.d_model * model.d_ff)


def forward_flops(model: ModelConfig, tokens: float, keys: float, logits: float) -> float:
  """2N a token, the output matrix where logits are needed only, and 4 a key, head and its width for
  attention.
  """
  attention = 4 * model.num_layers * model.num_heads * model.head_dim * keys
  return (
    2 * matrix_params(model) * tokens + attention + 2 * model.vocab_size * model.d_model * logits
  )


def training_flops(
  model: ModelConfig, tokens: float, keys: float, logits: float, adapter: int = 0
) -> float:
  """Three times the forward pass.

  Of an adapter with so many parameters: its products and attention three times; the model's own
  products twice, forward and back to what they multiply, since its matrices take no gradients.
  """
  if not adapter:
    return 3 * forward_flops(model, tokens, keys, logits)
  return 2 * forward_flops(model, tokens, 0, logits) + 3 * (
    forward_flops(model, 0, keys, 0) + 2 * adapter * tokens
  )


def num_bytes(abstract) -> int:
  """Of a tree of abstract arrays."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def _trained(config, name: str, lengths: Lengths) -> tuple[float, float]:
  """(trees of all problems, passes over them)."""
  problems = config.task.train_problems
  section = config[name.split("/")[0]]
  tree = mean_tree(config, name, lengths)
  if name == "sft":
    count = problems
  elif name == "rft":
    kept = min(config.rft.max_per_problem, lengths.pass_rate * config.sample.num_traces)
    count = problems * max(1.0, kept + config.rft.with_teacher) / tree.weight
  else:
    wrong = min(
      config.credit.max_wrong_per_problem, (1 - lengths.pass_rate) * config.sample.num_traces
    )
    count = problems * min(config.pairs.max_per_problem, wrong) / tree.weight
  steps = count * tree.weight * section.num_epochs / section.batch_size
  if section.max_steps and steps > section.max_steps:
    return count, section.num_epochs * section.max_steps / steps
  return count, section.num_epochs


def work(config, lengths: Lengths, methods: int) -> dict[str, dict[str, float]]:
  """By stage: steps and tokens trained, or traces (credit: rollouts) and tokens decoded.

  Credit is counted as if every prefix got all its rollouts; schedules other than `all` need fewer.
  """
  c, made = config, {}
  for name in ("sft", "rft", "dpo/dpo", "dpo/step_dpo"):
    trees, passes = _trained(c, name, lengths)
    tree = mean_tree(c, name, lengths)
    section = c[name.split("/")[0]]
    made[name] = {
      "steps": math.ceil(trees * tree.weight * passes / section.batch_size),
      "tokens_trained": trees * passes * tree.tokens,
    }
  traces = c.task.train_problems * c.sample.num_traces
  made["sample"] = {
    "trunks": c.task.train_problems,
    "traces": traces,
    "tokens_decoded": traces * lengths.response,
  }
  wrong = min(c.credit.max_wrong_per_problem, (1 - lengths.pass_rate) * c.sample.num_traces)
  right = min(c.credit.max_right_per_problem, lengths.pass_rate * c.sample.num_traces)
  chosen = c.task.train_problems * (wrong + right)
  rollouts = chosen * (lengths.steps - 1) * c.credit.num_rollouts
  made["credit"] = {
    "trunks": chosen,
    "rollouts": rollouts,
    "tokens_decoded": rollouts * lengths.response / 2,
  }
  answers = c.task.test_problems * methods
  made["evaluate"] = {
    "trunks": answers,
    "traces": answers,
    "tokens_decoded": answers * lengths.response,
  }
  return made


def storage(config, model: Model, made: dict) -> dict[str, float]:
  """Bytes on disk by kind, at the end of the recipe; of a policy whose adapter was trained, the
  adapter's.
  """
  policies, checkpoints = 0, 0
  for section in (config.sft, config.rft, config.dpo, config.dpo):
    size = num_bytes(train_policy.trained(model, section).abstract_params())
    policies += size
    # parameters and two moments each
    checkpoints += 3 * size * section.max_to_keep * bool(section.save_every_steps)

  def decoded(name):
    return made[name]["tokens_decoded"]

  return {
    "policies": policies,
    "checkpoints": checkpoints,
    "traces": _JSON_BYTES * (decoded("sample") + decoded("evaluate")),
    "rollouts": _ROLLOUT_BYTES * decoded("credit"),
  }
