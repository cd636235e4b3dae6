"""The study of the embedded task with a plain teacher: SFT, RFT and per-step DPO against |D_syn|.

    python launch/study.py --config=configs/study_arithmetic.py --workdir=DIR
    python launch/figure.py --figure=2a,5a --config=configs/study_arithmetic.py --workdir=DIR

Hardware and wall time: two CPU cores shared with other work; a cell took 25 to 300 seconds, SFT
from 16,000 problems 9 minutes. Copy docs/results/study_arithmetic/cells to DIR/cells and only what
is missing there is made.

Protocol, fixed before any cell was made. Task, base and recipe are those of configs/arithmetic.py,
whose docstring says how they were chosen, with seed 0; the study's seeds are 1 to 4. Figures are
told on 4000 test problems (from number 10,000 on) that nothing was chosen on. Each size and seed
has its own problems (more of them hold the fewer), π_sft, traces, credit and pairs.

What every method may tune, it tuned on validation problems with seed 0. SFT by passes over the
data, since its curve is what efficiency is told against; test errors on 2000 problems from number
100,000 on:

    problems   5 passes   10     20     40     5, at 1e-3   10, at 1e-3
    250        -          .482   .511   .559   -            -
    500        .450       .457   .496   -      -            -
    1000       -          .415   .462   -      -            -
    2000       .369       -      -      -      .383         -
    4000       .352       .374   -      -      .362         .378
    8000       .341       .330   -      -      .324         .311
    16000      -          -      -      -      .255         -

250 takes 10 passes, which are as many updates as 5 of 500; others take 5, and 8000 takes 10. The
step size is 5e-4 (chosen at 500 problems, see there), from 8000 on 1e-3. The last two columns, and
rows from 2000 on, were tried after per-step DPO's first results, which had made SFT's curve look
flat; they can only favour SFT. Per-step DPO has the settings of configs/arithmetic.py, arbitrary
and furthest pairs their own best step size, 3e-5.

Result so far: docs/results.md.
"""

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
  """`study_arithmetic.py` is the study; `:reduced` a part of it; `:right` what needs credit of
  right traces, too; `:leap` has a teacher that leaps; `:toy` is a few cells at toy size.
  """
  config = _recipe().get_config("smoke" if arg == "toy" else "")
  c = config
  c.study.family = "clock arithmetic, plain teacher"
  c.study.seeds = (1, 2, 3, 4)
  c.study.reference_size = 500
  c.study.figures = tuple("1 2a 2c 3 5a 5c 7 7_critical 9 controls rounds samples compute".split())
  c.study.grid = (
    ((250, 500, 1000, 2000), ("sft", "rft", "step_dpo"), {}),
    ((4000, 8000, 16000), ("sft",), {}),
    ((250, 500, 1000), ("rft",), {"rft.max_per_problem": 1}),
    ((500,), ("rft",), {"rft.max_per_problem": 2}),
    ((500,), ("arbitrary", "furthest", "dpop", "algorithm1", "random_step"), {}),
    ((500,), ("sft",), {"sft.num_epochs": 16}),
    ((500,), ("step_dpo_twice",), {}),
    ((500,), ("arbitrary", "furthest", "dpop", "step_dpo"), {"dpo.beta": 0.1}),
    ((500,), ("arbitrary", "furthest", "dpop", "step_dpo"), {"dpo.beta": 1}),
  )
  c.study.settings = (
    ((250,), {"sft.num_epochs": 10, "rft.num_epochs": 10}),
    ((8000,), {"sft.optimizer.learning_rate": 1e-3, "sft.num_epochs": 10}),
    ((16000,), {"sft.optimizer.learning_rate": 1e-3}),
    (("arbitrary", "furthest", "dpop"), {"dpo.optimizer.learning_rate": 3e-5}),
  )
  c.task.test_start, c.task.test_problems = 10_000, 4000
  if arg == "reduced":
    c.study.seeds = (1, 2)
    c.study.grid = (
      ((500,), ("sft", "rft", "step_dpo"), {}),
      ((250, 1000, 2000, 4000, 8000), ("sft",), {}),
    )
    c.study.figures = ("1", "2a", "5a")
  if arg == "right":
    c.credit.max_right_per_problem = 2
    c.study.grid = (
      ((250, 500), ("sft", "rft", "rft_advantage", "step_dpo", "step_dpo_both"), {}),
      ((500,), ("rft_clean", "rft_spurious"), {}),
    )
    # 227 is the least that any seed has of spurious ones; of so few, as many passes as of 250
    # problems.
    c.study.settings += (
      (("rft_clean", "rft_spurious"), {"rft.max_solutions": 227, "rft.num_epochs": 10}),
    )
    c.study.figures = ("4", "10", "11")
  if arg == "leap":
    c.study.family = "clock arithmetic, leaping teacher"
    c.task.arithmetic.skip_step_prob = 0.3
    c.study.grid = (
      ((250, 500, 1000, 2000), ("sft",), {}),
      ((500,), ("rft", "step_dpo", "arbitrary"), {}),
      ((1000,), ("rft", "step_dpo"), {}),
    )
    c.study.figures = ("2a", "5a")
  if arg == "toy":
    c.study.seeds, c.study.reference_size = (1, 2), 32
    c.study.grid = (
      ((32,), ("sft", "rft", "step_dpo", "arbitrary"), {}),
      # Of so few samples no right one shares a prefix with a wrong one, hence algorithm1.
      ((32,), ("step_dpo_twice",), {"pairs.pair_mode": "algorithm1"}),
      ((48,), ("sft",), {}),
    )
    c.study.settings = (((48,), {"sft.num_epochs": 2}),)
    c.study.figures = ("2a", "5a")
    c.task.test_problems = 32
    # Small equal batches: methods share more compiled programs.
    c.sft.batch_size = c.rft.batch_size = c.dpo.batch_size = c.credit.lanes = 8
  elif arg not in ("", "reduced", "right", "leap"):
    raise UserError(
      f"configs/study_arithmetic.py knows no {arg!r}; it knows reduced, right, leap and toy."
    )
  return config
