"""Credit by step against credit by response, on a task where every value is known. About a minute on one core.

python launch/credit_toy.py --out=DIR [--seeds=20]
"""

from absl import flags

from synthneg_jax.runtime import startup

startup.define_flags(config=False, workdir=False)
flags.DEFINE_string("out", None, "Folder that takes credit_matters.json and the figures.", required=True)
flags.DEFINE_integer("seeds", 20, "Tasks drawn for each experiment.", lower_bound=3)


def main():
  from synthneg_jax.experiments.credit_toy import study as credit_toy

  credit_toy.main(flags.FLAGS.out, flags.FLAGS.seeds)


if __name__ == "__main__":
  startup.run(main)
