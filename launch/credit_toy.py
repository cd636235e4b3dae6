"""Compares per-step with per-response credit where every value is known; a minute on one core.

python launch/credit_toy.py --out=DIR [--seeds=20]
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("credit-toy")
