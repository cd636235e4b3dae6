"""Compiles a config's programs for a TPU pod that is not there: does it fit, what binds, what will it cost.

    python launch/preflight.py --config=configs/gsm8k.py:model=deepseek_math_7b --topology=v5e:8x8 [--stages=sft,sample]

needs `pip install -e ".[preflight]"` (libtpu) and no TPU. Exit status 1 if a program does not fit.
"""

import os

from absl import flags

from synthneg_jax.runtime import startup

# Before jax starts: no chip is looked for, and no cloud machine is asked what it is.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

startup.define_flags(workdir=False)
flags.FLAGS.set_default("compilation_cache", "")  # its files are for chips that are there
flags.DEFINE_string("topology", None, "The TPU: v5e:8x8, v5e:16x16, v5p:4x4x8, v6e:16x16, ...", required=True)
flags.DEFINE_list(
  "stages", None, "Stages (sft, rft, dpo, sample, credit, evaluate) or programs (dpo/step_dpo, ...); default: all."
)
flags.DEFINE_string("out", None, "File that takes the figures as JSON; the last line printed holds them, too.")
flags.DEFINE_float("prompt_tokens", 100.0, "Assumed mean length of a prompt, tokens.")
flags.DEFINE_float("response_tokens", 200.0, "Assumed mean length of a response, tokens.")
flags.DEFINE_float("response_steps", 6.0, "Assumed mean number of steps of a response.")
flags.DEFINE_float("pass_rate", 0.5, "Assumed share of traces that are right.")
flags.DEFINE_float("efficiency", 0.5, "Share of the roofline's bound that is reached, for chip-hours.")


def main():
  from synthneg_jax.preflight import cost_model, preflight

  f = flags.FLAGS
  lengths = cost_model.Lengths(f.prompt_tokens, f.response_tokens, f.response_steps, f.pass_rate)
  preflight.main(f.config, f.topology, f.stages, f.out, lengths, f.efficiency)


if __name__ == "__main__":
  startup.run(main)
