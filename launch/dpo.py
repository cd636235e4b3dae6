"""Trains with DPO on arbitrary pairs and on per-step pairs.

python launch/dpo.py --config=arithmetic --workdir=DIR
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("dpo")
