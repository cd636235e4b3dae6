"""Compiles a config's programs for a TPU that is not there: what fits, what binds, and what the
recipe will cost.

The programs (recipe.py) are those that the stages run, compiled by XLA:TPU for abstract arrays;
nothing is computed and no chip is needed. What a program does is read from its optimised HLO
(roofline.py); what the recipe asks for is counted from the config and assumed lengths (bill.py).
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import re
import tempfile
import time
from collections.abc import Sequence

import jax
from etils import epath
from jax.experimental import topologies

from synthneg_jax.preflight import collective_traffic, cost_model, roofline
from synthneg_jax.preflight.chips import CHIPS, Chip
from synthneg_jax.preflight.compiled_programs import STAGES, Program, Recipe
from synthneg_jax.runtime import device_mesh
from synthneg_jax.runtime.errors import UserError


@dataclasses.dataclass
class Report:
  """What came of compiling a program. Bytes, FLOPs and seconds are a chip's, for a run (decoding: a
  turn of its loop).

  Attributes:
    program: which.
    fits: whether its peak is within the chip's memory.
    peak_bytes: arguments + results that are not written over them + temporaries + code + what lies
      beside; what XLA asked for where it does not fit.
    argument_bytes, temporary_bytes: parts of it; what lies beside is counted with the arguments.
    cost: what it does; None where it was not compiled to the end.
    seconds: what each of a chip's parts would need for that alone.
    compile_seconds: wall clock.
    too_large: which part of the peak XLA found too large, where it compiled no program.
    moves: which arrays its collectives move, and how many times (movement.py).
  """

  program: Program
  fits: bool
  peak_bytes: float
  argument_bytes: float = 0.0
  temporary_bytes: float = 0.0
  cost: roofline.Cost | None = None
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  compile_seconds: float = 0.0
  too_large: str = ""
  moves: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

  @property
  def bound_by(self) -> str:
    """What takes longest: compute, memory or links; memory capacity where nothing was counted."""
    return max(self.seconds, key=self.seconds.get) if self.seconds else "memory capacity"


def devices_of(topology: str, slices: int = 1) -> tuple[list, Chip]:
  """The devices of a TPU that is not there, and what each has (a v4 chip counts as two devices).

  Raises:
    UserError: libtpu is not installed, or knows no such topology.
  """
  generation, _, sizes = topology.partition(":")
  if generation not in CHIPS or not re.fullmatch(r"\d+x\d+(x\d+)?", sizes):
    raise UserError(
      f"--topology={topology}: it is GENERATION:SIZES with one of {', '.join(CHIPS)}, such as "
      "v5e:8x8."
    )
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      "XLA's compiler for TPUs is missing: pip install -e '.[preflight]' installs it (libtpu)."
    )
  try:
    more = {"num_slices": slices} if slices > 1 else {}
    devices = list(topologies.get_topology_desc(topology, "tpu", **more).devices)
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f"--topology={topology}: {str(error).splitlines()[0]}") from error
  chip, cores = CHIPS[generation], len(devices) // (slices * math.prod(map(int, sizes.split("x"))))
  part = {field.name: getattr(chip, field.name) / cores for field in dataclasses.fields(Chip)}
  return devices, Chip(**part) if cores > 1 else chip


def _exhausted(program: Program, text: str) -> Report:
  """From what XLA says of a program that does not fit: "... required for HLO temporaries (32.25G)
  exceeds ...".
  """
  unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  used = re.search(r"required for ([\w ]+) \(([\d.]+)([KMGT]?)\)", text) or re.search(
    r"(Used) ([\d.]+)([KMGT]?)", text
  )
  if used is None:
    return Report(program, False, math.inf)
  kind = "" if used.group(1) == "Used" else used.group(1).removeprefix("HLO ")
  return Report(program, False, float(used.group(2)) * unit[used.group(3)], too_large=kind)


def _compiled(lowered) -> tuple[jax.stages.Compiled, str]:
  """(the compiled program, its optimised HLO).

  The compiler writes the HLO to a folder, too: jax cannot read back what a v6e's sparse cores do on
  the side.
  """
  with tempfile.TemporaryDirectory() as folder:
    compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
    try:
      return compiled, compiled.as_text()
    except jax.errors.JaxRuntimeError:
      (path,) = epath.Path(folder).glob("*.after_optimizations.txt")
      return compiled, path.read_text()


def compile_program(program: Program, chip: Chip, num_devices: int) -> Report:
  """Compiles one program and reads what it does."""
  lowered, start = program.lower(), time.monotonic()
  try:
    compiled, text = _compiled(lowered)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return _exhausted(program, str(error))
  seconds = time.monotonic() - start
  memory, hlo = compiled.memory_analysis(), roofline.Program(text, num_devices)
  cost = (hlo.open_loop if program.name.endswith("/decode") else None) or hlo.cost
  peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  peak += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes + int(program.beside)
  needs = {
    "compute": cost.flops / chip.flops,
    "memory": cost.memory_bytes / chip.memory_rate,
    "interconnect": cost.collective_bytes / chip.link_rate,
  }
  return Report(
    program,
    peak <= chip.hbm_bytes,
    peak,
    memory.argument_size_in_bytes + int(program.beside),
    memory.temp_size_in_bytes,
    cost,
    needs,
    seconds,
  )


def _lines(report: Report, chip: Chip, num_devices: int, full_copy: float) -> list[str]:
  """A program's figures for a reader."""
  r, p, giga = report, report.program, 1e9
  head = f"{p.name}: {p.sizes}"
  if r.cost is None:
    return [
      head,
      f"  memory  DOES NOT FIT: {r.peak_bytes / giga:.2f} of {chip.hbm_bytes / giga:.2f} GB a chip",
    ]
  own = p.model_flops / num_devices
  kinds = (
    ", ".join(f"{kind} {size / giga:.3g}" for kind, size in sorted(r.cost.collectives.items()))
    or "none"
  )
  lines = [
    head,
    f"  memory  {'fits' if r.fits else 'DOES NOT FIT'}: {r.peak_bytes / giga:.2f} of "
    f"{chip.hbm_bytes / giga:.2f} GB a chip"
    f" (arguments {r.argument_bytes / giga:.2f}, temporaries {r.temporary_bytes / giga:.2f})",
    f"  compute {r.cost.flops / 1e12:.4g} TFLOP a chip, {r.cost.flops / own:.2f} x the model's own "
    f"{own / 1e12:.4g}",
    f"  traffic {r.cost.memory_bytes / giga:.3g} GB to and from memory"
    + (f", {r.cost.memory_bytes / p.least_read:.2f} x weights and cache" if p.least_read else ""),
    f"  links   {r.cost.collective_bytes / giga:.3g} GB sent, "
    f"{r.cost.collective_bytes / full_copy:.2f} x what a row's "
    f"device needs of all parameters (GB by kind: {kinds})",
    *(f"    times {line}" for line in collective_traffic.lines(r.moves)),
    "  bound   "
    + ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in r.seconds.items())
    + f": {r.bound_by}",
    f"  compiled in {r.compile_seconds:.0f} s; {p.runs:.0f} runs in the recipe",
  ]
  return lines


def make_bill(
  config, recipe: Recipe, reports: Sequence[Report], num_devices: int, efficiency: float
) -> dict:
  """Tokens, rollouts, chip-hours and bytes of the recipe; chip-hours of the programs that were
  compiled.
  """
  hours = {
    r.program.name: r.program.runs * max(r.seconds.values()) / efficiency * num_devices / 3600
    for r in reports
    if r.seconds
  }

  def total(key):
    return round(sum(stage.get(key, 0) for stage in recipe.work.values()))

  stored = cost_model.storage(config, recipe.model, recipe.work)
  return {
    "tokens_trained": total("tokens_trained"),
    "tokens_decoded": total("tokens_decoded"),
    "traces": total("traces"),
    "rollouts": total("rollouts"),
    "efficiency": efficiency,
    "chip_hours": {name: float(f"{value:.4g}") for name, value in hours.items()},
    "chip_hours_total": float(f"{sum(hours.values()):.4g}"),
    "storage_bytes": {name: round(value) for name, value in stored.items()},
    "storage_bytes_total": round(sum(stored.values())),
    "by_stage": {
      stage: {key: round(value) for key, value in made.items()}
      for stage, made in recipe.work.items()
    },
  }


def _entry(report: Report, chip: Chip, num_devices: int) -> dict:
  cost = report.cost
  return {
    "name": report.program.name,
    "fits": report.fits,
    "peak_bytes_per_chip": report.peak_bytes if math.isfinite(report.peak_bytes) else None,
    "hbm_bytes_per_chip": chip.hbm_bytes,
    "flops_per_chip": cost and cost.flops,
    "model_flops_per_chip": report.program.model_flops / num_devices,
    "collective_bytes_per_chip": cost and cost.collective_bytes,
    "bound_by": report.bound_by,
  }


def main(
  config,
  topology: str,
  stages: Sequence[str] | None,
  out: str | None,
  lengths: cost_model.Lengths,
  efficiency: float,
) -> list[Report]:
  """Prints each program's figures and the bill, and writes them as JSON.

  Returns:
    What was printed of each program.

  Raises:
    UserError: a program does not fit; names what to change.
  """
  if not 0 < efficiency <= 1:
    raise UserError(f"--efficiency={efficiency} is no share: it lies above 0 and at most at 1.")
  devices, chip = devices_of(topology, config.mesh.slices)
  mesh = device_mesh.make_mesh(**config.mesh, devices=devices)
  recipe = Recipe(config, mesh, lengths, chip.hbm_bytes)
  model = recipe.model.config
  sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
  print(
    f"{topology}: {len(devices)} devices as {sizes}; {model.num_params / 1e9:.2f} G parameters, "
    f"{model.param_dtype}"
  )
  print(
    f"Assumed: prompts of {lengths.prompt:.0f} tokens, responses of {lengths.response:.0f} in "
    f"{lengths.steps:.0f} steps (the longest twice that), {100 * lengths.pass_rate:.0f} % of "
    f"traces right, rows {100 * cost_model.PACKED:.0f} % packed."
  )
  full_copy = model.num_params * (2 if model.dtype == "bfloat16" else 4) / mesh.shape["tensor"]
  reports = []
  precision = (
    jax.default_matmul_precision("float32")
    if model.dtype == "float32"
    else contextlib.nullcontext()
  )
  with precision:
    for program in recipe.programs(stages or STAGES):
      report = compile_program(program, chip, len(devices))
      report.moves = recipe.moves(report.cost) if report.cost else {}
      reports.append(report)
      print("\n".join(_lines(report, chip, len(devices), full_copy)), flush=True)
  made = make_bill(config, recipe, reports, len(devices), efficiency)
  result = {
    "topology": topology,
    "programs": [_entry(report, chip, len(devices)) for report in reports],
    "bill": made,
  }
  print(json.dumps(result))
  if out:
    epath.Path(out).write_text(json.dumps(result, indent=2) + "\n")
  failed = [report for report in reports if not report.fits]
  if failed:
    r = failed[0]
    what = (
      r.too_large
      or max(
        ("arguments", r.argument_bytes), ("temporaries", r.temporary_bytes), key=lambda x: x[1]
      )[0]
    )
    more = (
      f"; neither do {', '.join(report.program.name for report in failed[1:])}"
      if failed[1:]
      else ""
    )
    raise UserError(
      f"{r.program.name} does not fit: {r.peak_bytes / 1e9:.2f} of {chip.hbm_bytes / 1e9:.2f} GB a "
      f"chip of {topology}, most of it {what}; {r.program.advice}{more}."
    )
  return reports
