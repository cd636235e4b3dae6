"""Trains the small base model of an embedded task.

python launch/pretrain.py --config=arithmetic --workdir=DIR
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("pretrain")
