"""Stage synthesize alone, in one process; docs/synthesis.md has a capable model write the problems.

python launch/synthesize.py --config=configs/arithmetic.py --workdir=DIR [--config.synthesis.provider=scripted]
"""

from absl import flags

from synthneg_jax.runtime import startup

startup.define_flags()


def main():
  from synthneg_jax.pipeline import stages

  stages.run(flags.FLAGS.config, flags.FLAGS.workdir, ["synthesize"])


if __name__ == "__main__":
  startup.run(main)
