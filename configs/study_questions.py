"""Questions that the paper leaves open, on the embedded task: equation 4 as a method, and five
more.

    synthneg study --config=study_questions:equation4 --workdir=DIR
    synthneg study --config=study_questions:1 --workdir=DIR

Arguments: `equation4`; `1`, prefix protection; `2`, how negatives are built; `3`, pairs from right
and from wrong traces in a fixed budget of pairs; `4`, rounds; `5`, a fixed budget of rollouts;
`tune`, what was tried on validation problems; `smoke`, a cell of each kind at toy size. All but
`tune` and `smoke` may share DIR: then π_sft, traces and estimates of a size and seed are made once,
and DIR/report holds the last one's figures. Copy docs/results/study_questions/ARGUMENT/cells to
DIR/cells and only what is missing there is made.

Protocol. Task, base and recipe are those of configs/study_arithmetic.py, whose seeds, problems and
4000 test problems these are. `tune` is seed 0 with 2000 validation problems (from number 100,000
on), 500 training problems: three tries for each of RFT, equation 4, algorithm 1 and the protected
form; per-step DPO had four before (configs/arithmetic.py) and keeps its choice. Validation error:

    SFT                                  .450
    per-step DPO                         .350
    RFT, step size 5e-4                  .4245     from the base; 1e-3 .4095
      from π_sft, 5e-4                   .394      chosen
    equation 4, β .1, step size 2e-4     .3885     chosen
      β .3, 2e-4 and 5e-4                .405, .400
    algorithm 1, step size 3e-5          .451      chosen; 1e-4 .468, 2e-4 .4915
    protected form, 1e-4                 .426      chosen; 3e-5 .4325, 2e-4 .428
"""

import importlib.util
import pathlib

from synthneg_jax.runtime.errors import UserError

_SIZES = (250, 500, 1000, 2000)
_BUDGET = 8000  # rollouts; two after each step of the traces of 500 problems
_PAIRS = 260  # as many as every seed has of right traces
_QUESTIONS = {
  "equation4": (
    (_SIZES, ("sft", "rft", "step_dpo", "advantage_weighted"), {}),
    ((500,), ("advantage_filtered",), {}),
  ),
  "1": (((500,), ("sft", "algorithm1", "prefix_protected", "step_dpo"), {}),),
  "2": (
    ((500,), ("step_dpo",), {}),
    *(
      ((500,), ("step_dpo",), {"pairs.pit_rule": rule})
      for rule in ("least_advantage", "relative_drop")
    ),
    ((500,), ("step_dpo",), {"pairs.continuation": "rollout"}),
    *(
      ((500,), ("step_dpo",), {"pairs.max_per_problem": 1, "pairs.order": order})
      for order in ("sampled", "likeliest", "largest_drop")
    ),
    *(((500,), ("step_dpo",), {"credit.num_rollouts": rollouts}) for rollouts in (2, 32)),
  ),
  "3": (
    *(
      ((500,), ("step_dpo_both",), {"pairs.max_pairs": _PAIRS, "pairs.right_fraction": fraction})
      for fraction in (0.0, 0.25, 0.5, 0.75, 1.0)
    ),
    *(
      ((500,), ("step_dpo",), {"pairs.max_pairs": _PAIRS, "dpo.nll_weight": weight})
      for weight in (0.0, 1.0, 4.0)
    ),
  ),
  "4": (
    (
      (500,),
      (
        "sft",
        "step_dpo",
        "step_dpo_twice",
        "step_dpo_3_rounds",
        "step_dpo_4_rounds",
        "step_dpo_5_rounds",
      ),
      {},
    ),
    (
      (500,),
      ("step_dpo",),
      {
        "sample.num_traces": 32,
        "credit.max_wrong_per_problem": 12,
        "pairs.max_per_problem": 12,
        "dpo.max_steps": 0,
      },
    ),
  ),
  "5": (
    *(
      ((500,), ("step_dpo",), {"credit.max_rollouts": _BUDGET, "credit.num_rollouts": rollouts})
      for rollouts in (2, 6, 16)
    ),
    (
      (500,),
      ("step_dpo",),
      {"credit.max_rollouts": _BUDGET, "credit.schedule": "until_first_zero"},
    ),
    (
      (500,),
      ("step_dpo",),
      {
        "credit.max_rollouts": _BUDGET,
        "credit.schedule": "adaptive",
        "pairs.pit_rule": "first_dead",
      },
    ),
  ),
}
_RATE = "dpo.optimizer.learning_rate"
_TRIES = (
  ((500,), ("sft", "step_dpo"), {}),
  ((500,), ("rft",), {"rft.optimizer.learning_rate": 5e-4}),
  ((500,), ("rft",), {"rft.optimizer.learning_rate": 1e-3}),
  ((500,), ("rft",), {"rft.start": "sft", "rft.optimizer.learning_rate": 5e-4}),
  *(
    (
      (500,),
      ("advantage_weighted",),
      {"rft.advantage_beta": beta, "rft.optimizer.learning_rate": rate},
    )
    for beta, rate in ((0.1, 2e-4), (0.3, 2e-4), (0.3, 5e-4))
  ),
  *(((500,), ("algorithm1", "prefix_protected"), {_RATE: rate}) for rate in (3e-5, 1e-4, 2e-4)),
)
_CHOSEN = (
  (("rft",), {"rft.start": "sft"}),
  (
    ("advantage_weighted", "advantage_filtered"),
    {"rft.advantage_beta": 0.1, "rft.optimizer.learning_rate": 2e-4},
  ),
  (("algorithm1",), {_RATE: 3e-5}),
  (("prefix_protected",), {_RATE: 1e-4}),
)
_RIGHT_TOO = ("advantage_weighted", "advantage_filtered", "step_dpo_both")


def _recipe():
  path = pathlib.Path(__file__).parent / "study_arithmetic.py"
  spec = importlib.util.spec_from_file_location("study_arithmetic_recipe", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def get_config(arg: str = ""):
  """`equation4`, which is the default, `1` to `5`, `tune` or `smoke`; see above."""
  config = _recipe().get_config("toy" if arg == "smoke" else "")
  c = config
  c.study.figures = ("settings",)
  c.study.settings = (
    ((250,), {"sft.num_epochs": 10, "rft.num_epochs": 10}),
    (_RIGHT_TOO, {"credit.max_right_per_problem": 2}),
  )
  arg = arg or "equation4"
  if arg in _QUESTIONS:
    c.study.grid = _QUESTIONS[arg]
    c.study.settings += _CHOSEN
    if arg == "equation4":
      c.study.figures = ("settings", "equation_4", "critical", "shifts")
  elif arg == "tune":
    c.study.seeds, c.study.grid = (0,), _TRIES
    c.task.test_start, c.task.test_problems = 100_000, 2000
  elif arg == "smoke":
    c.study.seeds = (1,)
    c.study.grid = (
      ((32,), ("sft", "rft", "step_dpo", "advantage_weighted"), {}),
      ((32,), ("step_dpo_3_rounds",), {}),
      (
        (32,),
        ("prefix_protected",),
        {
          "sample.num_traces": 4,
          "credit.max_rollouts": 12,
          "credit.schedule": "until_first_zero",
          "pairs.order": "largest_drop",
          "pairs.max_pairs": 4,
        },
      ),
    )
    c.study.settings = (
      (_RIGHT_TOO, {"credit.max_right_per_problem": 2}),
      # Of so few samples hardly a right one shares a prefix with a wrong one.
      (("step_dpo", "step_dpo_twice", "step_dpo_3_rounds"), {"pairs.pair_mode": "algorithm1"}),
    )
    c.study.figures = ("settings", "equation_4", "critical", "shifts")
  else:
    raise UserError(
      f"configs/study_questions.py knows no {arg!r}; it knows {', '.join(_QUESTIONS)}, tune and "
      "smoke."
    )
  return config
