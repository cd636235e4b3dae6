"""The grading report of a workdir, report/grading.md: verdicts by reason, with the answers that got them.

python launch/grading.py --workdir=DIR [--second_opinion] [--most=20]
"""

from absl import flags

from synthneg_jax.runtime import startup

startup.define_flags(config=False)
flags.DEFINE_bool("second_opinion", False, "Ask math-verify too and list where it differs; it never judges.")
flags.DEFINE_integer("most", 20, "Answers shown for each reason of each set.")


def main():
  from synthneg_jax.pipeline import grading_report

  print(grading_report.report(flags.FLAGS.workdir, flags.FLAGS.second_opinion, flags.FLAGS.most))


if __name__ == "__main__":
  startup.run(main)
