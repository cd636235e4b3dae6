"""Compiles a config's programs for an absent TPU: memory fit, bottlenecks and total cost.

XLA:TPU compiles the stages' programs (compiled_programs.py) for abstract arrays; nothing is
computed, and no chip is needed. A program's cost is read from its optimised HLO (roofline.py). The
workload is computed from the config and assumed lengths (cost_model.py).
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
  """A compiled program. Bytes, FLOPs and seconds are per chip and run (decoding: per iteration).

  Attributes:
    program: that was compiled.
    fits: whether the peak is within the chip's memory.
    peak_bytes: arguments + results that do not alias them + temporaries + code + program.beside;
      if compilation failed, what XLA requested.
    argument_bytes, temporary_bytes: parts of the peak; arguments include program.beside.
    cost: None if compilation failed.
    seconds: lower bounds for compute, memory and interconnect, each on its own.
    compile_seconds: wall clock.
    too_large: the part of the peak that XLA reports if compilation failed.
    moves: how many times collectives move each parameter (collective_traffic.py).
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
    """The bottleneck: compute, memory or interconnect; memory capacity if compilation failed."""
    return max(self.seconds, key=self.seconds.get) if self.seconds else "memory capacity"


def devices_of(topology: str, slices: int = 1) -> tuple[list, Chip]:
  """The devices of an absent TPU, and the capacities of each (a v4 chip is two devices).

  Raises:
    UserError: libtpu is not installed, or the topology is unknown.
  """
  generation, _, sizes = topology.partition(":")
  if generation not in CHIPS or not re.fullmatch(r"\d+x\d+(x\d+)?", sizes):
    raise UserError(
      f"--topology={topology}: must be GENERATION:SIZES, such as v5e:8x8; generations are "
      f"{', '.join(CHIPS)}."
    )
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("XLA's TPU compiler (libtpu) is not installed: pip install -e '.[preflight]'.")
  try:
    options = {"num_slices": slices} if slices > 1 else {}
    devices = list(topologies.get_topology_desc(topology, "tpu", **options).devices)
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f"--topology={topology}: {str(error).splitlines()[0]}") from error
  chip, num_chips = CHIPS[generation], slices * math.prod(map(int, sizes.split("x")))
  cores = len(devices) // num_chips
  if cores == 1:
    return devices, chip
  return devices, Chip(**{name: value / cores for name, value in vars(chip).items()})


def _exhausted(program: Program, text: str) -> Report:
  """The report from XLA's error for a program that does not fit.

  The error is like "... required for HLO temporaries (32.25G) exceeds ...".
  """
  unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  used = re.search(r"required for ([\w ]+) \(([\d.]+)([KMGT]?)\)", text) or re.search(
    r"(Used) ([\d.]+)([KMGT]?)", text
  )
  if used is None:
    return Report(program, fits=False, peak_bytes=math.inf)
  kind = "" if used.group(1) == "Used" else used.group(1).removeprefix("HLO ")
  peak = float(used.group(2)) * unit[used.group(3)]
  return Report(program, fits=False, peak_bytes=peak, too_large=kind)


def _compiled(lowered) -> tuple[jax.stages.Compiled, str]:
  """Returns (the compiled program, its optimised HLO).

  The compiler also dumps the HLO to a folder, because jax cannot read back programs that use a
  v6e's sparse cores.
  """
  with tempfile.TemporaryDirectory() as folder:
    compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
    try:
      return compiled, compiled.as_text()
    except jax.errors.JaxRuntimeError:
      (path,) = epath.Path(folder).glob("*.after_optimizations.txt")
      return compiled, path.read_text()


def compile_program(program: Program, chip: Chip, num_devices: int) -> Report:
  """Compiles one program and computes its cost."""
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
  arguments = memory.argument_size_in_bytes + int(program.beside)
  peak = arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes
  peak += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
  return Report(
    program,
    fits=peak <= chip.hbm_bytes,
    peak_bytes=peak,
    argument_bytes=arguments,
    temporary_bytes=memory.temp_size_in_bytes,
    cost=cost,
    seconds={
      "compute": cost.flops / chip.flops,
      "memory": cost.memory_bytes / chip.memory_rate,
      "interconnect": cost.collective_bytes / chip.link_rate,
    },
    compile_seconds=seconds,
  )


def _lines(report: Report, chip: Chip, num_devices: int, full_copy: float) -> list[str]:
  """A program's printed lines."""
  r, p, giga = report, report.program, 1e9
  head, fits = f"{p.name}: {p.sizes}", "fits" if r.fits else "DOES NOT FIT"
  peak = f"  memory  {fits}: {r.peak_bytes / giga:.2f} of {chip.hbm_bytes / giga:.2f} GB a chip"
  if r.cost is None:
    return [head, peak]
  own = p.model_flops / num_devices
  kinds = [f"{kind} {size / giga:.3g}" for kind, size in sorted(r.cost.collectives.items())]
  bounds = [f"{name} {1e3 * value:.3g} ms" for name, value in r.seconds.items()]
  return [
    head,
    f"{peak} (arguments {r.argument_bytes / giga:.2f}, temporaries {r.temporary_bytes / giga:.2f})",
    f"  compute {r.cost.flops / 1e12:.4g} TFLOP a chip, {r.cost.flops / own:.2f} x the model's own "
    f"{own / 1e12:.4g}",
    f"  traffic {r.cost.memory_bytes / giga:.3g} GB to and from memory"
    + (f", {r.cost.memory_bytes / p.least_read:.2f} x weights and cache" if p.least_read else ""),
    f"  links   {r.cost.collective_bytes / giga:.3g} GB sent, "
    f"{r.cost.collective_bytes / full_copy:.2f} x what a row's "
    f"device needs of all parameters (GB by kind: {', '.join(kinds) or 'none'})",
    *(f"    times {line}" for line in collective_traffic.lines(r.moves)),
    f"  bound   {', '.join(bounds)}: {r.bound_by}",
    f"  compiled in {r.compile_seconds:.0f} s; {p.runs:.0f} runs in the recipe",
  ]


def make_bill(
  config, recipe: Recipe, reports: Sequence[Report], *, num_devices: int, efficiency: float
) -> dict:
  """Tokens, rollouts and bytes of the recipe, and chip-hours of the compiled programs."""
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
      stage: {key: round(value) for key, value in work.items()}
      for stage, work in recipe.work.items()
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
  """Prints each program's figures and the bill, and writes them as JSON to `out`.

  Returns:
    The report of each program.

  Raises:
    UserError: a program does not fit; names the settings to change.
  """
  if not 0 < efficiency <= 1:
    raise UserError(f"--efficiency={efficiency} must be in (0, 1].")
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
  precision = contextlib.nullcontext()
  if model.dtype == "float32":
    precision = jax.default_matmul_precision("float32")
  with precision:
    for program in recipe.programs(stages or STAGES):
      report = compile_program(program, chip, len(devices))
      report.moves = recipe.moves(report.cost) if report.cost else {}
      reports.append(report)
      print("\n".join(_lines(report, chip, len(devices), full_copy)), flush=True)
  result = {
    "topology": topology,
    "programs": [_entry(report, chip, len(devices)) for report in reports],
    "bill": make_bill(config, recipe, reports, num_devices=len(devices), efficiency=efficiency),
  }
  print(json.dumps(result))
  if out:
    epath.Path(out).write_text(json.dumps(result, indent=2) + "\n")
  failed = [report for report in reports if not report.fits]
  if failed:
    r, others = failed[0], ", ".join(report.program.name for report in failed[1:])
    more = f"; neither do {others}" if others else ""
    largest = "arguments" if r.argument_bytes >= r.temporary_bytes else "temporaries"
    raise UserError(
      f"{r.program.name} does not fit: {r.peak_bytes / 1e9:.2f} of {chip.hbm_bytes / 1e9:.2f} GB a "
      f"chip of {topology}, most of it {r.too_large or largest}; {r.program.advice}"
      f"{more}."
    )
  return reports
