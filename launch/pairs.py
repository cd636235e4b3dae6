"""Builds preference pairs from traces and their credit: whole responses, and per step.

python launch/pairs.py --config=arithmetic --workdir=DIR
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("pairs")
