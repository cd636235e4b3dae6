"""Assigns examples to batches as a function of (seed, step), so resumed runs see the same data."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from synthneg_jax.core import geometry
from synthneg_jax.core.geometry import RowOptions, Rows
from synthneg_jax.models.config import ModelConfig
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.training import batch as batch_lib
from synthneg_jax.training.batch import Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """Number and size of the steps of a run.

  Attributes:
    batch_size: solutions (SFT, RFT) or pairs (DPO) per step.
    num_epochs: passes over the examples; a fraction uses that share of the last pass.
    max_steps: maximum number of steps; 0 for none.
    seed: of the shuffles; None to keep the examples' order (a curriculum).
  """

  batch_size: int
  num_epochs: float
  max_steps: int = 0
  seed: int | None = 0


def plan(weights: Sequence[int], schedule: Schedule) -> list[list[int]]:
  """The examples of each step.

  Epochs, each shuffled by (seed, epoch) unless the seed is None, are concatenated and cut into
  batches: a batch ends before its weight would exceed `batch_size`. Batches cross epoch boundaries.

  Args:
    weights: number of solutions (SFT, RFT) or pairs (DPO) of each example, at most batch_size.
    schedule: number and size of the steps.

  Returns:
    The indices of each step's examples.

  Raises:
    UserError: no examples, none within num_epochs, or one that exceeds batch_size.
  """
  batch_size, num_epochs = schedule.batch_size, schedule.num_epochs
  if not weights:
    raise UserError("Nothing to train on: selection left no examples.")
  if max(weights) > batch_size:
    raise UserError(
      f"An example has {max(weights)} solutions or pairs, more than batch_size={batch_size}."
    )
  stream = []
  for epoch in range(int(np.ceil(num_epochs))):
    order = np.arange(len(weights))
    if schedule.seed is not None:
      order = np.random.default_rng([schedule.seed, epoch]).permutation(order)
    stream.extend(order[: round(min(num_epochs - epoch, 1.0) * len(order))])
  if not stream:
    raise UserError(f"num_epochs={num_epochs} selects none of the {len(weights)} example(s).")
  steps, weight = [[]], 0
  for index in stream:
    if weight + weights[index] > batch_size:
      steps.append([])
      weight = 0
    steps[-1].append(int(index))
    weight += weights[index]
  return steps[: schedule.max_steps] if schedule.max_steps else steps


class Batches:
  """All batches of a run, built on demand.

  Attributes:
    rows: how trees are laid out in rows.
    shape: the shape that fits every batch; a step's number of rows is one of `rows.counts`, so few
      programs are compiled.
    packing_efficiency: share of the rows' capacity that is not padding.
  """

  def __init__(
    self,
    examples: Sequence[Example],
    keys: Sequence[str],
    *,
    schedule: Schedule,
    row_options: RowOptions,
    choose_once: Callable[[Callable[[], Rows]], Rows] | None = None,
  ):
    """Plans the run.

    Args:
      examples: trees with their pairs.
      keys: names of the examples, for error messages.
      schedule: number and size of the steps.
      row_options: for `core.geometry.fit_rows`. They do not change the examples of a step.
      choose_once: called with a function that chooses the rows; returns the rows to use, for
        instance those chosen before. None to choose anew.

    Raises:
      UserError: an example is longer than a row, or there are no examples.
    """
    self._examples, self._keys = examples, keys
    for example, key in zip(examples, keys, strict=True):
      if 0 < row_options.length < example.tree.num_tokens:
        raise UserError(
          f"{key}: its tree has {example.tree.num_tokens} tokens, more than "
          f"row_length={row_options.length}."
        )
    weights = [
      max(len(example.pairs), 1) if example.pairs else example.tree.num_branches
      for example in examples
    ]
    self._steps = plan(weights, schedule)
    sizes = [[examples[i].tree.num_tokens for i in step] for step in self._steps]
    choose = functools.partial(geometry.fit_rows, sizes, row_options)
    self.rows = (choose_once(choose) if choose_once else choose()).split(row_options.shards)
    self._steps = [
      [step[i] for i in self.rows.order(step_sizes)]
      for step, step_sizes in zip(self._steps, sizes, strict=True)
    ]
    self._num_rows = [self.rows.needed(step_sizes) for step_sizes in sizes]
    shapes = [
      batch_lib.measure([examples[i] for i in step], self.rows.length) for step in self._steps
    ]

    def widest(field):
      return max(getattr(shape, field) for shape in shapes)

    self.shape = batch_lib.Shape(
      rows=max(self._num_rows),
      length=self.rows.length,
      scored=widest("scored"),
      pairs=widest("pairs"),
      branches=widest("branches"),
    ).rounded()
    self.packing_efficiency = sum(map(sum, sizes)) / (sum(self._num_rows) * self.rows.length)

  @property
  def num_steps(self) -> int:
    """Number of batches."""
    return len(self._steps)

  def capacity(self, step: int) -> int:
    """Tokens in the batch of a step, including padding."""
    return self._num_rows[step] * self.rows.length

  def num_tokens(self, step: int) -> int:
    """Tokens in the batch of a step, without padding."""
    return sum(self._examples[i].tree.num_tokens for i in self._steps[step])

  def check_ids(self, config: ModelConfig) -> None:
    """Checks that every token id has a row in the model's embedding.

    Raises:
      UserError: names the example and the id.
    """
    for example, key in zip(self._examples, self._keys, strict=True):
      config.check_ids(example.tree.layout.token, f"{key}: its text")

  def keys(self, step: int) -> list[str]:
    """Names of a step's examples."""
    return [self._keys[i] for i in self._steps[step]]

  def build(self, step: int) -> batch_lib.Batch:
    """The batch of a step as numpy arrays, of `shape` except for the number of rows."""
    shape = dataclasses.replace(self.shape, rows=self._num_rows[step])
    return batch_lib.build([self._examples[i] for i in self._steps[step]], shape)
