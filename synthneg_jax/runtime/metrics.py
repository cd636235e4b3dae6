"""Writers of training metrics: JSON lines, TensorBoard event files, Weights & Biases.

Only process 0 writes. An update that is repeated after a kill replaces its earlier record.
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
  """Writes one JSON line per update.

  On a local disk each line is saved at once; in a bucket, where files cannot be appended to, at
  each checkpoint.
  """

  def __init__(self, path: epath.Path, first_step: int):
    """Keeps the complete lines of an existing file, unless training starts from step 0.

    A line beyond `first_step` stays until its update is repeated, because the checkpoint after it
    may be only temporarily unreadable.
    """
    text = path.read_text() if path.exists() and first_step else ""
    whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    self._lines = {json.loads(line)["step"]: line for line in whole}
    self._path, self._file = path, None
    self.save()
    if "://" not in os.fspath(path):
      self._file = path.open("a")

  def write(
    self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Histogram]
  ) -> None:
    """Writes a line, without the histograms.

    Raises:
      UserError: the line cannot be written.
    """
    del histograms
    self._lines[step] = json.dumps({"step": step, **scalars}) + "\n"
    if self._file is not None:
      with writing(self._path):
        self._file.write(self._lines[step])
        self._file.flush()

  def save(self) -> None:
    """Saves all lines written so far.

    Raises:
      UserError: the file cannot be written.
    """
    if self._file is None:
      with writing(self._path):
        temporary = self._path.parent / f"{self._path.name}.tmp"
        temporary.write_text("".join(self._lines[step] for step in sorted(self._lines)))
        temporary.replace(self._path)

  def close(self) -> None:
    """Closes the file; ignores a full disk, which `write` has reported."""
    if self._file is not None:
      with contextlib.suppress(OSError):
        self._file.close()
      self._file = None
    with contextlib.suppress(UserError):
      self.save()


class _TensorBoard:
  """Writes the event file of a training run."""

  def __init__(self, folder: epath.Path, first_step: int):
    self._file = EventFile(folder, first_step)
    self.save = self._file.save

  def write(
    self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Histogram]
  ) -> None:
    self._file.write(step, scalars=scalars, histograms=histograms)

  def close(self) -> None:
    with contextlib.suppress(UserError, OSError):
      self._file.close()


def check(section) -> None:
  """Checks settings that would otherwise fail only when training starts.

  Args:
    section: the config's section `metrics`.

  Raises:
    UserError: the package for Weights & Biases is missing, or profile_steps is not a range.
  """
  if section.wandb and importlib.util.find_spec("wandb") is None:
    raise UserError(
      f"metrics.wandb={section.wandb!r} needs the package wandb, which is not installed: pip "
      "install wandb."
    )
  if section.profile_steps:
    throughput.parse_steps(section.profile_steps)


class _Wandb:
  """Logs each training run to Weights & Biases, grouped by workdir.

  wandb itself drops updates that it has already received.
  """

  def __init__(self, config, workdir: epath.Path, folder: epath.Path):
    section = config.metrics
    check(section)
    import wandb

    self._wandb, id_file = wandb, folder / "wandb_run"
    if not id_file.exists():  # deleted with the folder, so training from step 0 is a new run
      id_file.write_text(secrets.token_hex(8))
    local = os.fspath(folder) if "://" not in os.fspath(folder) else None
    group, name = workdir.name, os.fspath(folder.relative_to(workdir))
    try:
      self._run = wandb.init(
        project=section.wandb,
        id=id_file.read_text().strip(),
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
    converted = {
      name: self._wandb.Histogram(np_histogram=(list(counts[1:-1]), list(edges)))
      for name, (edges, counts) in histograms.items()
    }
    self._run.log({**scalars, **converted}, step=step)

  def save(self) -> None:
    """Does nothing: wandb saves by itself."""

  def close(self) -> None:
    self._run.finish()


class Metrics:
  """Writes metrics to everything that the config names; does nothing except in process 0.

  Attributes:
    profile_steps: "a:b", updates to trace (runtime/throughput.py), or empty.
    measured: whether metrics include time, tokens, memory and compilations.
  """

  def __init__(self, config, workdir: epath.Path, folder: epath.Path, first_step: int):
    """Opens the writers of one training run.

    Args:
      config: the whole config, whose section `metrics` selects the writers; None for metrics.jsonl
        alone, with only metrics that a second run would reproduce.
      workdir: of the run.
      folder: of the stage, in the workdir.
      first_step: the first update of this start.

    Raises:
      UserError: a file cannot be written, or Weights & Biases fails.
    """
    section = None if config is None else config.metrics
    self.measured = section is not None
    self.profile_steps = "" if section is None else section.profile_steps
    self._writers = []
    if not distributed.is_primary():
      return
    if section is None or section.jsonl:
      self._writers.append(JsonLines(folder / "metrics.jsonl", first_step))
    if section is not None and section.tensorboard:
      self._writers.append(_TensorBoard(folder, first_step))
    if section is not None and section.wandb:
      self._writers.append(_Wandb(config, workdir, folder))

  def write(
    self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Histogram]
  ) -> None:
    """Writes the metrics of an update.

    Args:
      step: index of the update, from 0.
      scalars: by name.
      histograms: by name; (edges [E], counts [E + 1]).

    Raises:
      UserError: the metrics cannot be written.
    """
    for writer in self._writers:
      writer.write(step, scalars, histograms)

  def save(self) -> None:
    """Saves all metrics written so far, as when a checkpoint is saved."""
    for writer in self._writers:
      writer.save()

  def close(self) -> None:
    """Closes all writers."""
    for writer in self._writers:
      writer.close()
