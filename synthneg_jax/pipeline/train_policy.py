"""What the training stages share: trees of solutions, and one call of the train loop."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
from etils import epath

from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.data import prompts
from synthneg_jax.data.records import Problem
from synthneg_jax.decoding import policy as policies
from synthneg_jax.models.adapter import Adapter
from synthneg_jax.models.decoder import Model
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import device_mesh, keys
from synthneg_jax.runtime.metrics import Metrics
from synthneg_jax.tasks import problems as problems_lib
from synthneg_jax.training import batches, loop
from synthneg_jax.training.batch import Example


def prompt_ids(
  experiment: Experiment, policy: policies.Policy, problem: Problem, shots: Sequence[Problem] = ()
) -> list[int]:
  """The trunk of everything about a problem; `shots` are worked problems that come before it."""
  task = experiment.config.task
  return prompts.encode_prompt(
    policy.tokenizer,
    problem.prompt,
    problems_lib.prompt_style(task),
    instruction=task.instruction,
    shots=[(shot.prompt, shot.solution) for shot in shots],
  )


def solution_trees(
  trunks: Mapping[str, Sequence[int]], solutions: Mapping[str, Sequence[Sequence[int]]], most: int, length: int
) -> tuple[list[Example], list[str], int]:
  """`branch_trees` of whole solutions: the prompt is the trunk, the solutions its branches, all their tokens scored."""
  branches = {key: [Branch(len(trunks[key]), ids) for ids in all_ids] for key, all_ids in solutions.items()}
  return branch_trees(trunks, branches, most, length)


def branch_trees(
  trunks: Mapping[str, Sequence[int]], branches: Mapping[str, Sequence[Branch]], most: int, length: int
) -> tuple[list[Example], list[str], int]:
  """Trees of what is trained on, a problem's prompt with its branches.

  A tree holds at most `most` branches and `length` tokens; further ones go to another tree with the same trunk. A branch
  that does not fit a tree alone is left out.

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
    examples += [Example(Tree(trunk, tuple(part))) for part in parts]
    names += [key] * len(parts)
  return examples, names, dropped


def plan(experiment: Experiment, section, examples: Sequence[Example], names: Sequence[str]) -> batches.Batches:
  """The batches of a training stage."""
  return batches.Batches(
    examples,
    names,
    schedule=batches.Schedule(
      batch_size=section.batch_size,
      num_epochs=section.num_epochs,
      max_steps=section.max_steps,
      seed=experiment.config.seed,
    ),
    row_length=section.row_length,
    rows_multiple_of=section.grad_accum_steps * device_mesh.row_shards(experiment.mesh),
  )


def trained(model: Model, section) -> Model | Adapter:
  """What a section of the config trains: the model itself or, by `section.lora`, an adapter of it."""
  lora = section.lora
  return Adapter(model, lora.rank, lora.alpha, tuple(lora.targets)) if lora.rank else model


def of_adapter(adapter: Adapter, objective):
  """Returns joint(adapter's parameters, batch, base's) -> what the objective gives for both together."""

  def joint(params, batch, base):
    return objective(adapter.join(base, params), batch)

  return joint


def train(
  experiment: Experiment,
  name: str,
  section,
  policy: policies.Policy,
  objective,
  plan_: batches.Batches,
  folder: epath.Path,
  check_start=None,
) -> tuple[str, dict]:
  """Trains a policy's weights, or by `section.lora` an adapter of them, and writes the result to folder/policy.

  Returns:
    (fingerprint of the new weights, figures: steps, the packed rows' fill and the last step's metrics).
  """
  figures = {"steps": plan_.num_steps, "fill": round(plan_.packing_efficiency, 3)}
  run = loop.Run(
    name=name,
    section=section,
    model=policy.model,
    objective=objective,
    batches=plan_,
    mesh=experiment.mesh,
    folder=folder,
    check_start=check_start,
    open_metrics=functools.partial(Metrics, experiment.config, experiment.workdir, folder),
  )
  start, policy.params = policy.params, None  # trained in place, or frozen under an adapter
  adapter = trained(policy.model, section)
  if isinstance(adapter, Adapter):
    shardings = policies.shardings(adapter, experiment.mesh)
    key = jax.random.wrap_key_data(keys.draw_key(experiment.config.seed, "adapter", 0, name, "", 0))
    params = jax.jit(adapter.init, out_shardings=shardings)(key)
    figures["trained"] = sum(leaf.size for leaf in jax.tree.leaves(params))
    run = dataclasses.replace(run, model=adapter, objective=of_adapter(adapter, objective))
    params, last = loop.fit(run, params, frozen=(start,))
    fingerprint = policies.save(folder / "policy", policy, params, adapter)
  else:
    params, last = loop.fit(run, start)
    fingerprint = policies.save(folder / "policy", policy, params)
  return fingerprint, figures | {key: round(value, 5) for key, value in last.items()}
