"""synthneg_jax: reinforcement learning on incorrect synthetic data, for math reasoning, in JAX.

An independent implementation of Setlur et al., "RL on Incorrect Synthetic Data Scales the
Efficiency of LLM Math Reasoning by Eight-Fold" (NeurIPS 2024, https://arxiv.org/abs/2406.14532).
Read core/ for the method, pipeline/ for the way of the data.
"""

__version__ = "0.1.0"
