"""Runs all stages of the recipe, or some.

python launch/pipeline.py --config=arithmetic --workdir=DIR [--stages=pairs/step_dpo,dpo/step_dpo]
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("pipeline")
