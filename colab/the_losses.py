# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The losses
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/synthneg_jax/blob/main/colab/the_losses.ipynb)
#
# A preference loss is given a pair: a *chosen* branch y⁺ and a *rejected* one y⁻ after the same
# trunk. All it knows is how far the policy π has moved each of them from the reference π_ref:
#
# - shift of the chosen: log π(y⁺) − log π_ref(y⁺), in nats (one nat is a factor of e = 2.7 in
# probability);
# - shift of the rejected: log π(y⁻) − log π_ref(y⁻);
# - margin: **h** = shift of the chosen − shift of the rejected. Training starts at h = 0.
#
# The log-probabilities are *summed* over the tokens of a branch. The same function then serves
# whole solutions (standard DPO) and single steps (per-step DPO). Everything below draws the very
# functions that training uses, [core/losses.py](../synthneg_jax/core/losses.py); gradients are
# taken by `jax.grad`.

# %% tags=["setup"]
import sys

REPOSITORY = "https://github.com/OWNER/synthneg_jax"
# !git clone --quiet --depth=1 {REPOSITORY} synthneg_jax
# %cd -q synthneg_jax
# !{sys.executable} -m pip install --quiet --editable ".$(ls /dev/nvidia0 > /dev/null 2>&1 && echo [cuda] || (ls /dev/accel* /dev/vfio/[0-9]* 2> /dev/null | grep -q . && echo [tpu]))"

# %%
# %matplotlib inline
from synthneg_jax.runtime import startup

startup.in_notebook()

# %%
from functools import partial

import jax.numpy as jnp

from synthneg_jax.core import losses
from synthneg_jax.report import loss_figures
from synthneg_jax.runtime import startup

# %% [markdown]
# ## 1. Against the margin
#
# - **DPO**: −log σ(βh). Falls for ever, more and more slowly: at βh = 4.6 less than 1 % of its
# largest pull is left. β says how
#   soon; a small β lets the policy go further from the reference before the pull ends. At h = 0 it is log 2, whatever β.
# - **cDPO**: −(1−ε) log σ(βh) − ε log σ(−βh). It supposes that a share ε of the labels is the wrong
# way round, and turns back
#   where σ(βh) = 1 − ε: with β = 0.3 and ε = 0.1 at h = log(0.9/0.1)/0.3 = 7.3 nats.
# - **IPO**: (h − 1/(2τ))². Has a goal, 1/(2τ) nats (10 for τ = 0.05), and pulls back all that lies
# beyond.
#
# Their sizes are not comparable, so each is drawn as a multiple of itself at h = 0. Below: the pull
# −∂loss/∂h, how hard a pair with that margin is still pushed.

# %%
loss_figures.by_margin(
  {
    "DPO, β = 0.1": partial(losses.dpo_loss, beta=0.1),
    "DPO, β = 0.3": partial(losses.dpo_loss, beta=0.3),
    "cDPO, β = 0.3, ε = 0.1": partial(losses.dpo_loss, beta=0.3, label_smoothing=0.1),
    "IPO, τ = 0.05": partial(losses.ipo_loss, tau=0.05),
  }
)

# %% [markdown]
# ## 2. Two ways to the same margin
#
# The margin grows when the chosen branch becomes likelier, and just as well when **both** become
# less likely, the rejected one faster. DPO cannot tell these apart, and in practice the chosen
# branch often does fall. In this plane each pair starts at the orange dot; shades are the loss,
# arrows the way that its gradient pushes (longer is stronger).
#
# - **DPO** pushes along the diagonal everywhere: as much up for the chosen as down for the
# rejected.
# - **DPOP** (DPO-Positive) adds a penalty inside: −log σ(β(h − λ max(0, −shift of the chosen))).
# Right of the dot it *is* DPO.
#   Left of it, where the chosen branch has fallen below the reference, hardly anything counts but getting it back up: its
#   gradient on the chosen is 1 + λ times that on the rejected.
# - **DPO + nll** adds the chosen branch's own loss per token, −log π(y⁺)/|y⁺|, here with weight 1
# and six tokens: a push to the
#   right of 1/6 everywhere, at every margin. So pairs that DPO is done with still train, and the chosen branch stays likely.

# %%
dpo = partial(losses.dpo_loss, beta=0.3)
loss_figures.by_shifts(
  {
    "DPO, β = 0.3": dpo,
    "DPOP, λ = 5": partial(losses.dpop_loss, beta=0.3, penalty=5.0),
    "DPO + nll": loss_figures.with_nll(dpo, weight=1.0, num_tokens=6, ref_chosen=-4.0),
  }
)

# %% [markdown]
# In numbers, for a pair whose branches have both fallen, the chosen by 2 nats and the rejected by 5
# (so h = 3): the gradients of the loss by each branch's log-probability. Gradient descent moves
# against them.

# %%
fallen = jnp.array([-2.0]), jnp.array([-5.0])
for name, loss in {"DPO": dpo, "DPOP": partial(losses.dpop_loss, beta=0.3, penalty=5.0)}.items():
  value, by_chosen, by_rejected = loss_figures.slopes(loss, *fallen)
  print(
    f"{name:5} loss {value[0]:.3f}, by the chosen {by_chosen[0]:+.3f}, by the rejected "
    f"{by_rejected[0]:+.3f}"
  )

# %% [markdown]
# What training reports of such a pair is `preference_metrics`: the margin looks well, accuracy says
# that it is above 0, and the chosen shift tells what really happened. (`saturated` is 1 where less
# than 1 % of the largest pull is left.)

# %%
zero = jnp.zeros(1)
{
  name: float(value[0])
  for name, value in losses.preference_metrics(*fallen, zero, zero, beta=0.3).items()
}

# %% [markdown]
# ## 3. Which steps of a wrong solution are pushed
#
# Now one wrong solution of six steps with known advantages (first panel): step 2 was good, step 3
# spoiled it (the pit), and the rest no longer mattered. Each other panel shows how hard one loss
# pushes log π of each of these steps at the start of training; blue up, orange down.
#
# - **SFT** on it would imitate every step, the pit too.
# - **standard DPO** (this solution as the rejected one) pushes all six down alike: the good step as
# hard as the pit.
# - **per-step DPO, algorithm 1** rejects the prefix that ends in the pit: what comes after is left
# alone, the good step is not.
# - **per-step DPO, shared prefix** rejects the pit alone. What stood before it is in the trunk,
# which both branches share.
# - **advantage-weighted**: imitates each step with weight min(e^(A/β), 5), here β = 0.3. The
# paper's theorem 6.1 says when the
#   optimum of shared-prefix DPO is that of this loss.
# - **advantage-filtered**: imitates the steps with A > 0, and no others.

# %%
advantages = jnp.array([-0.05, 0.25, -0.6, 0.0, 0.0, 0.0])
pit_only, to_pit = jnp.array([0.0, 0, 1, 0, 0, 0]), jnp.array([1.0, 1, 1, 0, 0, 0])
loss_figures.by_step(
  advantages,
  {
    "SFT": partial(losses.sft_loss, count_T=jnp.ones(6, bool)),
    "standard DPO": loss_figures.rejecting(dpo, jnp.ones(6)),
    "algorithm 1": loss_figures.rejecting(dpo, to_pit),
    "shared prefix": loss_figures.rejecting(dpo, pit_only),
    "advantage-weighted": partial(
      losses.advantage_weighted_loss, advantage_S=advantages, temperature=0.3, max_weight=5.0
    ),
    "advantage-filtered": partial(losses.advantage_filtered_loss, advantage_S=advantages),
  },
)

# %% [markdown]
# Where next: [the_method_in_ten_minutes](the_method_in_ten_minutes.ipynb) trains with these losses;
# [docs/method.md](../docs/method.md) names the source of each. `--config.dpo.loss=dpop` and its
# neighbours in [runtime/config_schema.py](../synthneg_jax/runtime/config_schema.py) choose one for
# a run.
