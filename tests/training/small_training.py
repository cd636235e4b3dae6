"""A training of a few steps as a program of its own, for tests that kill it: python -m
tests.training.small_training --help.
"""

import os
import resource
import signal
import time

import numpy as np
from absl import flags
from etils import epath

from synthneg_jax.runtime import startup

startup.define_flags(config=False)
flags.DEFINE_integer("kill_at", -1, "Step at which SIGKILL comes, while its batch is built.")
flags.DEFINE_float("step_s", 0.0, "Seconds that a batch takes to be built.")
flags.DEFINE_integer("largest_file", 0, "Bytes beyond which no file can be written; 0 for none.")
flags.DEFINE_integer("save_every_steps", 2, "Steps between checkpoints.")
flags.DEFINE_integer("width", 4, "Columns of the matrix.")


def main():
  import jax.numpy as jnp

  from synthneg_jax.runtime import config_schema
  from synthneg_jax.training import loop
  from tests import tiny_model
  from tests.training import loop_test

  class Model(loop_test.StandIn):
    def abstract_params(self):
      import jax

      return jax.eval_shape(
        lambda: {"matrix": jnp.zeros((6, flags.FLAGS.width)), "norm": {"scale": jnp.zeros(4)}}
      )

  class Slow(loop_test.Spy):
    def build(self, step):
      if step == flags.FLAGS.kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
      time.sleep(flags.FLAGS.step_s)
      return super().build(step)

  section = config_schema.default().sft
  section.update(save_every_steps=flags.FLAGS.save_every_steps, max_to_keep=2)
  section.optimizer.update(learning_rate=0.05)
  if flags.FLAGS.largest_file:
    resource.setrlimit(resource.RLIMIT_FSIZE, (flags.FLAGS.largest_file, flags.FLAGS.largest_file))
  workdir = epath.Path(flags.FLAGS.workdir)
  run = loop.Run(
    name="small",
    section=section,
    model=Model(),
    objective=loop_test.objective,
    batches=Slow(num_steps=6),
    mesh=tiny_model.one_device_mesh(),
    folder=workdir,
  )
  params, _ = loop.fit(run, tiny_model.make_params(Model()))
  np.savez(workdir / "trained.npz", matrix=params["matrix"], scale=params["norm"]["scale"])


if __name__ == "__main__":
  startup.run(main)
