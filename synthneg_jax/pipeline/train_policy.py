"""Code shared by the training stages: trees, batches, and the call of the train loop."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from synthneg_jax.core.geometry import RowOptions, Rows
from synthneg_jax.core.tree import Branch, merge_prefixes
from synthneg_jax.data import prompts
from synthneg_jax.data.records import Problem
from synthneg_jax.decoding.policy import Policy, param_shardings
from synthneg_jax.models.adapter import Adapter
from synthneg_jax.models.decoder import Model
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import config_schema, device_mesh, keys, manifest
from synthneg_jax.runtime.metrics import Metrics
from synthneg_jax.tasks import problems as problems_lib
from synthneg_jax.training import batches, loop
from synthneg_jax.training import step as step_lib
from synthneg_jax.training.batch import Example


def prompt_ids(
  experiment: Experiment, tokenizer, problem: Problem, shots: Sequence[Problem] = ()
) -> list[int]:
  """Token ids of a problem's prompt, with `shots` as worked examples before the problem."""
  task = experiment.config.task
  return prompts.encode_prompt(
    tokenizer,
    problem.prompt,
    problems_lib.prompt_style(task),
    instruction=task.instruction,
    shots=[(shot.prompt, shot.solution) for shot in shots],
    template_args=config_schema.template_args(task.template_args),
  )


class Trees(NamedTuple):
  """Training examples of some problems.

  Attributes:
    examples: one tree each.
    names: the problem of each example.
    dropped: number of branches left out because they do not fit a tree.
  """

  examples: list[Example]
  names: list[str]
  dropped: int = 0


def solution_trees(
  trunks: Mapping[str, Sequence[int]],
  solutions: Mapping[str, Sequence[Sequence[int]]],
  *,
  max_branches: int,
  max_tokens: int,
) -> Trees:
  """`branch_trees` of whole solutions, whose tokens are all scored; arguments as there."""
  branches = {
    key: [Branch(len(trunks[key]), ids) for ids in group] for key, group in solutions.items()
  }
  return branch_trees(trunks, branches, max_branches=max_branches, max_tokens=max_tokens)


def branch_trees(
  trunks: Mapping[str, Sequence[int]],
  branches: Mapping[str, Sequence[Branch]],
  *,
  max_branches: int,
  max_tokens: int,
) -> Trees:
  """Packs branches into trees, in order; the branches of a tree share common beginnings.

  A branch that exceeds the limits of its problem's current tree starts another tree with the same
  trunk. A branch that exceeds `max_tokens` on its own is dropped.

  Args:
    trunks: prompt ids by problem.
    branches: by problem.
    max_branches: most branches of a tree.
    max_tokens: most tokens of a tree, counted before beginnings are shared.
  """
  examples, names, dropped = [], [], 0
  for key, problem_branches in branches.items():
    trunk = trunks[key]
    parts, room = [], 0
    for branch in problem_branches:
      if len(trunk) + len(branch.ids) > max_tokens:
        dropped += 1
        continue
      if not parts or len(parts[-1]) == max_branches or len(branch.ids) > room:
        parts.append([])
        room = max_tokens - len(trunk)
      parts[-1].append(branch)
      room -= len(branch.ids)
    examples += [Example(merge_prefixes(trunk, part)) for part in parts]
    names += [key] * len(parts)
  return Trees(examples, names, dropped)


def longest_tree(config, section) -> int:
  """The most tokens that a tree of a training stage may have."""
  return min(section.row_length or config.model.max_length, config.model.max_length)


def microbatch_tokens(model: Model, section, mesh: Mesh, *, length: int, memory: float) -> int:
  """Estimates how many tokens of a microbatch fit a row shard's memory, at least 1.

  Args:
    model: the stage trains its weights or, with `section.lora`, an adapter.
    section: the stage's config section.
    mesh: the mesh it runs on.
    length: most tokens of a row.
    memory: bytes available per device.
  """
  c = model.config
  weight_shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
  abstract_params = trainable(model, section).abstract_params()
  num_trained = sum(leaf.size for leaf in jax.tree.leaves(abstract_params))
  # float32: all parameters; gradients and two moments of the trained ones
  state = (4 * c.num_params + 12 * num_trained) / weight_shards
  token = step_lib.bytes_per_token(
    c, length, chunk=section.logit_chunk, fused=mesh.devices.flat[0].platform == "tpu"
  )
  return max(int((memory - state) / (token / mesh.shape["tensor"])), 1)


def make_run(
  experiment: Experiment, stage: manifest.Stage, section, *, model: Model, objective, trees: Trees
) -> loop.Run:
  """The training run of a stage.

  The number and length of rows are chosen once and kept in the stage's folder, so a resumed run
  uses the same.

  Args:
    experiment: gives seed, mesh and config.
    stage: the training stage.
    section: its config section.
    model: the model that it trains.
    objective: as training/objectives.py makes them.
    trees: the training examples.
  """

  def choose_once(choose: Callable[[], Rows]) -> Rows:
    rows = stage.choose_once("rows", lambda: dataclasses.asdict(choose()))
    return Rows(**rows | {"counts": tuple(rows["counts"])})

  plan = batches.Batches(
    trees.examples,
    trees.names,
    schedule=batches.Schedule(
      batch_size=section.batch_size,
      num_epochs=section.num_epochs,
      max_steps=section.max_steps,
      seed=experiment.config.seed,
    ),
    row_options=RowOptions(
      length=section.row_length,
      shards=device_mesh.row_shards(experiment.mesh),
      microbatches=section.grad_accum_steps,
      max_tokens=microbatch_tokens(
        model,
        section,
        experiment.mesh,
        length=longest_tree(experiment.config, section),
        memory=device_mesh.memory(),
      ),
    ),
    choose_once=choose_once,
  )
  return loop.Run(
    name=stage.name.removeprefix("dpo/"),
    section=section,
    model=model,
    objective=objective,
    batches=plan,
    mesh=experiment.mesh,
    folder=stage.folder,
  )


def trainable(model: Model, section) -> Model | Adapter:
  """What a config section trains: the model or, with `section.lora`, an adapter of it."""
  lora = section.lora
  return Adapter(model, lora.rank, lora.alpha, tuple(lora.targets)) if lora.rank else model


def merged_objective(adapter: Adapter, objective):
  """Returns joint(adapter params, batch, base params): the objective of the merged parameters."""

  def joint(params, batch, base):
    return objective(adapter.join(base, params), batch)

  return joint


def train(experiment: Experiment, policy: Policy, run: loop.Run) -> tuple[str, dict]:
  """Trains a policy's weights, or an adapter if the section sets `lora`, and writes policy/.

  Args:
    experiment: gives seed and config.
    policy: the initial policy; its parameters are consumed.
    run: a run of `policy.model`, without `open_metrics`.

  Returns:
    (fingerprint of the new weights; figures: number of steps, packing efficiency of the rows, and
    the last step's metrics).

  Raises:
    UserError: an example contains a token id outside the model's vocabulary.
  """
  run.batches.check_ids(policy.model.config)
  figures = {"steps": run.batches.num_steps, "fill": round(run.batches.packing_efficiency, 3)}
  open_metrics = functools.partial(Metrics, experiment.config, experiment.workdir, run.folder)
  run = dataclasses.replace(run, open_metrics=open_metrics)
  start, policy.params = policy.params, None  # trained in place, or frozen under an adapter
  adapter = trainable(policy.model, run.section)
  if isinstance(adapter, Adapter):
    shardings = param_shardings(adapter, experiment.mesh)
    key = jax.random.wrap_key_data(
      keys.draw_key(experiment.config.seed, "adapter", 0, run.name, "", 0)
    )
    params = jax.jit(adapter.init, out_shardings=shardings)(key)
    figures["trained"] = sum(leaf.size for leaf in jax.tree.leaves(params))
    run = dataclasses.replace(
      run, model=adapter, objective=merged_objective(adapter, run.objective)
    )
    params, last = loop.fit(run, params, frozen=(start,))
    fingerprint = policy.save(run.folder / "policy", params, adapter)
  else:
    params, last = loop.fit(run, start)
    fingerprint = policy.save(run.folder / "policy", params)
  return fingerprint, figures | {key: round(value, 5) for key, value in last.items()}
