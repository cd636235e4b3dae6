"""Imports traces sampled elsewhere, in place of stage sample.

python launch/import_traces.py --config=arithmetic --workdir=DIR --traces=FILE.jsonl \
    [--assume_finish=eos]
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("import-traces")
