"""The mesh: its sizes, error messages, and shardings of arrays."""

import dataclasses

import jax
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec

from synthneg_jax.decoding.policy import param_shardings
from synthneg_jax.runtime import device_mesh
from synthneg_jax.runtime.errors import UserError
from tests import tiny_model


@dataclasses.dataclass(frozen=True)
class _Chip:
  """The attributes of a TPU device that are needed to lay out a mesh."""

  id: int
  slice_index: int
  coords: tuple[int, int, int]
  core_on_chip: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"
  process_index: int = 0


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
    # Fails if -1 takes something else than what is left, or stands for one axis only, or if axes
    # change places.
    mesh = device_mesh.make_mesh(*asked)
    self.assertEqual(
      tuple(mesh.shape.items()),
      tuple(zip(("slice", "data", "fsdp", "tensor"), (1, *made), strict=True)),
    )
    self.assertEqual(device_mesh.row_shards(mesh), made[0] * made[1])

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
    # Fails if devices are left out, if a division by zero or numpy's error comes out, or if two -1
    # or negative sizes that multiply to the right number pass.
    data, fsdp, tensor = sizes
    with self.assertRaises(UserError) as caught:
      device_mesh.make_mesh(*sizes)
    self.assertEqual(
      str(caught.exception),
      f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor} do not fit 8 device(s).",
    )

  def test_slices_are_the_outermost_axis(self):
    # Fails if slices are not counted among the rows' parts, if they take devices in another order,
    # or if they may be -1.
    mesh = device_mesh.make_mesh(-1, 2, 1, slices=2)
    self.assertEqual(tuple(mesh.shape.values()), (2, 2, 2, 1))
    self.assertEqual(device_mesh.row_shards(mesh), 8)
    self.assertEqual([device.id for device in mesh.devices[1].reshape(-1)], [4, 5, 6, 7])
    for slices in (3, -1, 0):
      with self.assertRaisesRegex(
        UserError, rf"^mesh\.slices={slices}, mesh\.data=-1, .* do not fit 8 device\(s\)\.$"
      ):
        device_mesh.make_mesh(-1, 1, 1, slices=slices)
    with self.assertRaises(UserError):
      device_mesh.make_mesh(2, 2, 1, slices=-1)

  def test_devices_of_a_pod_are_in_slices(self):
    # Fails if a pod's slices are not asked for, or if the slice axis does not follow the devices'
    # slice numbers.
    devices = [
      _Chip(number, number % 2, ((number // 2) % 2, number // 4, 0)) for number in range(8)
    ]
    mesh = device_mesh.make_mesh(-1, 2, 1, slices=2, devices=devices)
    self.assertEqual(mesh.devices.shape, (2, 2, 2, 1))
    for index in range(2):
      self.assertLen({chip.slice_index for chip in mesh.devices[index].reshape(-1)}, 1)
    with self.assertRaisesRegex(
      UserError, r"^mesh\.slices=1, but the 8 devices are in 2 slice\(s\)\.$"
    ):
      device_mesh.make_mesh(-1, 2, 1, devices=devices)

  def test_some_devices(self):
    # Fails if the devices given are not those taken.
    mesh = device_mesh.make_mesh(-1, 2, 1, devices=jax.devices()[4:])
    self.assertEqual(
      [device.id for device in mesh.devices.reshape(-1)], [d.id for d in jax.devices()[4:]]
    )


class CheckTest(absltest.TestCase):
  def refusal(self, *args) -> str:
    with self.assertRaises(UserError) as caught:
      device_mesh.check(*args)
    return str(caught.exception)

  def test_a_dimension_that_does_not_divide(self):
    # Fails if a dimension that does not divide passes, or if the sentence lacks the array or one of
    # the numbers.
    mesh = device_mesh.make_mesh(1, 1, -1, devices=jax.devices()[:7])
    self.assertEqual(
      self.refusal("ends.embedding", (49152, 576), ("vocab", "embed"), mesh),
      "ends.embedding: dimension vocab=49152 does not divide by tensor=7.",
    )
    device_mesh.check(
      "ends.embedding", (49154, 575), ("vocab", "embed"), mesh
    )  # 7 x 7022; fsdp=1 takes anything

  def test_rows_that_do_not_divide(self):
    # Fails if only one of the axes that split rows is counted.
    mesh = device_mesh.make_mesh(2, 2, 1, slices=2)
    self.assertEqual(
      self.refusal("batch", (12, 64), ("rows", None), mesh),
      "batch: dimension rows=12 does not divide by slice=2 x data=2 x fsdp=2 = 8.",
    )
    device_mesh.check("batch", (16, 63), ("rows", None), mesh)

  def test_two_dimensions_on_one_axis(self):
    # Fails if an axis may be used twice: jax would refuse it with a traceback.
    self.assertEqual(
      self.refusal("layers.query", (2, 8, 16), ("layers", "heads", "mlp"), device_mesh.make_mesh()),
      "layers.query: dimensions 1 (heads=8) and 2 (mlp=16) are both split over the mesh axis "
      "tensor.",
    )

  def test_models(self):
    # Fails if a tree's arrays are not all looked at, if heads that do not divide while their widths
    # do pass (the cache could not be split), or if a model that fits is refused.
    def toy_mesh(fsdp, tensor):
      return device_mesh.make_mesh(1, fsdp, tensor, devices=jax.devices()[: fsdp * tensor])

    param_shardings(tiny_model.model(vocab_size=32), toy_mesh(8, 1))
    param_shardings(tiny_model.model(vocab_size=32), toy_mesh(4, 2))
    for model, mesh, sentence in (
      (
        tiny_model.model(),
        toy_mesh(1, 2),
        "ends.embedding: dimension vocab=31 does not divide by tensor=2.",
      ),
      (
        tiny_model.model(d_model=17),
        toy_mesh(2, 1),
        "ends.embedding: dimension embed=17 does not divide by fsdp=2.",
      ),
      (
        tiny_model.model(vocab_size=32, d_ff=25),
        toy_mesh(1, 2),
        "layers.down: dimension mlp=25 does not divide by tensor=2.",
      ),
      (
        tiny_model.model(vocab_size=32),
        toy_mesh(1, 4),
        "cache: dimension kv_heads=2 does not divide by tensor=4.",
      ),
      (
        tiny_model.model(vocab_size=32),
        toy_mesh(1, 8),
        "attention: dimension heads=4 does not divide by tensor=8.",
      ),
    ):
      with self.assertRaises(UserError) as caught:
        param_shardings(model, mesh)
      self.assertEqual(str(caught.exception), sentence)


class LayoutTest(absltest.TestCase):
  def test_spec(self):
    # Fails if a rule is not read, if None names an axis, or if an unknown name is taken for "not
    # split".
    self.assertEqual(
      device_mesh.spec("layers", "embed", "heads"), PartitionSpec(None, "fsdp", "tensor")
    )
    self.assertEqual(device_mesh.spec("rows", None), PartitionSpec(("slice", "data", "fsdp"), None))
    self.assertEqual(device_mesh.spec(), PartitionSpec())
    with self.assertRaises(KeyError):
      device_mesh.spec("hats")

  def test_rules_name_axes_of_the_mesh(self):
    # Fails if a rule points to an axis that no mesh has.
    for axes in device_mesh.RULES.values():
      self.assertContainsSubset(
        {axes} if isinstance(axes, str) else set(axes or ()), device_mesh.AXES
      )

  def test_arrays_lie_where_the_rules_say(self):
    # Fails if rows are split over fewer axes, if `shardings` loses the tree, or if replicated
    # splits.
    mesh = device_mesh.make_mesh(2, 2, 2)
    placed = jax.device_put(
      {"w": np.zeros((4, 6)), "n": {"s": np.zeros(3)}},
      device_mesh.shardings(mesh, {"w": ("embed", "mlp"), "n": {"s": ("norm",)}}),
    )
    self.assertEqual(placed["w"].sharding.shard_shape((4, 6)), (2, 3))
    self.assertEqual(placed["n"]["s"].sharding.shard_shape((3,)), (3,))
    self.assertEqual(device_mesh.rows(mesh).shard_shape((8, 5)), (2, 5))
    self.assertEqual(device_mesh.replicated(mesh).shard_shape((8, 5)), (8, 5))

  def test_rows_are_split_within_a_program(self):
    # Fails if the compiler is not told, or is told to split the other dimensions, too.
    mesh = device_mesh.make_mesh(2, 2, 2)
    for layout in (device_mesh.replicated(mesh), device_mesh.shardings(mesh, (None, "mlp"))):
      x = jax.device_put(np.ones((8, 16), np.float32), layout)
      made = jax.jit(device_mesh.under(mesh, lambda x: 2 * device_mesh.split_rows(x)))(x)
      self.assertEqual(made.sharding.shard_shape((8, 16)), (2, layout.shard_shape((8, 16))[1]))

  def test_parameters_and_their_gradients_lie_alike(self):
    # Fails if the compiler is not told where a parameter, or what its gradient sums to, lies.
    mesh, axes = device_mesh.make_mesh(2, 2, 2), ("embed", "mlp")
    x = jax.device_put(np.ones((8, 16), np.float32), device_mesh.replicated(mesh))
    for fn in (
      lambda x: 2 * device_mesh.split_as(x, axes),
      jax.grad(lambda x: (device_mesh.split_as(x, axes) ** 2).sum()),
    ):
      made = jax.jit(device_mesh.under(mesh, fn))(x)
      self.assertEqual(made.sharding.shard_shape((8, 16)), (4, 8))
    np.testing.assert_array_equal(
      jax.jit(lambda x: device_mesh.split_as(x, axes))(np.ones((3, 5))), np.ones((3, 5))
    )

  def test_split_rows_elsewhere_does_nothing(self):
    # Fails if code without a mesh, or a number of rows that no mesh divides, comes to grief.
    np.testing.assert_array_equal(jax.jit(device_mesh.split_rows)(np.ones(5)), np.ones(5))
    run = jax.jit(device_mesh.under(device_mesh.make_mesh(), device_mesh.split_rows))
    np.testing.assert_array_equal(run(np.ones((5, 2))), np.ones((5, 2)))


if __name__ == "__main__":
  absltest.main()
