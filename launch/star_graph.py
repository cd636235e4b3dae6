"""Figure 8, the star graph: what SFT memorises, and what per-step DPO makes of it from early and late checkpoints.

python launch/star_graph.py --config=configs/star_graph.py --workdir=DIR
"""

from absl import flags

from synthneg_jax.runtime import startup

startup.define_flags()


def main():
  from synthneg_jax.experiments.star_graph import study as star_graph_study

  star_graph_study.run(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
  startup.run(main)
