"""Parses the instructions of a compiled program from its optimised HLO text."""

import dataclasses
import math
import re

import numpy as np

_BYTES = {
  "pred": 1,
  "s4": 0.5,
  "u4": 0.5,
  "s8": 1,
  "u8": 1,
  "s16": 2,
  "u16": 2,
  "bf16": 2,
  "f16": 2,
  "s32": 4,
  "u32": 4,
  "f32": 4,
  "s64": 8,
  "u64": 8,
  "f64": 8,
  "f8e4m3fn": 1,
  "f8e5m2": 1,
}
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Array:
  """An array of a shape: dtype, sizes, and whether it is in the chip's main memory."""

  dtype: str
  sizes: tuple[int, ...]
  in_memory: bool

  @property
  def num_bytes(self) -> float:
    """Size in bytes; 0 for non-numeric dtypes."""
    return math.prod(self.sizes) * _BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation: name = arrays opcode(operands), attributes."""

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool

  def attribute(self, pattern: str) -> str | None:
    """The first group of a pattern in its attributes, or None."""
    match = re.search(pattern, self.attributes)
    return match.group(1) if match else None

  @property
  def called(self) -> str | None:
    """Name of the computation of a fusion, or None."""
    return self.attribute(r"calls=%?([\w.\-]+)")

  @property
  def index(self) -> int | None:
    """Index of a get-tuple-element, or None for other instructions."""
    if self.opcode != "get-tuple-element":
      return None
    return int(self.attribute(r"index=(\d+)"))

  @property
  def memory_bytes(self) -> float:
    """Bytes of the result in main memory."""
    return sum(array.num_bytes for array in self.arrays if array.in_memory)


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if depth == 0:
      return i
  return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
  return tuple(
    Array(dtype, tuple(int(size) for size in sizes.split(",") if size), "S(" not in layout)
    for dtype, sizes, layout in _ARRAY.findall(text)
  )


def instruction(line: str) -> Instruction | None:
  """Parses a line of HLO; returns None if it has no instruction."""
  match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
  if not match:
    return None
  rest = line[match.end() :]
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  start = rest.find("(")
  if start < 0:
    return None
  stop = _closing(rest, start)
  operands = tuple(re.findall(r"%([\w.\-]+)", rest[start:stop])) or (rest[start + 1 : stop],)
  return Instruction(
    match.group(2), _arrays(shape), rest[:start], operands, rest[stop + 1 :], bool(match.group(1))
  )


def group(collective: Instruction, num_devices: int) -> tuple[int, ...]:
  """Mesh indices of the devices in a collective's first group; for a permute, its first ring."""
  text = collective.attributes

  def ints(csv: str) -> list[int]:
    return [int(number) for number in csv.split(",")]

  if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
    devices = np.arange(math.prod(ints(match.group(2)))).reshape(ints(match.group(2)))
    devices = devices.transpose(ints(match.group(3))) if match.group(3) else devices
    return tuple(devices.reshape(-1)[: int(match.group(1))].tolist())
  if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
    return tuple(ints(match.group(1)))
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match.group(1))}
    across = re.findall(r"'(\w+)'", match.group(2))
    devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    selected = devices[tuple(slice(None) if name in across else 0 for name in sizes)]
    return tuple(selected.reshape(-1).tolist())
  if match := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", text):
    targets = {int(a): int(b) for a, b in re.findall(r"\{(\d+),(\d+)\}", match.group(1))}
    ring = [next((a for a, b in targets.items() if a != b), 0)]
    while (target := targets.get(ring[-1], ring[0])) not in ring:
      ring.append(target)
    return tuple(ring)
  return tuple(range(num_devices))
