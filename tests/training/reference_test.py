"""Reference log-probs: what is computed and stored, independently of packing."""

import tempfile

import jax
import numpy as np
from absl.testing import absltest
from etils import epath

from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.runtime import device_mesh
from synthneg_jax.training import reference
from synthneg_jax.training.reference import Store, branch_key
from tests import tiny_model

MODEL = tiny_model.model(num_layers=1)
T1 = Tree([1, 2, 3, 4], (Branch(4, [5, 6, 7]), Branch(4, [8]), Branch(2, [9, 10])))
T2 = Tree([11, 12], (Branch(2, [13, 14]), Branch(1, [15])))
# Its first branch is T1's third: equal up to the fork, another trunk beyond; one of its own comes
# twice.
T3 = Tree([1, 2, 30], (Branch(2, [9, 10]), Branch(3, [16]), Branch(3, [16])))


def branch_keys(*trees):
  return [
    branch_key(tree.trunk, branch.fork, branch.ids) for tree in trees for branch in tree.branches
  ]


class BranchKeyTest(absltest.TestCase):
  def test_depends_on_what_the_branch_sees_only(self):
    # Fails if the trunk beyond the fork enters (every tree would have its branches scored again),
    # or if list and array of the same ids differ.
    self.assertEqual(
      branch_key([1, 2, 3, 4], 2, [9]), branch_key(np.array([1, 2, 30]), 2, np.array([9], np.int64))
    )

  def test_tells_branches_apart(self):
    # Fails if trunk and branch are joined without a mark, or if one of them does not enter.
    keys = {
      branch_key(*args)
      for args in (
        ([1, 2, 3], 2, [3, 4]),
        ([1, 2, 3], 3, [4]),
        ([1, 2, 3], 1, [2, 3, 4]),
        ([1, 2, 3], 2, [3, 5]),
        ([0, 2, 3], 2, [3, 4]),
        ([1, 0, 3], 2, [3, 4]),
      )
    }
    self.assertLen(keys, 6)


class StoreTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.path = (
      epath.Path(self.enterContext(tempfile.TemporaryDirectory())) / "dpo" / "reference" / "f.npz"
    )

  def test_round_trip(self):
    # Fails if a second add forgets the first on disk, if parts are cut at the wrong ends, if a
    # value is rounded, or if a temporary file is left.
    rng = np.random.default_rng(0)
    values = {
      f"key{i}": rng.normal(size=size).astype(np.float32) for i, size in enumerate([3, 1, 1, 7, 2])
    }
    first = Store(self.path)
    first.add({name: values[name] for name in ("key0", "key1")})
    first.add({name: values[name] for name in ("key2", "key3", "key4")})
    for store in (first, Store(self.path)):
      for name, value in values.items():
        self.assertIn(name, store)
        np.testing.assert_array_equal(store[name], value)
        self.assertEqual(store[name].dtype, np.float32)
      self.assertNotIn("key5", store)
    self.assertEqual([path.name for path in self.path.parent.iterdir()], ["f.npz"])

  def test_nothing_is_written_for_nothing(self):
    # Fails if adding nothing writes a file (np.concatenate of nothing would raise), or if a missing
    # file is an error.
    store = Store(self.path)
    store.add({})
    self.assertFalse(self.path.exists())
    self.assertNotIn("key0", store)


class ScoreTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.params = tiny_model.make_params(MODEL)
    cls.folder = epath.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))

  def score(self, name, trees, row_length, mesh=None, params=None):
    store = Store(self.folder / name)
    packing = reference.Packing(mesh or tiny_model.one_device_mesh(), row_length)
    reference.score(
      MODEL, self.params if params is None else params, trees, store=store, packing=packing
    )
    return store

  def test_values_are_independent_of_packing(self):
    # Fails if values of a row are assigned in another order than its branches, if a
    # branch's first token is missing, or if a tree sees its neighbour. Rows of 24 hold two trees,
    # rows of 10 one, and rows over eight devices lie elsewhere again; another order of trees
    # changes rows.
    packed = self.score("a", [T1, T2, T3], 24)
    mesh = device_mesh.make_mesh(8, 1, 1)
    params = jax.device_put(self.params, device_mesh.shardings(mesh, MODEL.logical_axes()))
    for store in (
      self.score("b", [T3, T1, T2], 10),
      self.score("c", [T2, T3, T1], 24, mesh, params),
    ):
      for tree in (T1, T2, T3):
        for branch, key in zip(tree.branches, branch_keys(tree), strict=True):
          self.assertEqual(packed[key].shape, (len(branch.ids),))
          np.testing.assert_allclose(store[key], packed[key], rtol=0, atol=1e-5)
    lengths = [len(packed[key]) for key in dict.fromkeys(branch_keys(T1, T2, T3))]
    flat = np.concatenate([packed[key] for key in dict.fromkeys(branch_keys(T1, T2, T3))])
    self.assertLen(
      set(flat.tolist()), sum(lengths)
    )  # no two tokens share a value, so none can be mistaken for another
    self.assertLess(flat.max(), 0.0)

  def test_only_what_is_missing_is_computed(self):
    # Fails if known branches are scored again (they would be overwritten), if a known branch hides
    # an unknown one of its tree, or if nothing missing still runs the model (these parameters are
    # none).
    store = Store(self.folder / "d")
    known = branch_keys(T1)[1:]
    store.add({key: np.array([7.0], np.float32) for key in known})
    packing = reference.Packing(tiny_model.one_device_mesh(), 10)
    reference.score(MODEL, self.params, [T1, T3], store=store, packing=packing)
    for key in known:
      np.testing.assert_array_equal(store[key], [7.0])
    on_disk = Store(self.folder / "d")
    self.assertSameElements(on_disk._values, {*branch_keys(T1, T3)})
    reference.score(MODEL, None, [T1, T3], store=on_disk, packing=packing)
    fresh = self.score("e", [T1, T3], 10)
    for key in {*branch_keys(T1, T3)} - {*known}:
      np.testing.assert_allclose(on_disk[key], fresh[key], rtol=0, atol=1e-5)


if __name__ == "__main__":
  absltest.main()
