"""Samples solutions from the SFT policy and grades them.

python launch/sample.py --config=arithmetic --workdir=DIR
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("sample")
