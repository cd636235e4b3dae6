"""The cost of a compiled program from its optimised HLO: FLOPs, memory and link traffic.

XLA's own cost analysis counts a loop body once. Here it is multiplied by the loop's trip count. A
loop whose trip count depends on data (decoding) counts once, so its cost is that of one iteration.
Counted are matrix products (2·M·N·K; on TPU they are convolutions), bytes that instructions read
from and write to the chip's main memory, and bytes that a chip sends by the usual ring algorithms.
A Pallas kernel reports its own cost.
"""

import collections
import dataclasses
import functools
import math
import re
from typing import NamedTuple

from synthneg_jax.preflight import hlo

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_PERMUTE = "collective-permute"
_FREE = frozenset(
  "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id domain "
  "opt-barrier add-dependency iota".split()
)


@dataclasses.dataclass
class Cost:
  """Cost per chip and run of the program.

  Attributes:
    flops: of matrix products.
    memory_bytes: read from and written to main memory.
    collectives: bytes sent, by kind; "send" goes to other slices, over the data-centre network.
    moved: bytes sent within a slice, by (kind, group of devices, array); permutes are of parts or
      of sums.
  """

  flops: float = 0.0
  memory_bytes: float = 0.0
  collectives: dict[str, float] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(float)
  )
  moved: dict[tuple[str, tuple[int, ...], hlo.Array], float] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(float)
  )

  def add(self, other: "Cost", times: float = 1.0) -> None:
    """Adds another cost `times` times."""
    self.flops += times * other.flops
    self.memory_bytes += times * other.memory_bytes
    for kind, size in other.collectives.items():
      self.collectives[kind] += times * size
    for key, size in other.moved.items():
      self.moved[key] += times * size

  @property
  def collective_bytes(self) -> float:
    """Bytes sent, over all kinds."""
    return sum(self.collectives.values())


class Program:
  """A parsed HLO module: computations of instructions."""

  def __init__(self, text: str, num_devices: int):
    self._devices = num_devices
    self._computations, self._entry, current = {}, None, None
    for line in text.splitlines():
      header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
      if header:
        current = self._computations.setdefault(header.group(2), {})
        self._entry = header.group(2) if header.group(1) else self._entry
      elif current is not None and (instruction := hlo.instruction(line)):
        current[instruction.name] = instruction
    self._counted = set()  # (what, channel) of collectives that appear in several instructions

  @functools.cached_property
  def cost(self) -> Cost:
    """Cost of one run."""
    return self._cost(self._entry)

  @functools.cached_property
  def open_loop(self) -> Cost | None:
    """Cost of one iteration of the outermost loop with an unknown trip count, or None.

    Of several loops in one computation, the one with the most memory traffic.
    """
    # Callers follow the computations that they call.
    for name in (self._entry, *reversed(self._computations)):
      computation, costs = self._computations[name], []
      for loop in computation.values():
        if loop.opcode == "while" and self._trip_count(computation, loop) is None:
          self._counted = set()
          costs.append(self._cost(loop.attribute(r"body=%?([\w.\-]+)")))
      if costs:
        return max(costs, key=lambda cost: cost.memory_bytes)
    return None

  def _root(self, computation) -> hlo.Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)

  def _cost(self, name: str, fused: bool = False) -> Cost:
    total, computation = Cost(), self._computations[name]
    for instruction in computation.values():
      if instruction.opcode == "while":
        body = self._cost(instruction.attribute(r"body=%?([\w.\-]+)"))
        trips = self._trip_count(computation, instruction)
        total.add(body, 1 if trips is None else trips)
        continue
      if instruction.opcode == "conditional":
        listed = instruction.attribute(r"branch_computations=\{([^}]*)\}") or ""
        branches = re.findall(r"%([\w.\-]+)", listed)
        branches += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)
        costs = [self._cost(branch) for branch in branches]
        total.add(max(costs, key=lambda cost: cost.flops, default=Cost()))
        continue
      if instruction.opcode == "call":
        total.add(self._cost(instruction.attribute(r"to_apply=%?([\w.\-]+)")))
        continue
      if instruction.called:
        inner = self._cost(instruction.called, fused=True)
        total.add(Cost(inner.flops, 0.0, inner.collectives, inner.moved))
      if instruction.opcode in ("convolution", "dot"):
        total.flops += self._product_flops(computation, instruction)
      if kernel := _kernel_cost(instruction):
        total.add(kernel)
        continue
      kind = instruction.opcode.removesuffix("-start")
      if kind in _COLLECTIVES:
        if fused and name.startswith("all-reduce-scatter"):
          kind = "reduce-scatter"
        moved_kind = kind
        if kind == _PERMUTE:
          moved_kind += " of sums" if self._is_sum(computation, instruction) else " of parts"
        group = hlo.group(instruction, self._devices)
        for array, size in self._sent(computation, instruction, kind):
          total.collectives[kind] += size
          total.moved[moved_kind, group, array] += size
      if kind == "send":  # to another slice, through the hosts
        total.collectives["send"] += instruction.arrays[0].num_bytes
      if not fused:
        total.memory_bytes += self._traffic(computation, instruction)
    return total

  def _trip_count(self, computation, loop: hlo.Instruction) -> int | None:
    """Trip count of a loop from `index < bound` and the body's increment; None if unknown."""
    known = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
    if known:
      return int(known)
    condition = self._computations[loop.attribute(r"condition=%?([\w.\-]+)")]
    body = self._computations[loop.attribute(r"body=%?([\w.\-]+)")]
    root, first = self._root(condition), computation.get(loop.operands[0])
    if root.opcode == "fusion":  # of the comparison alone, with the same operands
      inner = self._root(self._computations[root.called])
      root = dataclasses.replace(root, opcode=inner.opcode, attributes=inner.attributes)
    if (
      root.opcode != "compare"
      or len(root.operands) != 2
      or root.attribute(r"direction=(\w+)") not in ("LT", "GT")
    ):
      return None
    sides = [condition[name] for name in root.operands]
    if root.attribute(r"direction=(\w+)") == "GT":
      sides.reverse()
    result = self._root(body)
    if first is None or result.opcode != "tuple":
      return None

    def initial(index: int) -> int | None:
      if first.opcode != "tuple":
        return None
      return self._constant(computation, first.operands[index])

    index, bound_index = sides[0].index, sides[1].index
    bound = self._constant(condition, sides[1].name)
    # A bound in the loop's state is known if the body passes it on unchanged.
    if bound is None and bound_index is not None:
      if body[result.operands[bound_index]].index == bound_index:
        bound = initial(bound_index)
    if index is None or bound is None:
      return None
    step, start = self._added(body, result.operands[index], index), initial(index)
    return None if step is None or start is None else max(-(-(bound - start) // step), 0)

  def _constant(self, computation, name: str) -> int | None:
    instruction = computation.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
      instruction = computation.get(instruction.operands[0])
    if (
      instruction is None
      or instruction.opcode != "constant"
      or not re.fullmatch(r"-?\d+", instruction.operands[0])
    ):
      return None
    return int(instruction.operands[0])

  def _added(self, body, name: str, index: int) -> int | None:
    """The constant that a loop body adds to element `index` of its state, or None."""
    instruction, total = body[name], 0
    while instruction.opcode in ("add", "copy", "fusion"):
      if instruction.opcode == "copy":
        instruction = body[instruction.operands[0]]
        continue
      if instruction.opcode == "fusion":
        inner = self._computations[instruction.called]
        root = self._root(inner)
        constants = [self._constant(inner, operand) for operand in root.operands]
        if root.opcode != "add" or len(instruction.operands) != 1 or not any(constants):
          return None
        total += next(value for value in constants if value)
        instruction = body[instruction.operands[0]]
        continue
      constants = [self._constant(body, operand) for operand in instruction.operands]
      if constants[0] is None and constants[1] is None:
        return None
      side = 0 if constants[0] is not None else 1
      total += constants[side]
      instruction = body[instruction.operands[1 - side]]
    return total if instruction.index == index and total > 0 else None

  def _product_flops(self, computation, instruction: hlo.Instruction) -> float:
    out = instruction.arrays[0].sizes
    left, right = (computation[name].arrays[0].sizes for name in instruction.operands[:2])
    if instruction.opcode == "dot":
      contracting = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
      contracted = [left[int(axis)] for axis in contracting.split(",") if axis]
      return 2.0 * math.prod(out) * math.prod(contracted)
    labels = instruction.attribute(r"dim_labels=(\S+?)(?:,|$)")
    left_labels, right_labels, out_labels = re.split(r"_|->", labels)
    attributes = instruction.attribute(r"window=\{([^}]*)\}") or ""
    spatial = [label for label in out_labels if label.isdigit()]

    def by_dimension(key, default):
      """An attribute's value for each spatial dimension."""
      given = re.search(rf"\b{key}=(\S+)", attributes)
      return given[1].split("x") if given else [default] * max(len(spatial), 1)

    strides, pads = by_dimension("stride", "1"), by_dimension("pad", "0_0")
    dilations, kernel_dilations = by_dimension("lhs_dilate", "1"), by_dimension("rhs_dilate", "1")
    total = 2.0 * out[out_labels.index("b")] * out[out_labels.index("f")]
    total *= right[right_labels.index("i")]
    for label in spatial:
      axis = int(label)
      window = _Window(
        size=left[left_labels.index(label)],
        kernel=right[right_labels.index(label)],
        outputs=out[out_labels.index(label)],
        stride=int(strides[axis]),
        dilation=int(dilations[axis]),
        kernel_dilation=int(kernel_dilations[axis]),
        pad=int(pads[axis].split("_")[0]),
      )
      total *= _num_products(window)
    return total / int(instruction.attribute(r"batch_group_count=(\d+)") or 1)

  def _sent(
    self, computation, instruction: hlo.Instruction, kind: str
  ) -> list[tuple[hlo.Array, float]]:
    """Returns (operand, bytes that a chip sends of it by a ring algorithm) for each operand."""
    if not self._first("sent", instruction):
      return []
    arrays = list(instruction.arrays)
    if instruction.opcode == "collective-permute-start":
      arrays = arrays[:1]
    elif instruction.opcode == "all-gather-start":
      arrays = arrays[len(arrays) // 2 :]
    parts = len(hlo.group(instruction, self._devices))
    times = (parts - 1) / parts
    if kind == "collective-permute":
      times = 1.0
    elif kind == "all-reduce":
      times *= 2
    elif kind == "reduce-scatter" and instruction.opcode.startswith("reduce-scatter"):
      times = parts - 1
    inputs = [computation[name].arrays for name in instruction.operands if name in computation]
    operands = arrays
    if len(inputs) == len(arrays) and all(inputs):
      operands = [input_arrays[0] for input_arrays in inputs]
    return [
      (operand, times * array.num_bytes) for operand, array in zip(operands, arrays, strict=True)
    ]

  def _is_sum(self, computation, permute: hlo.Instruction) -> bool:
    """Whether a permute passes on sums (it scatters), rather than unchanged parts (it gathers)."""
    forwarding = ("copy", "bitcast", "get-tuple-element", "fusion", _PERMUTE)
    source = computation.get(permute.operands[0])
    while source is not None and not self._adds(source):
      if source.opcode.removesuffix("-done") not in forwarding:
        return source.opcode == "while"
      source = computation.get(source.operands[0])
    return source is not None

  def _adds(self, instruction: hlo.Instruction) -> bool:
    """Whether an instruction computes a sum, or its initial zeros (a select in a loop)."""
    if instruction.opcode == "fusion":
      return any(map(self._adds, self._computations[instruction.called].values()))
    adds = instruction.opcode in ("add", "dot", "convolution", "select")
    return adds and bool(instruction.arrays[0].sizes)

  def _first(self, what: str, instruction: hlo.Instruction) -> bool:
    """False for further parts of a collective that is split into several instructions."""
    if "chain_id=" not in instruction.attributes:
      return True
    key = what, instruction.attribute(r"channel_id=(\d+)")
    new = key not in self._counted
    self._counted.add(key)
    return new

  def _traffic(self, computation, instruction: hlo.Instruction) -> float:
    """Bytes that an instruction outside a fusion reads from and writes to main memory."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
      return 0.0
    operands = [computation[name] for name in instruction.operands if name in computation]
    if opcode in ("copy-start", "slice-start", "async-start", "async-update"):
      # Arrays are (result, source, ...) for copy-start, otherwise ((sources), result, ...). The
      # first operand of an update is the start, which may have no sources.
      sources = operands[opcode == "async-update" :]
      if not sources:
        return 0.0
      source = sources[0].arrays[0]
      result = instruction.arrays[0 if opcode == "copy-start" else len(sources)]
      return min(source.num_bytes, result.num_bytes) * (source.in_memory + result.in_memory)
    if opcode in ("dynamic-slice", "slice", "gather"):
      read = instruction.arrays[0].num_bytes if operands[0].arrays[0].in_memory else 0.0
      return read + instruction.memory_bytes
    if opcode in ("dynamic-update-slice", "scatter"):
      update = operands[1 if opcode == "dynamic-update-slice" else -1]
      written = update.arrays[0].num_bytes if instruction.arrays[0].in_memory else 0.0
      return update.memory_bytes + written
    if opcode != "fusion":
      return sum(operand.memory_bytes for operand in operands) + instruction.memory_bytes
    inner = self._computations[instruction.called]
    if "AsyncCollectiveDone" in self._root(inner).attributes:
      return 0.0
    if "AsyncCollectiveStart" in self._root(inner).attributes:
      for part in inner.values():
        self._first("read", part), self._first("written", part)
    read = sum(
      min(self._read(inner, self._parameter(inner, number).name), operand.memory_bytes)
      for number, operand in enumerate(operands)
      if operand.memory_bytes
    )
    return read + self._written(inner, instruction)

  def _parameter(self, computation, number: int) -> hlo.Instruction:
    return next(
      i for i in computation.values() if i.opcode == "parameter" and i.operands[0] == str(number)
    )

  def _read(self, inner, name: str) -> float:
    """Bytes that a fusion reads of its parameter; if it slices the parameter, only the slices."""
    total = 0.0
    uses = [
      (user, position)
      for user in inner.values()
      for position, operand in enumerate(user.operands)
      if operand == name
    ]
    for user, position in uses:
      if user.opcode in ("bitcast", "reshape"):
        total += self._read(inner, user.name)
      elif user.opcode == "fusion":
        nested = self._computations[user.called]
        total += self._read(nested, self._parameter(nested, position).name)
      elif user.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
        total += sum(array.num_bytes for array in user.arrays)
      elif user.opcode == "tuple" or (user.opcode == "dynamic-update-slice" and position == 0):
        continue  # passed on, or written in place
      elif user.opcode in _COLLECTIVES and not self._first("read", user):
        continue
      elif user.opcode == "scatter" and position == 0:
        total += sum(array.num_bytes for array in inner[user.operands[-1]].arrays)
      else:
        return float("inf")
    return total

  def _written(self, inner, fusion: hlo.Instruction) -> float:
    """Bytes that a fusion writes to main memory; if it updates in place, only the updates."""
    root = self._root(inner)
    roots = (
      [inner[name] for name in root.operands if name in inner] if root.opcode == "tuple" else [root]
    )
    if len(roots) != len(fusion.arrays):
      return fusion.memory_bytes
    total = 0.0
    for part, array in zip(roots, fusion.arrays, strict=True):
      while part.opcode in ("bitcast", "convert") and part.operands[0] in inner:
        part = inner[part.operands[0]]
      written = array.num_bytes
      if part.opcode == "dynamic-update-slice":
        written = min(written, sum(a.num_bytes for a in inner[part.operands[1]].arrays))
      elif part.opcode == "scatter":
        written = min(written, sum(a.num_bytes for a in inner[part.operands[-1]].arrays))
      elif part.opcode == "parameter" or (
        part.opcode in _COLLECTIVES and not self._first("written", part)
      ):
        written = 0.0  # passed on
      total += written if array.in_memory else 0.0
    return total


def _kernel_cost(instruction: hlo.Instruction) -> Cost | None:
  """The cost that a Pallas kernel reports (models/fused_attention.py), or None."""
  flops, memory_bytes = (
    instruction.attribute(rf'"cost_estimate":\{{[^}}]*"{name}":"(\d+)"')
    for name in ("flops", "bytes_accessed")
  )
  return Cost(float(flops), float(memory_bytes)) if flops and memory_bytes else None


class _Window(NamedTuple):
  """One dimension of a convolution.

  Attributes:
    size: input elements.
    kernel: kernel elements.
    outputs: output elements.
    stride: of the output, in positions of the dilated input.
    dilation: positions from one input element to the next.
    kernel_dilation: positions from one kernel element to the next.
    pad: positions before the first input element.
  """

  size: int
  kernel: int
  outputs: int
  stride: int
  dilation: int
  kernel_dilation: int
  pad: int


@functools.lru_cache(maxsize=4096)
def _num_products(window: _Window) -> int:
  """Number of (output, kernel element) pairs that use an input element, not padding or a gap."""
  total, extent = 0, (window.size - 1) * window.dilation + 1
  for k in range(window.kernel):
    low = k * window.kernel_dilation - window.pad  # position of output 0
    first = max(0, -(low // window.stride))
    last = min(window.outputs - 1, (extent - 1 - low) // window.stride)
    if window.dilation == 1:
      total += max(last - first + 1, 0)
    else:
      positions = range(low + first * window.stride, low + last * window.stride + 1, window.stride)
      total += sum(position % window.dilation == 0 for position in positions)
  return total
