"""What a cell of a study trains: a kind of method, and overrides of config leaves that tell it from
others of its kind.

A method may override leaves of the stage that makes it and no others, so that what comes before
(π_sft, its traces, their credit) is made once and shared by all methods of a size and seed. Its
name joins both: `rft,rft.max_per_problem=1`.

`study.settings` overrides leaves for all cells of some sizes or kinds, as rows (sizes or kinds,
overrides):

    ((250,), {"sft.num_epochs": 10, "rft.num_epochs": 10})
    (("arbitrary", "furthest"), {"dpo.optimizer.learning_rate": 3e-5})
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import NamedTuple

from synthneg_jax.pipeline import (
  credit,
  dpo,
  evaluate,
  import_traces,
  pairs,
  rft,
  sample,
  sft,
  synthesize,
)
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError

_SFT = ("synthesize", "sft")
_SAMPLE = (*_SFT, "sample")
_CREDIT = (*_SAMPLE, "credit")
_RUN = {"synthesize": synthesize.run, "sft": sft.run, "sample": sample.run, "credit": credit.run}


@dataclasses.dataclass(frozen=True)
class Kind:
  """A method without overrides.

  Attributes:
    label: for figures.
    before: stages that it shares with others.
    sections: the config sections whose leaves it may override.
    settings: leaves that make it what it is.
    first: a method whose policy takes the place of π_sft before its stages, which have a folder of
      their own: a second round on that policy's own traces.
  """

  label: str
  before: tuple[str, ...]
  sections: tuple[str, ...]
  settings: dict[str, object] = dataclasses.field(default_factory=dict)
  first: str = ""


def _dpo(label: str, mode: str, **dpo) -> Kind:
  return Kind(
    label,
    _CREDIT,
    ("dpo", "pairs"),
    {"pairs.pair_mode": mode, **{f"dpo.{k}": v for k, v in dpo.items()}},
  )


def _rft(label: str, **settings) -> Kind:
  needs_credit = "keep" in settings
  return Kind(
    label,
    _CREDIT if needs_credit else _SAMPLE,
    ("rft",),
    {f"rft.{k}": v for k, v in settings.items()},
  )


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
  "step_dpo_twice": dataclasses.replace(
    _dpo("per-step DPO, two rounds", "shared_prefix"), first="step_dpo"
  ),
  "random_step": _dpo("DPO at a random step", "random_step"),
  "arbitrary": _dpo("DPO, arbitrary pairs", "arbitrary"),
  "furthest": _dpo("DPO, furthest pairs", "furthest"),
  "dpop": _dpo("DPOP, furthest pairs", "furthest", loss="dpop"),
}


class SettingsRow(NamedTuple):
  """A checked row of study.settings: overrides for all cells of some sizes (in problems) or kinds
  of methods.
  """

  sizes_or_kinds: tuple[int | str, ...]
  overrides: dict[str, object]


@dataclasses.dataclass(frozen=True)
class Method:
  """A kind with overrides of its own.

  Attributes:
    name: from `name_of`.
    kind: its kind's name.
    settings: its own overrides.
    given: overrides that study.settings has for all methods of its kind.
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
    made = (
      "" if self.kind == "base" else f"dpo/{name}" if "dpo" in KINDS[self.kind].sections else name
    )
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


def name_of(kind: str, overrides: Mapping[str, object]) -> str:
  """A method's name: its kind and its own overrides, as in `rft,rft.max_per_problem=1`."""
  return ",".join([kind, *(f"{leaf}={value}" for leaf, value in overrides.items())])


def resolve(
  config, kind: str, overrides: Mapping[str, object] | None = None, *, where: str = ""
) -> Method:
  """The method of a kind and its overrides, with what study.settings gives to all of that kind.

  Args:
    config: the study's.
    kind: one of `KINDS`.
    overrides: leaves of its own stage with their values.
    where: what error messages begin with, such as the row that asks for it.

  Raises:
    UserError: an unknown kind or leaf, a leaf of another stage, or a value of another type.
  """
  if kind not in KINDS:
    near = difflib.get_close_matches(str(kind), KINDS, n=2)
    raise UserError(f"{where} names the method {kind!r}; known are {', '.join(near or KINDS)}.")
  given = {}
  for number, row in enumerate(settings_rows(config), start=1):
    if kind in row.sizes_or_kinds:
      _check_own(kind, row.overrides, f"study.settings: row {number}")
      given |= row.overrides
  overrides = {} if overrides is None else overrides
  own = typed_overrides(config, overrides, where)
  _check_own(kind, own, where)
  return Method(name_of(kind, overrides), kind, own, given)


def _check_own(kind: str, overrides: Mapping[str, object], where: str) -> None:
  for leaf in overrides:
    if leaf.split(".")[0] not in KINDS[kind].sections:
      sections = " and ".join(f"{name}.*" for name in KINDS[kind].sections) or "no leaves"
      raise UserError(f"{where} overrides {leaf!r}; {kind} may override {sections}.")


def settings_rows(config) -> list[SettingsRow]:
  """The rows of study.settings, values as the leaves' types.

  Raises:
    UserError: a row that is not (sizes or kinds, overrides); names it.
  """
  rows = []
  for number, row in enumerate(config.study.settings, start=1):
    where = f"study.settings: row {number}"
    if not (is_sequence(row) and len(row) == 2 and is_sequence(row[0]) and row[0]):
      raise UserError(
        f"{where}, {row!r}, must be (sizes or methods, overrides), such as ((250, 500), "
        f'{{"sft.num_epochs": 10}}).'
      )
    for entry in row[0]:
      if entry not in KINDS and not is_size(entry):
        raise UserError(
          f"{where} names {entry!r}, which is neither a size in problems nor a method."
        )
    rows.append(SettingsRow(tuple(row[0]), typed_overrides(config, row[1], where)))
  return rows


def is_sequence(value: object) -> bool:
  """Whether a value is a tuple or list; ("sft") without a comma is a string."""
  return isinstance(value, tuple | list)


def is_size(value: object) -> bool:
  """Whether a value is a number of problems."""
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


def typed_overrides(config, overrides: object, where: str) -> dict[str, object]:
  """Overrides with each value as its leaf's type, so that 1 and 1.0 of a float leaf are the same.

  Raises:
    UserError: begins with `where`: not a dict, an unknown leaf, or a value of another type.
  """
  if not isinstance(overrides, Mapping):
    raise UserError(
      f'{where}: overrides must be a dict such as {{"dpo.beta": 0.1}}, not {overrides!r}.'
    )
  defaults, typed = dict(config_schema.leaves(config)), {}
  for leaf, value in overrides.items():
    config_schema.check_name(leaf, where)
    wanted = type(defaults[leaf])
    if wanted is float and type(value) is int or wanted is tuple and type(value) is list:
      value = wanted(value)
    if type(value) is not wanted:
      raise UserError(
        f"{where}: {leaf} takes values of type {wanted.__name__}, and {value!r} is not one."
      )
    typed[leaf] = value
  return typed


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
    first = resolve(experiment.config, kind.first)
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
  own = dataclasses.replace(experiment, config=configure(experiment.config, method))
  name = method.name.replace(",", "-")
  for stage in KINDS[method.kind].before:
    _RUN[stage](experiment)
  if "dpo" in KINDS[method.kind].sections:
    pairs.variant(own, name)
    dpo.variant(own, name)
  elif method.kind == "sft":
    sft.run(own, name)
  elif method.kind != "base":
    rft.run(own, name)
