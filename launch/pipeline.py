"""Runs all stages of the recipe, or some.

python launch/pipeline.py --config=arithmetic --workdir=DIR [--stages=sft,sample]
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("pipeline")
