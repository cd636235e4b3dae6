"""The programs of a config's stages at their full sizes, ready to compile for abstract arrays."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from synthneg_jax.core import losses
from synthneg_jax.core.geometry import Lanes
from synthneg_jax.core.tree import PackedTrees
from synthneg_jax.decoding import engine, policy
from synthneg_jax.decoding.decode import DecodeSpec, Geometry, Stops, state_shardings
from synthneg_jax.models import huggingface, presets
from synthneg_jax.models.adapter import Adapter
from synthneg_jax.models.decoder import Model
from synthneg_jax.pipeline import train_policy
from synthneg_jax.pipeline.experiment import sampling
from synthneg_jax.preflight import collective_traffic, cost_model, roofline
from synthneg_jax.runtime import device_mesh
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.training import objectives, reference
from synthneg_jax.training import optimizer as optimizer_lib
from synthneg_jax.training import step as step_lib
from synthneg_jax.training.batch import Batch, Shape

STAGES = ("sft", "rft", "dpo", "sample", "credit", "evaluate")
PROGRAMS = (
  "sft",
  "rft",
  "dpo/reference",
  "dpo/dpo",
  "dpo/step_dpo",
  *(
    f"{stage}/{part}"
    for stage in ("sample", "credit", "evaluate")
    for part in ("prefill", "decode")
  ),
)
_EOS = (2,)  # any id gives the same costs


@dataclasses.dataclass(frozen=True)
class Program:
  """One program of the recipe.

  Attributes:
    name: stage, or stage/part.
    lower: returns jax.jit(...).lower(...).
    runs: number of runs in the recipe; for decoding, iterations of its loop.
    model_flops: FLOPs that the model itself needs per run, over all chips, without padding.
    sizes: as text.
    advice: what to change if the program does not fit.
    least_read: for decoding, bytes of weights and cache per chip, which each iteration must read.
    beside: bytes per chip of other arrays that exist during the run: for decoding, the parameters
      as loaded.
  """

  name: str
  lower: Callable[[], jax.stages.Lowered]
  runs: float
  model_flops: float
  sizes: str
  advice: str
  least_read: float = 0.0
  beside: float = 0.0


def architecture(config) -> Model:
  """The model of a config: from its folder's config.json, or else a preset.

  Raises:
    UserError: model.path is neither.
  """
  c = config.model
  settings = {
    "dtype": c.dtype,
    "param_dtype": c.param_dtype,
    "scan_layers": c.scan_layers,
    "remat": c.remat,
  }
  try:
    folder = policy.resolve(c.path, weights=False)
  except UserError as error:
    raise UserError(
      f"model.path={c.path} is neither a folder nor a preset ({', '.join(presets.NAMES)}). {error}"
    ) from error
  if (folder / "config.json").exists():
    return Model(huggingface.read_config(folder, **settings, max_length=c.max_length))
  if folder.name in presets.NAMES:
    return Model(presets.preset(folder.name, **settings))
  raise UserError(
    f"model.path={c.path} is neither a folder with a config.json nor a preset "
    f"({', '.join(presets.NAMES)})."
  )


def _abstract(tree, shardings):
  """Abstract arrays of a tree; `shardings` may be a prefix of the tree."""

  def with_sharding(sharding, part):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part)

  return jax.tree.map(with_sharding, shardings, tree)


def _batch(shape: Shape, mesh: Mesh) -> Batch:
  """A batch of abstract arrays."""
  rows, replicated = device_mesh.rows(mesh), device_mesh.replicated(mesh)

  def abstract(dtype, *sizes):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=rows)

  i32, f32 = functools.partial(abstract, jnp.int32), functools.partial(abstract, jnp.float32)
  fields = {field.name: i32(shape.rows, shape.length) for field in dataclasses.fields(PackedTrees)}
  fields["scored"] = abstract(bool, shape.rows, shape.length)
  pairs = (shape.rows, shape.pairs)
  count = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
  trees = PackedTrees(**fields)
  scored, ends = i32(shape.rows, shape.scored), i32(shape.rows, shape.branches)
  advantage = f32(shape.rows, shape.scored)
  return Batch(
    trees, scored, advantage, ends, i32(*pairs), i32(*pairs), f32(*pairs), f32(*pairs), count, count
  )


def _held(abstract) -> float:
  """Bytes per chip of abstract arrays with shardings."""
  leaves = jax.tree.leaves(abstract)
  return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


class Recipe:
  """The programs of one config on one mesh.

  Attributes:
    model: its architecture.
    mesh: of training; decoding merges fsdp into data.
    work: from `cost_model.work`.
  """

  def __init__(self, config, mesh: Mesh, lengths: cost_model.Lengths, memory: float):
    """Checks that the mesh can split the model; `memory` is a device's memory in bytes."""
    self.mesh, self._lengths, self._memory = mesh, lengths, device_mesh.MEMORY_FRACTION * memory
    self.model = architecture(config)
    self._config = self._with_geometry(config)
    self._params = policy.param_shardings(self.model, mesh)
    self.work = cost_model.work(config, lengths, len(config.evaluate.methods))

  def _with_geometry(self, config):
    """The config with the geometry that stages would choose, for rows of model.max_length."""
    config = copy.deepcopy(config)
    for stage in ("sft", "rft", "dpo"):
      section = config[stage]
      section.row_length = section.row_length or config.model.max_length
      if not section.grad_accum_steps:
        name = "dpo/step_dpo" if stage == "dpo" else stage
        tree = cost_model.mean_tree(config, name, self._lengths)
        shards = device_mesh.row_shards(self.mesh)
        section.grad_accum_steps = 1
        rows = cost_model.batch_shape(section, tree, shards)[0].rows // shards
        room = train_policy.microbatch_tokens(
          self.model, section, self.mesh, length=section.row_length, memory=self._memory
        )
        section.grad_accum_steps = -(-rows // max(room // section.row_length, 1))
    return config

  def programs(self, stages: Sequence[str]) -> Iterator[Program]:
    """Yields the programs of stages (sft, dpo, ...), or single programs (sample/decode, ...).

    Raises:
      UserError: a name is neither a stage nor a program.
    """
    for name in stages:
      if name not in STAGES and name not in PROGRAMS:
        raise UserError(
          f"--stages: {name!r} is neither a stage ({', '.join(STAGES)}) nor a program "
          f"({', '.join(PROGRAMS)})."
        )
    for name in PROGRAMS:
      if name in stages or name.split("/")[0] in stages:
        yield self._program(name)

  def moves(self, cost: roofline.Cost) -> dict[str, dict[str, float]]:
    """How many times a program's collectives move each parameter (collective_traffic.py)."""
    return collective_traffic.moves(cost, self.model.abstract_params(), self._params, self.mesh)

  def _program(self, name: str) -> Program:
    stage, _, part = name.partition("/")
    if name == "dpo/reference":
      return self._reference()
    if stage in ("sample", "credit", "evaluate"):
      return self._engine(stage, part)
    return self._train(name)

  def _train(self, name: str) -> Program:
    config, model, mesh, stage = self._config, self.model, self.mesh, name.split("/")[0]
    section = config[stage]
    tree = cost_model.mean_tree(config, name, self._lengths)
    shape, trees = cost_model.batch_shape(section, tree, device_mesh.row_shards(mesh))
    device_mesh.check(
      f"{name}: a microbatch", (shape.rows // section.grad_accum_steps,), ("rows",), mesh
    )
    if stage == "dpo":
      # Other preference losses cost the same.
      loss = functools.partial(losses.dpo_loss, beta=section.beta)
      preference = objectives.Preference(
        loss=loss, beta=section.beta, nll_weight=section.nll_weight
      )
      objective = objectives.make_preference(
        model, preference, eos_ids=_EOS, chunk=section.logit_chunk
      )
    else:
      objective = objectives.make_sft(model, section.logit_chunk)
    optimizer = optimizer_lib.make_optimizer(section.optimizer, max(self.work[name]["steps"], 1))
    trained = train_policy.trainable(model, section)
    frozen, num_adapter, adapter_text = (), 0, ""
    if isinstance(trained, Adapter):
      policy.param_shardings(trained, mesh)  # checks that they exist
      objective = train_policy.merged_objective(trained, objective)
      frozen = (_abstract(model.abstract_params(), self._params),)
      num_adapter = sum(leaf.size for leaf in jax.tree.leaves(trained.abstract_params()))
      adapter_text = f", adapter of {num_adapter / 1e6:.3g} M parameters"
    layout = step_lib.state_shardings(trained, optimizer, mesh)

    def lower():
      state = jax.eval_shape(step_lib.make_init(optimizer, layout), trained.abstract_params())
      frozen_shardings = jax.tree.map(lambda leaf: leaf.sharding, frozen)
      run = step_lib.make_step(
        objective,
        optimizer,
        layout,
        mesh=mesh,
        num_microbatches=section.grad_accum_steps,
        frozen=frozen_shardings,
      )
      return run.lower(_abstract(state, layout), _batch(shape, mesh), *frozen)

    tokens = trees * tree.tokens
    fill = tokens / (shape.rows * shape.length)
    advice = (
      f"raise {stage}.grad_accum_steps or mesh.fsdp, lower {stage}.row_length, or set model.remat "
      "to full"
    )
    if num_adapter:
      advice += ", or model.param_dtype to bfloat16"
    return Program(
      name,
      lower,
      self.work[name]["steps"],
      cost_model.training_flops(
        model.config, tokens, trees * tree.keys, trees * tree.scored, adapter=num_adapter
      ),
      f"{shape.rows} rows x {shape.length} tokens in {section.grad_accum_steps} microbatch(es), "
      f"{100 * fill:.0f} % full{adapter_text}",
      advice,
    )

  def _reference(self) -> Program:
    config, model, mesh = self._config, self.model, self.mesh
    tree = cost_model.mean_tree(config, "dpo/step_dpo", self._lengths)
    shards = device_mesh.row_shards(mesh)
    rows = reference.rows_per_call(mesh)
    shape = dataclasses.replace(
      cost_model.batch_shape(config.dpo, tree, shards)[0], rows=rows, pairs=0
    )
    score = reference.make_forward(model, mesh, config.dpo.logit_chunk)
    trees = rows * cost_model.PACKED * shape.length / tree.tokens
    scored = (
      sum(self.work[name]["tokens_trained"] for name in ("dpo/dpo", "dpo/step_dpo"))
      / config.dpo.num_epochs
    )
    return Program(
      "dpo/reference",
      lambda: score.lower(_abstract(model.abstract_params(), self._params), _batch(shape, mesh)),
      math.ceil(scored / (trees * tree.tokens)),
      cost_model.forward_flops(
        model.config, trees * tree.tokens, trees * tree.keys, trees * tree.scored
      ),
      f"{rows} rows x {shape.length} tokens, {100 * cost_model.PACKED:.0f} % full",
      "lower dpo.row_length, or raise mesh.fsdp",
    )

  def _geometry(self, stage: str) -> Geometry:
    """The engine's geometry for the stage's longest trunks."""
    config, lengths = self._config, self._lengths
    c, section = config.engine, config[stage]
    refill = 0
    if stage == "sample":
      slots, lanes = min(c.slots, section.num_traces), c.lanes
      items = section.num_traces
    elif stage == "credit":
      slots, lanes = section.slots, section.lanes
      items = math.ceil((2 * lengths.steps - 1) * section.num_rollouts)
    else:
      slots, lanes, items = 1, c.lanes * min(c.slots or 1, 4), 1
    trunk = math.ceil(2 * (lengths.prompt + (lengths.response if stage == "credit" else 0)))
    if not lanes or not slots:  # as the stage would choose them
      mean = lengths.response / (2 if stage == "credit" else 1)
      trunks = min(math.ceil(self.work[stage]["trunks"]), 512)
      sizes = np.random.default_rng(0).integers(1, math.ceil(2 * mean) + 1, (trunks, items))
      work = engine.Work(
        sizes=np.minimum(sizes, c.max_new_tokens).tolist(),
        longest=min(trunk, config.model.max_length),
      )
      chosen = engine.fit(
        self.model,
        self.mesh,
        work,
        fixed=Lanes(lanes, slots),
        max_new_tokens=c.max_new_tokens,
        memory=self._memory,
      )
      lanes, slots, refill = chosen.lanes, chosen.slots, chosen.refill
    shards = device_mesh.row_shards(self.mesh)
    lanes = -(-lanes // shards) * shards
    return Geometry(
      lanes=lanes,
      slots=slots,
      trunk=min(engine.bucket(trunk), max(config.model.max_length, 1)),
      items=engine.items_bucket(items),
      new=c.max_new_tokens,
      refill=refill or max(lanes // 4, 1),
    )

  def _engine(self, stage: str, part: str) -> Program:
    config, model, lengths = self._config, self.model, self._lengths
    mesh, g = device_mesh.decoding(self.mesh), self._geometry(stage)
    work, m = self.work[stage], model.config
    spec = DecodeSpec(model=model, geometry=g, sampling=sampling(config[stage]), stops=Stops(_EOS))
    programs, replicated = engine.programs(spec, mesh), device_mesh.replicated(mesh)
    cast = jax.eval_shape(
      functools.partial(engine.cast_for_decoding, model), model.abstract_params()
    )
    beside = _held(_abstract(model.abstract_params(), self._params))
    params = _abstract(cast, engine.params_shardings(model, mesh))
    state = _abstract(jax.eval_shape(programs.empty), state_shardings(model, mesh))
    sizes = f"{g.lanes} lanes x {g.slots} slots, trunks of {g.trunk}, {g.new} new tokens"
    section = "credit" if stage == "credit" else "engine"
    advice = (
      f"lower {section}.lanes, {section}.slots or engine.max_new_tokens, or raise mesh.tensor"
    )

    # Credit continues prefixes of a trace in the trunk, on average from its middle.
    trace = lengths.response if stage == "credit" else 0.0
    new = lengths.response - trace / 2  # tokens decoded per branch
    trunk = lengths.prompt + trace
    if part == "decode":
      tokens, keys = g.lanes * g.slots, lengths.prompt + trace / 2 + new / 2
      flops = cost_model.forward_flops(m, tokens, tokens * keys, tokens)
      enough = _abstract(np.int32(0), replicated)

      def lower():
        return programs.decode.lower(params, state, enough)

      runs, least = work["tokens_decoded"] / tokens, _held(params) + _held(state.cache)
      return Program(f"{stage}/decode", lower, math.ceil(runs), flops, sizes, advice, least, beside)
    batch = _abstract(engine.trunk_arrays(g, []), replicated)
    branches = work["tokens_decoded"] / new / max(work["trunks"], 1)
    flops = cost_model.forward_flops(
      m, g.refill * trunk, g.refill * trunk * (trunk + 1) / 2, g.refill * branches
    )
    runs = math.ceil(work["trunks"] / g.refill)

    def lower():
      return programs.prefill.lower(params, state, batch)

    return Program(
      f"{stage}/prefill", lower, runs, flops, f"{g.refill} of {sizes}", advice, 0.0, beside
    )
