# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Step credit on a text of yours
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/synthneg_jax/blob/main/colab/step_credit_on_a_text_of_yours.ipynb)
#
# You write a problem and a solution; a policy says after each step how likely it is to come out
# right from there. That number is **Q**. It is measured, not guessed: from the end of each step the
# policy goes on many times ("rollouts"), and each rollout's answer is compared with the right one.
# The change from one step to the next is the step's advantage **A**, and the first step with the
# lowest Q is the **pit**, the step that the method would train on.
#
# So Q says two things at once: how good the step is, and how able the policy. A perfect policy
# would mend anything; a hopeless one has Q = 0 everywhere.

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
from configs import arithmetic
from synthneg_jax.pipeline import sft, single_solution_credit, synthesize
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.report import trace_figures

# %% tags=["parameters"]
WORKDIR = "runs/text_of_yours"
TRAIN_PROBLEMS = 500  # solved problems that the policy learns from
NUM_ROLLOUTS = 32  # from the end of each step

# %% [markdown]
# ## The policy
#
# A model of 0.2 million parameters, finetuned on 500 solved problems of the embedded task; that
# takes about 20 seconds. It is right about every other time.

# %%
config = arithmetic.get_config()
config.task.train_problems = TRAIN_PROBLEMS
run = Experiment.open(config, WORKDIR)
synthesize.run(run)
sft.run(run)
policy = run.policy("sft")

# %% [markdown]
# ## The problem, and a solution
#
# A problem gives four letters (A to L) a digit, defines six more by `+`, `-` or `*`, and asks for
# one. Sums are on a clock of ten: 3 + 8 = 1. A step has the form ` E: A+B A= 3 B= 8 E= 1`: the
# letter, its definition, what goes in, what comes out. The last step is ` #### ` and the answer.
# Each word begins with a blank, as in the text below.
#
# Here H rests on F and G, G on E, and I and J are not needed. The solution forgets to work out F
# before it uses it, in step 3. **Change the texts and run the cells again.**

# %%
PROBLEM = " A= 3 B= 8 C= 5 D= 2 E: A+B F: C*D G: E-C H: F+G I: D*E J: H-A ? H=\n"
SOLUTION = """ E: A+B A= 3 B= 8 E= 1
 G: E-C E= 1 C= 5 G= 6
 H: F+G F= 4 G= 6 H= 0
 #### 0"""
ANSWER = "6"

# %%
trace, rollouts = single_solution_credit.credit(
  run, policy, PROBLEM, SOLUTION, ANSWER, num_rollouts=NUM_ROLLOUTS
)
trace_figures.credit(trace)

# %% [markdown]
# How to read it: **V** is how often the policy solves the problem on its own. Each row is a step,
# as the tokenizer's ids were split; orange lowered Q and blue raised it. The bar is the 95 %
# interval of Q for this number of rollouts, the diamond the verdict itself, and the frame the pit.
#
# A step may be true and still lower Q: step 2 is correct arithmetic. But E and G belong together in
# the problem's order, with F between them, and after a policy like this one has skipped F it seldom
# comes back to it.
#
# ## What the policy did from there
#
# Four of the rollouts from the end of step 1, and whether they came out right. They are the raw
# material of everything: Q is their share of right ones, and the pair at a pit takes its chosen
# step from one of them.

# %%
for text, right in rollouts[1][:4]:
  print("right" if right else "wrong", text, sep="\n", end="\n\n")

# %% [markdown]
# ## How sure is that?
#
# The interval narrows with the root of the number of rollouts: four times as many halve it. With
# four rollouts a step, Q = 0/4 may still mean a Q of 0.5, and the pit may well be put elsewhere, as
# here. The method uses few rollouts on many solutions; with one solution we can afford more.

# %%
few, _ = single_solution_credit.credit(run, policy, PROBLEM, SOLUTION, ANSWER, num_rollouts=4)
trace_figures.credit(few)

# %% [markdown]
# ## A right solution
#
# The same problem, solved: Q ends at 1. But step 3 works out I, which nobody asked for. It is true,
# and it lowers Q, since a policy that strays once tends to go on straying. Such a step of a right
# solution is called *spurious*; `pair_mode=positives_too` trains on those as well.

# %%
RIGHT = """ E: A+B A= 3 B= 8 E= 1
 F: C*D C= 5 D= 2 F= 0
 I: D*E D= 2 E= 1 I= 2
 G: E-C E= 1 C= 5 G= 6
 H: F+G F= 0 G= 6 H= 6
 #### 6"""
trace, _ = single_solution_credit.credit(
  run, policy, PROBLEM, RIGHT, ANSWER, num_rollouts=NUM_ROLLOUTS
)
trace_figures.credit(trace)

# %% [markdown]
# ## What it costs
#
# One prefill of problem and solution serves all rollouts: each is a *branch* that forks off this
# *trunk* at the end of a step, so that no prefix is computed twice. It is the same engine that
# gives credit to a whole data set in stage `credit`.
#
# Where next: [a_real_model](a_real_model.ipynb) does this with SmolLM2 and a word problem in
# English. [docs/interchange.md](../docs/interchange.md) tells how traces from elsewhere, thousands
# of them, are taken in and given credit.
