"""The kernels, interpreted, against softmax attention in float64, and compiled for chips that are
not there.
"""

import functools
import inspect
import os
from unittest import mock

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

from synthneg_jax.core import tree as tree_lib
from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.models import attention, fused_attention, fused_attention_gpu
from synthneg_jax.preflight import preflight
from synthneg_jax.runtime import device_mesh
from tests import random_trees


def draw_rows(num_rows: int, length: int) -> tree_lib.PackedTrees:
  """Rows of random trees, some padding at the end of each; the first also holds a branch longer
  than a block.
  """
  rng, rows = np.random.default_rng(0), []
  for number in range(num_rows):

    def ids(size):
      return rng.integers(2, 30, size).tolist()

    row = (
      []
      if number
      else [
        Tree(ids(20), (Branch(12, ids(150)), Branch(20, ids(9), branches=(Branch(24, ids(3)),))))
      ]
    )
    while sum(tree.num_tokens for tree in row) < length - 60:
      row.append(random_trees.of_depth(rng, int(rng.integers(1, 6))))
    rows.append(row)
  return tree_lib.pack(rows, length)


def mask_of(packed, window: int) -> np.ndarray:
  keys = tree_lib.row_keys(packed)
  return np.asarray(
    tree_lib.attention_mask(tree_lib.Queries(keys.index, keys.position), keys, window)
  )


def dense(q, k, v, mask, cap: float):
  """Plain softmax attention, in the dtype of what it gets."""
  scores = jnp.einsum("bkgth,bksh->bkgts", q, k, precision="highest")
  scores = cap * jnp.tanh(scores / cap) if cap else scores
  weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1)
  return jnp.einsum("bkgts,bksh->bkgth", weights, v, precision="highest")


def value_and_gradients(fn, weight, *args):
  """(fn of the arguments, gradients of its weighted sum)."""
  pulled = jax.jit(
    lambda *args: (fn(*args), jax.grad(lambda *args: jnp.sum(weight * fn(*args)), (0, 1, 2))(*args))
  )
  out, gradients = pulled(*args)
  return [np.asarray(x, np.float64) for x in (out, *gradients)]


def interpreted(kernels, packed, **settings):
  """attend(q, k, v) over these rows, by a module of kernels."""
  fields, block = (jnp.asarray(packed.position), jnp.asarray(packed.leave)), BLOCK[kernels]
  return lambda q, k, v: kernels.attend(q, k, v, *fields, block=block, interpret=True, **settings)


BLOCK = {fused_attention: 128, fused_attention_gpu: 32}


class InterpretedTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("plain", fused_attention, 1, 16, 384, 0, 0.0),
    ("grouped", fused_attention, 3, 8, 256, 0, 0.0),
    ("window", fused_attention, 2, 8, 384, 5, 0.0),
    ("wide_window", fused_attention, 1, 8, 384, 140, 0.0),
    ("cap", fused_attention, 2, 8, 256, 0, 2.0),
    ("padded_window_and_cap", fused_attention, 2, 8, 300, 7, 3.0),
    ("gpu_plain", fused_attention_gpu, 1, 16, 384, 0, 0.0),
    ("gpu_grouped", fused_attention_gpu, 3, 16, 256, 0, 0.0),
    ("gpu_window", fused_attention_gpu, 2, 16, 384, 5, 0.0),
    ("gpu_padded_window_and_cap", fused_attention_gpu, 2, 24, 300, 7, 3.0),
  )
  def test_equals_dense_attention(self, kernels, groups, head_dim, length, window, cap):
    # Fails if a visit is left out or made twice, if a sum is not begun anew, if a mask, a cap or a
    # window is read at another block's tokens, if a query head reads another key head, if padding
    # is seen, or if a term of a gradient is missing.
    rng, packed = np.random.default_rng(1), draw_rows(2, length)
    shape = (2, 2, groups, length, head_dim)
    mask = mask_of(packed, window)
    q, k, v, weight = (
      rng.normal(size=s) for s in (shape, (2, 2, length, head_dim), (2, 2, length, head_dim), shape)
    )
    with jax.enable_x64(True):
      expected = value_and_gradients(functools.partial(dense, mask=mask, cap=cap), weight, q, k, v)
    fused = interpreted(kernels, packed, window=window, cap=cap)
    args = [jnp.asarray(x, jnp.float32) for x in (weight, q, k, v)]
    found = value_and_gradients(fused, *args)
    for name, got, wanted in zip(("out", "d_q", "d_k", "d_v"), found, expected, strict=True):
      np.testing.assert_allclose(
        got, wanted, rtol=0, atol=1e-5 * max(np.abs(wanted).max(), 1.0), err_msg=name
      )

  @parameterized.parameters(fused_attention, fused_attention_gpu)
  def test_bfloat16_and_heads_held_one_by_one(self, kernels):
    # Fails if sums are kept in bfloat16, if a query head that the chip cannot hold beside its
    # siblings reads another key head or is left out of the keys' gradients, or if results have
    # another dtype.
    rng, packed = np.random.default_rng(1), draw_rows(1, 256)
    shape = (1, 2, 2, 256, 8)
    mask = mask_of(packed, 0)
    q, k, v, weight = (
      jnp.asarray(rng.normal(size=s), jnp.bfloat16)
      for s in (shape, (1, 2, 256, 8), (1, 2, 256, 8), shape)
    )
    fused = interpreted(kernels, packed)
    with jax.enable_x64(True):
      args = [np.asarray(x, np.float64) for x in (weight, q, k, v)]
      expected = value_and_gradients(functools.partial(dense, mask=mask, cap=0.0), *args)
    with mock.patch.object(fused_attention, "_MOST_ROW_BYTES", 1):
      found = value_and_gradients(fused, weight, q, k, v)
      self.assertEqual(jax.eval_shape(fused, q, k, v).dtype, jnp.bfloat16)
    for name, got, wanted in zip(("out", "d_q", "d_k", "d_v"), found, expected, strict=True):
      np.testing.assert_allclose(
        got, wanted, rtol=0, atol=0.02 * np.abs(wanted).max(), err_msg=name
      )

  @parameterized.parameters(fused_attention, fused_attention_gpu)
  def test_the_last_block_alone_skips_blocks(self, kernels):
    # Fails if the end of the list of visits is not the end of a block's: what follows it, not to be
    # visited, is of the same block then, and the block's result would never be written.
    packed = tree_lib.pack([[Tree([1] * 256), Tree([2] * 128)]], 384)
    rng = np.random.default_rng(1)
    q, k = (
      rng.normal(size=(1, 1, 1, 384, 8)).astype(np.float32),
      rng.normal(size=(1, 1, 384, 8)).astype(np.float32),
    )
    out = interpreted(kernels, packed)(q, k, k)
    np.testing.assert_allclose(out, dense(q, k, k, mask_of(packed, 0), 0.0), rtol=0, atol=1e-5)

  @parameterized.parameters(fused_attention, fused_attention_gpu)
  def test_each_layer_has_its_window(self, kernels):
    # Fails if a window that is a traced scalar is read as a constant, or not at all.
    rng, packed = np.random.default_rng(1), draw_rows(1, 256)
    q, k = (
      rng.normal(size=(1, 1, 1, 256, 8)).astype(np.float32),
      rng.normal(size=(1, 1, 256, 8)).astype(np.float32),
    )

    @jax.jit
    def fused(window):
      return interpreted(kernels, packed, window=window)(q, k, k)

    for window in (3, 256):
      np.testing.assert_allclose(
        fused(window), dense(q, k, k, mask_of(packed, window), 0.0), rtol=0, atol=1e-5
      )


class BlocksTest(parameterized.TestCase):
  @parameterized.parameters(0, 6, 40)
  def test_no_block_is_missed(self, window):
    # Fails if a bound is of another block or the wrong end of it, or if nothing is skipped.
    packed = draw_rows(8, 256)
    found = np.asarray(
      fused_attention.needed_blocks(packed.position, packed.leave, window or None, 32)
    )
    seen = mask_of(packed, window).reshape(8, 8, 32, 8, 32).any(axis=(2, 4))
    self.assertFalse(np.any(seen & ~found))
    self.assertLess(found.sum(), 0.5 * 8 * 8 * 9 / 2)

  def test_siblings_are_skipped(self):
    # Fails if a block of one branch is visited for a block of its sibling: trunk, then four
    # branches, a block each.
    branches = tuple(Branch(128, [1] * 128) for _ in range(4))
    packed = tree_lib.pack([[Tree([1] * 128, branches)]], 640)
    found = fused_attention.needed_blocks(packed.position, packed.leave, None, 128)[0]
    self.assertEqual(
      np.asarray(found, int).tolist(), (np.eye(5, dtype=int) | (np.arange(5) == 0)).tolist()
    )

  def test_cost(self):
    # Fails if the kernel's cost is not that of the blocks it visits: of one row and head, 3 pairs
    # of blocks of 128.
    forward = fused_attention.cost((1, 1, 1, 256, 64), 128, 2, itemsize=2)
    self.assertEqual(
      (forward.flops, forward.transcendentals), (2 * 2 * 3 * 128 * 128 * 64, 3 * 128 * 128)
    )
    block = 128 * 64
    self.assertEqual(forward.bytes_accessed, 2 * (3 * 2 * block + 2 * 2 * block))
    backward = fused_attention.cost((1, 1, 1, 256, 64), 128, 5, itemsize=2)
    self.assertEqual(backward.flops, 2.5 * forward.flops)
    self.assertEqual(
      backward.bytes_accessed, 2 * (3 * 2 * block + 2 * 2 * block) + 4 * 2 * 3 * block
    )


def loss(q, k, v, keys, window=0, cap=0.0):
  scoring = attention.Scoring(cap=cap)
  return jnp.sum(
    attention.tree_attention(q, k, v, keys=keys, window=window, scoring=scoring)[0].astype(
      jnp.float32
    )
    ** 2
  )


class ShardedTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("heads_divide", "TPU", 2, 2), ("heads_do_not_divide", "TPU", 4, 2), ("on_gpus", "NVIDIA", 2, 2)
  )
  def test_equals_one_device(self, maker, tensor, kv_heads):
    # Fails if a device computes other rows or heads than its own, or if gradients are lost or
    # counted twice where all have all heads.
    rng, packed = np.random.default_rng(1), draw_rows(4, 256)
    q, k, v = (
      jnp.asarray(rng.normal(size=(4 * 256, n, 8)), jnp.float32) for n in (8, kv_heads, kv_heads)
    )
    keys = tree_lib.row_keys(jax.tree.map(jnp.asarray, packed))
    gradients = jax.value_and_grad(loss, (0, 1, 2))
    expected = jax.jit(gradients)(q, k, v, keys)
    mesh = device_mesh.make_mesh(2, 8 // 2 // tensor, tensor)
    kernels = fused_attention if maker == "TPU" else fused_attention_gpu
    attend = functools.partial(kernels.attend, block=BLOCK[kernels], interpret=True)
    with (
      mock.patch.object(device_mesh, "runs_on", maker.__eq__),
      mock.patch.object(attention, "_FUSED_FROM", 1),
      mock.patch.object(kernels, "attend", side_effect=attend) as called,
    ):
      args = jax.device_put((q, k, v, keys), device_mesh.rows(mesh))
      found = jax.jit(device_mesh.under(mesh, gradients))(*args)
    called.assert_called()
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


class LoweredForGpuTest(parameterized.TestCase):
  @parameterized.product(dtype=("bfloat16", "float32"), length=(512, 8192))
  def test_lowers_to_triton(self, dtype, length):
    # Fails if Triton's language lacks an operation of a kernel, if an array's size is no power of
    # two, or if short rows are fused or long ones not.
    described = {"device_kind": "NVIDIA H200", "num_cores": None, "platform": "gpu"}
    known = inspect.signature(AbstractDevice).parameters  # jax 0.10.0 has no platform
    device = AbstractDevice(**{name: described[name] for name in known})
    mesh = AbstractMesh(
      (1,) * 4, device_mesh.AXES, axis_types=(AxisType.Auto,) * 4, abstract_device=device
    )

    def x(n):
      return jax.ShapeDtypeStruct((length, n, 80), jnp.dtype(dtype))

    field = jax.ShapeDtypeStruct((1, length), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
      run = jax.jit(jax.grad(functools.partial(loss, window=100, cap=30.0), (0, 1, 2)))
      traced = run.trace(x(8), x(2), x(2), tree_lib.Keys(field, field, field))
      made = traced.lower(lowering_platforms=("cuda",)).as_text()
    self.assertEqual(made.count("xla.gpu.triton"), 3 if length > 1024 else 0)


@pytest.mark.slow  # compiles for TPUs
class CompiledTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.addCleanup(
      jax.config.update, "jax_enable_compilation_cache", jax.config.jax_enable_compilation_cache
    )
    jax.config.update("jax_enable_compilation_cache", False)

  def compile(self, sharding, mesh, *, rows, length, heads, kv_heads, head_dim, dtype, **settings):
    """Forward and backward pass of `tree_attention`."""

    def x(n):
      return jax.ShapeDtypeStruct((rows * length, n, head_dim), dtype, sharding=sharding)

    field = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=sharding)
    args = (x(heads), x(kv_heads), x(kv_heads), tree_lib.Keys(field, field, field))
    run = jax.grad(functools.partial(loss, **settings), (0, 1, 2))
    return jax.jit(device_mesh.under(mesh, run)).lower(*args).compile()

  @parameterized.product(
    topology=("v5e:2x2", "v5p:2x2x1", "v6e:2x2"), dtype=("bfloat16", "float32")
  )
  def test_on_each_chip(self, topology, dtype):
    # Fails if a chip's compiler refuses a kernel (memory on the chip, layouts, transposes), if long
    # rows are not fused, or if scores are held: by hand, those of 8192 tokens and 8 heads are 2
    # GiB.
    devices, _ = preflight.devices_of(topology)
    mesh = device_mesh.make_mesh(1, 1, 1, devices=devices[:1])
    for length, kv_heads, head_dim, settings in (
      (8192, 8, 128, {}),
      (1280, 2, 64, {"window": 100, "cap": 30.0}),
    ):
      made = self.compile(
        SingleDeviceSharding(devices[0]),
        mesh,
        rows=1,
        length=length,
        heads=8,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=jnp.dtype(dtype),
        **settings,
      )
      self.assertEqual(made.as_text().count('custom_call_target="tpu_custom_call"'), 2)
      self.assertLess(made.memory_analysis().temp_size_in_bytes, 256 << 20)

  def test_on_a_pod(self):
    # Fails if a kernel's operands are gathered, or if the whole batch is computed on each chip.
    devices, _ = preflight.devices_of("v5e:4x4")
    mesh = device_mesh.make_mesh(2, 4, 2, devices=devices)
    made = self.compile(
      device_mesh.rows(mesh),
      mesh,
      rows=16,
      length=2048,
      heads=8,
      kv_heads=4,
      head_dim=128,
      dtype=jnp.bfloat16,
    )
    self.assertIn("bf16[2,2,2,2048,128]", made.as_text())  # rows and key heads of a chip

  def test_short_rows_are_not_fused(self):
    # Fails if rows whose scores are small pay for a kernel.
    devices, _ = preflight.devices_of("v5e:2x2")
    made = self.compile(
      SingleDeviceSharding(devices[0]),
      device_mesh.make_mesh(1, 1, 1, devices=devices[:1]),
      **{
        "rows": 2,
        "length": 512,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "dtype": jnp.bfloat16,
      },
    )
    self.assertNotIn("tpu_custom_call", made.as_text())


if __name__ == "__main__":
  absltest.main()
