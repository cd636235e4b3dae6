"""Stage credit alone, in one process.

python launch/credit.py --config=configs/arithmetic.py --workdir=DIR
"""

from absl import flags

from synthneg_jax.runtime import startup

startup.define_flags()


def main():
  from synthneg_jax.pipeline import stages

  stages.run(flags.FLAGS.config, flags.FLAGS.workdir, ["credit"])


if __name__ == "__main__":
  startup.run(main)
