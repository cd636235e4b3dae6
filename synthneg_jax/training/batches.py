"""Which examples make which batch: a function of (seed, step), so that a resumed run sees what an
unbroken one sees.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from synthneg_jax.core import geometry
from synthneg_jax.core.geometry import Rows
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
    rows: how trees are laid in rows.
    shape: the one shape that holds each of them; a step has as many rows as `rows` says, so that
      few compiled programs serve all.
    packing_efficiency: share of all rows' places that hold a token.
  """

  def __init__(
    self,
    examples: Sequence[Example],
    keys: Sequence[str],
    *,
    schedule: Schedule,
    row_length: int = 0,
    row_shards: int = 1,
    microbatches: int = 0,
    room: int = 0,
    settle: Callable[[Callable[[], Rows]], Rows] = lambda choose: choose(),
  ):
    """Plans the run.

    Args:
      examples: trees with their pairs.
      keys: a name for each example, for error messages.
      schedule: how many steps there are, and what they take.
      row_length, row_shards, microbatches, room: `length`, `shards`, `microbatches`, `room` of
        `core.geometry.fit_rows`, which chooses what is 0. The examples of a step, and so what an
        update means, never depend on them.
      settle: given what chooses the rows, gives those to be used, such as ones that were chosen
        before.

    Raises:
      UserError: an example is longer than a row, or there is none.
    """
    self._examples, self._keys = examples, keys
    for example, key in zip(examples, keys, strict=True):
      if 0 < row_length < example.tree.num_tokens:
        raise UserError(
          f"{key}: its tree has {example.tree.num_tokens} tokens, more than "
          f"row_length={row_length}."
        )
    weights = [
      max(len(example.pairs), 1) if example.pairs else example.tree.num_branches
      for example in examples
    ]
    self._steps = plan(weights, schedule)
    sizes = [[examples[i].tree.num_tokens for i in step] for step in self._steps]
    self.rows = settle(
      functools.partial(
        geometry.fit_rows,
        sizes,
        length=row_length,
        shards=row_shards,
        microbatches=microbatches,
        room=room,
      )
    ).split(row_shards)
    self._steps = [
      [step[i] for i in self.rows.order(of_step)]
      for step, of_step in zip(self._steps, sizes, strict=True)
    ]
    self._num_rows = list(map(self.rows.needed, sizes))
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
    )
    self.packing_efficiency = sum(map(sum, sizes)) / (sum(self._num_rows) * self.rows.length)

  @property
  def num_steps(self) -> int:
    """How many batches there are."""
    return len(self._steps)

  def num_places(self, step: int) -> int:
    """Places for tokens in the batch of a step, filled or not."""
    return self._num_rows[step] * self.rows.length

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
    """The batch of a step, numpy arrays of `shape` but for the number of rows."""
    shape = dataclasses.replace(self.shape, rows=self._num_rows[step])
    return batch_lib.build([self._examples[i] for i in self._steps[step]], shape)
