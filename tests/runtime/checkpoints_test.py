"""Saved policies, fingerprints and training checkpoints, on several meshes."""

import gc
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from synthneg_jax.runtime import checkpoints, device_mesh
from synthneg_jax.runtime.errors import UserError

pytestmark = pytest.mark.slow  # writes checkpoints

_rng = np.random.default_rng(0)
PARAMS = {
  "ends": {"embedding": _rng.normal(size=(16, 8)).astype(np.float32)},
  "layers": {
    "query": jnp.asarray(_rng.normal(size=(2, 8, 8)), jnp.bfloat16),
    "scale": np.ones((2, 8), np.float32),
  },
}
SPECS = {
  "ends": {"embedding": PartitionSpec("tensor", "fsdp")},
  "layers": {"query": PartitionSpec(None, "fsdp", "tensor"), "scale": PartitionSpec()},
}
MESHES = ((8, 1, 1), (2, 2, 2), (1, 8, 1))


def shardings(*sizes):
  devices = jax.devices()[: int(np.prod(sizes))]
  mesh = device_mesh.make_mesh(*sizes, devices=devices)
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)


def abstract(params):
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


class FolderTestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = epath.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def assert_bitwise(self, got, expected):
    self.assertEqual(jax.tree.structure(got), jax.tree.structure(expected))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
      self.assertEqual(a.dtype, b.dtype)
      np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


class ParamsTest(FolderTestCase):
  def test_round_trip_from_mesh_to_mesh(self):
    # Fails if a bit or dtype changes, if the layout asked for is not given, or if a second save
    # does not replace the first.
    placed = jax.device_put(PARAMS, shardings(2, 2, 2))
    checkpoints.save_params(self.folder, jax.tree.map(jnp.zeros_like, placed))
    checkpoints.save_params(self.folder, placed)
    wanted = shardings(1, 4, 1)
    loaded = checkpoints.load_params(self.folder, abstract(PARAMS), wanted)
    self.assert_bitwise(loaded, PARAMS)
    for leaf, sharding in zip(jax.tree.leaves(loaded), jax.tree.leaves(wanted), strict=True):
      self.assertTrue(leaf.sharding.is_equivalent_to(sharding, leaf.ndim))

  def test_missing_folder(self):
    # Fails if orbax's own error is raised.
    with self.assertRaises(UserError) as caught:
      checkpoints.load_params(self.folder / "nowhere", abstract(PARAMS), shardings(1, 1, 1))
    self.assertEqual(
      str(caught.exception),
      f"{self.folder / 'nowhere' / 'params'} does not exist: the policy's weights are missing.",
    )

  @parameterized.parameters("wider", "narrower", "another leaf", "a leaf less")
  @pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
  )  # orbax leaves coroutines behind
  def test_other_weights(self, change):
    # Fails if an array is silently truncated or padded, or if the error does not name the folder.
    checkpoints.save_params(self.folder, jax.device_put(PARAMS, shardings(1, 1, 1)))
    target, placed = abstract(PARAMS), shardings(1, 1, 1)
    if change == "another leaf":
      target["ends"]["unembedding"], placed["ends"]["unembedding"] = (
        target["ends"]["embedding"],
        placed["ends"]["embedding"],
      )
    elif change == "a leaf less":
      del target["layers"]["scale"], placed["layers"]["scale"]
    else:
      rows = 24 if change == "wider" else 8
      target["ends"]["embedding"] = jax.ShapeDtypeStruct((rows, 8), np.float32)
    with self.assertRaises(UserError) as caught:
      checkpoints.load_params(self.folder, target, placed)
    self.assertStartsWith(
      str(caught.exception), f"{self.folder / 'params'} does not hold the weights of this model: "
    )
    self.assertNotIn("\n", str(caught.exception))
    self.assertLess(len(str(caught.exception)), 500)
    gc.collect()  # orbax's coroutines, within this test

  def assertStartsWith(self, text, start):
    self.assertEqual(text[: len(start)], start)


class FingerprintTest(parameterized.TestCase):
  def test_recorded_value(self):
    # Fails if the hash changes: reference log-probs and manifests of earlier runs are filed under
    # it.
    params = {
      "a": np.arange(6, dtype=np.float32).reshape(2, 3),
      "b": jnp.asarray([1.5, -2.0], jnp.bfloat16),
    }
    self.assertEqual(checkpoints.fingerprint(params), "30a7bdf81c6da15a")

  @parameterized.parameters(*MESHES)
  def test_equal_on_every_mesh(self, *sizes):
    # Fails if the sum depends on the layout: on the order of shards, or on places counted within a
    # shard.
    self.assertEqual(
      checkpoints.fingerprint(jax.device_put(PARAMS, shardings(*sizes))),
      checkpoints.fingerprint(PARAMS),
    )

  @parameterized.parameters(
    (np.float32, np.uint32), (jnp.bfloat16, np.uint16), (np.float64, np.uint64)
  )
  def test_any_bit_changes_it(self, dtype, bits):
    # Fails if some bits are not read (the high ones of a wide dtype, the sign), or if the last or
    # first place is not.
    with jax.enable_x64(True):
      values = np.asarray(jnp.asarray(np.linspace(-1.0, 1.0, 6), dtype))
      seen = {checkpoints.fingerprint({"a": values})}
      size = 8 * values.dtype.itemsize
      flips = [(0, 0), (0, size - 1), (5, size // 2), (3, size // 2 - 1)]
      for place, bit in flips:
        changed = values.view(bits).copy()
        changed[place] ^= bits(1 << bit)
        seen.add(checkpoints.fingerprint({"a": changed.view(values.dtype)}))
    self.assertLen(seen, 1 + len(flips))

  def test_places_and_names_enter(self):
    # Fails if values may change places within a leaf or between leaves, or if a leaf may be
    # renamed.
    a, b = np.float32([1.0, 2.0, 3.0]), np.float32([4.0, 5.0, 6.0])
    trees = [
      {"a": a, "b": b},
      {"a": b, "b": a},
      {"a": a, "c": b},
      {"a": a[[2, 1, 0]], "b": b},
      {"a": a[[1, 0, 2]], "b": b},
      {"a": a},
    ]
    self.assertLen({checkpoints.fingerprint(tree) for tree in trees}, len(trees))

  def test_signs_do_not_cancel(self):
    # Fails if bits only enter a weighted sum: there the top bit, the sign, weighs 2³¹ in any place,
    # and two cancel.
    a = np.float32([1.0, 2.0, 3.0, 4.0])
    signs = np.float32(
      [
        [1, 1, 1, 1],
        [-1, -1, 1, 1],
        [-1, 1, -1, 1],
        [1, -1, 1, -1],
        [-1, -1, -1, -1],
        [-1, 1, 1, 1],
      ]
    )
    self.assertLen({checkpoints.fingerprint({"a": a * sign}) for sign in signs}, len(signs))


class TrainCheckpointsTest(FolderTestCase):
  def test_newest_comes_back_in_the_layout_asked_for(self):
    # Fails if another step's state is restored, if older ones are kept beyond `keep`, or if the
    # layout is the saved one.
    keeper = checkpoints.TrainCheckpoints(self.folder, keep=2, every_steps=5)
    self.assertIsNone(keeper.restore(abstract(PARAMS), shardings(1, 1, 1)))
    state = jax.device_put(PARAMS, shardings(2, 2, 2))
    for step in (5, 10, 15):
      keeper.save(step, jax.tree.map(lambda leaf, step=step: leaf * step, state), loss=1.0)
    keeper.close()
    self.assertCountEqual([path.name for path in self.folder.iterdir()], ["10", "15"])
    again = checkpoints.TrainCheckpoints(self.folder, keep=2, every_steps=5)
    wanted = shardings(1, 8, 1)
    restored = again.restore(abstract(PARAMS), wanted)
    again.close()
    self.assert_bitwise(restored, jax.tree.map(lambda leaf: leaf * 15, state))
    for leaf, sharding in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
      self.assertTrue(leaf.sharding.is_equivalent_to(sharding, leaf.ndim))

  def test_the_best_are_kept_besides_the_newest(self):
    # Fails if max_to_keep_best is not read, if the highest loss counts as best, or if the newest
    # make room for the best.
    keeper = checkpoints.TrainCheckpoints(self.folder, keep=1, every_steps=1, max_to_keep_best=2)
    state = jax.device_put(PARAMS, shardings(1, 1, 1))
    for step, loss in enumerate((3.0, 1.0, 2.0, 5.0, 4.0), start=1):
      keeper.save(step, state, loss)
    keeper.close()
    self.assertCountEqual([path.name for path in self.folder.iterdir()], ["2", "3", "5"])
    again = checkpoints.TrainCheckpoints(self.folder, keep=1, every_steps=1, max_to_keep_best=2)
    again.restore(abstract(PARAMS), shardings(1, 1, 1))
    again.save(6, state, 0.5)
    again.close()
    self.assertCountEqual([path.name for path in self.folder.iterdir()], ["2", "6"])

  def test_another_model_is_refused(self):
    # Fails if an intact checkpoint of another model is skipped, and so lost to newer ones.
    keeper = checkpoints.TrainCheckpoints(self.folder, keep=2, every_steps=1)
    keeper.save(1, jax.device_put(PARAMS, shardings(1, 1, 1)), 1.0)
    keeper.close()
    keeper = checkpoints.TrainCheckpoints(self.folder, keep=2, every_steps=1)
    for change, said in (
      (
        lambda tree: tree["ends"].update(embedding=np.zeros((16, 9), np.float32)),
        r"ends.embedding has shape \(16, 8\) in the checkpoint",
      ),
      (
        lambda tree: tree.update(extra=np.zeros(3, np.float32)),
        "extra has shape none in the checkpoint",
      ),
    ):
      other = jax.tree.map(np.asarray, PARAMS)
      change(other)
      device = shardings(1, 1, 1)["ends"]["embedding"].mesh
      layout = jax.tree.map(lambda _, device=device: NamedSharding(device, PartitionSpec()), other)
      with self.assertRaisesRegex(UserError, f"checkpoint of another model: {said}"):
        keeper.restore(abstract(other), layout)
    keeper.close()
    self.assertTrue((self.folder / "1").exists())

  @parameterized.product(
    steps=[(2,), (2, 4), (2, 4, 6)],
    damage=["emptied", "no arrays", "no metadata", "no metrics"],
    best=[0, 1],
  )
  def test_all_damaged(self, steps, damage, best):
    # Fails if training with unreadable checkpoints cannot restart, write in their place, or resume.
    state = jax.device_put(PARAMS, shardings(1, 1, 1))
    keeper = checkpoints.TrainCheckpoints(self.folder, keep=2, every_steps=2, max_to_keep_best=best)
    for step in steps:
      keeper.save(step, state, loss=1.0 / step)
    keeper.close()
    for path in list(self.folder.iterdir()):
      self.damage(pathlib.Path(path), damage)
    again = checkpoints.TrainCheckpoints(self.folder, keep=2, every_steps=2, max_to_keep_best=best)
    restored = again.restore(abstract(PARAMS), shardings(1, 1, 1))
    self.assertEqual(restored is None, damage != "no metrics")
    for step in (2, 4, 6, 8) if restored is None else (8,):
      again.save(step, jax.tree.map(lambda leaf, step=step: leaf * step, state), loss=1.0)
    again.close()
    last = checkpoints.TrainCheckpoints(self.folder, keep=2, every_steps=2, max_to_keep_best=best)
    self.assert_bitwise(
      last.restore(abstract(PARAMS), shardings(1, 1, 1)), jax.tree.map(lambda leaf: leaf * 8, state)
    )
    last.close()
    aside = pathlib.Path(f"{self.folder}.unreadable")
    self.assertEqual(aside.exists(), restored is None)
    self.addCleanup(shutil.rmtree, aside, ignore_errors=True)

  def damage(self, path, how):
    if how == "emptied":
      shutil.rmtree(path)
      path.mkdir()
    for file in list(path.rglob("*")):
      if not file.is_file():
        continue
      is_metrics = "metrics" in str(file.relative_to(path))
      if (
        (how == "no arrays" and not is_metrics and not file.name.startswith("_"))
        or (how == "no metadata" and file.name.startswith("_"))
        or (how == "no metrics" and is_metrics)
      ):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

  def test_due(self):
    # Fails if step 5 of every 5 is not due, or if 0 divides.
    keeper = checkpoints.TrainCheckpoints(self.folder, keep=2, every_steps=5)
    self.assertEqual([step for step in range(1, 16) if keeper.due(step)], [5, 10, 15])
    keeper.close()
    keeper = checkpoints.TrainCheckpoints(self.folder, keep=2, every_steps=0)
    self.assertFalse(any(keeper.due(step) for step in range(1, 4)))
    keeper.close()


if __name__ == "__main__":
  absltest.main()
