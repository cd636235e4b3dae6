"""A grid |D_syn| x method x seed, its figures and efficiency factors; cells that are there are not made again.

python launch/study.py --config=configs/study_arithmetic.py --workdir=DIR
"""

from absl import flags

from synthneg_jax.runtime import startup

startup.define_flags()


def main():
  from synthneg_jax.experiments.scaling import figure

  figure.whole_study(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
  startup.run(main)
