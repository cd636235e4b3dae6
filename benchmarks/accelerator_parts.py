"""What the accelerator check measures, part by part; accelerator_check.py starts this file as a
process and reads its lines.

python -m benchmarks.accelerator_parts [--toy] PART ...     one JSON line a part
python -m benchmarks.accelerator_parts --record         writes the CPU's reference figures
"""

import argparse
import dataclasses
import functools
import gc
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import ours, torch_baselines
from benchmarks.ours import LEARNING_RATE, SIZES, Side
from synthneg_jax.core import losses
from synthneg_jax.core import tree as tree_lib
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.decoding.engine import Trunk
from synthneg_jax.decoding.policy import EMBEDDED
from synthneg_jax.models import attention
from synthneg_jax.models.config import ModelConfig
from synthneg_jax.models.decoder import Model
from synthneg_jax.preflight import chips
from synthneg_jax.training import batch as batch_lib
from synthneg_jax.training import objectives
from synthneg_jax.training.batch import Example, PairInTree

RECORDED = pathlib.Path(__file__).with_name("accelerator_numerics.json")
_BETA, _BILLION = 0.1, 10**9
_STATE_BYTES = 16  # of a parameter in training: itself, its gradient and two moments in float32


@dataclasses.dataclass(frozen=True)
class Scale:
  """How large the parts are.

  Attributes:
    sizes: by the name in a part, the name in `ours.SIZES`.
    rows: of a training batch, by the same names, on a chip with 141 GB.
    length: tokens of a row.
    prompt, branch: tokens of a DPO tree's trunk and of each of its two branches.
    attention: tokens of the row whose attention is timed.
    sequences, short, long: sequences that are decoded together, and new tokens of the two runs
      whose times are subtracted.
    seconds: that the steps of a part may take, compilation not counted.
    matrix: rows and columns of the matrices of the device part.
    dtype: of products; parameters are float32 in training.
  """

  sizes: dict[str, str]
  rows: dict[str, int]
  length: int
  prompt: int
  branch: int
  attention: int
  sequences: int
  short: int
  long: int
  seconds: float
  matrix: int
  dtype: str


FULL = Scale(
  sizes={"135M": "S", "1B": "1B", "7B": "7B"},
  rows={"135M": 16, "1B": 8, "7B": 4},
  length=2048,
  prompt=512,
  branch=250,
  attention=8192,
  sequences=8,
  short=8,
  long=136,
  seconds=3.0,
  matrix=8192,
  dtype="bfloat16",
)
TOY = Scale(
  sizes=dict.fromkeys(FULL.sizes, "T"),
  rows=dict.fromkeys(FULL.rows, 2),
  length=128,
  prompt=32,
  branch=15,
  attention=1024,
  sequences=2,
  short=2,
  long=66,
  seconds=0.2,
  matrix=256,
  dtype="float32",
)


def _seconds(run: Callable[[], object], seconds: float, of=statistics.median) -> float:
  """Of calls after a first one, at least three and for so many seconds, each waited for: what `of`
  makes of their times.
  """
  jax.block_until_ready(run())
  times = []
  while len(times) < 3 or (sum(times) < seconds and len(times) < 50):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  return of(times)


def _memory() -> float:
  """Bytes that the device may hold."""
  limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
  chip = chips.from_device_kind(jax.devices()[0].device_kind)
  return limit or (chip.hbm_bytes if chip else 8 * _BILLION)


def _fitting(name: str, scale: Scale, bytes_a_parameter: float, **changes) -> tuple[str, dict]:
  """(size, changes of its config), with as many layers as half of the memory holds."""
  size = scale.sizes[name]
  config = SIZES[size]
  one = dataclasses.replace(config, num_layers=1)
  layer = (config.num_params - one.num_params) / max(config.num_layers - 1, 1)
  held = _memory() / 2 / bytes_a_parameter - (one.num_params - layer)
  layers = int(min(config.num_layers, max(held // layer, 1)))
  return size, {"num_layers": layers, "dtype": scale.dtype, "scan_layers": True} | changes


def _out_of_memory(error: Exception) -> bool:
  return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def _halving(rows: int, measure: Callable[[int], dict]) -> dict:
  """What `measure(rows)` says, with half as many rows as often as memory asks for it."""
  while True:
    try:
      return measure(rows)
    except Exception as error:
      if rows == 1 or not _out_of_memory(error):
        raise
      rows //= 2
    gc.collect()


def _start_rows(name: str, scale: Scale) -> int:
  return max(1, round(scale.rows[name] * min(_memory() / (141 * _BILLION), 1.0)))


def device(scale: Scale) -> dict:
  """Which device this is, its published peaks, and what one product and one copy reach."""
  found, n = jax.devices()[0], scale.matrix
  chip = chips.from_device_kind(found.device_kind)
  a = jnp.asarray(np.random.default_rng(0).normal(size=(n, n)), jnp.bfloat16)
  large = jnp.ones((16 * n, n), jnp.float32)
  product = _seconds(functools.partial(jax.jit(jnp.dot), a, a), scale.seconds / 4)
  copy = _seconds(functools.partial(jax.jit(lambda x: x + 1), large), scale.seconds / 4)
  return {
    "kind": found.device_kind,
    "platform": found.platform,
    "memory_bytes": _memory(),
    "peak_flops": chip.flops if chip else None,
    "peak_bytes": chip.memory_rate if chip else None,
    "product_flops": 2 * n**3 / product,
    "copy_bytes": 2 * large.nbytes / copy,
    "versions": {"python": sys.version.split()[0], "jax": jax.__version__},
  }


_NUMERICS = ModelConfig(
  vocab_size=256,
  d_model=128,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=64,
  d_ff=256,
  scan_layers=True,
)


def _numbers(dtype: str) -> dict:
  """Log-probs and gradients of a small model on rows of 1024 tokens, long enough for the fused
  kernels.

  Parameters are numpy's draws, which are the same everywhere. Of each array's gradient its norm is
  kept, and its products with eight drawn directions.
  """
  model, rng = Model(dataclasses.replace(_NUMERICS, dtype=dtype)), np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape) * (0.08 if x.ndim > 1 else 1.0), jnp.float32),
    model.abstract_params(),
  )

  def ids(size: int) -> list[int]:
    return rng.integers(1, _NUMERICS.vocab_size, size).tolist()

  examples = [
    Example(Tree(ids(280), (Branch(280, ids(120)), Branch(200, ids(110))))) for _ in range(4)
  ]
  batch = batch_lib.build(examples, batch_lib.measure(examples, 1024))
  weight_RS = jnp.asarray(rng.normal(size=batch.scored_at.shape), jnp.float32)
  batch = jax.tree.map(jnp.asarray, batch)

  def weighted(params):
    logp_RS, _ = objectives.scored_logprobs(model, params, batch)
    return jnp.sum(weight_RS * logp_RS), logp_RS

  gradients, logp_RS = jax.jit(jax.grad(weighted, has_aux=True))(params)
  found = {"logp": np.asarray(logp_RS, np.float64).ravel()[::7].tolist(), "gradients": {}}
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    gradient = np.asarray(gradient, np.float64)
    along = [float(np.sum(gradient * rng.normal(size=gradient.shape))) for _ in range(8)]
    found["gradients"][jax.tree_util.keystr(path, simple=True, separator=".")] = [
      np.linalg.norm(gradient),
      along,
    ]
  return found


def _greedy() -> list[int]:
  """24 tokens that the engine draws greedily for each of two prompts, float32."""
  side = Side("T", num_layers=2, vocab_size=64)
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), side.model.abstract_params()
  )
  trunks = [Trunk(rng.integers(1, 64, n).tolist(), [n], ours.draw_keys(0, 1)) for n in (9, 20)]
  side.params = params
  return [
    int(token)
    for items in ours.grow(ours.make_engine(side, 2, 1, 24), side, trunks, 0.0)
    for token in items[0]
  ]


def _all_numbers() -> dict:
  with jax.default_matmul_precision("highest"):
    exact = {"float32": _numbers("float32"), "greedy": _greedy()}
  return exact | {"bfloat16": _numbers("bfloat16")}


def _difference(found: dict, wanted: dict) -> dict[str, float]:
  """Root mean squares: of log-probs' differences, nats, and of gradients', over their norms."""
  logp = np.subtract(found["logp"], wanted["logp"])
  pairs = [
    np.subtract(found["gradients"][name][1], along) / norm
    for name, (norm, along) in wanted["gradients"].items()
  ]
  return {
    "logp": float(np.sqrt(np.mean(logp**2))),
    "gradients": float(np.sqrt(np.mean(np.square(pairs)))),
  }


def numerics(scale: Scale) -> dict:
  """Against the numbers that a CPU gave in float32, with products in full precision: float32 within
  1e-4, greedy tokens equal; bfloat16 at most twice as far from them as the CPU's own bfloat16.
  """
  del scale
  recorded, found = json.loads(RECORDED.read_text()), _all_numbers()
  exact = recorded["float32"]
  result = {dtype: _difference(found[dtype], exact) for dtype in ("float32", "bfloat16")}
  result["bfloat16 on CPU"] = allowed = _difference(recorded["bfloat16"], exact)
  result["greedy_equal"] = found["greedy"] == recorded["greedy"]
  close = all(x < 1e-4 for x in result["float32"].values())
  near = all(result["bfloat16"][name] <= 2 * allowed[name] for name in allowed)
  return result | {"holds": bool(close and near and result["greedy_equal"])}


def attend(scale: Scale) -> dict:
  """Forward and backward pass of one layer's attention over one row, 16 heads of 128: fused against
  dense.
  """
  length, side = scale.attention, 16 if scale is FULL else 2
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(length, side, 128)), jnp.bfloat16) for _ in range(3))
  if attention.kernels(length, q.dtype) is None:
    raise RuntimeError(f"attention is not fused on {jax.devices()[0].device_kind}")

  def run(fused: bool, trees) -> tuple[float, jax.Array]:
    keys = tree_lib.row_keys(jax.tree.map(jnp.asarray, tree_lib.pack([trees], length)))

    def loss(q, k, v):
      out = attention.tree_attention(q, k, v, keys=keys)[0].astype(jnp.float32)
      return jnp.sum(out**2), out

    with mock.patch.object(attention, "_FUSED_FROM", 1 if fused else length + 1):
      call = functools.partial(jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True)), q, k, v)
      return _seconds(call, scale.seconds / 4), call()[1]

  rows = {}
  for name, trees in ours.TREES.items():
    (fused, out), (dense, wanted) = (run(is_fused, trees(length)) for is_fused in (True, False))
    rows[name] = {
      "fused_ms": 1e3 * fused,
      "dense_ms": 1e3 * dense,
      "ratio": dense / fused,
      "difference": float(jnp.max(jnp.abs(out - wanted))),
    }
  return {"tokens": length, "rows": rows, "ratio": min(row["ratio"] for row in rows.values())}


def _dpo_tree(scale: Scale, ids: Callable[[int], list[int]]) -> Tree:
  prompt = scale.prompt
  return Tree(ids(prompt), tuple(Branch(prompt, ids(scale.branch)) for _ in range(2)))


def _work(scale: Scale, kind: str, rows: int, side: Side) -> tuple[list[Example], dict]:
  """(examples of a batch, its tokens without padding and the FLOPs of a step)."""

  def ids(size: int) -> list[int]:
    return side.ids(size).tolist()

  def triangle(n: int) -> float:
    return n * (n + 1) / 2

  if kind == "sft":
    n = scale.length
    examples = [Example(Tree(ids(1), (Branch(1, ids(n - 1)),))) for _ in range(rows)]
    tokens, scored, keys = rows * n, rows * (n - 1), rows * triangle(n)
  else:
    prompt, branch = scale.prompt, scale.branch
    pairs = rows * (scale.length // (prompt + 2 * branch))
    pair = (PairInTree(0, 1, -9.0 * branch, -9.0 * branch),)
    examples = [Example(_dpo_tree(scale, ids), pair) for _ in range(pairs)]
    tokens, scored = pairs * (prompt + 2 * branch), pairs * 2 * branch
    keys = pairs * (triangle(prompt) + 2 * (branch * prompt + triangle(branch)))
  flops = 3 * side.forward_flops(tokens, scored, keys / tokens)
  return examples, {"tokens": tokens, "flops": flops}


def train(kind: str, name: str, scale: Scale) -> dict:
  """Steps of SFT on full rows, or of DPO on trees; padding does not count."""

  def measure(rows: int) -> dict:
    size, changes = _fitting(name, scale, _STATE_BYTES)
    side = Side(size, **changes)
    examples, work = _work(scale, kind, rows, side)
    batch = batch_lib.build(examples, batch_lib.measure(examples, scale.length))
    if kind == "sft":
      objective = objectives.make_sft(side.model)
    else:
      loss = functools.partial(losses.dpo_loss, beta=_BETA)
      objective = objectives.make_preference(
        side.model, objectives.Preference(loss=loss, beta=_BETA), eos_ids=(0,)
      )
    seconds = _seconds(ours.train_step(side, objective, batch), scale.seconds)
    return _trained(side.config, rows, scale, work, seconds)

  return _halving(_start_rows(name, scale), measure)


def _trained(config: ModelConfig, rows: int, scale: Scale, work: dict, seconds: float) -> dict:
  return {
    "layers": config.num_layers,
    "size": f"{rows} x {scale.length}",
    "step_s": seconds,
    "tokens_per_s": work["tokens"] / seconds,
    "flops_per_s": work["flops"] / seconds,
  }


def _decoded(config: ModelConfig, scale: Scale, seconds: float) -> dict:
  """From the time that the further tokens took: each step reads all matrices and the keys and
  values so far.
  """
  if seconds <= 0:
    raise RuntimeError(
      f"{scale.long} new tokens took no longer than {scale.short}: the machine is too busy to tell"
    )
  steps = scale.long - scale.short
  matrices = config.num_params - (
    0 if config.tie_embeddings else config.vocab_size * config.d_model
  )
  context = scale.prompt + (scale.long + scale.short) / 2
  cache = scale.sequences * context * 2 * config.num_layers * config.num_kv_heads * config.head_dim
  return {
    "layers": config.num_layers,
    "size": f"{scale.sequences} sequences",
    "step_s": seconds / steps,
    "tokens_per_s": scale.sequences * steps / seconds,
    "bytes_per_s": 2 * (matrices + cache) * steps / seconds,
  }


def decode(name: str, scale: Scale) -> dict:
  """Sampling of a few sequences, one lane each, prefill subtracted."""
  size, changes = _fitting(name, scale, 6, param_dtype=scale.dtype)
  side = Side(size, **changes)
  engine = ours.make_engine(side, scale.sequences, 1, scale.long)

  def seconds(new: int) -> float:
    trunks = [
      Trunk(side.ids(scale.prompt).tolist(), [scale.prompt], ours.draw_keys(i, 1), [new])
      for i in range(scale.sequences)
    ]
    return _seconds(lambda: ours.grow(engine, side, trunks, 1.0) and None, scale.seconds / 4, min)

  short = seconds(scale.short)
  return _decoded(side.config, scale, seconds(scale.long) - short)


def peer(tool: str, kind: str, name: str, scale: Scale) -> dict:
  """The same work by transformers or TRL on the same device: float32 weights, products in bfloat16;
  decoding in bfloat16.
  """
  torch_baselines.device()  # first of all, that there is such a device
  size, changes = _fitting(name, scale, 6 if kind == "decode" else _STATE_BYTES)
  side = Side(size, **changes)
  if kind == "decode":
    model = torch_baselines.random(side.config, "bfloat16")
    prompts = side.ids(scale.sequences, scale.prompt).tolist()

    def seconds(new: int) -> float:
      return _seconds(
        lambda: torch_baselines.generate(model, prompts, new, 1.0), scale.seconds / 4, min
      )

    short = seconds(scale.short)
    return _decoded(side.config, scale, seconds(scale.long) - short)

  def measure(rows: int) -> dict:
    model = torch_baselines.random(side.config, "float32")
    examples, work = _work(scale, kind, rows, side)
    if kind == "sft":
      step = torch_baselines.SftStep(
        model, side.ids(rows, scale.length), LEARNING_RATE, autocast=True
      )
    else:
      pairs = [
        {
          "prompt_ids": list(example.tree.trunk),
          "chosen_ids": list(example.tree.branches[0].ids),
          "rejected_ids": list(example.tree.branches[1].ids),
          "ref_chosen_logps": example.pairs[0].ref_chosen,
          "ref_rejected_logps": example.pairs[0].ref_rejected,
        }
        for example in examples
      ]
      # else TRL loads one
      unused = torch_baselines.random(dataclasses.replace(side.config, num_layers=1), "bfloat16")
      step = torch_baselines.DpoStep(
        model, unused, str(EMBEDDED), pairs, _BETA, LEARNING_RATE, autocast=True
      )
    seconds = _seconds(step.run, scale.seconds)
    return _trained(side.config, rows, scale, work, seconds)

  del tool
  return _halving(_start_rows(name, scale), measure)


def run(part: str, scale: Scale) -> dict:
  """One part by its name: device, numerics, attention, KIND/SIZE, or TOOL/KIND/SIZE."""
  whole = {"device": device, "numerics": numerics, "attention": attend}
  if part in whole:
    return whole[part](scale)
  *tool, kind, name = part.split("/")
  if tool:
    return peer(*tool, kind, name, scale)
  return decode(name, scale) if kind == "decode" else train(kind, name, scale)


def main(arguments: Sequence[str]) -> None:
  """Runs the parts in order; a part that fails is a line with its reason."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--toy", action="store_true")
  parser.add_argument("--record", action="store_true")
  parser.add_argument("parts", nargs="*")
  given = parser.parse_args(arguments)
  if given.record:
    RECORDED.write_text(json.dumps(_all_numbers()) + "\n")
  for part in given.parts:
    start = time.perf_counter()
    try:
      result = run(part, TOY if given.toy else FULL)
    except Exception as error:
      result = {"failed": f"{type(error).__name__}: {str(error).strip()[:400]}"}
    print(json.dumps({"part": part, "seconds": time.perf_counter() - start, **result}), flush=True)
    gc.collect()


if __name__ == "__main__":
  main(sys.argv[1:])
