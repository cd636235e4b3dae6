"""Fine-tunes the base model on the teacher's solutions.

python launch/sft.py --config=arithmetic --workdir=DIR
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("sft")
