"""What the training stages share: trees of solutions, and one call of the train loop."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import Mesh

from synthneg_jax.core.geometry import RowOptions, Rows
from synthneg_jax.core.tree import Branch, sharing
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
  """The trunk of everything about a problem; `shots` are worked problems that come before it."""
  task = experiment.config.task
  return prompts.encode_prompt(
    tokenizer,
    problem.prompt,
    problems_lib.prompt_style(task),
    instruction=task.instruction,
    shots=[(shot.prompt, shot.solution) for shot in shots],
    template_args=config_schema.template_args(task.template_args),
  )


def solution_trees(
  trunks: Mapping[str, Sequence[int]],
  solutions: Mapping[str, Sequence[Sequence[int]]],
  most: int,
  length: int,
) -> tuple[list[Example], list[str], int]:
  """`branch_trees` of whole solutions: the prompt is the trunk, the solutions its branches, all
  their tokens scored.
  """
  branches = {
    key: [Branch(len(trunks[key]), ids) for ids in all_ids] for key, all_ids in solutions.items()
  }
  return branch_trees(trunks, branches, most, length)


def branch_trees(
  trunks: Mapping[str, Sequence[int]],
  branches: Mapping[str, Sequence[Branch]],
  most: int,
  length: int,
) -> tuple[list[Example], list[str], int]:
  """Trees of what is trained on, a problem's prompt with its branches; beginnings that branches of
  a tree share stand once.

  A tree holds at most `most` branches and `length` tokens; further ones go to another tree with the
  same trunk. A branch that does not fit a tree alone is left out.

  Returns:
    (examples, their names, how many branches were left out).
  """
  examples, names, dropped = [], [], 0
  for key, of_problem in branches.items():
    trunk = trunks[key]
    parts, room = [], 0
    for branch in of_problem:
      if len(trunk) + len(branch.ids) > length:
        dropped += 1
        continue
      if not parts or len(parts[-1]) == most or len(branch.ids) > room:
        parts.append([])
        room = length - len(trunk)
      parts[-1].append(branch)
      room -= len(branch.ids)
    examples += [Example(sharing(trunk, part)) for part in parts]
    names += [key] * len(parts)
  return examples, names, dropped


def longest_tree(config, section) -> int:
  """Tokens that a tree of a training stage may have."""
  longest = config.model.max_length
  return min(section.row_length or longest, longest)


def room(model: Model, section, mesh: Mesh, *, length: int, memory: float) -> int:
  """Tokens of a microbatch that each row shard has memory for, at least 1, by an estimate that is
  ours.

  Args:
    model: whose weights a stage trains, or by `section.lora` an adapter of them.
    section: the stage's.
    mesh: where it runs.
    length: tokens of a row, at most.
    memory: bytes that a device has for it all.
  """
  c = model.config
  weights = mesh.shape["fsdp"] * mesh.shape["tensor"]
  adapter = trained(model, section)
  num_trained = sum(leaf.size for leaf in jax.tree.leaves(adapter.abstract_params()))
  # parameters; their gradients and two moments
  state = (4 * c.num_params + 12 * num_trained) / weights
  token = step_lib.bytes_per_token(
    c, length, chunk=section.logit_chunk, fused=mesh.devices.flat[0].platform == "tpu"
  )
  return max(int((memory - state) / (token / mesh.shape["tensor"])), 1)


def plan(
  experiment: Experiment,
  stage: manifest.Stage,
  section,
  model: Model,
  *,
  examples: Sequence[Example],
  names: Sequence[str],
) -> batches.Batches:
  """The batches of a training stage, in rows that were chosen for it once."""

  def settle(choose: Callable[[], Rows]) -> Rows:
    rows = stage.settle("rows", lambda: dataclasses.asdict(choose()))
    return Rows(**rows | {"counts": tuple(rows["counts"])})

  return batches.Batches(
    examples,
    names,
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
      max_tokens=room(
        model,
        section,
        experiment.mesh,
        length=longest_tree(experiment.config, section),
        memory=device_mesh.memory(),
      ),
    ),
    settle=settle,
  )


def trained(model: Model, section) -> Model | Adapter:
  """What a config section trains: the model or, with `section.lora`, an adapter of it."""
  lora = section.lora
  return Adapter(model, lora.rank, lora.alpha, tuple(lora.targets)) if lora.rank else model


def of_adapter(adapter: Adapter, objective):
  """Returns joint(adapter's parameters, batch, base's) -> what the objective gives for both
  together.
  """

  def joint(params, batch, base):
    return objective(adapter.join(base, params), batch)

  return joint


def train(experiment: Experiment, policy: Policy, run: loop.Run) -> tuple[str, dict]:
  """Trains a policy's weights, or by `lora` of the run's section an adapter of them, and writes the
  result to policy/.

  Args:
    experiment: gives seed and config.
    policy: where training starts; its parameters are consumed.
    run: of `policy.model`, without `open_metrics`.

  Returns:
    (fingerprint of the new weights; figures: steps, how full the packed rows are, and the last
    step's metrics).

  Raises:
    UserError: an example holds a token id that the model has no row for.
  """
  run.batches.check_ids(policy.model.config)
  figures = {"steps": run.batches.num_steps, "fill": round(run.batches.packing_efficiency, 3)}
  open_metrics = functools.partial(Metrics, experiment.config, experiment.workdir, run.folder)
  run = dataclasses.replace(run, open_metrics=open_metrics)
  start, policy.params = policy.params, None  # trained in place, or frozen under an adapter
  adapter = trained(policy.model, run.section)
  if isinstance(adapter, Adapter):
    shardings = param_shardings(adapter, experiment.mesh)
    key = jax.random.wrap_key_data(
      keys.draw_key(experiment.config.seed, "adapter", 0, run.name, "", 0)
    )
    params = jax.jit(adapter.init, out_shardings=shardings)(key)
    figures["trained"] = sum(leaf.size for leaf in jax.tree.leaves(params))
    run = dataclasses.replace(run, model=adapter, objective=of_adapter(adapter, run.objective))
    params, last = loop.fit(run, params, frozen=(start,))
    fingerprint = policy.save(run.folder / "policy", params, adapter)
  else:
    params, last = loop.fit(run, start)
    fingerprint = policy.save(run.folder / "policy", params)
  return fingerprint, figures | {key: round(value, 5) for key, value in last.items()}
