"""The study in English: SmolLM2-135M-Instruct on story problems, SFT, RFT and preference losses.

    bash launch/get_smollm2.sh
    python launch/study.py --config=configs/study_stories.py --workdir=DIR
    python launch/figure.py --figure=2a,5a,true_pits --config=configs/study_stories.py --workdir=DIR

Every stage of a cell resumes where its workdir is still there. Copy docs/results/stories/cells to
DIR/cells and only what is missing there is made. configs/stories.py tells how task and SFT recipe
were chosen, from SFT on validation problems alone.

Test problems are those from number 10,000 on, which nothing is chosen on. All methods of a size and
seed share π_sft, its traces and their estimates. Not yet run; the preference losses' settings are
not yet chosen on validation problems.
"""

import importlib.util
import pathlib

from synthneg_jax.runtime.errors import UserError


def _recipe():
  path = pathlib.Path(__file__).parent / "stories.py"
  spec = importlib.util.spec_from_file_location("stories_recipe", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def get_config(arg: str = ""):
  """`study_stories.py` is the study; `:smoke` a few cells at toy size."""
  config = _recipe().get_config(arg if arg == "smoke" else "")
  c = config
  c.study.family = "stories, SmolLM2-135M"
  c.study.seeds, c.study.reference_size = (0, 1), 500
  c.study.figures = ("2a", "5a", "true_pits")
  c.study.grid = (
    ((500,), ("sft", "rft", "step_dpo", "arbitrary", "algorithm1"), {}),
    ((1000, 2000), ("sft",), {}),
  )
  c.task.test_start, c.task.test_problems = 10_000, 600
  if arg == "smoke":
    c.study.seeds, c.study.reference_size = (0, 1), 32
    c.study.grid = (
      ((32,), ("sft", "rft", "step_dpo", "arbitrary", "algorithm1"), {}),
      ((48,), ("sft",), {}),
    )
    c.task.test_problems = 24
  elif arg:
    raise UserError(f"configs/study_stories.py knows no {arg!r}; it knows smoke.")
  return config
