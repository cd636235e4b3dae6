"""Writes what a run holds in a form that other trainers read; docs/interchange.md shows them.

python launch/export_records.py --config=configs/arithmetic.py --workdir=DIR --what=pairs --out=FILE.jsonl
"""

from absl import flags, logging

from synthneg_jax.runtime import startup

startup.define_flags()
flags.DEFINE_enum(
  "what", None, ["traces", "pairs", "stepwise", "math_shepherd", "prm800k"], "Traces, TRL's pairs, or labels of steps."
)
flags.DEFINE_string("out", None, "File to write, .jsonl or .parquet.")
flags.DEFINE_string("source", "", "traces: sample (default) or evaluate/METHOD; pairs: step_dpo (default) or dpo.")
flags.mark_flags_as_required(["what", "out"])


def main():
  from synthneg_jax.pipeline import export_formats
  from synthneg_jax.pipeline.experiment import Experiment

  values = flags.FLAGS
  count = export_formats.write(Experiment.open(values.config, values.workdir), values.what, values.out, values.source)
  logging.info("%s: %d rows.", values.out, count)


if __name__ == "__main__":
  startup.run(main)
