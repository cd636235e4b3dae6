"""Fine-tunes the base model on the policy's own correct solutions.

python launch/rft.py --config=arithmetic --workdir=DIR
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("rft")
