# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The method in ten minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/synthneg_jax/blob/main/colab/the_method_in_ten_minutes.ipynb)
#
# A language model learns to solve problems by imitating right solutions (SFT). Setlur et al.
# ([NeurIPS 2024](https://arxiv.org/abs/2406.14532)) let it learn from its own **wrong** solutions,
# too. A wrong solution is rarely wrong throughout: often it was on its way until one step spoiled
# it. So their method asks of every step how much it changed the chance to come out right, and
# trains the model at the step that is to blame.
#
# Here all of it happens on one small task, in a few minutes on two CPU cores: a model of 0.2
# million parameters that can do sums but cannot plan, and problems that it has to plan for. (This
# is an independent implementation, not the authors' code.)
#
# The next cell fetches and installs the project, on Colab or wherever you are. It leaves you in the
# project's folder.

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
from synthneg_jax.pipeline import (
  credit,
  dpo,
  evaluate,
  pair_logprobs,
  pairs,
  report,
  rft,
  sample,
  sft,
  synthesize,
)
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.report import figures, markup, trace_figures, training_sections
from synthneg_jax.runtime import manifest

# %% tags=["parameters"]
WORKDIR = "runs/ten_minutes"  # all files of the run; a stage that is done there is not done again
TRAIN_PROBLEMS = 500  # |D_syn|, problems with a known solution
TEST_PROBLEMS = 1000

# %% [markdown]
# ## 1. Problems, and a teacher's solutions
#
# A run is a configuration and a folder. Everything that can be set stands in one tree
# ([runtime/config_schema.py](../synthneg_jax/runtime/config_schema.py)); `configs/arithmetic.py` is
# what the README's quickstart runs.

# %%
config = arithmetic.get_config()
config.task.train_problems, config.task.test_problems = TRAIN_PROBLEMS, TEST_PROBLEMS
config.report.num_traces = 12
run = Experiment.open(config, WORKDIR)
synthesize.run(run)

# %% [markdown]
# The dictionary is what a stage says of itself: here, seconds and the numbers of problems. (`{}`
# means: it was done before.)
#
# A problem **x** gives some letters a digit, defines others by them, and asks for one. All sums are
# on a clock of ten: 7 + 5 =
# 2. Some definitions are not needed. A solution is a row of **steps** y_1 … y_L, one a line; a step
# names a letter, its definition, the values that go in and the value that comes out. The last step
# states the answer.

# %%
problem = next(iter(run.problems("train").values()))
print(problem.prompt, problem.solution, sep="\n")

# %% [markdown]
# ## 2. SFT: imitate the teacher
#
# The base model is trained to make the teacher's solutions likely. The result is **π_sft**, where
# everything else starts. Its loss is −log p of a token, in nats: 0.1 means that a token of the
# teacher's gets a probability of about e^−0.1 = 0.9.

# %%
sft.run(run)
training_sections.training_figure(report.collect(run).training["sft"][1])

# %% [markdown]
# ## 3. Sample: let it try, and look at the answers
#
# π_sft now solves each training problem eight times, at temperature 0.8, so that it does not say
# the same eight times. A verifier looks at the final answer alone. *pass@1* is the share of right
# tries, *pass@8* the share of problems with at least one right try among the eight. The gap between
# the two is what there is to gain: the model *can* solve far more problems than it solves at the
# first try.

# %%
sample.run(run)
told = manifest.figures(run.workdir, "sample")
print(f"pass@1 {told['pass_at_1']}, pass@8 {told['pass_at_8']}")
figures.verdicts(report.collect(run).reasons, markup.REASONS)

# %% [markdown]
# *RFT* uses the right tries: the base model is trained on them as if a teacher had written them. It
# throws away the wrong ones, which here are more than half. That is the baseline to beat.

# %%
rft.run(run)
told = manifest.figures(run.workdir, "rft")
print(
  f"{told['solutions']} right tries of {told['problems']} problems, at most "
  f"{config.rft.max_per_problem} of each"
)

# %% [markdown]
# ## 4. Credit: what did each step of a wrong solution do?
#
# **Q** of a step is the probability of coming out right if π_sft goes on from there. It is
# measured: from the end of each step, six continuations ("rollouts") are drawn and graded. Q of the
# last step is the verdict itself, 0 for a wrong solution.
#
# **A**, the advantage of a step, is what the step changed: A_i = Q_i − Q_i−1. Before the first step
# stands V(x), the share of right tries at the problem. A step with A < 0 made things worse, though
# nothing in it need be *false*: a sum that is correct and not needed, or a letter that is used
# before its value was worked out, are the usual mistakes here.

# %%
credit.run(run)
told = manifest.figures(run.workdir, "credit")
print(f"{told['traces']} wrong tries with {told['steps']} steps, {told['rollouts']} rollouts")

# %% [markdown]
# One wrong solution. Orange steps lowered Q, the stronger the more; blue ones raised it. The bars
# are 95 % intervals: six rollouts do not say much about one step. The frame is the **pit**, the
# first step with the lowest Q: from there, not one of the rollouts came out right. What follows is
# lost, and not to blame; a rollout from there that comes out right after all had luck, since on a
# clock of ten one false answer in ten is the right digit. (Of a dozen solutions taken at even
# distances, this is the first one with its pit in the middle.)

# %%
found = report.collect(run)
shown = [trace for trace in found.traces if 0 < trace.pit < len(trace.steps) - 2][0]
print(shown.problem, f"\ngold answer {shown.gold}, given {shown.extracted}")
trace_figures.credit(shown)

# %% [markdown]
# Over all credited wrong solutions: Q starts at V(x), and falls step by step. (The bars below count
# the solutions that have such a step.)

# %%
figures.mean_values(found.values.means, found.values.counts, found.values.start)

# %% [markdown]
# And this is where the pits lie. If they were all in the last step, credit by step would be the
# same as credit by answer.

# %%
figures.pits(
  [found.pits.count(step) for step in range(len(found.values.means))], found.pits.count(-1)
)

# %% [markdown]
# ## 5. Pairs, and per-step DPO
#
# At a pit the solution forks: there is the step that was taken, and among the rollouts from *the
# same prefix* there may be one that came out right. Its first step y⁺ should become likelier, and
# the pit y⁻ less likely. DPO does that, by raising the **margin** h = [log π(y⁺) − log π_sft(y⁺)] −
# [log π(y⁻) − log π_sft(y⁻)]. Its first bracket is the *shift* of the chosen step, its second one
# that of the rejected.
#
# For comparison the stage also trains *standard* DPO: whole right solutions against whole wrong
# ones ("arbitrary pairs").

# %%
pairs.run(run)
dpo.run(run)
told = manifest.figures(run.workdir, "pairs/step_dpo")
print(
  f"{told['pairs']} pairs at pits of {told['problems']} problems; "
  f"{told['dropped']['without_alternative']} pits without a right rollout"
)

# %% [markdown]
# Such a pair; the numbers are the log-probabilities of the two steps before training and after.

# %%
found = report.collect(run)
shown = [trace for trace in found.traces if trace.preferred and trace.pit > 0][0]
moved = pair_logprobs.read(run, "step_dpo")
pair = moved[f"{shown.id}/{config.pairs.pair_mode}/{shown.pit}"]
trace_figures.fork(trace_figures.pair_at_pit(shown, pair.chosen, pair.rejected))

# %% [markdown]
# All pairs, after training. Blue dots have a margin above 0. Most went straight down: the pit
# became less likely, by a factor of e for each nat, and the chosen step, which had been likely
# before, stayed so.

# %%
chosen = [margin.chosen[1] - margin.chosen[0] for margin in moved.values()]
rejected = [margin.rejected[1] - margin.rejected[0] for margin in moved.values()]
figures.shifts(chosen, rejected)

# %% [markdown]
# The same while training went on, as means over the pairs of each update. The loss starts at log 2
# = 0.69, where h = 0 for all pairs; accuracy is the share of pairs with h > 0.

# %%
training_sections.training_figure(found.training["dpo/step_dpo"][1])

# %% [markdown]
# ## 6. Does it help?
#
# Each policy answers the test problems once, taking the likeliest token each time. The line is the
# 95 % interval over the draw of test problems. One seed and one small task: read the order, not the
# digits. The README has three seeds, and says which settings were chosen how.

# %%
evaluate.run(run)
methods = report.collect(run).methods
figures.errors(
  [m.label for m in methods], [m.error for m in methods], [(m.low, m.high) for m in methods]
)

# %% [markdown]
# ## Where next
#
# The report puts all of this on one page, and a viewer shows every solution with its rollouts and
# pairs:

# %%
report.run(run)

# %% [markdown]
# - [the_losses](the_losses.ipynb): what DPO and its relatives do to a margin.
# - [step_credit_on_a_text_of_yours](step_credit_on_a_text_of_yours.ipynb): write a solution and see
# Q after each step.
# - [a_real_model](a_real_model.ipynb): the same stages with SmolLM2 on GSM8K, and the way to 7B on
# a TPU.
# - [docs/method.md](../docs/method.md): every equation beside the function that computes it.
