"""study"""

import importlib.util
import pathlib

from synthneg_jax.runtime.errors import UserError


def _recipe():
  path = pathlib.Path(__file__).parent / "arithmetic.py"
  spec = importlib.util.spec_from_file_location("arithmetic_recipe", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def get_config(arg: str = ""):
  """`study_arithmetic.py` is the whole study; `study_arithmetic.py:toy` makes a few cells at toy size."""
  config = _recipe().get_config("smoke" if arg == "toy" else "")
  c = config
  c.study.family = "clock arithmetic, plain teacher"
  c.study.seeds = (1, 2, 3, 4)
  c.study.factor_at = 500
  c.study.grid = (
    "250 500 1000 2000: sft rft step_dpo",
    "4000 8000 16000: sft",
    "500: rft,rft.max_per_problem=1",
  )
  c.study.settings = (
    "250: sft.num_epochs=10 rft.num_epochs=10",
    "arbitrary furthest dpop: dpo.optimizer.learning_rate=3e-5",
  )
  c.task.test_start, c.task.test_problems = 10_000, 4000
  if arg == "toy":
    c.study.seeds, c.study.factor_at = (1, 2), 32
    c.study.grid, c.study.settings = ("32: sft rft step_dpo arbitrary", "48: sft"), ("48: sft.num_epochs=2",)
    c.task.test_problems = 32
  elif arg:
    raise UserError(f"configs/study_arithmetic.py knows no {arg!r}; it knows toy.")
  return config
