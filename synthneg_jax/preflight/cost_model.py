"""Workload of a config from assumed lengths: trees, batches, tokens, rollouts and bytes."""

import dataclasses
import math

import jax

from synthneg_jax.models.config import ModelConfig
from synthneg_jax.models.decoder import Model
from synthneg_jax.pipeline import train_policy
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.training.batch import Shape

# Assumed fraction of a row filled by trees if it holds at least three; otherwise whole trees fit.
PACKED = 0.95
_WIDEST = 1.1  # scored tokens of the fullest row, relative to the mean
_JSON_BYTES = 32  # per token of a trace: its id, two log-probs and its text as JSON
_ROLLOUT_BYTES = 7  # per token of a rollout: its id


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Assumed means over problems and responses.

  Attributes:
    prompt, response: tokens; the longest are assumed to be twice as long.
    steps: per response.
    pass_rate: fraction of right traces of the SFT policy.
  """

  prompt: float
  response: float
  steps: float
  pass_rate: float

  def __post_init__(self):
    if min(self.prompt, self.response, self.steps) < 1 or not 0 < self.pass_rate < 1:
      raise UserError(f"{self}: lengths must be at least 1, and the pass rate between 0 and 1.")


@dataclasses.dataclass(frozen=True)
class MeanTree:
  """A tree of mean size.

  Attributes:
    trunk: tokens.
    branches: tokens of each branch; all fork at the end of the trunk.
    weight: solutions or pairs that the tree contributes to a batch.
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
    """Scored tokens: those of the branches."""
    return sum(self.branches)

  @property
  def keys(self) -> float:
    """Number of (query, visible key) pairs."""

    def triangle(size):
      return size * (size + 1) / 2

    return triangle(self.trunk) + sum(size * self.trunk + triangle(size) for size in self.branches)


def _right_traces(config, lengths: Lengths) -> float:
  """Right traces per problem."""
  return lengths.pass_rate * config.sample.num_traces


def _wrong_traces_with_credit(config, lengths: Lengths) -> float:
  """Wrong traces per problem that get credit."""
  wrong = (1 - lengths.pass_rate) * config.sample.num_traces
  return min(config.credit.max_wrong_per_problem, wrong)


def mean_tree(config, name: str, lengths: Lengths) -> MeanTree:
  """The mean tree of sft, rft, dpo/dpo (whole responses) or dpo/step_dpo; pits are half-way."""
  prompt, response = lengths.prompt, lengths.response
  if name == "sft":
    return MeanTree(prompt, (response,), 1)
  if name == "rft":
    right = max(1.0, _right_traces(config, lengths))
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
  """Returns (shape of a step's batch, number of trees in it)."""
  trees = section.batch_size / tree.weight
  per_row = section.row_length / tree.tokens
  if per_row < 1:
    raise UserError(
      f"A mean tree has {tree.tokens:.0f} tokens, more than row_length={section.row_length}."
    )
  held = per_row * PACKED if per_row >= 3 else float(int(per_row))
  multiple = row_shards * section.grad_accum_steps
  rows = math.ceil(math.ceil(trees / held) / multiple) * multiple
  trees_per_row = math.ceil(per_row)
  paired = tree.weight if len(tree.branches) > 1 else 0
  return Shape(
    rows=rows,
    length=section.row_length,
    scored=min(section.row_length, math.ceil(_WIDEST * held * tree.scored)),
    pairs=trees_per_row * paired,
    branches=trees_per_row * len(tree.branches),
  ), trees


def matrix_params(model: ModelConfig) -> int:
  """Parameters of the layers' matrices: all but embedding, output matrix and norms."""
  attention = model.d_model * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
  return model.num_layers * (attention + 3 * model.d_model * model.d_ff)


def forward_flops(model: ModelConfig, tokens: float, keys: float, logits: float) -> float:
  """FLOPs of a forward pass: 2N per token, attention, and the output matrix for needed logits.

  Attention takes 4 FLOPs per (query, visible key) pair and per dimension of each head.
  """
  attention = 4 * model.num_layers * model.num_heads * model.head_dim * keys
  output = 2 * model.vocab_size * model.d_model * logits
  return 2 * matrix_params(model) * tokens + attention + output


def training_flops(
  model: ModelConfig, tokens: float, keys: float, logits: float, *, adapter: int = 0
) -> float:
  """FLOPs of a training step: three times the forward pass.

  With an adapter of this many parameters, its products and attention count three times, but the
  model's own products only twice: forward, and gradients of their inputs but not of their matrices.
  """
  if not adapter:
    return 3 * forward_flops(model, tokens, keys, logits)
  return 2 * forward_flops(model, tokens, 0, logits) + 3 * (
    forward_flops(model, 0, keys, 0) + 2 * adapter * tokens
  )


def num_bytes(abstract) -> int:
  """Bytes of a tree of abstract arrays."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def _trained(config, name: str, lengths: Lengths) -> tuple[float, float]:
  """Returns (trees of all problems, passes over them)."""
  problems = config.task.train_problems
  section = config[name.split("/")[0]]
  tree = mean_tree(config, name, lengths)
  if name == "sft":
    count = problems
  elif name == "rft":
    kept = min(config.rft.max_per_problem, _right_traces(config, lengths))
    count = problems * max(1.0, kept + config.rft.with_teacher) / tree.weight
  else:
    wrong = _wrong_traces_with_credit(config, lengths)
    count = problems * min(config.pairs.max_per_problem, wrong) / tree.weight
  steps = count * tree.weight * section.num_epochs / section.batch_size
  if section.max_steps and steps > section.max_steps:
    return count, section.num_epochs * section.max_steps / steps
  return count, section.num_epochs


def work(config, lengths: Lengths, methods: int) -> dict[str, dict[str, float]]:
  """By stage: steps and tokens trained, or traces (credit: rollouts) and tokens decoded.

  Credit assumes all rollouts from every prefix; schedules other than `all` need fewer.
  """
  c, stages = config, {}
  for name in ("sft", "rft", "dpo/dpo", "dpo/step_dpo"):
    trees, passes = _trained(c, name, lengths)
    tree = mean_tree(c, name, lengths)
    section = c[name.split("/")[0]]
    stages[name] = {
      "steps": math.ceil(trees * tree.weight * passes / section.batch_size),
      "tokens_trained": trees * passes * tree.tokens,
    }
  traces = c.task.train_problems * c.sample.num_traces
  stages["sample"] = {
    "trunks": c.task.train_problems,
    "traces": traces,
    "tokens_decoded": traces * lengths.response,
  }
  right = min(c.credit.max_right_per_problem, _right_traces(c, lengths))
  credited = c.task.train_problems * (_wrong_traces_with_credit(c, lengths) + right)
  rollouts = credited * (lengths.steps - 1) * c.credit.num_rollouts
  stages["credit"] = {
    "trunks": credited,
    "rollouts": rollouts,
    "tokens_decoded": rollouts * lengths.response / 2,
  }
  answers = c.task.test_problems * methods
  stages["evaluate"] = {
    "trunks": answers,
    "traces": answers,
    "tokens_decoded": answers * lengths.response,
  }
  return stages


def storage(config, model: Model, stages: dict) -> dict[str, float]:
  """Bytes on disk by kind at the end of the recipe; for an adapter, only the adapter's.

  Args:
    config: of the run.
    model: its architecture.
    stages: from `work`.
  """
  policies, checkpoints = 0, 0
  for section in (config.sft, config.rft, config.dpo, config.dpo):
    size = num_bytes(train_policy.trainable(model, section).abstract_params())
    policies += size
    # parameters and their two moments
    checkpoints += 3 * size * section.max_to_keep * bool(section.save_every_steps)

  def decoded(name):
    return stages[name]["tokens_decoded"]

  return {
    "policies": policies,
    "checkpoints": checkpoints,
    "traces": _JSON_BYTES * (decoded("sample") + decoded("evaluate")),
    "rollouts": _ROLLOUT_BYTES * decoded("credit"),
  }
