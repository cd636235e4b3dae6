"""Measures speed against PyTorch with transformers and TRL, in one process on one core.

python launch/benchmark.py --suite={train,dpo,sampling,credit} [--full] [--out=FILE]
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("benchmark")
