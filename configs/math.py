"""Competition MATH with a real pretrained model; models and their sizes are those of
configs/gsm8k.py.

    python launch/pipeline.py --config=configs/math.py:model=smollm2_135m,smoke --workdir=DIR
    python launch/pipeline.py --config=configs/math.py:model=deepseek_math_7b \
        --config.task.path=MATH --workdir=DIR

MATH (https://arxiv.org/abs/2103.03874) is not shipped. MATH names its folder: the original tree
(MATH/train/algebra/1.json and so on), or train.jsonl and test.jsonl with problem, level, type and
solution; without --config.task.path it is looked for in SYNTHNEG_DATA_DIR/math.
--config.task.test_path=FILE takes MATH-500 as the test set.

smoke: the problems of MATH's form that come with the package, through every stage, to see that all
of it works; its errors mean nothing. Seen: 7 minutes on one of two CPU cores; 24 samples (13 wrong,
6 truncated, 4 ambiguous, 1 unparsable), 7 with credit, 15 rollouts, 7 pairs of each kind, test
errors 1.0 on 4 problems. The other models: not yet run. Responses are given twice the tokens of
GSM8K's, our choice, and rows are cut for responses of 250 tokens in 8 steps, our assumption;
docs/scaling.md has what the compiler says of them.
"""

import importlib.util
import pathlib

import synthneg_jax.tasks
from synthneg_jax.runtime.errors import UserError


def _gsm8k():
  """The neighbouring config file; by its path, since configs/ is no package."""
  spec = importlib.util.spec_from_file_location(
    "gsm8k_config", pathlib.Path(__file__).with_name("gsm8k.py")
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _longer_rows(c) -> None:
  """Rows that whole trees fill where responses have 250 tokens, not 200; of SFT half as many, twice
  as long.

  A row then holds 5.5 solutions of SFT, 8 of RFT, 8 pairs of DPO.
  """
  c.sft.row_length, c.sft.batch_size = 2 * c.sft.row_length, int(c.sft.batch_size * 5.5 / 6.4)
  c.rft.row_length, c.dpo.row_length = 2304, 1792


def get_config(arg: str = "model=smollm2_135m"):
  """`math.py:model=NAME[,smoke]`, and what else configs/gsm8k.py takes; `math.py:smoke` is
  smollm2_135m's.
  """
  try:
    c = _gsm8k().get_config(arg)
  except UserError as error:
    raise UserError(str(error).replace("gsm8k.py", "math.py")) from None
  c.task.name, c.task.answers, c.task.steps = "math", "math", "prose"
  c.synthesis.prompts = "configs/prompts/math"
  if c.task.prompt == "chat":
    c.task.instruction = "Reason step by step, and put the final answer in \\boxed{}."
  if "smoke" in arg.split(","):
    c.task.path = str(pathlib.Path(synthneg_jax.tasks.__file__).with_name("math_rows"))
    c.task.train_problems, c.task.test_problems = 8, 4
    c.engine.max_new_tokens = 128
    c.sample.num_traces, c.credit.num_rollouts = 3, 3
    for part in (c.sft, c.rft):
      part.num_epochs = 1
    return c
  c.task.test_problems = 500
  c.engine.max_new_tokens *= 2
  c.model.max_length = max(c.model.max_length, 2048)
  if c.mesh.tensor > 1:  # a paper's model on a pod
    _longer_rows(c)
  return c
