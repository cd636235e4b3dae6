"""Measures every policy's error on the test problems.

python launch/evaluate.py --config=arithmetic --workdir=DIR
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("evaluate")
