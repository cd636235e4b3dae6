"""GSM8K with a real pretrained model.

    python launch/pipeline.py --config=configs/gsm8k.py:model=smollm2_135m,smoke --workdir=DIR

needs SYNTHNEG_DATA_DIR (a folder with gsm8k/train.jsonl and gsm8k/test.jsonl, as OpenAI's
repository grade-school-math has them) and, for smollm2_135m, `bash launch/get_smollm2.sh`.

smoke: a handful of problems through every stage, to see that all of it works; its errors mean
nothing. deepseek_math_7b, llama2_7b: the paper's models at the paper's sizes, from a Hugging Face
folder named by --config.model.path, on the TPU pod named by pod=v5e_64 (the default), v5e_256,
v5p_128 or v6e_256. The paper's rates, batch sizes and epochs are not known from public sources;
what stands here are published recipes of its neighbours (RFT, https://arxiv.org/abs/2308.01825;
DPO, https://arxiv.org/abs/2305.18290) and our choices. |D_syn| is task.train_problems, 8000 to
128000 in the paper. Not yet run; docs/scaling.md has what the compiler says of each.
"""

import os

from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError

_CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.join("~", ".cache")), "synthneg_jax")
# name -> (folder, prompt style)
_MODELS = {
  "smollm2_135m": (os.path.join(_CACHE, "smollm2_135m"), "chat"),
  "deepseek_math_7b": ("deepseek_math_7b", "plain"),
  "llama2_7b": ("llama2_7b", "plain"),
}
# TPU pod -> (parts that rows are split into, rows of SFT, RFT and DPO a part and step, lanes of
# sampling and of credit a part). A part is four chips that share the rows (mesh.tensor). Rows: as
# few as keep the chips' arithmetic the slowest part of a step (docs/scaling.md), since a batch
# grows with them. Lanes: what fits, with room for MATH's longer responses.
_PODS = {
  "v5e_64": (16, 4, 1, 2, 16, 8),
  "v5e_256": (64, 2, 1, 2, 16, 8),
  "v5p_128": (32, 2, 1, 2, 64, 32),
  "v6e_256": (64, 4, 2, 2, 32, 16),
}


def _paper_scale(c, pod: str) -> None:
  """What the paper's models need on a pod."""
  parts, sft_rows, rft_rows, dpo_rows, sample_lanes, credit_lanes = _PODS[pod]
  c.model.dtype, c.model.scan_layers, c.model.remat = "bfloat16", True, "selective"
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = -1, 16, 4
  c.sample.num_traces = 100
  c.rft.max_per_problem = 4
  c.engine.lanes, c.engine.slots = sample_lanes * parts, 10
  c.credit.lanes, c.credit.slots = credit_lanes * parts, 16
  # Rows that whole trees of mean length fill (python launch/preflight.py says how full they are):
  # 3.2 solutions of SFT a row, 8 of RFT, 8 pairs of DPO.
  c.model.max_length = c.rft.row_length = 2048
  c.sft.row_length, c.sft.batch_size = 1024, int(3.2 * sft_rows * parts)
  c.rft.batch_size = 8 * rft_rows * parts
  c.dpo.row_length, c.dpo.batch_size = 1536, 8 * dpo_rows * parts
  # which the compiler found to fit
  c.sft.grad_accum_steps = c.rft.grad_accum_steps = c.dpo.grad_accum_steps = 1


def get_config(arg: str = "model=smollm2_135m"):
  """`gsm8k.py:model=NAME[,pod=POD][,smoke]`."""
  options = dict(part.partition("=")[::2] for part in arg.split(",") if part)
  name, smoke = options.pop("model", "smollm2_135m"), options.pop("smoke", None) is not None
  pod = options.pop("pod", "v5e_64")
  if options or name not in _MODELS or pod not in _PODS:
    unknown = (
      f"model={name}"
      if name not in _MODELS
      else f"pod={pod}"
      if pod not in _PODS
      else next(iter(options))
    )
    takes = f"model={'|'.join(_MODELS)}, pod={'|'.join(_PODS)} and smoke"
    raise UserError(f"configs/gsm8k.py knows no {unknown!r}; it takes {takes}.")
  c = config_schema.default()
  c.task.name = "gsm8k"
  c.model.path, c.task.prompt = _MODELS[name]
  c.task.train_problems, c.task.test_problems = 7000, 1319
  if name == "smollm2_135m":
    c.sft.optimizer.learning_rate = c.rft.optimizer.learning_rate = 2e-5
    c.dpo.optimizer.learning_rate = 2e-6
  else:
    _paper_scale(c, pod)
  if smoke:
    c.task.train_problems, c.task.test_problems = 12, 6
    c.model.max_length = 640
    c.engine.lanes, c.engine.slots, c.engine.max_new_tokens = 6, 4, 160
    c.sample.num_traces = 4
    c.credit.num_rollouts, c.credit.best_of, c.credit.max_wrong_per_problem = 4, 1, 1
    c.rft.with_teacher = True  # so that there is something to train on when no trace is right
    c.sft.optimizer.learning_rate = c.rft.optimizer.learning_rate = 5e-5
    c.credit.lanes, c.credit.slots = 4, 16
    c.pairs.pair_mode, c.pairs.pit_rule = "algorithm1", "lowest_value"
    for part in (c.sft, c.rft, c.dpo):
      part.row_length, part.batch_size, part.num_epochs, part.save_every_steps = 640, 4, 2, 0
    c.dpo.num_epochs, c.dpo.max_steps = 1, 4
  return c
