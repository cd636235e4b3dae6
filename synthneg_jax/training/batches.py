"""Which examples make which batch: a function of (seed, step), so that a resumed run sees what an
unbroken one sees.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from synthneg_jax.models.config import ModelConfig
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.training import batch as batch_lib
from synthneg_jax.training.batch import Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """How many steps there are, and what they take.

  Attributes:
    batch_size: solutions (SFT, RFT) or pairs (DPO) a step.
    num_epochs: passes over the examples; a fraction takes that share of the last pass.
    max_steps: upper bound on the steps; 0 for none.
    seed: of the shuffles; None for a curriculum, which takes the examples in their order.
  """

  batch_size: int
  num_epochs: float
  max_steps: int = 0
  seed: int | None = 0


def plan(weights: Sequence[int], schedule: Schedule) -> list[list[int]]:
  """The examples of each step.

  Epoch after epoch, each shuffled by (seed, epoch) if there is a seed, examples are taken in order
  until the next would make the batch weigh more than `batch_size`; batches cross the ends of
  epochs, and only the last may be small.

  Args:
    weights: what each example counts: its solutions (SFT, RFT) or its pairs (DPO), never more than
      batch_size.
    schedule: how many steps there are, and what they take.

  Returns:
    For each step the indices of its examples.

  Raises:
    UserError: there is no example, or none is taken, or one weighs more than a batch.
  """
  batch_size, num_epochs = schedule.batch_size, schedule.num_epochs
  if not weights:
    raise UserError("There is nothing to train on: no example is left after selection.")
  if max(weights) > batch_size:
    raise UserError(f"An example weighs {max(weights)}, more than batch_size={batch_size}.")
  stream = []
  for epoch in range(int(np.ceil(num_epochs))):
    order = np.arange(len(weights))
    if schedule.seed is not None:
      order = np.random.default_rng([schedule.seed, epoch]).permutation(order)
    stream.extend(order[: round(min(num_epochs - epoch, 1.0) * len(order))])
  if not stream:
    raise UserError(f"num_epochs={num_epochs} of {len(weights)} example(s) trains on none of them.")
  steps, weight = [[]], 0
  for index in stream:
    if weight + weights[index] > batch_size:
      steps.append([])
      weight = 0
    steps[-1].append(int(index))
    weight += weights[index]
  return steps[: schedule.max_steps] if schedule.max_steps else steps


class Batches:
  """All batches of a run, built when asked for.

  Attributes:
    shape: the one shape that holds each of them, so that one compiled program serves all.
    packing_efficiency: share of all rows' places that hold a token.
  """

  def __init__(
    self,
    examples: Sequence[Example],
    keys: Sequence[str],
    *,
    schedule: Schedule,
    row_length: int,
    rows_multiple_of: int,
  ):
    """Plans the run.

    Args:
      examples: trees with their pairs.
      keys: a name for each example, for error messages.
      schedule: how many steps there are, and what they take.
      row_length: T, tokens a row.
      rows_multiple_of: accumulation steps × the mesh's row shards.

    Raises:
      UserError: an example is longer than a row, or there is none.
    """
    self._examples, self._keys = examples, keys
    for example, key in zip(examples, keys, strict=True):
      if example.tree.num_tokens > row_length:
        raise UserError(
          f"{key}: its tree has {example.tree.num_tokens} tokens, more than "
          f"row_length={row_length}."
        )
    weights = [
      max(len(example.pairs), 1) if example.pairs else example.tree.num_branches
      for example in examples
    ]
    self._steps = plan(weights, schedule)
    shapes = [
      batch_lib.measure([examples[i] for i in step], row_length, rows_multiple_of)
      for step in self._steps
    ]

    def widest(field):
      return max(getattr(shape, field) for shape in shapes)

    self.shape = batch_lib.Shape(
      rows=widest("rows"),
      length=row_length,
      scored=widest("scored"),
      pairs=widest("pairs"),
      branches=widest("branches"),
    )
    tokens = sum(examples[i].tree.num_tokens for step in self._steps for i in step)
    self.packing_efficiency = tokens / (len(self._steps) * self.shape.rows * row_length)

  @property
  def num_steps(self) -> int:
    """How many batches there are."""
    return len(self._steps)

  @property
  def num_places(self) -> int:
    """Places for tokens in a batch, filled or not."""
    return self.shape.rows * self.shape.length

  def num_tokens(self, step: int) -> int:
    """Tokens in the batch of a step; padding does not count."""
    return sum(self._examples[i].tree.num_tokens for i in self._steps[step])

  def check_ids(self, config: ModelConfig) -> None:
    """Refuses token ids that a model has no row for.

    Raises:
      UserError: names the example and the id.
    """
    for example, key in zip(self._examples, self._keys, strict=True):
      config.check_ids(example.tree.layout.token, f"{key}: its text")

  def keys(self, step: int) -> list[str]:
    """Names of the examples of a step."""
    return [self._keys[i] for i in self._steps[step]]

  def build(self, step: int) -> batch_lib.Batch:
    """The batch of a step, numpy arrays of `shape`."""
    return batch_lib.build([self._examples[i] for i in self._steps[step]], self.shape)
