"""All stages of the recipe, or some.

python launch/pipeline.py --config=configs/arithmetic.py --workdir=DIR [--stages=sft,sample]
"""

from absl import flags

from synthneg_jax.runtime import startup

startup.define_flags()
flags.DEFINE_list("stages", None, "Stages to run, in this order; all of the recipe if not given.")


def main():
  from synthneg_jax.pipeline import stages

  stages.run(flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.stages or stages.RECIPE)


if __name__ == "__main__":
  startup.run(main)
