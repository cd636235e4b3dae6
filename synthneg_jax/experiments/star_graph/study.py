"""Figure 8: star graphs (tasks/star_graph.py), where per-step DPO learns what SFT memorises.

Training. The base model has learned to look up edges but not to plan; the config's seed initialises
its weights. Each of `star_graph.seeds` training sets gets one SFT run from the base, far beyond
memorisation, and per-step DPO from SFT's checkpoints on the same problems only. All use the
project's train loop on packed token trees (training/).

Pairs. A checkpoint is both reference and initial policy. For each training problem
`sample.num_traces` responses are sampled. If the node after the centre, the critical token, is
wrong, Q is 0 from there on, and this node is the first pit. The pair has the shared-prefix form:
after prompt and centre, the rest of the right path is chosen and the wrong node rejected. Duplicate
pairs count once. Only the critical node is sampled, from its exact distribution.

Values. A response is right if it equals the path. So Q is 0 after a wrong critical node, and after
the right one it is the probability of the rest of the path, computed exactly by one forced pass.
Reported means over problems: `critical`, the probability of the right critical node; `rest`, Q
after it; `value`, their product, the mean Q of the critical token; `error`, of the greedy response;
`legal`, the probability that the critical node is a neighbour of the centre. A model that follows a
random arm has critical = value = 1 / degree.

Files. Each cell (the base; SFT of a seed; DPO of a seed and checkpoint) writes cells/NAME.json with
a hash of the settings that it depends on, and is skipped if the file exists. Weights are in
weights/ and are recomputed if needed and missing. training/NAME/metrics.jsonl has every update.
Batches and draws are functions of seed, checkpoint and step.
"""

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from synthneg_jax.core import losses
from synthneg_jax.core import tree as tree_lib
from synthneg_jax.core.geometry import RowOptions
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.experiments.star_graph import plots
from synthneg_jax.models import layer_stacking
from synthneg_jax.models.config import ModelConfig
from synthneg_jax.models.decoder import Model, Params
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import config_schema, device_mesh, workdir_lock
from synthneg_jax.runtime.errors import UserError, writing
from synthneg_jax.tasks import star_graph
from synthneg_jax.tasks.star_graph import Graphs
from synthneg_jax.training import loop, objectives
from synthneg_jax.training.batch import Example, PairInTree
from synthneg_jax.training.batches import Batches, Schedule

_TRAIN, _TEST, _BASE, _DRAWS = 0, 1, 2, 4  # seeds of random generators by purpose
_MEASURED = 1000  # maximum training problems to measure; all test problems are measured
_CALL = 1000  # problems per forward pass
_DRAWN_STEPS = 100  # steps of pretraining whose documents are drawn at once


def make_model(config) -> Model:
  """The model of the config's section pretrain, with the task's nodes as vocabulary."""
  section = config.pretrain
  return Model(
    ModelConfig(
      vocab_size=len(star_graph.WORDS) + config.task.star_graph.num_nodes,
      d_model=section.d_model,
      num_layers=section.num_layers,
      num_heads=section.num_heads,
      num_kv_heads=section.num_heads,
      head_dim=section.d_model // section.num_heads,
      d_ff=section.d_ff,
      tie_embeddings=False,
      scan_layers=False,
    )
  )


class Forced(NamedTuple):
  """A policy's log-probs along the right paths of N graphs, from one forced pass.

  Attributes:
    logp_NS: log-probs of the path's nodes and EOS, nats.
    greedy_NS: bool, whether each of them has the highest probability.
    critical_NV: log-probs of all tokens at the critical position, nats.
  """

  logp_NS: np.ndarray
  greedy_NS: np.ndarray
  critical_NV: np.ndarray


class CriticalValues(NamedTuple):
  """π(a | prompt, centre) for the first node a of each arm, and Q after it (0 on wrong arms)."""

  policy_NA: np.ndarray
  q_NA: np.ndarray


class CriticalPairs(NamedTuple):
  """P pairs after prompt and centre: the rest of the path is chosen, a wrong node rejected.

  Attributes:
    problem_P: index of the graph.
    wrong_P: token id of the wrong node.
    ref_chosen_P, ref_rejected_P: log-probs under the reference, nats.
  """

  problem_P: np.ndarray
  wrong_P: np.ndarray
  ref_chosen_P: np.ndarray
  ref_rejected_P: np.ndarray


@functools.partial(jax.jit, static_argnames=("model", "num_prompt"))
def _forced(model: Model, params: Params, token_NT, *, num_prompt: int) -> Forced:
  """Computes `force` for the rows of one call; each row is a trunk."""
  row = tree_lib.pack([[Tree(np.zeros(token_NT.shape[1], int))]], token_NT.shape[1])
  trunks = jax.tree.map(lambda field: jnp.broadcast_to(field, token_NT.shape), row)
  h_NTD, _ = model.hidden(params, dataclasses.replace(trunks, token=token_NT))
  logp_NSV = jax.nn.log_softmax(model.logits(params, h_NTD[:, num_prompt - 1 : -1]))
  target_NS = token_NT[:, num_prompt:]
  logp_NS = jnp.take_along_axis(logp_NSV, target_NS[..., None], axis=-1)[..., 0]
  return Forced(logp_NS, jnp.argmax(logp_NSV, axis=-1) == target_NS, logp_NSV[:, 1])


def force(model: Model, params: Params, graphs: Graphs) -> Forced:
  """Runs one forced pass along the right paths."""
  prompt_NC = star_graph.prompt_ids(graphs)
  token_NT = np.concatenate([prompt_NC, star_graph.solution_ids(graphs)], axis=1).astype(np.int32)
  count = len(token_NT)
  if count > _CALL:  # pad to whole calls, which share one compiled program
    token_NT = np.resize(token_NT, (-(-count // _CALL) * _CALL, token_NT.shape[1]))
  calls = [
    _forced(model, params, token_NT[at : at + _CALL], num_prompt=prompt_NC.shape[1])
    for at in range(0, len(token_NT), _CALL)
  ]
  return Forced(*(np.concatenate(parts)[:count] for parts in zip(*calls, strict=True)))


def critical_values(model: Model, params: Params, graphs: Graphs) -> CriticalValues:
  """The exact policy over the centre's neighbours, and Q after each."""
  return _values(graphs, force(model, params, graphs))


def _values(graphs: Graphs, forced: Forced) -> CriticalValues:
  policy_NA = np.exp(
    np.take_along_axis(forced.critical_NV, star_graph.tokens(graphs.arm_NAL[:, :, 1]), axis=1)
  )
  q_NA = np.zeros_like(policy_NA)
  q_NA[np.arange(len(graphs)), graphs.goal_N] = np.exp(forced.logp_NS[:, 2:].sum(axis=1))
  return CriticalValues(policy_NA, q_NA)


def measure(model: Model, params: Params, graphs: Graphs) -> dict[str, float]:
  """Means over problems (module docstring), and SFT's `loss` in nats per token."""
  forced = force(model, params, graphs)
  policy_NA, q_NA = _values(graphs, forced)
  means = {
    "critical": np.exp(forced.logp_NS[:, 1]).mean(),
    "rest": np.exp(forced.logp_NS[:, 2:].sum(axis=1)).mean(),
    "value": (policy_NA * q_NA).sum(axis=1).mean(),
    "legal": policy_NA.sum(axis=1).mean(),
    "error": 1 - forced.greedy_NS.all(axis=1).mean(),
    "loss": -forced.logp_NS.mean(),
  }
  return {name: round(float(value), 5) for name, value in means.items()}


def response_examples(prompt_NC: np.ndarray, response_NS: np.ndarray) -> list[Example]:
  """Token trees for the next-token loss: prompt and response; all response tokens are scored."""
  return [
    Example(Tree(prompt_C, (Branch(len(prompt_C), response_S),)))
    for prompt_C, response_S in zip(prompt_NC, response_NS, strict=True)
  ]


def pair_examples(graphs: Graphs, pairs: CriticalPairs) -> list[Example]:
  """Token trees for the preference loss: a trunk of prompt and centre, and two branches."""
  prompt_NC, path_NS = star_graph.prompt_ids(graphs), star_graph.solution_ids(graphs)
  examples = []
  for problem, wrong, ref_chosen, ref_rejected in zip(*pairs, strict=True):
    trunk = np.append(prompt_NC[problem], path_NS[problem, 0])
    branches = (Branch(len(trunk), path_NS[problem, 1:]), Branch(len(trunk), [wrong]))
    examples.append(
      Example(Tree(trunk, branches), (PairInTree(0, 1, float(ref_chosen), float(ref_rejected)),))
    )
  return examples


def dpo_objective(model: Model, section):
  """DPO with the settings of the config's section dpo."""
  preference = objectives.Preference(
    loss=functools.partial(losses.dpo_loss, beta=section.beta),
    beta=section.beta,
    nll_weight=section.nll_weight,
  )
  eos_ids = (star_graph.WORDS.index(star_graph.EOS),)
  return objectives.make_preference(model, preference, eos_ids=eos_ids, chunk=section.logit_chunk)


class Study:
  """The cells of one config in one workdir."""

  def __init__(self, config, workdir: epath.PathLike):
    """Checks the config; computes nothing.

    Raises:
      UserError: the task is not star_graph, its sizes are invalid, or a checkpoint is after SFT's
        last step.
    """
    config_schema.check_values(config)
    if config.task.name != "star_graph":
      raise UserError(
        f"task.name={config.task.name!r}: figure 8 needs star_graph, as in configs/star_graph.py."
      )
    star_graph.check(config.task)
    marks = config.star_graph
    self.checkpoints = (*marks.under_trained, *marks.over_trained)
    if (
      not marks.under_trained
      or not marks.over_trained
      or max(self.checkpoints) > config.sft.max_steps
    ):
      raise UserError(
        f"star_graph.under_trained={marks.under_trained} and "
        f"star_graph.over_trained={marks.over_trained} must be "
        f"non-empty SFT steps up to sft.max_steps={config.sft.max_steps}."
      )
    if config.star_graph.seeds < 2:
      raise UserError("star_graph.seeds must be at least 2: intervals are over seeds.")
    self.config, self.folder, self.model = config, epath.Path(workdir), make_model(config)
    self.mesh = Experiment.open(config, workdir).mesh
    self.test = self._draw(config.task.test_problems, _TEST, 0)

  def _draw(self, count: int, *purpose: int) -> Graphs:
    task = self.config.task
    return star_graph.draw(
      np.random.default_rng(purpose),
      count,
      task.star_graph.degree,
      task.star_graph.path_nodes,
      task.star_graph.num_nodes,
    )

  def train_set(self, seed: int) -> Graphs:
    """The training graphs of a seed."""
    return self._draw(self.config.task.train_problems, _TRAIN, seed)

  def has(self, *cell) -> bool:
    """Whether a cell's file exists: ("base",), ("sft", seed) or ("dpo", seed, checkpoint)."""
    return (self.folder / "cells" / f"{'_'.join(map(str, cell))}.json").exists()

  def _cell(self, name: str, sections: Sequence[str], make: Callable[[], dict]) -> dict:
    """The cell's JSON, read from disk or computed."""
    leaves = config_schema.plain(self.config, ("seed", "task", *sections))
    defaults = config_schema.plain(config_schema.default(), ("seed", "task", *sections))
    # Defaults are excluded: published cells stay valid when a later version adds a leaf.
    changed = {
      leaf: value
      for leaf, value in leaves.items()
      if config_schema.changes_results(leaf) and value != defaults[leaf]
    }
    key = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:16]
    path = self.folder / "cells" / f"{name}.json"
    if path.exists():
      cell = json.loads(path.read_text())
      if cell["config_hash"] != key:
        raise UserError(f"{path} has other settings; use another --workdir, or delete it.")
      return cell
    start = time.monotonic()
    cell = {"cell": name, "config_hash": key, **make()}
    cell["seconds"] = round(time.monotonic() - start, 1)
    with writing(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      temporary = path.parent / f"{path.name}.tmp"
      temporary.write_text(json.dumps(cell, indent=1) + "\n")
      temporary.replace(path)
    logging.info("%s: %.0f s.", name, cell["seconds"])
    return cell

  def _save(self, name: str, params: Params) -> None:
    """Writes weights with stacked layers."""
    path = self.folder / "weights" / f"{name}.npz"
    with writing(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      temporary = path.parent / f"{path.name}.tmp"
      with temporary.open("wb") as file:
        np.savez(file, *map(np.asarray, jax.tree.leaves(layer_stacking.stack(params))))
      temporary.replace(path)

  def weights(self, cell: str):
    """The parameters of a finished cell: "base", or "sft_SEED_CHECKPOINT" for SFT.

    Raises:
      UserError: the cell is not finished, or its weights were removed.
    """
    params = self._saved(cell)
    if params is None:
      raise UserError(
        f"{self.folder / 'weights' / f'{cell}.npz'} does not exist: run the cell first."
      )
    return params

  def _saved(self, name: str):
    """The saved weights of a cell, on the device, or None."""
    path = self.folder / "weights" / f"{name}.npz"
    if not path.exists():
      return None
    with path.open("rb") as file, np.load(file) as arrays:
      leaves = [jnp.asarray(arrays[key]) for key in arrays.files]
    return jax.tree.unflatten(jax.tree.structure(self.model.abstract_params()), leaves)

  def _batches(
    self, section, examples: Sequence[Example], *, num_steps: int, seed: int | None
  ) -> Batches:
    """The first `num_steps` batches over the examples; without a seed, in the given order."""
    return Batches(
      examples,
      [str(number) for number in range(len(examples))],
      schedule=Schedule(
        batch_size=section.batch_size,
        num_epochs=math.ceil(num_steps * section.batch_size / len(examples)),
        max_steps=num_steps,
        seed=seed,
      ),
      row_options=RowOptions(
        length=section.row_length,
        shards=device_mesh.row_shards(self.mesh),
        microbatches=section.grad_accum_steps,
      ),
    )

  def _fit(
    self, name: str, params: Params, *, section, objective, batches: Batches, after_step=None
  ) -> Params:
    """Trains with the project's loop, without checkpoints: an interrupted cell starts over."""
    run = loop.Run(
      name=name,
      section=section,
      model=self.model,
      objective=objective,
      batches=batches,
      mesh=self.mesh,
      folder=self._training_folder(name),
      resumable=False,
      after_step=after_step,
    )
    return loop.fit(run, params)[0]

  def _training_folder(self, name: str) -> epath.Path:
    return self.folder / "training" / name

  def base(self) -> dict:
    """Pretrains the base model on tours, then walks."""
    return self._cell("base", ("pretrain",), self._make_base)

  def _make_base(self) -> dict:
    section = self.config.pretrain
    num_steps = section.num_problems // section.batch_size
    batches = self._batches(section, self._documents(num_steps), num_steps=num_steps, seed=None)
    objective = objectives.make_sft(self.model, section.logit_chunk)
    start = jax.jit(self.model.init)(jax.random.key(self.config.seed))
    params = self._fit("base", start, section=section, objective=objective, batches=batches)
    self._save("base", params)
    return {
      "parameters": self.model.config.num_params,
      "test": measure(self.model, params, self.test),
    }

  def _documents(self, num_steps: int) -> list[Example]:
    """The pretraining documents: tours for `random_step_fraction` of the steps, then walks."""
    section, rng = self.config.pretrain, np.random.default_rng([_BASE, 0])
    num_tour_steps = round(num_steps * section.random_step_fraction)
    examples = []
    for kind, begin, end in (
      (star_graph.tours, 0, num_tour_steps),
      (star_graph.walks, num_tour_steps, num_steps),
    ):
      for first in range(begin, end, _DRAWN_STEPS):
        count = (min(first + _DRAWN_STEPS, end) - first) * section.batch_size
        examples += response_examples(*kind(rng, self._draw(count, _BASE, first)))
    return examples

  def sft(self, seed: int) -> dict:
    """SFT of one seed, measured every `star_graph.every_steps` steps."""
    self.base()
    return self._cell(
      f"sft_{seed}", ("pretrain", "sft", "star_graph"), functools.partial(self._make_sft, seed)
    )

  def _make_sft(self, seed: int) -> dict:
    section, graphs = self.config.sft, self.train_set(seed)
    examples = response_examples(star_graph.prompt_ids(graphs), star_graph.solution_ids(graphs))
    batches = self._batches(section, examples, num_steps=section.max_steps, seed=seed)
    params = self._saved("base")
    if params is None:
      self._make_base()
      params = self._saved("base")
    curve = []
    measured = {*self._measured_steps(section.max_steps), *self.checkpoints}

    def record(step: int, params: Params) -> None:
      if step in measured:
        curve.append(self._point(step, params, graphs))
      if step in self.checkpoints:
        self._save(f"sft_{seed}_{step}", params)

    record(0, params)
    objective = objectives.make_sft(self.model, section.logit_chunk)
    self._fit(
      f"sft_{seed}",
      params,
      section=section,
      objective=objective,
      batches=batches,
      after_step=record,
    )
    return {"seed": seed, "curve": curve}

  def _measured_steps(self, num_steps: int) -> list[int]:
    """Every `star_graph.every_steps`-th step from 0, and the last step."""
    return sorted({*range(0, num_steps, self.config.star_graph.every_steps), num_steps})

  def _point(self, step: int, params: Params, graphs: Graphs) -> dict:
    train = measure(self.model, params, graphs.take(slice(_MEASURED)))
    return {"step": step, "train": train, "test": measure(self.model, params, self.test)}

  def dpo(self, seed: int, checkpoint: int) -> dict:
    """Per-step DPO from one checkpoint."""
    self.sft(seed)
    sections = ("pretrain", "sft", "star_graph", "sample", "dpo")
    make = functools.partial(self._make_dpo, seed, checkpoint)
    return self._cell(f"dpo_{seed}_{checkpoint}", sections, make)

  def pairs(self, params: Params, graphs: Graphs, rng: np.random.Generator) -> CriticalPairs:
    """The distinct pairs from `sample.num_traces` responses of the policy to each graph."""
    section = self.config.sample
    forced = force(self.model, params, graphs)
    scaled_NV = forced.critical_NV - forced.critical_NV.max(axis=1, keepdims=True)
    if section.temperature:
      share_NV = np.exp(scaled_NV.astype(np.float64) / section.temperature)
    else:
      share_NV = (scaled_NV == 0).astype(np.float64)
    below_NV = np.cumsum(share_NV / share_NV.sum(axis=1, keepdims=True), axis=1)[:, :-1]
    drawn_NK = np.sum(
      rng.random((len(graphs), section.num_traces, 1)) >= below_NV[:, None], axis=-1
    )
    right_N = star_graph.tokens(graphs.path_NL[:, 1])
    problem_W, k_W = np.nonzero(drawn_NK != right_N[:, None])
    problem_P, wrong_P = np.unique(
      np.stack([problem_W, drawn_NK[problem_W, k_W]], axis=1), axis=0
    ).T
    ref_chosen_P = forced.logp_NS[problem_P, 1:].sum(axis=1)
    return CriticalPairs(problem_P, wrong_P, ref_chosen_P, forced.critical_NV[problem_P, wrong_P])

  def _make_dpo(self, seed: int, checkpoint: int) -> dict:
    name, section, graphs = f"dpo_{seed}_{checkpoint}", self.config.dpo, self.train_set(seed)
    params = self._saved(f"sft_{seed}_{checkpoint}")
    if params is None:
      self._make_sft(seed)
      params = self._saved(f"sft_{seed}_{checkpoint}")
    pairs = self.pairs(params, graphs, np.random.default_rng([_DRAWS, seed, checkpoint]))
    curve = [{**self._point(0, params, graphs), "dpo_loss": round(math.log(2), 5)}]
    cell = {"seed": seed, "checkpoint": checkpoint, "pairs": len(pairs.problem_P), "curve": curve}
    if not cell["pairs"]:
      return cell
    batches = self._batches(
      section, pair_examples(graphs, pairs), num_steps=section.max_steps, seed=seed
    )
    measured = self._measured_steps(section.max_steps)

    def record(step: int, params: Params) -> None:
      if step in measured:
        curve.append(self._point(step, params, graphs))

    objective = dpo_objective(self.model, section)
    self._fit(
      name, params, section=section, objective=objective, batches=batches, after_step=record
    )
    metrics = (self._training_folder(name) / "metrics.jsonl").read_text().splitlines()
    loss_T = [json.loads(line)["loss/per_pair"] for line in metrics]
    for before, point in zip(curve, curve[1:], strict=False):
      point["dpo_loss"] = round(float(np.mean(loss_T[before["step"] : point["step"]])), 5)
    return cell


def run(config, workdir: epath.PathLike) -> dict:
  """Makes the missing cells, then report/star_graph.json, .csv, .png and .svg.

  Machines may share a workdir: one makes the base, and each seed is made by the process that locks
  its folder in claims/.

  Returns:
    The content of star_graph.json (experiments/star_graph/plots.py); empty if other processes still
    work on cells.

  Raises:
    UserError: another process is making the base, or a cell fails.
  """
  study = Study(config, workdir)
  marks, claims = config.star_graph, study.folder / "claims"
  seeds = range(marks.seeds)
  todo = [("base",)] + [("sft", seed) for seed in seeds]
  todo += [("dpo", seed, at) for seed in seeds for at in study.checkpoints]
  if not study.has("base"):
    with workdir_lock.hold(claims / "base"):
      study.base()
  start, finished = time.monotonic(), 0
  for seed in seeds:
    missing = [cell for cell in todo[1:] if cell[1] == seed and not study.has(*cell)]
    if not missing:
      continue
    with workdir_lock.claim(claims / f"seed_{seed}") as holder:
      if holder:
        logging.info("Skipping seed %d, which is held by %s.", seed, holder)
        continue
      for kind, *args in missing:
        getattr(study, kind)(*args)
        finished += 1
        rest = sum(not study.has(*cell) for cell in todo)
        left = (time.monotonic() - start) / finished * rest
        logging.info("%d of %d cells; about %.0f min left.", len(todo) - rest, len(todo), left / 60)
  if not all(study.has(*cell) for cell in todo):
    logging.warning("Some cells are missing; other processes still work on them.")
    return {}
  cells = [getattr(study, kind)(*args) for kind, *args in todo]
  result = plots.collect(cells, config.task.star_graph.degree)
  plots.write(result, epath.Path(workdir) / "report", marks.under_trained, marks.over_trained)
  return result
