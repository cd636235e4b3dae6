"""Where the figures of a training go, update by update: JSON lines, TensorBoard event files,
Weights & Biases.

The first process writes alone. An update that is done again, after a kill, takes its first doing's
place.
"""

import contextlib
import importlib.util
import json
import os
import secrets
from collections.abc import Mapping

from etils import epath

from synthneg_jax.runtime import config_schema, distributed, throughput
from synthneg_jax.runtime.errors import UserError, writing
from synthneg_jax.runtime.event_files import EventFile, Histogram


class JsonLines:
  """One JSON line an update.

  On a local disk each line is there at once; elsewhere, where files cannot be added to, with each
  checkpoint.
  """

  def __init__(self, path: epath.Path, first_step: int):
    """Keeps the whole lines of a file that is there, unless training begins anew. A line beyond
    `first_step` stays until its update is done again: the checkpoint behind it may be one that only
    cannot be read now.
    """
    text = path.read_text() if path.exists() and first_step else ""
    whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    self._lines = {json.loads(line)["step"]: line for line in whole}
    self._path, self._file = path, None
    self.keep()
    if "://" not in os.fspath(path):
      self._file = path.open("a")

  def write(
    self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Histogram]
  ) -> None:
    """Adds a line; histograms are left out.

    Raises:
      UserError: it cannot be written.
    """
    del histograms
    self._lines[step] = json.dumps({"step": step, **scalars}) + "\n"
    if self._file is not None:
      with writing(self._path):
        self._file.write(self._lines[step])
        self._file.flush()

  def keep(self) -> None:
    """Everything up to here is on disk when it returns.

    Raises:
      UserError: it cannot be written.
    """
    if self._file is None:
      with writing(self._path):
        temporary = self._path.parent / f"{self._path.name}.tmp"
        temporary.write_text("".join(self._lines[step] for step in sorted(self._lines)))
        temporary.replace(self._path)

  def close(self) -> None:
    """Ends the file; of a full disk nothing is said, it was said before."""
    if self._file is not None:
      with contextlib.suppress(OSError):
        self._file.close()
      self._file = None
    with contextlib.suppress(UserError):
      self.keep()


class _TensorBoard:
  """The event file of a training."""

  def __init__(self, folder: epath.Path, first_step: int):
    self._file = EventFile(folder, first_step)
    self.keep = self._file.keep

  def write(
    self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Histogram]
  ) -> None:
    self._file.write(step, scalars=scalars, histograms=histograms)

  def close(self) -> None:
    with contextlib.suppress(UserError, OSError):
      self._file.close()


def check(section) -> None:
  """Refuses what would fail only when the first training begins.

  Args:
    section: the config's section `metrics`.

  Raises:
    UserError: Weights & Biases is asked for and its package is missing, or profile_steps is no
      range.
  """
  if section.wandb and importlib.util.find_spec("wandb") is None:
    raise UserError(
      f"metrics.wandb={section.wandb!r} needs the package wandb, which is not installed: pip "
      "install wandb."
    )
  if section.profile_steps:
    throughput.parse_steps(section.profile_steps)


class _Wandb:
  """A run of Weights & Biases: one a training, in a group by workdir. wandb itself drops updates
  that it has had.
  """

  def __init__(self, config, workdir: epath.Path, folder: epath.Path):
    section = config.metrics
    check(section)
    import wandb

    self._wandb, mark = wandb, folder / "wandb_run"
    if not mark.exists():  # goes with the folder: a training that begins anew is a new run
      mark.write_text(secrets.token_hex(8))
    local = os.fspath(folder) if "://" not in os.fspath(folder) else None
    group, name = workdir.name, os.fspath(folder.relative_to(workdir))
    try:
      self._run = wandb.init(
        project=section.wandb,
        id=mark.read_text().strip(),
        name=f"{group}/{name}",
        group=group,
        job_type=name,
        config=config_schema.plain(config),
        dir=local,
        mode=section.wandb_mode,
        resume="allow",
        settings=wandb.Settings(silent=True, console="off"),
      )
    except wandb.Error as error:
      raise UserError(
        f"metrics.wandb={section.wandb!r}: {' '.join(str(error).split())[:300]}; "
        "--config.metrics.wandb_mode=offline keeps the run in the workdir."
      ) from error

  def write(
    self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Histogram]
  ) -> None:
    made = {
      name: self._wandb.Histogram(np_histogram=(list(counts[1:-1]), list(edges)))
      for name, (edges, counts) in histograms.items()
    }
    self._run.log({**scalars, **made}, step=step)

  def keep(self) -> None:
    """wandb sends by itself."""

  def close(self) -> None:
    self._run.finish()


class Metrics:
  """All that the config asks for, at once; nothing in processes but the first.

  Attributes:
    profile_steps: "a:b", updates to be traced, or empty; as runtime/throughput.py takes it.
    measured: whether time, tokens, memory and compilations are to be among the figures.
  """

  def __init__(self, config, workdir: epath.Path, folder: epath.Path, first_step: int):
    """Opens what takes the metrics of one training.

    Args:
      config: the whole config, of which the section `metrics` says what is written; None for
        metrics.jsonl alone, with nothing in it that a second run would find otherwise.
      workdir: of the run.
      folder: of the stage, below it.
      first_step: the update that training goes on from.

    Raises:
      UserError: something cannot be written, or Weights & Biases refuses.
    """
    section = None if config is None else config.metrics
    self.measured, self.profile_steps = (
      section is not None,
      "" if section is None else section.profile_steps,
    )
    self._sinks = []
    if not distributed.first():
      return
    if section is None or section.jsonl:
      self._sinks.append(JsonLines(folder / "metrics.jsonl", first_step))
    if section is not None and section.tensorboard:
      self._sinks.append(_TensorBoard(folder, first_step))
    if section is not None and section.wandb:
      self._sinks.append(_Wandb(config, workdir, folder))

  def write(
    self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Histogram]
  ) -> None:
    """The figures of an update.

    Args:
      step: the update, from 0.
      scalars: by name.
      histograms: by name; (edges [E], counts [E + 1]).

    Raises:
      UserError: they cannot be written.
    """
    for sink in self._sinks:
      sink.write(step, scalars, histograms)

  def keep(self) -> None:
    """Everything up to here is on disk when it returns, as when a checkpoint is saved."""
    for sink in self._sinks:
      sink.keep()

  def close(self) -> None:
    """Ends all of them."""
    for sink in self._sinks:
      sink.close()
