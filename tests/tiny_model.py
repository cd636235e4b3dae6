"""A toy decoder that several tests share, so that its programs are compiled once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from synthneg_jax.models.config import ModelConfig
from synthneg_jax.models.decoder import Model
from synthneg_jax.runtime import device_mesh

CONFIG = ModelConfig(
  vocab_size=31,
  d_model=16,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  d_ff=24,
  scan_layers=False,
)


def model(**changes) -> Model:
  return Model(dataclasses.replace(CONFIG, **changes))


def params(seed: int = 0):
  """Parameters with a spread wide enough that greedy choices and endings vary."""
  scaled = jax.tree.map(
    lambda leaf: leaf * 2.0 if leaf.ndim > 1 else leaf, model().init(jax.random.key(seed))
  )
  return jax.tree.map(jnp.asarray, scaled)


def make_params(model):
  """Parameters with a wide spread, norms that differ from 1 included; drawn by numpy, which
  compiles nothing.
  """
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    normal = rng.normal(size=leaf.shape).astype(leaf.dtype)
    return jnp.asarray(
      1.0 + 0.3 * normal if jax.tree_util.keystr(path).endswith("['scale']") else 0.4 * normal
    )

  return jax.tree_util.tree_map_with_path(draw, model.abstract_params())


def one_device_mesh():
  return device_mesh.make_mesh(1, 1, 1, devices=jax.devices()[:1])
