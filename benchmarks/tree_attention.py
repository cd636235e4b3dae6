"""What fused attention saves on a TPU that is not there, beside dense attention: python -m
benchmarks.tree_attention.

Forward and backward pass of one layer's attention over one row, compiled for one chip of a v5e:
temporaries, bytes moved and FLOPs as preflight counts them, and which blocks a row of typical trees
visits.
"""

import os

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")

from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks import ours
from synthneg_jax.core import tree as tree_lib
from synthneg_jax.core.tree import Tree
from synthneg_jax.models import attention, fused_attention
from synthneg_jax.preflight import preflight
from synthneg_jax.preflight.compiled_programs import Program
from synthneg_jax.runtime import device_mesh

HEADS, HEAD_DIM = 8, 128  # of a chip: llama2_7b over tensor=4
LENGTHS = (2048, 4096, 8192)


def report(length: int, *, fused: bool) -> preflight.Report:
  """What preflight says of attention over one row."""
  devices, chip = preflight.devices_of("v5e:2x2")
  sharding, mesh = (
    SingleDeviceSharding(devices[0]),
    device_mesh.make_mesh(1, 1, 1, devices=devices[:1]),
  )

  def loss(q, k, v, keys):
    return jnp.sum(attention.tree_attention(q, k, v, keys=keys)[0].astype(jnp.float32) ** 2)

  x = jax.ShapeDtypeStruct((length, HEADS, HEAD_DIM), jnp.bfloat16, sharding=sharding)
  field = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=sharding)
  run = jax.jit(device_mesh.under(mesh, jax.grad(loss, (0, 1, 2))))
  program = Program(
    "attention", lambda: run.lower(x, x, x, tree_lib.Keys(field, field, field)), 1, 1.0, "", ""
  )
  with mock.patch.object(attention, "_FUSED_FROM", 1 if fused else length + 1):
    return preflight.compile_program(program, chip, 1)


def visited(trees: list[Tree], length: int) -> float:
  """Share of all pairs of blocks of a row that the kernels visit."""
  packed = tree_lib.pack([trees], length)
  block = fused_attention.block_of(length, 1, HEAD_DIM, 2)
  return float(jnp.mean(fused_attention.needed_blocks(packed.position, packed.leave, None, block)))


def main() -> None:
  """Prints two tables in Markdown."""
  print("| tokens | attention | temporaries MiB | traffic GB | GFLOP |\n|---|---|---|---|---|")
  for length in LENGTHS:
    for name in ("dense", "fused"):
      found = report(length, fused=name == "fused")
      cost = found.cost
      figures = (
        f"{found.temporary_bytes / 2**20:.0f} | {cost.memory_bytes / 1e9:.2f} | "
        f"{cost.flops / 1e9:.0f}"
      )
      print(f"| {length} | {name} | {figures} |", flush=True)
  print(f"\n| row | {' | '.join(map(str, LENGTHS))} |\n|---|{'---|' * len(LENGTHS)}")
  for name, trees in ours.TREES.items():
    print(
      f"| {name} | "
      f"{' | '.join(f'{100 * visited(trees(length), length):.0f} %' for length in LENGTHS)} |"
    )


if __name__ == "__main__":
  main()
