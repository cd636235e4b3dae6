"""Prints the paired difference of two methods' test errors over several runs, with its 95 %
interval.

python launch/paired.py --workdirs=DIR,DIR,DIR [--first=sft] [--second=step_dpo]
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("paired")
