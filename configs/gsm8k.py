"""GSM8K with a real pretrained model.

    python launch/pipeline.py --config=configs/gsm8k.py:model=smollm2_135m,smoke --workdir=DIR

needs SYNTHNEG_DATA_DIR (a folder with gsm8k/train.jsonl and gsm8k/test.jsonl, as OpenAI's repository grade-school-math has
them) and, for smollm2_135m, `bash launch/get_smollm2.sh`.

smoke: a handful of problems through every stage, to see that all of it works; its errors mean nothing.
deepseek_math_7b, llama2_7b: the paper's models at the paper's sizes, from a Hugging Face folder named by
--config.model.path. The paper's rates, batch sizes and epochs are not known from public sources; what stands here are
published recipes of its neighbours (RFT, https://arxiv.org/abs/2308.01825; DPO, https://arxiv.org/abs/2305.18290) and
our choices. Not yet run.
"""

import os

from synthneg_jax.runtime import config as config_lib
from synthneg_jax.runtime.errors import UserError

_CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.join("~", ".cache")), "synthneg_jax")
# name -> (folder, prompt style)
_MODELS = {
  "smollm2_135m": (os.path.join(_CACHE, "smollm2_135m"), "chat"),
  "deepseek_math_7b": ("deepseek_math_7b", "plain"),
  "llama2_7b": ("llama2_7b", "plain"),
}


def get_config(arg: str = "model=smollm2_135m"):
  """`gsm8k.py:model=NAME[,smoke]`."""
  options = dict(part.partition("=")[::2] for part in arg.split(",") if part)
  name, smoke = options.pop("model", "smollm2_135m"), options.pop("smoke", None) is not None
  if options or name not in _MODELS:
    unknown = f"model={name}" if name not in _MODELS else next(iter(options))
    raise UserError(f"configs/gsm8k.py knows no {unknown!r}; it takes model={'|'.join(_MODELS)} and smoke.")
  c = config_lib.default()
  c.task.name = "gsm8k"
  c.model.path, c.task.prompt = _MODELS[name]
  c.task.train_problems, c.task.test_problems = 7000, 1319
  if name == "smollm2_135m":
    c.sft.optimizer.learning_rate = c.rft.optimizer.learning_rate = 2e-5
    c.dpo.optimizer.learning_rate = 2e-6
  else:  # parameters and rows split over all devices of one host; several hosts are not supported yet
    c.model.dtype, c.model.scan_layers, c.model.remat = "bfloat16", True, "selective"
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.sample.num_traces = 100
    c.rft.max_per_problem = 4
    c.engine.lanes, c.engine.slots = 256, 10
    c.credit.lanes, c.credit.slots = 128, 16
    # Rows that whole trees of mean length fill, on 64 parts (python launch/preflight.py says how full they are).
    c.model.max_length = c.rft.row_length = 2048
    c.sft.row_length, c.sft.batch_size = 1024, 206
    c.dpo.row_length, c.dpo.batch_size = 1536, 512
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
