"""The paired difference of two methods' test errors over several finished runs, with its 95 % interval.

python launch/paired.py --workdirs=runs/seed0,runs/seed1,runs/seed2 [--first=sft] [--second=step_dpo]
"""

from absl import flags

from synthneg_jax.runtime import startup

startup.define_flags(config=False, workdir=False)
flags.DEFINE_list("workdirs", None, "Finished workdirs, tested on the same problems.", required=True)
flags.DEFINE_string("first", "sft", "The method whose error is taken.")
flags.DEFINE_string("second", "step_dpo", "The method whose error is subtracted.")


def main():
  from synthneg_jax.experiments.scaling import paired

  paired.main(flags.FLAGS.workdirs, flags.FLAGS.first, flags.FLAGS.second)


if __name__ == "__main__":
  startup.run(main)
