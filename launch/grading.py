"""Lists the verdicts of a run by reason, with the answers that got them.

python launch/grading.py --workdir=DIR [--second_opinion] [--most=20]
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("grading")
