"""Ratios against what users would pick instead (PyTorch with transformers and TRL), in one process on one core.

Needs: pip install -e ".[bench]". Outputs are shown to be equal before anything is timed. docs/performance.md has results.

python launch/benchmark.py --suite={train,dpo,sampling,credit} [--full] [--out=FILE]
"""

from absl import flags

from synthneg_jax.runtime import startup

startup.define_flags(config=False, workdir=False)
flags.DEFINE_enum("suite", None, ["train", "dpo", "sampling", "credit"], "What is measured.", required=True)
flags.DEFINE_bool("full", False, "Also the shapes of SmolLM2-135M and torch.compile; many minutes on one core.")
flags.DEFINE_string("out", None, "File that takes the rows as JSON.")


def main():
  from benchmarks import benchmark

  benchmark.main(flags.FLAGS.suite, flags.FLAGS.full, flags.FLAGS.out)


if __name__ == "__main__":
  startup.run(main)
