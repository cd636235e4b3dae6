"""Writes the report with its trace viewer, or the viewer alone.

python launch/report.py --config=arithmetic --workdir=DIR [--view=traces]
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("report")
