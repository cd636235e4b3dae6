"""A stage is skipped, resumed or refused, with a reason in one sentence."""

import json
import os
import pathlib
import subprocess
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized
from etils import epath

from synthneg_jax.runtime import manifest
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.runtime.manifest import Stage

CONFIG = {"seed": 0, "sample.num_traces": 8, "engine.stop": ("\n\n",)}


class StageTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = epath.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.enterContext(mock.patch.object(manifest, "git_commit", lambda: "abc"))  # git takes a while

  def make(self, name="sample", text="one\ntwo\n", identity="", config=None):
    """Makes a finished stage with one file."""
    stage = Stage(self.workdir, name, CONFIG if config is None else config)
    path = stage.folder / "traces" / "00000.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    stage.finish({"traces": 2}, [path], identity)
    return path

  def refused(self, *args, **kwargs) -> str:
    with self.assertRaises(UserError) as caught:
      Stage(self.workdir, *args, **kwargs)
    self.assertNotIn("\n", str(caught.exception))
    return str(caught.exception)

  def test_begun_then_done(self):
    # Fails if an unfinished stage counts as done, or a finished one is repeated.
    self.assertFalse(Stage(self.workdir, "sample", CONFIG).done)
    self.assertFalse(Stage(self.workdir, "sample", CONFIG).done)
    self.assertIsNone(manifest.figures(self.workdir, "sample"))
    self.make()
    self.assertTrue(Stage(self.workdir, "sample", CONFIG).done)
    figures = manifest.figures(self.workdir, "sample")
    self.assertEqual(figures["traces"], 2)
    self.assertGreaterEqual(figures["seconds"], 0.0)
    written = json.loads((self.workdir / "sample" / "manifest.json").read_text())
    self.assertEqual(
      (written["stage"], written["git_commit"], list(written["files"])),
      ("sample", "abc", [os.path.join("traces", "00000.jsonl")]),
    )
    self.assertIn("jax", written["versions"])
    self.assertEqual(
      sorted(p.name for p in (self.workdir / "sample").iterdir()),
      ["begun.json", "manifest.json", "traces"],
    )

  def test_a_geometry_is_chosen_once(self):
    # Fails if a stage that goes on chooses anew, if a geometry makes another stage of it or of
    # those behind it, if the manifest lacks it, or if a start with another config that had made
    # nothing leaves its own.
    stage = Stage(self.workdir, "sample", CONFIG)
    self.assertEqual(stage.choose_once("lanes", lambda: {"lanes": 3}), {"lanes": 3})
    self.assertEqual(stage.choose_once("lanes", lambda: {"lanes": 4}), {"lanes": 3})
    stage = Stage(self.workdir, "sample", CONFIG)
    self.assertEqual(stage.choose_once("lanes", lambda: {"lanes": 5}), {"lanes": 3})
    self.assertEqual(stage.choose_once("rows", lambda: {"length": 7}), {"length": 7})
    stage.finish({})
    written = json.loads((stage.folder / "manifest.json").read_text())
    self.assertEqual(written["geometry"], {"lanes": {"lanes": 3}, "rows": {"length": 7}})
    other = Stage(self.workdir / "other", "sample", CONFIG)
    other.choose_once("lanes", lambda: {"lanes": 9})
    other.finish({})
    self.assertEqual(
      json.loads((other.folder / "manifest.json").read_text())["identity"], written["identity"]
    )
    Stage(self.workdir, "rft", CONFIG).choose_once("rows", lambda: {"length": 7})
    changed = Stage(self.workdir, "rft", CONFIG | {"seed": 1})
    self.assertEqual(changed.choose_once("rows", lambda: {"length": 8}), {"length": 8})

  def test_leaves_that_decided_results_once(self):
    # Fails if a stage of an earlier version is refused over a leaf that today says only how a stage
    # computes.
    self.make(name="sft", config=CONFIG | {"sft.grad_accum_steps": 1})
    self.assertTrue(Stage(self.workdir, "sft", CONFIG).done)

  def test_a_stage_that_has_made_nothing_takes_a_changed_config(self):
    # Fails if a mistyped setting must be cleaned up by hand, or if logs of the abandoned start are
    # mixed with new ones.
    folder = Stage(self.workdir, "sft", CONFIG).folder
    for name in ("metrics.jsonl", "events.out.tfevents.1"):
      (folder / name).write_text("of the first start")
    self.assertFalse(Stage(self.workdir, "sft", CONFIG | {"seed": 1}).done)
    self.assertEqual([path.name for path in folder.iterdir()], ["begun.json"])
    self.assertIn("seed=1, but now it is 0", self.made_something_then_refused(folder))

  def made_something_then_refused(self, folder):
    (folder / "checkpoints").mkdir()
    return self.refused("sft", CONFIG)

  def test_what_version_1_made_is_refused(self):
    # Fails if files of the earlier format are read as today's, as this stage's own or as its
    # inputs.
    self.make()
    for name in ("begun.json", "manifest.json"):
      path = self.workdir / "sample" / name
      written = json.loads(path.read_text())
      del written["format"]
      path.write_text(json.dumps(written))
    sentence = f"Stage sample in {self.workdir} is from version 1 of synthneg_jax"
    for said in (self.refused("sample", CONFIG), self.refused("credit", CONFIG, ["sample"])):
      self.assertStartsWith(said, sentence)
      self.assertIn(f"delete {self.workdir / 'sample'} and the later stages", said)

  @parameterized.parameters(True, False)
  def test_changed_config(self, finished):
    # Fails if a changed, new or dropped leaf goes unseen, before the stage is done or after, or if
    # the sentence does not name leaf, both values and the workdir.
    if finished:
      self.make()
    else:
      (Stage(self.workdir, "sample", CONFIG).folder / "traces").mkdir()
    message = self.refused("sample", {**CONFIG, "sample.num_traces": 16})
    self.assertStartsWith(
      message,
      f"Stage sample in {self.workdir} was started with sample.num_traces=8, but now it is 16;",
    )
    self.assertIn("--workdir", message)
    self.assertIn(str(self.workdir / "sample"), message)
    self.assertIn("extra=None, but now it is 1", self.refused("sample", {**CONFIG, "extra": 1}))
    self.assertIn(
      "seed=0, but now it is None",
      self.refused("sample", {k: v for k, v in CONFIG.items() if k != "seed"}),
    )

  def assertStartsWith(self, text, start):
    self.assertEqual(text[: len(start)], start)

  def test_needs_what_is_not_done(self):
    # Fails if a stage uses files of a killed stage.
    Stage(self.workdir, "sample", CONFIG)
    self.assertEqual(
      self.refused("credit", CONFIG, ["sample"]),
      f"Stage credit needs stage sample, which is not done in {self.workdir}; run it first.",
    )

  def test_changed_upstream(self):
    # Fails if a stage resumes with a different rerun of its input; an identical rerun is allowed.
    path = self.make()
    Stage(self.workdir, "credit", CONFIG, ["sample"]).finish({})
    self.make()
    self.assertTrue(Stage(self.workdir, "credit", CONFIG, ["sample"]).done)
    for change in ({"text": "one\nthree\n"}, {"identity": "other weights"}):
      self.make(**change)
      message = self.refused("credit", CONFIG, ["sample"])
      self.assertStartsWith(
        message,
        f"Stage credit in {self.workdir} was started from another run of stage sample; delete ",
      )
      self.assertIn(str(self.workdir / "credit"), message)
    path.parent.parent.joinpath("begun.json").unlink()
    self.make(config={**CONFIG, "seed": 1})
    self.assertIn("another run of stage sample", self.refused("credit", CONFIG, ["sample"]))

  def test_imported_files_are_kept(self):
    # Fails if a plain run after an import deletes what was imported, or accepts it with another
    # config or before the import ended.
    Stage(self.workdir, "sft", CONFIG).finish({})
    given = {"imported traces": "abc"}
    stage = Stage(self.workdir, "sample", CONFIG, ["sft"], given)
    file = stage.folder / "traces.jsonl"
    file.write_text("row")
    message = self.refused("sample", CONFIG, ["sft"])
    self.assertIn("was started from imported traces, which are not given now; delete ", message)
    stage.finish({}, [file])
    self.assertTrue(Stage(self.workdir, "sample", CONFIG, ["sft"]).done)
    self.assertIn("seed=", self.refused("sample", {**CONFIG, "seed": 9}, ["sft"]))
    self.assertIn(
      "another imported traces", self.refused("sample", CONFIG, ["sft"], {"imported traces": "d"})
    )
    self.assertEqual(file.read_text(), "row")
    self.assertTrue(Stage(self.workdir, "sample", CONFIG, ["sft"], given).done)

  def test_a_change_is_carried_on(self):
    # Fails if a stage's identity does not hold its inputs': a stage two steps down would not see
    # the change.
    self.make()
    Stage(self.workdir, "credit", CONFIG, ["sample"]).finish({})
    Stage(self.workdir, "dpo/step_dpo", CONFIG, ["credit"]).finish({})
    self.make(text="other\n")
    for path in (self.workdir / "credit").iterdir():
      path.unlink()
    Stage(self.workdir, "credit", CONFIG, ["sample"]).finish({})
    self.assertIn(
      "started from another run of stage credit", self.refused("dpo/step_dpo", CONFIG, ["credit"])
    )

  @parameterized.parameters("one\ntw", "one\nTwo\n", "one\ntwo\n\n", "")
  def test_cut_off_or_changed_file(self, text):
    # Fails if only the file's presence, its length or its start is looked at.
    path = self.make()
    path.write_text(text)
    self.assertEqual(
      self.refused("credit", CONFIG, ["sample"]),
      f"{path} was changed or truncated after stage sample wrote it; delete it and "
      f"{self.workdir / 'sample' / 'manifest.json'} to run the stage again.",
    )

  def test_missing_file(self):
    # Fails if a deleted file gives a traceback.
    path = self.make()
    path.unlink()
    self.assertEqual(
      self.refused("credit", CONFIG, ["sample"]),
      f"{path} is missing; delete {self.workdir / 'sample' / 'manifest.json'} to run stage sample "
      "again.",
    )

  def test_a_folder_that_cannot_be_written(self):
    # Fails if the operating system's error comes out as a traceback.
    (self.workdir / "sample").write_text("a file where the folder should be")
    self.assertRegex(
      self.refused("sample", CONFIG), f"{self.workdir / 'sample'}.* cannot be written: .+"
    )

  def test_write_json_leaves_nothing_half(self):
    # Fails if a reader can see a partial file: an interrupted write leaves the old one.
    path = self.workdir / "a" / "b.json"
    manifest.write_json(path, {"x": 1})

    def killed(self, text):
      with open(self, "w") as file:
        file.write(text[:3])
      raise KeyboardInterrupt

    with mock.patch.object(type(path), "write_text", killed), self.assertRaises(KeyboardInterrupt):
      manifest.write_json(path, {"x": 2})
    self.assertEqual(json.loads(path.read_text()), {"x": 1})
    manifest.write_json(path, {"x": 2})
    self.assertEqual(json.loads(path.read_text()), {"x": 2})
    self.assertEqual([p.name for p in path.parent.iterdir()], ["b.json"])


class GitCommitTest(absltest.TestCase):
  def test_commit_or_nothing(self):
    # Fails if the commit is cut or its mark of changes is, or if a missing git or checkout raises.
    self.assertRegex(manifest.git_commit(), r"^([0-9a-f]{40}\+?)?$")
    with mock.patch.object(manifest.subprocess, "run", side_effect=FileNotFoundError):
      self.assertEqual(manifest.git_commit(), "")

  def test_of_this_project_alone(self):
    # Fails if a package inside another project's repository reports that project's commit.
    root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message=m"], check=True)
    for package, pattern in (("synthneg_jax", r"^[0-9a-f]{40}$"), (".venv/lib/synthneg_jax", "^$")):
      path = root / package / "runtime" / "manifest.py"
      path.parent.mkdir(parents=True)
      with mock.patch.object(manifest, "__file__", str(path)):
        self.assertRegex(manifest.git_commit(), pattern)


if __name__ == "__main__":
  absltest.main()
