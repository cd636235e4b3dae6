"""Figures of the paper from a study: makes the study's missing cells, then draws.

python launch/figure.py --figure=5a --config=configs/study_arithmetic.py --workdir=DIR
"""

from absl import flags

from synthneg_jax.runtime import startup

startup.define_flags()
flags.DEFINE_list(
  "figure",
  None,
  "Numbers of the paper's figures, such as 2a,5a; experiments/scaling/figure.py has them all.",
  required=True,
)


def main():
  from synthneg_jax.experiments.scaling import figure

  figure.main(flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.figure)


if __name__ == "__main__":
  startup.run(main)
