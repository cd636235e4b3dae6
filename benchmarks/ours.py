"""Our side of the benchmark: random models of two sizes, their weights in a folder for the other
side, and our calls.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence

import jax
import numpy as np

from benchmarks.benchmark import Work
from synthneg_jax.core.geometry import Lanes
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.decoding import decode
from synthneg_jax.decoding.decode import DecodeSpec, Geometry, Stops
from synthneg_jax.decoding.engine import Engine, Trunk, trunk_arrays
from synthneg_jax.decoding.sampling import Sampling
from synthneg_jax.models import huggingface, presets
from synthneg_jax.models.config import ModelConfig
from synthneg_jax.models.decoder import Model
from synthneg_jax.runtime import config_schema, device_mesh
from synthneg_jax.training import optimizer
from synthneg_jax.training import step as step_lib

SIZES = {
  "T": ModelConfig(
    vocab_size=512,
    d_model=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    d_ff=344,
    scan_layers=False,
  ),
  "S": ModelConfig(  # SmolLM2-135M's shapes
    vocab_size=49152,
    d_model=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    d_ff=1536,
    rope_theta=100000.0,
    tie_embeddings=True,
    scan_layers=False,
  ),
  # TinyLlama-1.1B (https://arxiv.org/abs/2401.02385) and Llama 2 7B.
  "1B": ModelConfig(
    vocab_size=32000,
    d_model=2048,
    num_layers=22,
    num_heads=32,
    num_kv_heads=4,
    head_dim=64,
    d_ff=5632,
  ),
  "7B": presets.preset(
    "llama2_7b", dtype="float32", param_dtype="float32", scan_layers=True, remat="none"
  ),
}
TREES = {  # that fill a row of so many tokens
  "one sequence": lambda length: [Tree([1] * length)],
  "pairs: trunk 256, 128 + 128": lambda length: (
    [Tree([1] * 256, (Branch(256, [1] * 128),) * 2)] * (length // 512)
  ),
  "traces: prompt 128, 4 x 224": lambda length: (
    [Tree([1] * 128, (Branch(128, [1] * 224),) * 4)] * (length // 1024)
  ),
  "one pair: prompt 512, two halves": lambda length: [
    Tree([1] * 512, (Branch(512, [1] * (length // 2 - 256)),) * 2)
  ],
}
LEARNING_RATE = 1e-4


class Side:
  """Our side of one size: model, random weights, and the folder that the other side reads them
  from.
  """

  def __init__(self, size: str, seed: int = 0, **changes):
    """`changes` are fields of the size's config that this model has otherwise."""
    self.size, self.config = size, dataclasses.replace(SIZES[size], **changes)
    self.model = Model(self.config)
    self.mesh = device_mesh.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    self._seed, self.rng = seed, np.random.default_rng(seed)

  @functools.cached_property
  def params(self):
    """The weights."""
    return self.fresh()

  @functools.cached_property
  def folder(self) -> str:
    """Where the other side finds the weights."""
    folder = f"{tempfile.mkdtemp()}/model"
    huggingface.save(folder, self.model, self.params)
    return folder

  def fresh(self):
    """The weights anew: train steps consume theirs."""
    shardings = device_mesh.shardings(self.mesh, self.model.logical_axes())
    return jax.jit(self.model.init, out_shardings=shardings)(jax.random.key(self._seed))

  def ids(self, *shape: int) -> np.ndarray:
    """Random tokens, none of them the other side's padding."""
    return self.rng.integers(1, self.config.vocab_size, shape)

  def forward_flops(self, tokens: int, scored: int, context: float) -> float:
    """Of the matrix products for `tokens` tokens that see `context` others each, and logits for
    `scored`.
    """
    c = self.config
    ends = c.vocab_size * c.d_model
    layers = c.num_params - ends * (1 if c.tie_embeddings else 2)
    return (
      2.0 * layers * tokens
      + 2.0 * ends * scored
      + 4.0 * c.num_layers * c.num_heads * c.head_dim * context * tokens
    )

  def decode_work(self, rows: Sequence[tuple[int, int, int]], steps: int) -> Work:
    """Of decoding: (context, new tokens, prefilled tokens) of each row, in `steps` steps that each
    read all weights.
    """
    c = self.config
    flops = sum(self.forward_flops(new + pre, new, context) for context, new, pre in rows)
    read = 4.0 * (c.num_params - (0 if c.tie_embeddings else c.vocab_size * c.d_model)) * steps
    return Work(flops, read)


def train_step(side: Side, objective, batch) -> Callable[[], float]:
  """A function that takes one step and returns the loss before it."""
  section = config_schema.default().sft.optimizer
  section.update(
    learning_rate=LEARNING_RATE, schedule="constant", warmup_fraction=0.0, clip_norm=1e9
  )
  made = optimizer.make_optimizer(section, 1000)
  shardings = step_lib.state_shardings(side.model, made, side.mesh)
  held = {"state": step_lib.make_init(made, shardings)(side.fresh())}
  run = step_lib.make_step(objective, made, shardings, mesh=side.mesh)
  batch = jax.device_put(batch, step_lib.batch_shardings(side.mesh))

  def step():
    held["state"], metrics = run(held["state"], batch)
    total, count = next(value for name, value in metrics.items() if name.startswith("loss"))
    return float(total) / float(count)

  return step


def grow(
  engine: Engine, side: Side, trunks: Sequence[Trunk], temperature: float
) -> list[list[np.ndarray]]:
  """The new tokens of every item of every trunk."""
  made = dict(engine.run(side.params, trunks, Sampling(temperature)))
  return [[generation.ids for generation in made[i]] for i in range(len(trunks))]


def make_engine(side: Side, lanes: int, slots: int, new: int) -> Engine:
  """The engine of a side, without EOS or stop strings: `new` tokens of every item."""
  return Engine(side.model, side.mesh, Stops(()), lanes=Lanes(lanes, slots), max_new_tokens=new)


def draw_keys(number: int, items: int) -> np.ndarray:
  """uint32 [items, 2], random keys of the items of trunk `number`."""
  return np.random.default_rng(number).integers(0, 2**32, (items, 2), np.uint32)


def peak_bytes(side: Side, g: Geometry) -> float:
  """State and temporaries of the greater of prefill and decode, by XLA's analysis; the weights are
  not counted.
  """
  spec = DecodeSpec(model=side.model, geometry=g, sampling=Sampling(1.0), stops=Stops(()))
  state = jax.eval_shape(functools.partial(decode.empty_state, side.model, g))
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trunk_arrays(g, []))
  params = side.model.unstack(side.params)  # as the engine hands them over

  def lower(fn, *args):
    return jax.jit(functools.partial(fn, spec), donate_argnums=1).lower(params, state, *args)

  programs = (lower(decode.prefill, batch), lower(decode.decode, np.int32(1)))
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
  return held + max(program.compile().memory_analysis().temp_size_in_bytes for program in programs)
