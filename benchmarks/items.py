"""What the benchmark compares: for each suite both sides, on the same random weights, and the proof
of equality.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from absl import logging

from benchmarks import ours, schedules, torch_baselines, tunix_baseline
from benchmarks.benchmark import Baseline, Item, Work
from benchmarks.ours import LEARNING_RATE, Side
from synthneg_jax.core import losses
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.decoding.decode import Geometry
from synthneg_jax.decoding.engine import Trunk
from synthneg_jax.decoding.policy import EMBEDDED
from synthneg_jax.training import batch as batch_lib
from synthneg_jax.training import objectives
from synthneg_jax.training.batch import Example, PairInTree

_BETA = 0.1
_CLOSE = 1e-4  # difference of two losses over the greatest of them, at most


def _losses_differ(expected: Sequence[float], run: Callable[[], float]) -> str:
  """Compares the losses before the first steps of both sides, by the greatest: a step may bring a
  loss to nearly 0.
  """
  found = [run() for _ in expected]
  close = all(
    abs(a - b) <= _CLOSE * max(map(abs, found)) for a, b in zip(expected, found, strict=True)
  )
  return (
    ""
    if close
    else (f"losses {[round(x, 6) for x in expected]} and {[round(x, 6) for x in found]}")
  )


def _tokens_differ(
  expected: Callable[[], Sequence[np.ndarray]], run: Callable[[], Sequence[np.ndarray]]
) -> str:
  """Compares each of our greedy sequences with the other side's, which may go on longer."""
  pairs = list(zip(expected(), run(), strict=True))
  wrong = sum(not np.array_equal(a, b[: len(a)]) for a, b in pairs)
  return f"{wrong} of {len(pairs)} greedy sequences" if wrong else ""


def train(full: bool) -> Iterator[Item]:
  """SFT steps: every token but the first of each row is scored."""
  for size, rows in (("T", 16), ("S", 2))[: 1 + full]:
    yield _sft(size, rows, 128, compiled=full)


def _sft(size: str, rows: int, length: int, compiled: bool) -> Item:
  side = Side(size)
  ids = side.ids(rows, length)
  examples = [Example(Tree(row[:1], (Branch(1, row[1:]),))) for row in ids]
  batch = batch_lib.build(examples, batch_lib.measure(examples, length))
  step = ours.train_step(side, objectives.make_sft(side.model), batch)
  expected, baselines = [step(), step()], []
  for name in ("torch eager", "torch.compile")[: 1 + compiled]:
    other = torch_baselines.SftStep(
      torch_baselines.load(side.folder), ids, LEARNING_RATE, compiled=name == "torch.compile"
    )
    baselines.append(
      Baseline(name, other.run, functools.partial(_losses_differ, expected, other.run))
    )
  work = Work(3 * side.forward_flops(rows * length, rows * (length - 1), length / 2))
  return Item(
    f"SFT step {rows}x{length}", size, step, baselines, work, rounds=11 if size == "T" else 3
  )


def dpo(full: bool) -> Iterator[Item]:
  """Steps on pairs of 32-token continuations of one prefix: a tree on our side, two sequences on
  the other.
  """
  for size, pairs in (("T", 8), ("S", 2))[: 1 + full]:
    for times in (4, 8):
      yield _dpo(size, pairs, times, 32)


def _dpo(size: str, pairs: int, times: int, continuation: int) -> Item:
  side, reference, prefix = Side(size), Side(size, seed=1), times * continuation
  length = prefix + 2 * continuation
  prompts = side.ids(pairs, prefix).tolist()
  chosen, rejected = side.ids(2, pairs, continuation).tolist()
  rows = list(zip(prompts, chosen, rejected, strict=True))
  trees = [Tree(prompt, (Branch(prefix, good), Branch(prefix, bad))) for prompt, good, bad in rows]
  examples = [Example(tree) for tree in trees]
  scored = batch_lib.build(examples, batch_lib.measure(examples, length))
  logp, _ = jax.jit(functools.partial(objectives.scored_logprobs, side.model))(
    reference.params, scored
  )
  sums = np.asarray(logp, np.float64).reshape(pairs, 2, continuation).sum(-1).tolist()
  examples = [
    Example(tree, (PairInTree(0, 1, *row),)) for tree, row in zip(trees, sums, strict=True)
  ]
  loss = functools.partial(losses.dpo_loss, beta=_BETA)
  objective = objectives.make_preference(
    side.model, objectives.Preference(loss=loss, beta=_BETA), eos_ids=(0,)
  )
  step = ours.train_step(
    side, objective, batch_lib.build(examples, batch_lib.measure(examples, length))
  )
  expected, baselines = [step(), step()], []
  plain = [
    dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row, strict=True)) for row in rows
  ]
  known = [
    row | {"ref_chosen_logps": good, "ref_rejected_logps": bad}
    for row, (good, bad) in zip(plain, sums, strict=True)
  ]
  for name, data in (("TRL, reference precomputed", known), ("TRL, reference at each step", plain)):
    other = torch_baselines.DpoStep(
      *map(torch_baselines.load, (side.folder, reference.folder)),
      str(EMBEDDED),
      data,
      _BETA,
      LEARNING_RATE,
    )
    baselines.append(
      Baseline(name, other.run, functools.partial(_losses_differ, expected, other.run))
    )
  work = Work(3 * side.forward_flops(pairs * length, 2 * continuation * pairs, length / 2))
  return Item(
    f"DPO step, {pairs} pairs {times}:1",
    size,
    step,
    baselines,
    work,
    rounds=7 if size == "T" else 3,
  )


def sampling(full: bool) -> Iterator[Item]:
  """Prompts of 64 tokens: one lane a prompt, with one slot.

  Against transformers, then against google-tunix: each where it is installed, since tunix's pins
  ask for an environment of its own. A first line says which is left out; without both, that the
  bench extra is missing is an error.
  """
  sizes = (("T", ((1, 64), (16, 64), (64, 64))), ("S", ((1, 32), (16, 32), (64, 16))))[: 1 + full]
  tunix = tunix_baseline.installed()
  if torch_baselines.installed() or not tunix:
    for size, counts in sizes:
      side = Side(size)
      model = torch_baselines.load(side.folder)
      for count, new in counts:
        yield from _sampling(side, "generate", count, new, functools.partial(_generate, model))
  else:
    logging.info(
      "No rows against transformers: torch is not installed here (the bench extra brings it)."
    )
  if not tunix:
    logging.info(
      "No rows against tunix: google-tunix is not installed here; it may want an "
      "environment of its own."
    )
    return
  for size, counts in sizes:
    side = Side(size, rope_theta=tunix_baseline.ROPE_THETA)
    for count, new in counts:
      sampler = functools.partial(tunix_baseline.Sampler, side.folder, side.config)
      yield from _sampling(side, "tunix", count, new, sampler)


def _generate(
  model, prompts: Sequence[Sequence[int]], new: int
) -> Callable[[float], Sequence[np.ndarray]]:
  return functools.partial(torch_baselines.generate, model, prompts, new)


def _sampling(side: Side, name: str, count: int, new: int, other) -> Iterator[Item]:
  """`other(prompts, new)` gives the other side's function of a temperature."""
  prompts = side.ids(count, 64).tolist()
  trunks = [Trunk(prompt, [64], ours.draw_keys(i, 1)) for i, prompt in enumerate(prompts)]
  engine = ours.make_engine(side, count, 1, new)
  grow = functools.partial(ours.grow, engine, side, trunks)
  generate = other(prompts, new)
  differs = functools.cache(
    lambda: _tokens_differ(lambda: [items[0] for items in grow(0.0)], lambda: generate(0.0))
  )
  work = side.decode_work([(64 + new / 2, new, 64)] * count, new)

  def proven(temperature: float) -> str:
    why = differs()
    if temperature and not why:
      generate(temperature)  # tunix compiles another program for it
    return why

  for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
    if temperature or side.size == "T":
      baseline = Baseline(
        name, functools.partial(generate, temperature), functools.partial(proven, temperature)
      )
      run = functools.partial(grow, temperature)
      rounds = (7 if count == 1 else 5) if side.size == "T" and count < 64 else 3
      yield Item(f"{count} x {new} tokens, {how}", side.size, run, [baseline], work, rounds)


@dataclasses.dataclass(frozen=True)
class _Trace:
  """A trace of `steps` equal steps after a prompt, with `rollouts` of `new` tokens from each
  prefix.
  """

  prompt: int
  response: int
  steps: int
  rollouts: int
  new: int = 32

  def forks(self) -> list[int]:
    """Where each step's rollouts leave the trunk, shallow prefixes first."""
    return [self.prompt + (step + 1) * self.response // self.steps for step in range(self.steps)]

  def trunk(self, ids, limits=None) -> Trunk:
    """One trunk with all rollouts."""
    forks = [fork for fork in self.forks() for _ in range(self.rollouts)]
    return Trunk(ids, forks, ours.draw_keys(0, len(forks)), limits)

  def __str__(self):
    return f"credit {self.steps} steps x {self.rollouts}"


def credit(full: bool) -> Iterator[Item]:
  """Rollouts from every prefix of a trace. Ours: one lane, with the slots that `credit.slots` would
  be set to.
  """
  sizes = (("T", _Trace(64, 384, 16, 8)), ("S", _Trace(64, 128, 8, 4)))
  for size, trace in sizes[: 1 + full]:
    side = Side(size)
    model, ids = torch_baselines.load(side.folder), side.ids(trace.forks()[-1]).tolist()
    yield _credit(side, model, ids, trace, slots=32)
    if size == "T":
      yield _credit_of_many_lengths(side, model, ids, trace, slots=16)
      yield _credit_memory(side, ids, trace, slots=32)
      yield schedules.item("credit.schedule=adaptive, values known", schedules.exact_values())


def _one_a_prefix(
  model, ids, trace: _Trace, new: Sequence[int], temperature: float
) -> list[np.ndarray]:
  """One call of `generate` a prefix, for all its rollouts, or for one where it is greedy and all
  would be equal.
  """
  copies = trace.rollouts if temperature else 1
  calls = [
    torch_baselines.generate(model, [ids[:f]], n, temperature, copies)
    for f, n in zip(trace.forks(), new, strict=True)
  ]
  return [row for call in calls for row in call]


def _credit(side: Side, model, ids, trace: _Trace, slots: int) -> Item:
  engine, trunk, forks = (
    ours.make_engine(side, 1, slots, trace.new),
    trace.trunk(ids),
    trace.forks(),
  )
  greedy = functools.cache(lambda: ours.grow(engine, side, [trunk], 0.0)[0][:: trace.rollouts])
  each = functools.partial(_one_a_prefix, model, ids, trace, [trace.new] * trace.steps)
  padded = functools.partial(
    torch_baselines.generate, model, [ids[:fork] for fork in forks], trace.new
  )
  baselines = [
    Baseline(
      "generate, one call a prefix",
      lambda: each(1.0),
      lambda: _tokens_differ(greedy, lambda: each(0.0)),
    ),
    Baseline(
      "generate, one padded batch",
      lambda: padded(1.0, trace.rollouts),
      lambda: _tokens_differ(greedy, lambda: padded(0.0)),
    ),
  ]
  count, context = trace.steps * trace.rollouts, np.mean(forks) + trace.new / 2
  work = side.decode_work(
    [(context, trace.new * count, 0), (len(ids) / 2, 0, len(ids))], trace.new * count // slots
  )
  run = functools.partial(ours.grow, engine, side, [trunk], 1.0)
  return Item(
    f"{trace}, {trace.new} tokens each",
    side.size,
    run,
    baselines,
    work,
    rounds=3 if side.size == "T" else 2,
  )


def _credit_of_many_lengths(
  side: Side, model, ids, trace: _Trace, slots: int, most: int = 128
) -> Item:
  """Lengths are preset on both sides, as if EOS came there: our items have limits, a call of theirs
  ends with its longest rollout, as `generate` does once all its rows have met EOS.
  """
  count = trace.steps * trace.rollouts
  lengths = np.random.default_rng(0).lognormal(3.2, 0.75, count).astype(int) + 1
  lengths = np.clip(lengths, 1, most)
  longest = lengths.reshape(trace.steps, trace.rollouts).max(1).tolist()
  engine, trunk = ours.make_engine(side, 1, slots, most), trace.trunk(ids, lengths.tolist())
  each = functools.partial(_one_a_prefix, model, ids, trace, longest)

  def differs() -> str:
    made = ours.grow(engine, side, [trunk], 0.0)[0]
    wrong = [len(row) for row in made] != lengths.tolist()

    def other():
      return [row for row in each(0.0) for _ in range(trace.rollouts)]

    return "lengths" if wrong else _tokens_differ(lambda: made, other)

  baseline = Baseline("generate, one call a prefix", lambda: each(1.0), differs)
  total = int(lengths.sum())
  context = np.mean(trace.forks()) + total / count / 2
  work = side.decode_work([(context, total, 0), (len(ids) / 2, 0, len(ids))], total // slots)
  run = functools.partial(ours.grow, engine, side, [trunk], 1.0)
  return Item(
    f"{trace}, 1 to {most} tokens, mean {total / count:.0f}",
    side.size,
    run,
    [baseline],
    work,
    rounds=2,
  )


def _credit_memory(side: Side, ids, trace: _Trace, slots: int) -> Item:
  """Bytes of one program over one trunk against one lane, and so one copy of the trunk's cache, for
  each rollout.
  """
  count, trunk = trace.steps * trace.rollouts, trace.trunk(ids)
  copied = [Trunk(ids[:fork], [fork], trunk.keys[i : i + 1]) for i, fork in enumerate(trunk.forks)]

  def grown(lanes: int, slots: int, trunks: Sequence[Trunk]) -> list[np.ndarray]:
    made = ours.grow(ours.make_engine(side, lanes, slots, trace.new), side, trunks, 0.0)
    return [row for items in made for row in items]

  def differs():
    return _tokens_differ(lambda: grown(1, slots, [trunk]), lambda: grown(count, 1, copied))

  shared = Geometry(lanes=1, slots=slots, trunk=len(ids), items=count, new=trace.new, refill=1)
  copies = Geometry(lanes=count, slots=1, trunk=len(ids), items=1, new=trace.new, refill=1)
  baseline = Baseline("a cache copy a rollout", lambda: ours.peak_bytes(side, copies), differs)

  def run():
    return ours.peak_bytes(side, shared)

  return Item(
    f"{trace}, memory but for weights", side.size, run, [baseline], rounds=1, unit="bytes"
  )


SUITES = {"train": train, "dpo": dpo, "sampling": sampling, "credit": credit}
