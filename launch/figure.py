"""Draws figures of the paper from a study, after running its missing cells.

python launch/figure.py --figure=5a --config=study_arithmetic --workdir=DIR
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("figure")
