"""Figure 8: does per-step DPO teach what SFT only memorises? The star graph (tasks/star_graph.py), every value exact.

One base model, which looks edges up and does not plan. For each seed a training set; SFT on it, from the base, far beyond
the point where it knows the set by heart; and per-step DPO from SFT's checkpoints, on the same problems and no others.

Pairs. A checkpoint is reference and start. From each training problem `sample.num_traces` responses are sampled; where the
node after the centre, the critical token, is wrong, Q is 0 from there on, and it is the first pit. The pair is that of the
shared-prefix form: the right rest of the path against the wrong node, after prompt and centre. Equal pairs count once. The
critical node is drawn from its exact distribution, which is what a sampler does.

Values. A response is right if it is the path, so Q is 0 after a wrong critical node, and after the right one the probability
of the rest of the path, by one forced pass: no rollouts, no sampling error. What is reported of problems: `critical`, the
probability of the right critical node; `rest`, Q after it; `value`, their product, the mean Q of the critical token;
`error`, of the greedy response; `legal`, the probability of the critical node being any neighbour of the centre. A model
that walks some arm has critical = value = 1 / degree.

Files. Each cell (the base; SFT of a seed; DPO of a seed and checkpoint) leaves cells/NAME.json with the hash of the settings
that it depends on, and is skipped when that is there; weights lie in weights/ and are made again where they are wanted and
missing. Batches and draws are functions of seed, checkpoint and step.
"""

import functools
import hashlib
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath

from synthneg_jax.core import losses
from synthneg_jax.core.tree import PackedTrees
from synthneg_jax.experiments.star_graph import plots
from synthneg_jax.models.config import ModelConfig
from synthneg_jax.models.decoder import Model
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError, writing
from synthneg_jax.tasks import star_graph
from synthneg_jax.tasks.star_graph import Graphs
from synthneg_jax.training import optimizer as optimizer_lib

_TRAIN, _TEST, _BASE, _ORDER, _DRAWS = range(5)  # purposes of generators
_MEASURED = 1000  # training problems that are measured, at most; of test problems all
_CALL = 1000  # problems a forward pass


def make_model(config) -> Model:
  """The model of the config's section pretrain, over the nodes of its task."""
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


def response_logprobs(model: Model, params, token_NT, prompt: int):
  """Log-probs [N, T - prompt, V] of what may stand at each place behind the prompt, given all before it."""
  count, length = token_NT.shape
  zero_NT = jnp.zeros((count, length), jnp.int32)
  position_NT = zero_NT + jnp.arange(length, dtype=jnp.int32)[None]
  trunks = PackedTrees(token_NT, position_NT, zero_NT + 1, zero_NT, zero_NT, position_NT - 1, zero_NT > 0)
  h_NTD, _ = model.hidden(params, trunks)
  return jax.nn.log_softmax(model.logits(params, h_NTD[:, prompt - 1 : -1]))


def _of_targets(logp_NSV, token_NT):
  return jnp.take_along_axis(logp_NSV, token_NT[:, -logp_NSV.shape[1] :, None], axis=-1)[..., 0]


@functools.partial(jax.jit, static_argnames=("model", "prompt"))
def _forced(model, params, token_NT, prompt):
  """Of right responses: log-probs of their tokens, whether each is the likeliest, and of all that may follow the centre."""
  logp_NSV = response_logprobs(model, params, token_NT, prompt)
  likeliest_NS = jnp.argmax(logp_NSV, axis=-1) == token_NT[:, prompt:]
  return _of_targets(logp_NSV, token_NT), likeliest_NS, logp_NSV[:, 1]


def force(model: Model, params, graphs: Graphs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """One forced pass along the right paths.

  Returns:
    (log-probs of the path's tokens and EOS [N, L + 1] nats, whether greedy decoding takes each [N, L + 1], log-probs of
    all tokens at the critical place [N, V]).
  """
  prompt_NC = star_graph.prompt_ids(graphs)
  token_NT = np.concatenate([prompt_NC, star_graph.solution_ids(graphs)], axis=1).astype(np.int32)
  count, rows = len(token_NT), -(-len(token_NT) // _CALL) * _CALL if len(token_NT) > _CALL else len(token_NT)
  token_NT = np.resize(token_NT, (rows, token_NT.shape[1]))  # full calls, so that one program serves
  parts = [_forced(model, params, token_NT[at : at + _CALL], prompt_NC.shape[1]) for at in range(0, rows, _CALL)]
  return tuple(np.concatenate([np.asarray(part) for part in column])[:count] for column in zip(*parts, strict=True))


def critical_values(model: Model, params, graphs: Graphs) -> tuple[np.ndarray, np.ndarray]:
  """What the policy gives to every neighbour of the centre, and what that is worth: exact.

  Returns:
    (π(a | prompt, centre) for the first node a of each arm [N, A], Q after it [N, A]: 0 but for the goal's arm).
  """
  return _values(graphs, *force(model, params, graphs))


def _values(graphs: Graphs, logp_NS, _, critical_NV):
  policy_NA = np.exp(np.take_along_axis(critical_NV, star_graph.tokens(graphs.arm_NAL[:, :, 1]), axis=1))
  q_NA = np.zeros_like(policy_NA)
  q_NA[np.arange(len(graphs)), graphs.goal_N] = np.exp(logp_NS[:, 2:].sum(axis=1))
  return policy_NA, q_NA


def measure(model: Model, params, graphs: Graphs) -> dict[str, float]:
  """Means over problems; the names are explained at the head of this file. `loss` is SFT's, nats per token."""
  logp_NS, likeliest_NS, critical_NV = force(model, params, graphs)
  policy_NA, q_NA = _values(graphs, logp_NS, likeliest_NS, critical_NV)
  found = {
    "critical": np.exp(logp_NS[:, 1]).mean(),
    "rest": np.exp(logp_NS[:, 2:].sum(axis=1)).mean(),
    "value": (policy_NA * q_NA).sum(axis=1).mean(),
    "legal": policy_NA.sum(axis=1).mean(),
    "error": 1 - likeliest_NS.all(axis=1).mean(),
    "loss": -logp_NS.mean(),
  }
  return {name: round(float(value), 5) for name, value in found.items()}


def make_training(loss_fn, section, num_steps: int):
  """(initial optimizer state of params, (params, state, batches [steps, ...]) -> (params, state, losses [steps]))."""
  optimizer = optimizer_lib.make_optimizer(section.optimizer, num_steps)

  def step(carry, batch):
    params, state = carry
    loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), loss

  def run(params, state, batches):
    (params, state), loss_S = jax.lax.scan(step, (params, state), batches)
    return params, state, loss_S

  return jax.jit(optimizer.init), jax.jit(run, donate_argnums=(0, 1))


def sft_loss(model: Model, prompt: int, params, token_NT):
  """Next-token loss of the responses, mean nats per token."""
  return -jnp.mean(_of_targets(response_logprobs(model, params, token_NT, prompt), token_NT))


def dpo_loss(
  model: Model, prompt: int, beta: float, nll_weight: float, params, token_NT, wrong_N, ref_chosen_N, ref_rejected_N
):
  """DPO of the right rest of the path against a wrong critical node, both after prompt and centre; mean per pair.

  Args:
    model, prompt, params: the policy, and how many tokens its prompts have.
    beta: per nat.
    nll_weight: weight of the right rest's next-token loss per token, which keeps what copying the model has.
    token_NT: prompts with their right responses.
    wrong_N: token ids of the wrong nodes.
    ref_chosen_N, ref_rejected_N: log-probs under the reference, nats.
  """
  logp_NSV = response_logprobs(model, params, token_NT, prompt)
  chosen_N = jnp.sum(_of_targets(logp_NSV, token_NT)[:, 1:], axis=1)
  rejected_N = jnp.take_along_axis(logp_NSV[:, 1], wrong_N[:, None], axis=1)[:, 0]
  loss_N = losses.dpo_loss(chosen_N, rejected_N, ref_chosen_N, ref_rejected_N, beta=beta)
  return jnp.mean(loss_N - nll_weight * chosen_N / (logp_NSV.shape[1] - 1))


def _stream(rng: np.random.Generator, count: int, wanted: int) -> np.ndarray:
  """Epoch after epoch of numbers below `count`, each shuffled, the first `wanted`."""
  return np.concatenate([rng.permutation(count) for _ in range(-(-wanted // count))])[:wanted]


def _parts(num_steps: int, every: int) -> list[tuple[int, int]]:
  return [(at, min(at + every, num_steps)) for at in range(0, num_steps, every)]


class Study:
  """The cells of one config in one workdir."""

  def __init__(self, config, workdir: epath.PathLike):
    """Computes nothing.

    Raises:
      UserError: the task is not star_graph, its sizes make no star, or checkpoints lie beyond SFT's last step.
    """
    if config.task.name != "star_graph":
      raise UserError(f"task.name={config.task.name!r}: figure 8 needs star_graph, as configs/star_graph.py has it.")
    star_graph.check(config.task)
    marks = config.star_graph
    self.checkpoints = (*marks.under_trained, *marks.over_trained)
    if not marks.under_trained or not marks.over_trained or max(self.checkpoints) > config.sft.max_steps:
      raise UserError(
        f"star_graph.under_trained={marks.under_trained} and star_graph.over_trained={marks.over_trained} must name steps of "
        f"SFT, none above sft.max_steps={config.sft.max_steps}."
      )
    if config.star_graph.seeds < 2:
      raise UserError("star_graph.seeds must be 2 at least: intervals are over seeds.")
    self.config, self.folder, self.model = config, epath.Path(workdir), make_model(config)
    self.num_prompt = 3 * config.task.star_graph.degree * (config.task.star_graph.path_nodes - 1) + 4
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

  def _cell(self, name: str, sections, make) -> dict:
    """The cell's JSON: from the disk if it is of these settings, else made."""
    plain = config_schema.plain(self.config, ("task", *sections))
    key = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
    path = self.folder / "cells" / f"{name}.json"
    if path.exists():
      found = json.loads(path.read_text())
      if found["config_hash"] != key:
        raise UserError(f"{path} is of other settings; take another --workdir, or remove it.")
      return found
    begin = time.monotonic()
    made = {"cell": name, "config_hash": key, **make()}
    made["seconds"] = round(time.monotonic() - begin, 1)
    with writing(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      temporary = path.parent / f"{path.name}.tmp"
      temporary.write_text(json.dumps(made, indent=1) + "\n")
      temporary.replace(path)
    logging.info("%s: %.0f s.", name, made["seconds"])
    return made

  def _keep(self, name: str, params) -> None:
    path = self.folder / "weights" / f"{name}.npz"
    with writing(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      temporary = path.parent / f"{path.name}.tmp"
      with temporary.open("wb") as file:
        np.savez(file, *map(np.asarray, jax.tree.leaves(params)))
      temporary.replace(path)

  def weights(self, cell: str):
    """Parameters that a finished cell has left: of "base", or of SFT, "sft_SEED_CHECKPOINT".

    Raises:
      UserError: the cell has not been made, or its weights were removed.
    """
    found = self._kept(cell)
    if found is None:
      raise UserError(f"{self.folder / 'weights' / f'{cell}.npz'} is not there: make the cell first.")
    return found

  def _kept(self, name: str):
    """Weights that a cell left, on the device; None where they are not there."""
    path = self.folder / "weights" / f"{name}.npz"
    if not path.exists():
      return None
    with path.open("rb") as file, np.load(file) as found:
      leaves = [jnp.asarray(found[key]) for key in found.files]
    return jax.tree.unflatten(jax.tree.structure(self.model.abstract_params()), leaves)

  @functools.cached_property
  def _sft(self):
    loss = functools.partial(sft_loss, self.model, self.num_prompt)
    return make_training(loss, self.config.sft, self.config.sft.max_steps)

  @functools.cached_property
  def _dpo(self):
    section = self.config.dpo
    loss = functools.partial(dpo_loss, self.model, self.num_prompt, section.beta, section.nll_weight)
    return make_training(loss, self.config.dpo, self.config.dpo.max_steps)

  def base(self) -> dict:
    """Pretrains the base: tours first, then walks."""
    return self._cell("base", ("pretrain",), self._make_base)

  def _make_base(self) -> dict:
    section, rng = self.config.pretrain, np.random.default_rng([_BASE, 0])
    num_steps, size = section.num_problems // section.batch_size, section.batch_size
    loss = functools.partial(sft_loss, self.model, self.num_prompt)
    init, run = make_training(loss, section, num_steps)
    params = jax.jit(self.model.init)(jax.random.key(0))
    state, of_tours = init(params), round(num_steps * section.random_step_fraction)
    for first, last in [
      *_parts(of_tours, 100),
      *((of_tours + a, of_tours + b) for a, b in _parts(num_steps - of_tours, 100)),
    ]:
      kind = star_graph.tours if first < of_tours else star_graph.walks
      graphs = self._draw((last - first) * size, _BASE, first)
      token_NT = np.concatenate(kind(rng, graphs), axis=1).astype(np.int32)
      params, state, loss_S = run(params, state, (token_NT.reshape(last - first, size, -1),))
      logging.info("base: step %d of %d, loss %.3f.", last, num_steps, float(loss_S[-1]))
    self._keep("base", params)
    return {"parameters": self.model.config.num_params, "test": measure(self.model, params, self.test)}

  def sft(self, seed: int) -> dict:
    """SFT of one seed, far beyond memorisation, measured every `star_graph.every_steps` steps."""
    self.base()
    return self._cell(f"sft_{seed}", ("pretrain", "sft", "star_graph"), lambda: self._make_sft(seed))

  def _make_sft(self, seed: int) -> dict:
    section, marks, graphs = self.config.sft, self.config.star_graph, self.train_set(seed)
    token_NT = np.concatenate([star_graph.prompt_ids(graphs), star_graph.solution_ids(graphs)], axis=1).astype(np.int32)
    order = _stream(np.random.default_rng([_ORDER, seed]), len(graphs), section.max_steps * section.batch_size)
    order = order.reshape(section.max_steps, section.batch_size)
    params = self._kept("base")
    if params is None:
      self._make_base()
      params = self._kept("base")
    init, run = self._sft
    state = init(params)
    stops = sorted({0, section.max_steps, *self.checkpoints, *range(0, section.max_steps, marks.every_steps)})
    curve = [self._point(0, params, graphs)]
    for first, last in zip([0, *stops], stops, strict=False):
      if last > first:
        params, state, _ = run(params, state, (token_NT[order[first:last]],))
        curve.append(self._point(last, params, graphs))
      if last in self.checkpoints:
        self._keep(f"sft_{seed}_{last}", params)
    return {"seed": seed, "curve": curve}

  def _point(self, step: int, params, graphs: Graphs) -> dict:
    train = measure(self.model, params, graphs.take(slice(_MEASURED)))
    return {"step": step, "train": train, "test": measure(self.model, params, self.test)}

  def dpo(self, seed: int, checkpoint: int) -> dict:
    """Per-step DPO from one checkpoint."""
    self.sft(seed)
    sections = ("pretrain", "sft", "star_graph", "sample", "dpo")
    return self._cell(f"dpo_{seed}_{checkpoint}", sections, lambda: self._make_dpo(seed, checkpoint))

  def pairs(self, params, graphs: Graphs, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """(problem, token id of the wrong node, reference log-probs of chosen and rejected) of each pair, [P] each."""
    how = self.config.sample
    logp_NS, _, critical_NV = force(self.model, params, graphs)
    share_NV = np.exp((critical_NV - critical_NV.max(axis=1, keepdims=True)).astype(np.float64) / how.temperature)
    below_NV = np.cumsum(share_NV / share_NV.sum(axis=1, keepdims=True), axis=1)[:, :-1]
    drawn_NK = np.sum(rng.random((len(graphs), how.num_traces, 1)) >= below_NV[:, None], axis=-1)
    right_N = star_graph.tokens(graphs.path_NL[:, 1])
    problem_W, k_W = np.nonzero(drawn_NK != right_N[:, None])
    pair_P2 = np.unique(np.stack([problem_W, drawn_NK[problem_W, k_W]], axis=1), axis=0)
    problem_P, wrong_P = pair_P2.T
    return problem_P, wrong_P, logp_NS[problem_P, 1:].sum(axis=1), critical_NV[problem_P, wrong_P]

  def _make_dpo(self, seed: int, checkpoint: int) -> dict:
    section, graphs = self.config.dpo, self.train_set(seed)
    params = self._kept(f"sft_{seed}_{checkpoint}")
    if params is None:
      self._make_sft(seed)
      params = self._kept(f"sft_{seed}_{checkpoint}")
    rng = np.random.default_rng([_DRAWS, seed, checkpoint])
    problem_P, *columns = self.pairs(params, graphs, rng)
    curve = [{**self._point(0, params, graphs), "dpo_loss": round(float(np.log(2)), 5)}]
    found = {"seed": seed, "checkpoint": checkpoint, "pairs": len(problem_P), "curve": curve}
    if len(problem_P) == 0:
      return found
    token_NT = np.concatenate([star_graph.prompt_ids(graphs), star_graph.solution_ids(graphs)], axis=1).astype(np.int32)
    order = _stream(rng, len(problem_P), section.max_steps * section.batch_size)
    order = order.reshape(section.max_steps, section.batch_size)
    init, run = self._dpo
    state = init(params)
    for first, last in _parts(section.max_steps, self.config.star_graph.every_steps):
      at = order[first:last]
      batch = (token_NT[problem_P[at]], columns[0][at].astype(np.int32), columns[1][at], columns[2][at])
      params, state, loss_S = run(params, state, batch)
      curve.append({**self._point(last, params, graphs), "dpo_loss": round(float(np.mean(loss_S)), 5)})
    return found


def run(config, workdir: epath.PathLike) -> dict:
  """All cells that are missing, then report/: star_graph.json, .csv, .png and .svg.

  Returns:
    What star_graph.json holds (experiments/star_graph/plots.py).
  """
  study = Study(config, workdir)
  marks = config.star_graph
  todo = [("base",)] + [("sft", seed) for seed in range(marks.seeds)]
  todo += [("dpo", seed, at) for seed in range(marks.seeds) for at in study.checkpoints]
  cells, begin, made = [], time.monotonic(), 0
  for number, (kind, *args) in enumerate(todo):
    before = time.monotonic()
    cells.append(getattr(study, kind)(*args))
    made += time.monotonic() - before > 0.5
    left = (time.monotonic() - begin) / max(made, 1) * (len(todo) - number - 1)
    logging.info("%d of %d cells, %s; about %.0f min left.", number + 1, len(todo), cells[-1]["cell"], left / 60)
  result = plots.collect(cells, config.task.star_graph.degree)
  plots.write(result, epath.Path(workdir) / "report", marks.under_trained, marks.over_trained)
  return result
