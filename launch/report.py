"""Stage report alone, in one process: the report with its trace viewer, or the viewer alone.

python launch/report.py --config=configs/arithmetic.py --workdir=DIR [--view=traces]
"""

from absl import flags

from synthneg_jax.runtime import startup

startup.define_flags()
flags.DEFINE_enum("view", "all", ["all", "traces"], "What is made: report and trace viewer, or the trace viewer alone.")


def main():
  from synthneg_jax.pipeline import stages as pipeline

  stages = ["traces"] if flags.FLAGS.view == "traces" else ["report"]
  pipeline.run(flags.FLAGS.config, flags.FLAGS.workdir, stages)


if __name__ == "__main__":
  startup.run(main)
