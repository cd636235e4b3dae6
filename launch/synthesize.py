"""Makes the synthetic problems, D_syn; docs/synthesis.md has a capable model write them.

python launch/synthesize.py --config=arithmetic --workdir=DIR
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("synthesize")
