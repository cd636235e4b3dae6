"""Runs a grid |D_syn| x method x seed and draws its figures; finished cells are kept.

python launch/study.py --config=study_arithmetic --workdir=DIR
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("study")
