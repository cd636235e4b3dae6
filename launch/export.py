"""Writes trained policies as Hugging Face folders.

python launch/export.py --config=arithmetic --workdir=DIR
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("export")
