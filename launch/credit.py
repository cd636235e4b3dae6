"""Estimates the value of every step of wrong solutions by rollouts.

python launch/credit.py --config=arithmetic --workdir=DIR
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("credit")
