"""Workdirs in a bucket: gs:// paths through etils.epath, with an in-memory bucket."""

import fsspec
from absl.testing import absltest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from synthneg_jax.data import problem_files
from synthneg_jax.data.records import Problem, Shards
from synthneg_jax.decoding.policy import EMBEDDED, tokenizer_folder
from synthneg_jax.models import hf_tokenizers
from synthneg_jax.runtime import event_files, manifest, metrics
from synthneg_jax.runtime.errors import UserError


class Bucket(MemoryFileSystem):
  """Stands in for gcsfs under epath."""

  protocol = ("gcs", "gs")
  store, pseudo_dirs = {}, [""]

  @classmethod
  def _strip_protocol(cls, path):
    return "/" + str(path).removeprefix("gs://").strip("/")

  def open(self, path, mode="rb", **kwargs):
    assert "a" not in mode, "objects of a bucket cannot be added to"
    return super().open(path, mode, **kwargs)

  def glob(self, path, **kwargs):
    return [found.lstrip("/") for found in super().glob(path, **kwargs)]


class BucketTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    Bucket.store.clear()
    self.workdir = epath.Path("gs://bucket/run")

  def test_records_and_manifest(self):
    # Fails if a path is made by anything but epath, or a file is renamed or listed as only a disk
    # can.
    problems = [Problem(f"p{i}", "1 + 1 =", "2 #### 2", "2", "test") for i in range(3)]
    stage = manifest.Stage(self.workdir, "synthesize", {"seed": 0})
    self.assertFalse(stage.done)
    shards = Shards(stage.folder / "train", Problem)
    shards.write(problems[:2])
    shards.write(problems[2:])
    self.assertEqual([path.name for path in shards.files()], ["00000.jsonl", "00001.jsonl"])
    self.assertEqual(list(shards.read()), problems)
    shards.write_replicated(problems)
    self.assertEqual([path.name for path in shards.files()], ["00000.jsonl"])
    stage.finish({"train": 3}, shards.files())
    self.assertTrue(manifest.Stage(self.workdir, "synthesize", {"seed": 0}).done)
    manifest.Stage(self.workdir, "sft", {"seed": 0}, ["synthesize"])
    with self.assertRaisesRegex(UserError, "seed=0, but now it is 1"):
      manifest.Stage(self.workdir, "synthesize", {"seed": 1})
    self.assertContainsSubset(["/bucket/run/synthesize/manifest.json"], Bucket.store)
    self.assertEmpty([name for name in Bucket.store if name.endswith(".tmp")])

  def test_metrics(self):
    # Fails if lines are added to a file that cannot be added to, or are not there after a
    # checkpoint.
    path = self.workdir / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = metrics.JsonLines(path, 0)
    for step in range(3):
      lines.write(step, {"loss": step / 2}, {})
    lines.save()
    self.assertLen(path.read_text().splitlines(), 3)
    again = metrics.JsonLines(path, 2)
    again.write(2, {"loss": 9.0}, {})
    again.close()
    self.assertEqual(
      path.read_text().splitlines()[1:], ['{"step": 1, "loss": 0.5}', '{"step": 2, "loss": 9.0}']
    )

  def test_event_files(self):
    # Fails if an event file is added to, is not there after a checkpoint, or cannot be cut where
    # training goes on.
    folder = self.workdir / "sft"
    file = event_files.EventFile(folder)
    for step in range(3):
      file.write(step, scalars={"loss": step / 2})
    file.save()

    def events():
      return [
        (event.step, event.summary.value[0].simple_value)
        for path in sorted(folder.glob("events.out.tfevents.*"))
        for event in event_files.read(path)
        if event.HasField("summary")
      ]

    self.assertEqual(events(), [(0, 0.0), (1, 0.5), (2, 1.0)])
    again = event_files.EventFile(folder, 2)
    again.write(2, scalars={"loss": 9.0})
    again.close()
    self.assertEqual(events(), [(0, 0.0), (1, 0.5), (2, 9.0)])

  def test_data_and_tokenizer(self):
    # Fails if problems, or what transformers reads, must lie on a local disk.
    path = self.workdir / "problems.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"problem": "1 + 1", "answer": "2"}\n')
    self.assertEqual([row.answer for row in problem_files.read(path, "jsonl", "train").rows], ["2"])
    (self.workdir / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    for file in epath.Path(EMBEDDED).iterdir():
      if file.suffix == ".json" and file.name != "generation_config.json":
        (self.workdir / file.name).write_bytes(file.read_bytes())
    import transformers

    local = tokenizer_folder(self.workdir)
    self.assertNotIn("://", local)
    self.assertEqual(
      hf_tokenizers.eos_ids(local, 1), [1, 5]
    )  # a copy without them would end an export at one token
    self.assertGreater(len(transformers.AutoTokenizer.from_pretrained(local)), 10)


if __name__ == "__main__":
  absltest.main()
