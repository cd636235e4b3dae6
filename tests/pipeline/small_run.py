"""A small run of the embedded task, made once per process and copied by tests that change it."""

import functools
import pathlib
import shutil
import tempfile

from etils import epath

from configs import arithmetic
from synthneg_jax.pipeline import credit, pairs, sample, sft, synthesize
from synthneg_jax.pipeline.experiment import Experiment
from tests import tiny_model


def config():
  c = arithmetic.get_config("smoke")
  c.task.train_problems, c.sft.num_epochs = 40, 12
  c.sft.optimizer.learning_rate = 2e-3  # so that some traces are right
  c.pairs.pit_rule = "lowest_value"
  return c


@functools.cache
def finished() -> pathlib.Path:
  """The finished run, up to pairs/step_dpo. Do not change it."""
  workdir = pathlib.Path(tempfile.mkdtemp(prefix="small_run_")) / "run"
  experiment = opened(workdir)
  for stage in (synthesize, sft, sample, credit):
    stage.run(experiment)
  assert pairs.variant(experiment, "step_dpo")["pairs"] > 3
  return workdir


def copied(*stages: str) -> pathlib.Path:
  """A new workdir with these stages of the finished run."""
  workdir = pathlib.Path(tempfile.mkdtemp(prefix="small_run_")) / "run"
  for stage in stages:
    shutil.copytree(finished() / stage, workdir / stage)
  return workdir


def opened(workdir, **changes) -> Experiment:
  """Opens a workdir; changes are config leaves by dotted name."""
  c = config()
  c.update_from_flattened_dict(changes)
  return Experiment(c, epath.Path(workdir), tiny_model.one_device_mesh())
