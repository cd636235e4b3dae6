"""Writes traces, pairs or step labels for other trainers.

python launch/export_records.py --config=arithmetic --workdir=DIR --what=pairs --out=FILE.jsonl
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("export-records")
