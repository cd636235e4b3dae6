"""The study of irrevocable choices: jobs with deadlines, where every step's true value is known.

    python launch/study.py --config=configs/study_jobs.py --workdir=DIR
    python launch/figure.py --figure=5a,true_pits --config=configs/study_jobs.py --workdir=DIR

Hardware and wall time: two CPU cores shared with other work; a cell took 30 to 150 seconds.
Copy docs/results/study_jobs/cells to DIR/cells and only what is missing there is made.

Protocol, fixed before any cell and any preference loss was made, from base and SFT alone:
configs/jobs.py tells how. The recipe is that of configs/arithmetic.py, no setting of which was
tuned here; SFT has 5 passes everywhere. The study's seeds are 1 to 4, its 4000 test problems those
from number 10,000 on.

Result so far: docs/results.md.
"""

import importlib.util
import pathlib

from synthneg_jax.runtime.errors import UserError


def _recipe():
  path = pathlib.Path(__file__).parent / "jobs.py"
  spec = importlib.util.spec_from_file_location("jobs_recipe", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def get_config(arg: str = ""):
  """`study_jobs.py` is the study; `:toy` a few cells at toy size."""
  config = _recipe().get_config("smoke" if arg == "toy" else "")
  c = config
  c.study.family = "jobs with deadlines"
  c.study.seeds = (1, 2, 3, 4)
  c.study.reference_size = 500
  c.study.figures = ("1", "2a", "5a", "true_pits")
  c.study.grid = (
    ((500,), ("sft", "rft", "step_dpo", "arbitrary", "random_step"), {}),
    ((1000, 2000), ("sft",), {}),
  )
  c.study.settings = ((("arbitrary",), {"dpo.optimizer.learning_rate": 3e-5}),)
  c.task.test_start, c.task.test_problems = 10_000, 4000
  if arg == "toy":
    c.study.seeds, c.study.reference_size = (1, 2), 32
    c.study.grid, c.study.settings = (
      (((32,), ("sft", "rft", "step_dpo"), {}), ((48,), ("sft",), {})),
      (),
    )
    c.study.figures = ("2a",)
    c.task.test_problems = 32
  elif arg:
    raise UserError(f"configs/study_jobs.py knows no {arg!r}; it knows toy.")
  return config
