"""Conversion between stacked and unstacked layers."""

import jax
import numpy as np
import optax
from absl.testing import absltest

from synthneg_jax.models import layer_stacking
from synthneg_jax.runtime import device_mesh
from tests import tiny_model


class LayerStackingTest(absltest.TestCase):
  def test_round_trip(self):
    # Fails if a layer is lost or moved, if an optimizer's moments are not converted, if the ends or
    # the step change, or if unstacked layers are unstacked again.
    params = tiny_model.make_params(tiny_model.model())
    state = {"params": params, "opt_state": optax.adamw(1e-3).init(params), "step": np.int32(3)}
    unstacked = layer_stacking.unstack(state)
    self.assertEqual(
      (layer_stacking.is_unstacked(state), layer_stacking.is_unstacked(unstacked)), (False, True)
    )
    for tree in (unstacked["params"], unstacked["opt_state"][0].mu):
      self.assertLen(tree["layers"], tiny_model.CONFIG.num_layers)
    for number, layer in enumerate(unstacked["params"]["layers"]):
      np.testing.assert_array_equal(layer["query"], params["layers"]["query"][number])
    self.assertEqual(
      jax.tree.structure(layer_stacking.unstack(unstacked)), jax.tree.structure(unstacked)
    )
    self.assertEqual(
      jax.tree.structure(layer_stacking.like(unstacked, state)), jax.tree.structure(unstacked)
    )
    for back in (layer_stacking.stack(unstacked), layer_stacking.like(state, unstacked)):
      self.assertEqual(jax.tree.structure(back), jax.tree.structure(state))
      for (path, got), expected in zip(
        jax.tree_util.tree_leaves_with_path(back), jax.tree.leaves(state), strict=True
      ):
        np.testing.assert_array_equal(got, expected, err_msg=jax.tree_util.keystr(path))

  def test_shardings_fit_the_arrays(self):
    # Fails if the axis of layers keeps a mesh axis, or if the other axes shift.
    mesh, model = device_mesh.make_mesh(2, 2, 2), tiny_model.model()
    shardings = layer_stacking.unstacked_shardings(
      device_mesh.shardings(mesh, model.logical_axes()), tiny_model.CONFIG.num_layers
    )
    self.assertEqual(
      jax.tree.structure(shardings),
      jax.tree.structure(layer_stacking.unstack(tiny_model.make_params(model))),
    )
    self.assertEqual(tuple(shardings["layers"][1]["down"].spec), ("tensor", "fsdp"))


if __name__ == "__main__":
  absltest.main()
