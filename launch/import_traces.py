"""Takes traces sampled elsewhere in the place of stage sample's own; stages synthesize and sft are done before.

python launch/import_traces.py --config=configs/arithmetic.py --workdir=DIR --traces=FILE.jsonl [--assume_finish=eos]
"""

from absl import flags

from synthneg_jax.runtime import startup

startup.define_flags()
flags.DEFINE_list("traces", None, "Files of traces, .jsonl or .parquet; docs/interchange.md lists their fields.")
flags.DEFINE_enum(
  "assume_finish", "", ["", "eos", "length"], "How responses ended whose rows do not say so; empty refuses such rows."
)
flags.DEFINE_string("sft_policy", "", "Hugging Face folder of the policy that drew them, in the place of stage sft.")
flags.mark_flag_as_required("traces")


def main():
  from synthneg_jax.pipeline import import_traces, stages

  values = flags.FLAGS
  if values.sft_policy:
    adopt = lambda experiment: import_traces.adopt_sft(experiment, values.sft_policy)
    stages.run(values.config, values.workdir, ["sft"], {"sft": adopt})
  take = lambda experiment: import_traces.run(
    experiment, values.traces, values.assume_finish, values.config.task.skip_bad_rows
  )
  stages.run(values.config, values.workdir, ["sample"], {"sample": take})


if __name__ == "__main__":
  startup.run(main)
