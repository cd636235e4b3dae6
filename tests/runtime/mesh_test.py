"""The mesh: sizes that fit, sentences where they do not, and where arrays lie."""

import jax
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec

from synthneg_jax.runtime import mesh as mesh_lib
from synthneg_jax.runtime.errors import UserError


class MakeMeshTest(parameterized.TestCase):
  @parameterized.parameters(
    ((-1, 1, 1), (8, 1, 1)),
    ((-1, 2, 2), (2, 2, 2)),
    ((2, -1, 1), (2, 4, 1)),
    ((1, 1, -1), (1, 1, 8)),
    ((4, 2, 1), (4, 2, 1)),
    ((-1, 8, 1), (1, 8, 1)),
  )
  def test_sizes(self, asked, made):
    # Fails if -1 takes something else than what is left, or stands for one axis only, or if axes change places.
    mesh = mesh_lib.make_mesh(*asked)
    self.assertEqual(tuple(mesh.shape.items()), tuple(zip(("data", "fsdp", "tensor"), made, strict=True)))
    self.assertEqual(mesh_lib.row_shards(mesh), made[0] * made[1])

  @parameterized.parameters(
    (3, 1, 1),
    (-1, 3, 1),
    (2, 2, 1),
    (16, 1, 1),
    (-1, -1, 1),
    (0, 1, 1),
    (-1, 0, 1),
    (-1, 16, 1),
    (-2, -4, 1),
    (-1, -1, 8),
    (-8, -1, 1),
  )
  def test_sizes_that_do_not_fit(self, *sizes):
    # Fails if devices are left out, if a division by zero or numpy's error comes out, or if two -1 or negative sizes
    # that multiply to the right number pass.
    data, fsdp, tensor = sizes
    with self.assertRaises(UserError) as caught:
      mesh_lib.make_mesh(*sizes)
    self.assertEqual(
      str(caught.exception), f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor} do not fit 8 device(s)."
    )

  def test_some_devices(self):
    # Fails if the devices given are not those taken.
    mesh = mesh_lib.make_mesh(-1, 2, 1, devices=jax.devices()[4:])
    self.assertEqual([device.id for device in mesh.devices.reshape(-1)], [d.id for d in jax.devices()[4:]])


class LayoutTest(absltest.TestCase):
  def test_spec(self):
    # Fails if a rule is not read, if None names an axis, or if an unknown name is taken for "not split".
    self.assertEqual(mesh_lib.spec("layers", "embed", "heads"), PartitionSpec(None, "fsdp", "tensor"))
    self.assertEqual(mesh_lib.spec("rows", None), PartitionSpec(("data", "fsdp"), None))
    self.assertEqual(mesh_lib.spec(), PartitionSpec())
    with self.assertRaises(KeyError):
      mesh_lib.spec("hats")

  def test_rules_name_axes_of_the_mesh(self):
    # Fails if a rule points to an axis that no mesh has.
    for axes in mesh_lib.RULES.values():
      self.assertContainsSubset({axes} if isinstance(axes, str) else set(axes or ()), mesh_lib.AXES)

  def test_arrays_lie_where_the_rules_say(self):
    # Fails if rows are split over fewer axes, if `shardings` loses the tree, or if replicated splits.
    mesh = mesh_lib.make_mesh(2, 2, 2)
    placed = jax.device_put(
      {"w": np.zeros((4, 6)), "n": {"s": np.zeros(3)}},
      mesh_lib.shardings(mesh, {"w": ("embed", "mlp"), "n": {"s": ("norm",)}}),
    )
    self.assertEqual(placed["w"].sharding.shard_shape((4, 6)), (2, 3))
    self.assertEqual(placed["n"]["s"].sharding.shard_shape((3,)), (3,))
    self.assertEqual(mesh_lib.rows(mesh).shard_shape((8, 5)), (2, 5))
    self.assertEqual(mesh_lib.replicated(mesh).shard_shape((8, 5)), (8, 5))


if __name__ == "__main__":
  absltest.main()
