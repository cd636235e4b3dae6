"""Runs figure 8, the star graph: what SFT memorizes, and what per-step DPO makes of early and late
checkpoints.

python launch/star_graph.py --config=star_graph --workdir=DIR
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("star-graph")
