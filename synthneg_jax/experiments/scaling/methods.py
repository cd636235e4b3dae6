"""What a cell of a study trains: a method by name, with leaves of the config that are its own.

A method is written NAME or NAME,LEAF=VALUE,...: `rft,rft.max_per_problem=1`. Its leaves belong to the stage that makes it, so
that what comes before (π_sft, its traces, their credit) is made once and shared by all methods of a size and seed.
"""

import dataclasses
import difflib

from synthneg_jax.pipeline import credit, dpo, evaluate, import_traces, pairs, rft, sample, sft, synthesize
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError

_SFT = ("synthesize", "sft")
_SAMPLE = (*_SFT, "sample")
_CREDIT = (*_SAMPLE, "credit")
_RUN = {"synthesize": synthesize.run, "sft": sft.run, "sample": sample.run, "credit": credit.run}


@dataclasses.dataclass(frozen=True)
class Kind:
  """A method without its own leaves.

  Attributes:
    label: for figures.
    before: stages that it shares with others.
    sections: of the config, whose leaves it may set.
    settings: leaves that make it what it is.
    first: a method whose policy takes the place of π_sft before its stages, which have a folder of their own: a second
      round on that policy's own traces.
  """

  label: str
  before: tuple[str, ...]
  sections: tuple[str, ...]
  settings: dict[str, object] = dataclasses.field(default_factory=dict)
  first: str = ""


def _dpo(label: str, mode: str, **dpo) -> Kind:
  return Kind(label, _CREDIT, ("dpo", "pairs"), {"pairs.pair_mode": mode, **{f"dpo.{k}": v for k, v in dpo.items()}})


def _rft(label: str, **settings) -> Kind:
  needs_credit = "keep" in settings
  return Kind(label, _CREDIT if needs_credit else _SAMPLE, ("rft",), {f"rft.{k}": v for k, v in settings.items()})


KINDS = {
  "base": Kind("base model", ("synthesize",), ()),
  "sft": Kind("SFT", _SFT[:1], ("sft",)),
  "rft": _rft("RFT"),
  "rft_spurious": _rft("RFT, with spurious steps", keep="spurious"),
  "rft_clean": _rft("RFT, without spurious steps", keep="clean"),
  "rft_advantage": _rft("advantage-filtered RFT", keep="advantage"),
  "step_dpo": _dpo("per-step DPO", "shared_prefix"),
  "step_dpo_both": _dpo("per-step DPO, right traces too", "positives_too"),
  "algorithm1": _dpo("per-step DPO, algorithm 1", "algorithm1"),
  "step_dpo_twice": dataclasses.replace(_dpo("per-step DPO, two rounds", "shared_prefix"), first="step_dpo"),
  "random_step": _dpo("DPO at a random step", "random_step"),
  "arbitrary": _dpo("DPO, arbitrary pairs", "arbitrary"),
  "furthest": _dpo("DPO, furthest pairs", "furthest"),
  "dpop": _dpo("DPOP, furthest pairs", "furthest", loss="dpop"),
}


@dataclasses.dataclass(frozen=True)
class Method:
  """A kind with leaves of its own.

  Attributes:
    name: as it was written.
    kind: its kind's name.
    settings: leaves that the name sets.
    given: leaves that study.settings sets for all of its kind.
  """

  name: str
  kind: str
  settings: dict[str, object]
  given: dict[str, object] = dataclasses.field(default_factory=dict)

  @property
  def label(self) -> str:
    """For figures and tables."""
    own = ", ".join(f"{leaf.rpartition('.')[2]} {value}" for leaf, value in self.settings.items())
    return KINDS[self.kind].label + (f", {own}" if own else "")

  @property
  def folder(self) -> str:
    """Stage folder of its policy; empty for the base model."""
    name = self.name.replace(",", "-")
    made = "" if self.kind == "base" else f"dpo/{name}" if "dpo" in KINDS[self.kind].sections else name
    return f"{self.second}/{made}" if self.second else made

  @property
  def pairs_folder(self) -> str:
    """Stage folder of the pairs that it trains on; empty for methods without any."""
    return self.folder.replace("dpo/", "pairs/") if "dpo" in KINDS[self.kind].sections else ""

  @property
  def second(self) -> str:
    """Folder of its stages in a second round, in the run folder; empty for methods of one."""
    first = KINDS[self.kind].first
    return f"after_{first}" if first else ""

  @property
  def path(self) -> tuple[str, ...]:
    """All stages that it rests on, its own last."""
    kind, again = KINDS[self.kind], ()
    if kind.first:
      again = (
        f"pairs/{kind.first}",
        f"dpo/{kind.first}",
        *(f"{self.second}/{stage}" for stage in kind.before if stage not in _SFT),
      )
    own = [self.pairs_folder, self.folder] if "dpo" in kind.sections else [self.folder]
    return (*kind.before, *again, *filter(None, own))


def parse(text: str, config) -> Method:
  """A method from its name.

  Raises:
    UserError: an unknown kind or leaf, a leaf of another stage, or a value that is none.
  """
  kind, *settings = text.split(",")
  if kind not in KINDS:
    near = difflib.get_close_matches(kind, KINDS, n=2)
    raise UserError(f"study.grid names the method {kind!r}; known are {', '.join(near or KINDS)}.")
  own, given = {}, {}
  for setting in settings:
    own |= _own_setting(kind, setting, config, f"study.grid: {text!r}")
  for line in config.study.settings:
    kinds, all_settings = split_line("settings", line, "LEAF=VALUE LEAF=VALUE ...")
    for setting in all_settings if kind in kinds else ():
      given |= _own_setting(kind, setting, config, f"study.settings: {line!r}")
  return Method(text, kind, own, given)


def split_line(leaf: str, line: str, form: str) -> tuple[list[str], list[str]]:
  """The words before and after the colon of a line of study.<leaf>.

  Raises:
    UserError: there are none; says what `form` the rest has.
  """
  first, _, rest = line.partition(":")
  if not rest.split() or not first.split():
    raise UserError(f'study.{leaf}: {line!r} is not of the form "SIZE SIZE ...: {form}", sizes in problems.')
  return first.split(), rest.split()


def _own_setting(kind: str, setting: str, config, where: str) -> dict[str, object]:
  if setting.split(".")[0] not in KINDS[kind].sections:
    sections = " and ".join(f"{name}.*" for name in KINDS[kind].sections) or "no leaves"
    raise UserError(f"{where} sets {setting!r}; {kind} may set LEAF=VALUE of {sections}.")
  return read_setting(setting, config, where)


def read_setting(text: str, config, where: str) -> dict[str, object]:
  """LEAF=VALUE as {leaf: value}, of the leaf's type.

  Raises:
    UserError: says `where`: an unknown leaf, or a value that is none of its type.
  """
  values = dict(config_schema.leaves(config))
  leaf, equals, value = text.partition("=")
  if not equals:
    raise UserError(f"{where}: {text!r} is not of the form LEAF=VALUE.")
  config_schema.check_name(leaf, where)
  kind = type(values[leaf])
  try:
    return {leaf: {"True": True, "False": False}[value] if kind is bool else kind(value)}
  except (KeyError, ValueError):
    raise UserError(f"{where}: {value!r} is no {kind.__name__}, which {leaf} is.") from None


def with_leaves(config, leaves: dict[str, object]):
  """The config with these leaves, locked."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    for leaf, value in leaves.items():
      *parts, last = leaf.split(".")
      section = config
      for part in parts:
        section = section[part]
      section[last] = value
  config.lock()
  return config


def configure(config, method: Method):
  """The config with the method's leaves.

  Raises:
    UserError: they do not go together.
  """
  config = with_leaves(config, {**KINDS[method.kind].settings, **method.given, **method.settings})
  config_schema.check_values(config)
  return config


def make(experiment: Experiment, method: Method) -> None:
  """Runs whatever of the method's stages is not done, and its test on the test problems.

  Args:
    experiment: of the workdir that the methods of a size and seed share, with the config of all.
    method: what to make.
  """
  kind = KINDS[method.kind]
  if kind.first:
    first = parse(kind.first, experiment.config)
    _train(experiment, first)
    again = dataclasses.replace(experiment, workdir=experiment.workdir / method.second)
    synthesize.run(again)
    import_traces.adopt_sft(again, experiment.workdir / first.folder / "policy")
    _train(again, method)
  else:
    _train(experiment, method)
  evaluate.test(experiment, method.name.replace(",", "-"), method.folder or None)


def _train(experiment: Experiment, method: Method) -> None:
  """The method's stages in one folder, each where it is not done."""
  own, name = (
    dataclasses.replace(experiment, config=configure(experiment.config, method)),
    method.name.replace(",", "-"),
  )
  for stage in KINDS[method.kind].before:
    _RUN[stage](experiment)
  if "dpo" in KINDS[method.kind].sections:
    pairs.variant(own, name)
    dpo.variant(own, name)
  elif method.kind == "sft":
    sft.run(own, name)
  elif method.kind != "base":
    rft.run(own, name)
