"""Methods of a study: a kind of method, and overrides of config leaves.

A method may override leaves of its own stages, so that earlier results (π_sft, its traces, their
credit) are made once and shared by all methods of a size and seed. Its name contains both, as in
`rft,rft.max_per_problem=1`. A method that needs credit may also override leaves of the stages
sample and credit. It then runs these stages in its own folder (`with_...`) in the run folder, which
methods with the same overrides share; earlier stages are copied there.

`study.settings` overrides leaves for all cells of some sizes or kinds, as rows (sizes or kinds,
overrides):

    ((250,), {"sft.num_epochs": 10, "rft.num_epochs": 10})
    (("arbitrary", "furthest"), {"dpo.optimizer.learning_rate": 3e-5})
"""

import dataclasses
import difflib
import itertools
from collections.abc import Mapping
from typing import NamedTuple

from etils import epath

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
from synthneg_jax.runtime import config_schema, distributed
from synthneg_jax.runtime.errors import UserError

_SFT = ("synthesize", "sft")
_SAMPLE = (*_SFT, "sample")
_CREDIT = (*_SAMPLE, "credit")
_RUN = {"synthesize": synthesize.run, "sft": sft.run, "sample": sample.run, "credit": credit.run}


@dataclasses.dataclass(frozen=True)
class Kind:
  """A method without overrides.

  Attributes:
    label: in figures.
    before: stages before its own, which other methods may share.
    sections: config sections whose leaves it may override.
    settings: leaves that define it.
    first: a method whose policy replaces π_sft for a further round on that policy's traces; the
      round's stages have their own folder.
  """

  label: str
  before: tuple[str, ...]
  sections: tuple[str, ...]
  settings: dict[str, object] = dataclasses.field(default_factory=dict)
  first: str = ""


_RESAMPLED = ("sample", "credit")  # stages that a method with overrides repeats


def _dpo(label: str, mode: str, **dpo) -> Kind:
  return Kind(
    label,
    _CREDIT,
    ("dpo", "pairs", *_RESAMPLED),
    {"pairs.pair_mode": mode, **{f"dpo.{k}": v for k, v in dpo.items()}},
  )


def _rft(label: str, **settings) -> Kind:
  needs_credit = "keep" in settings
  sections = ("rft", *_RESAMPLED) if needs_credit else ("rft",)
  return Kind(
    label,
    _CREDIT if needs_credit else _SAMPLE,
    sections,
    {f"rft.{k}": v for k, v in settings.items()},
  )


def _round(label: str, first: str) -> Kind:
  """A further round of per-step DPO, on traces of the policy of the method `first`."""
  return dataclasses.replace(_dpo(label, "shared_prefix"), first=first, sections=("dpo", "pairs"))


KINDS = {
  "base": Kind("base model", ("synthesize",), ()),
  "sft": Kind("SFT", _SFT[:1], ("sft",)),
  "rft": _rft("RFT"),
  "rft_spurious": _rft("RFT, with spurious steps", keep="spurious"),
  "rft_clean": _rft("RFT, without spurious steps", keep="clean"),
  "rft_advantage": _rft("advantage-filtered RFT", keep="advantage"),
  "advantage_weighted": _rft(
    "advantage-weighted (eq. 4)",
    keep="advantage",
    drop_fraction=0.0,
    start="sft",
    max_per_problem=100,
    objective="advantage_weighted",
  ),
  "advantage_filtered": _rft(
    "steps of positive advantage",
    keep="advantage",
    drop_fraction=0.0,
    start="sft",
    max_per_problem=100,
    loss_mask="positive",
  ),
  "step_dpo": _dpo("per-step DPO", "shared_prefix"),
  "step_dpo_both": _dpo("per-step DPO, right traces too", "positives_too"),
  "algorithm1": _dpo("per-step DPO, algorithm 1", "algorithm1"),
  "prefix_protected": _dpo("per-step DPO, algorithm 1, prefix protected", "prefix_protected"),
  "step_dpo_twice": _round("per-step DPO, two rounds", "step_dpo"),
  "step_dpo_3_rounds": _round("per-step DPO, three rounds", "step_dpo_twice"),
  "step_dpo_4_rounds": _round("per-step DPO, four rounds", "step_dpo_3_rounds"),
  "step_dpo_5_rounds": _round("per-step DPO, five rounds", "step_dpo_4_rounds"),
  "random_step": _dpo("DPO at a random step", "random_step"),
  "arbitrary": _dpo("DPO, arbitrary pairs", "arbitrary"),
  "furthest": _dpo("DPO, furthest pairs", "furthest"),
  "dpop": _dpo("DPOP, furthest pairs", "furthest", loss="dpop"),
}


class SettingsRow(NamedTuple):
  """A valid row of study.settings: overrides for some sizes (in problems) or kinds of methods."""

  sizes_or_kinds: tuple[int | str, ...]
  overrides: dict[str, object]


@dataclasses.dataclass(frozen=True)
class Method:
  """A kind with overrides.

  Attributes:
    name: from `name_of`.
    kind: name of its kind.
    settings: its own overrides.
    given: overrides from study.settings for its kind.
  """

  name: str
  kind: str
  settings: dict[str, object]
  given: dict[str, object] = dataclasses.field(default_factory=dict)

  @property
  def label(self) -> str:
    """Label in figures and tables."""
    own = ", ".join(f"{leaf.rpartition('.')[2]} {value}" for leaf, value in self.settings.items())
    return KINDS[self.kind].label + (f", {own}" if own else "")

  @property
  def folder(self) -> str:
    """Stage folder of its policy; "" for the base model."""
    if self.kind == "base":
      return ""
    return self._folder("dpo" if "dpo" in KINDS[self.kind].sections else "")

  @property
  def pairs_folder(self) -> str:
    """Stage folder of its training pairs; "" for methods without pairs."""
    return self._folder("pairs") if "dpo" in KINDS[self.kind].sections else ""

  def _folder(self, stage: str) -> str:
    return "/".join(filter(None, (self.second, stage, self.name.replace(",", "-"))))

  @property
  def second(self) -> str:
    """Subfolder of the run folder for stages of a further round, or with its own sampling.

    "" if it shares all stages before its own with other methods.
    """
    if first := KINDS[self.kind].first:
      return f"after_{first}"
    if not self.resampling:
      return ""
    return "with_" + "-".join(f"{leaf}={value}" for leaf, value in sorted(self.resampling.items()))

  @property
  def resampling(self) -> dict[str, object]:
    """Its overrides of leaves of sample and credit."""
    overrides = {**self.given, **self.settings}
    return {leaf: value for leaf, value in overrides.items() if leaf.split(".")[0] in _RESAMPLED}

  @property
  def shared(self) -> tuple[str, ...]:
    """The stages before its own that it shares with other methods."""
    if KINDS[self.kind].first:
      return _SFT
    before = KINDS[self.kind].before
    sections = {leaf.split(".")[0] for leaf in self.resampling}
    return tuple(itertools.takewhile(lambda stage: stage not in sections, before))

  @property
  def path(self) -> tuple[str, ...]:
    """All stages that it depends on, its own last."""
    kind = KINDS[self.kind]
    shared = Method(kind.first, kind.first, {}).path if kind.first else self.shared
    repeated = [
      f"{self.second}/{stage}" if self.second else stage
      for stage in kind.before
      if stage not in self.shared
    ]
    own = [self.pairs_folder, self.folder] if "dpo" in kind.sections else [self.folder]
    return (*shared, *repeated, *filter(None, own))


def name_of(kind: str, overrides: Mapping[str, object]) -> str:
  """A method's name: its kind and overrides, as in `rft,rft.max_per_problem=1`."""
  return ",".join([kind, *(f"{leaf}={value}" for leaf, value in overrides.items())])


def resolve(
  config, kind: str, overrides: Mapping[str, object] | None = None, *, where: str = ""
) -> Method:
  """The method of a kind with these overrides and those of study.settings.

  Args:
    config: of the study.
    kind: one of `KINDS`.
    overrides: values of leaves of its own stages.
    where: beginning of error messages, such as the row of the grid.

  Raises:
    UserError: an unknown kind or leaf, a leaf of another stage, or a value of the wrong type.
  """
  if kind not in KINDS:
    near = difflib.get_close_matches(str(kind), KINDS, n=2)
    raise UserError(
      f"{where} names the method {kind!r}; must be one of {', '.join(near or KINDS)}."
    )
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
  """The rows of study.settings, with values of the leaves' types.

  Raises:
    UserError: a row is not (sizes or kinds, overrides).
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
  """Whether a value is a positive number of problems."""
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


def typed_overrides(config, overrides: object, where: str) -> dict[str, object]:
  """Converts values to their leaves' types, so that 1 and 1.0 are equal for a float leaf.

  Raises:
    UserError: not a dict, an unknown leaf, or a value of the wrong type; begins with `where`.
  """
  if not isinstance(overrides, Mapping):
    raise UserError(
      f'{where}: overrides must be a dict such as {{"dpo.beta": 0.1}}, not {overrides!r}.'
    )
  defaults, typed = dict(config_schema.leaves(config)), {}
  for leaf, value in overrides.items():
    config_schema.check_name(leaf, where)
    leaf_type = type(defaults[leaf])
    if (leaf_type, type(value)) in ((float, int), (tuple, list)):
      value = leaf_type(value)
    if type(value) is not leaf_type:
      raise UserError(f"{where}: {leaf} must be of type {leaf_type.__name__}, not {value!r}.")
    typed[leaf] = value
  return typed


def with_leaves(config, leaves: dict[str, object]):
  """A locked copy of the config with these leaves."""
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
    UserError: the leaves are incompatible.
  """
  config = with_leaves(config, {**KINDS[method.kind].settings, **method.given, **method.settings})
  config_schema.check_values(config)
  return config


def make(experiment: Experiment, method: Method) -> None:
  """Runs the method's unfinished stages, and its evaluation on the test problems.

  Args:
    experiment: of the run folder and config that methods of a size and seed share.
    method: to train and evaluate.
  """
  _train(experiment, method)
  evaluate.test(experiment, method.name.replace(",", "-"), method.folder or None)


def _train(experiment: Experiment, method: Method) -> None:
  """Runs the method's unfinished stages."""
  kind, where = KINDS[method.kind], experiment
  if method.second:
    where = dataclasses.replace(experiment, workdir=experiment.workdir / method.second)
  if kind.first:
    first = resolve(experiment.config, kind.first)
    _train(experiment, first)
    synthesize.run(where)
    import_traces.adopt_sft(where, experiment.workdir / first.folder / "policy")
  else:
    for stage in method.shared:
      _RUN[stage](experiment)
      if method.second:
        _copy_stage(experiment.workdir / stage, where.workdir / stage)
  own = dataclasses.replace(where, config=configure(experiment.config, method))
  for stage in kind.before:
    if stage not in method.shared:
      _RUN[stage](own if method.resampling else where)
  name = method.name.replace(",", "-")
  if "dpo" in kind.sections:
    pairs.variant(own, name)
    dpo.variant(own, name)
  elif method.kind == "sft":
    sft.run(own, name)
  elif method.kind != "base":
    rft.run(own, name)


def _copy_stage(source: epath.Path, target: epath.Path) -> None:
  """Copies a finished stage into another workdir, its manifest last, unless it exists there."""
  if distributed.broadcast((target / "manifest.json").exists()):
    return
  if distributed.is_primary():
    _copy(source, target, without="manifest.json")
    (source / "manifest.json").copy(target / "manifest.json")
  distributed.barrier()


def _copy(source: epath.Path, target: epath.Path, without: str = "") -> None:
  target.mkdir(parents=True, exist_ok=True)
  for path in source.iterdir():
    if path.is_dir():
      _copy(path, target / path.name)
    elif path.name != without:
      path.copy(target / path.name, overwrite=True)
