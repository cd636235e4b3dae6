"""Stages that choose their geometry record it, keep it when resumed, and give the same results."""

import json
from unittest import mock

from absl.testing import absltest

from synthneg_jax.data.records import Shards, Trace
from synthneg_jax.pipeline import sample, sft
from synthneg_jax.runtime import device_mesh, distributed
from tests.pipeline import small_run

_CHOSEN = {
  "sft.row_length": 0,
  "sft.num_epochs": 1,
  "sft.max_steps": 0,
  "sft.batch_size": 8,
  "sft.save_every_steps": 1,
}


def geometry(workdir, stage, file="manifest.json"):
  """The geometry that a stage recorded."""
  return json.loads((workdir / stage / file).read_text())["geometry"]


class GeometryTest(absltest.TestCase):
  def losses(self, workdir):
    lines = (workdir / "sft" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss/per_token"] for line in lines]

  def test_training_goes_on_with_what_it_chose(self):
    # Fails if a resumed stage chooses its rows again from the memory of its machine, if rows are
    # not in the manifest, or if chosen rows give other losses than rows of a given length.
    workdir, stops = small_run.copied("synthesize"), iter([False, True])
    with mock.patch.object(distributed, "stopping", lambda: next(stops, True)):
      with self.assertRaises(distributed.Stopped):
        sft.run(small_run.opened(workdir, **_CHOSEN))
    begun = geometry(workdir, "sft", "begun.json")
    self.assertEqual((begun["rows"]["microbatches"], begun["rows"]["by_size"]), (1, True))
    with mock.patch.object(device_mesh, "memory", lambda: 1.0):
      figures = sft.run(small_run.opened(workdir, **_CHOSEN))
    self.assertEqual(geometry(workdir, "sft"), begun)
    given = small_run.copied("synthesize")
    with mock.patch.object(device_mesh, "memory", lambda: 1.0):  # a row a microbatch
      sft.run(small_run.opened(given, **_CHOSEN | {"sft.row_length": 160}))
    self.assertGreater(geometry(given, "sft")["rows"]["microbatches"], 1)
    self.assertLen(self.losses(workdir), figures["steps"])
    for one, other in zip(self.losses(workdir), self.losses(given), strict=True):
      self.assertAlmostEqual(one, other, delta=1e-5)

  def test_sampling_draws_the_same(self):
    # Fails if samples depend on the chosen lanes and slots, or if the stage does not record them.
    workdir = small_run.copied("synthesize", "sft")
    sample.run(small_run.opened(workdir, **{"engine.lanes": 0, "engine.slots": 0}))
    chosen = geometry(workdir, "sample")["lanes"]
    self.assertNotEqual((chosen["lanes"], chosen["slots"]), (32, 3))

    def drawn(folder):
      return {trace.id: trace.ids for trace in Shards(folder / "sample" / "traces", Trace).read()}

    self.assertEqual(drawn(workdir), drawn(small_run.copied("sample")))


if __name__ == "__main__":
  absltest.main()
