"""What a compiled program does, read from its optimised HLO: FLOPs, bytes over memory, bytes
between chips.

XLA's own cost analysis counts the body of a loop once. Here a body counts as often as its loop
turns; a loop whose turns only the data knows (decoding) counts once, so that its figures are those
of one turn. Counted are matrix products (2·M·N·K; on TPU they are convolutions), what instructions
read from and write to the chip's main memory, and what a chip sends by the usual ring algorithms. A
Pallas kernel counts as it says of itself.
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
  """Per chip and run of the program.

  Attributes:
    flops: of matrix products.
    memory_bytes: read from and written to main memory.
    collectives: bytes sent, by kind; "send" is what goes to other slices, over the data-centre
      network.
    moved: the same by (kind, group of devices, array), but for what is sent to other slices;
      permutes are of parts or sums.
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
    """Adds another cost so many times."""
    self.flops += times * other.flops
    self.memory_bytes += times * other.memory_bytes
    for kind, size in other.collectives.items():
      self.collectives[kind] += times * size
    for key, size in other.moved.items():
      self.moved[key] += times * size

  @property
  def collective_bytes(self) -> float:
    """Bytes sent, of all kinds together."""
    return sum(self.collectives.values())


class Program:
  """An HLO module's text, as computations of instructions."""

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
    self._counted = set()  # (what, channel) of collectives that show in several instructions

  @functools.cached_property
  def cost(self) -> Cost:
    """Of one run."""
    return self._cost(self._entry)

  @functools.cached_property
  def open_loop(self) -> Cost | None:
    """Of one turn of the outermost loop whose length only the data knows (of several, the largest);
    None if there is none.
    """
    for computation in map(
      self._computations.get, [self._entry, *reversed(self._computations)]
    ):  # callers come last
      costs = []
      for loop in computation.values():
        if loop.opcode == "while" and self._turns(computation, loop) is None:
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
        turns = self._turns(computation, instruction)
        total.add(body, 1 if turns is None else turns)
        continue
      if instruction.opcode == "conditional":
        branches = re.findall(
          r"%([\w.\-]+)", instruction.attribute(r"branch_computations=\{([^}]*)\}") or ""
        )
        branches += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)
        total.add(
          max(
            (self._cost(branch) for branch in branches), key=lambda cost: cost.flops, default=Cost()
          )
        )
        continue
      called = instruction.attribute(r"calls=%?([\w.\-]+)")
      if instruction.opcode == "call":
        total.add(self._cost(instruction.attribute(r"to_apply=%?([\w.\-]+)")))
        continue
      if called:
        inner = self._cost(called, fused=True)
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
        for array, size in self._sent(computation, instruction, kind):
          total.collectives[kind] += size
          of = (
            f"{kind} of {'sums' if self._is_sum(computation, instruction) else 'parts'}"
            if kind == _PERMUTE
            else kind
          )
          total.moved[of, hlo.group(instruction, self._devices), array] += size
      if kind == "send":  # to another slice, by way of the hosts
        total.collectives["send"] += instruction.arrays[0].num_bytes
      if not fused:
        total.memory_bytes += self._traffic(computation, instruction)
    return total

  def _turns(self, computation, loop: hlo.Instruction) -> int | None:
    """How often a loop runs its body: from `index < bound` and what the body adds to the index."""
    known = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
    if known:
      return int(known)
    condition = self._computations[loop.attribute(r"condition=%?([\w.\-]+)")]
    body = self._computations[loop.attribute(r"body=%?([\w.\-]+)")]
    root, first = self._root(condition), computation.get(loop.operands[0])
    if root.opcode == "fusion":  # the comparison alone, its operands as they stand
      inner = self._root(self._computations[root.attribute(r"calls=%?([\w.\-]+)")])
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
    index = sides[0].attribute(r"index=(\d+)") if sides[0].opcode == "get-tuple-element" else None

    def start(place):
      return self._constant(computation, first.operands[place]) if first.opcode == "tuple" else None

    bound = self._constant(condition, sides[1].name)
    result = self._root(body)
    if (
      bound is None
      and sides[1].opcode == "get-tuple-element"
      and first is not None
      and result.opcode == "tuple"
    ):
      place = sides[1].attribute(r"index=(\d+)")
      passed = body[result.operands[int(place)]]  # as the loop got it, or the bound moves
      same = passed.opcode == "get-tuple-element" and passed.attribute(r"index=(\d+)") == place
      bound = start(int(place)) if same else None
    if index is None or bound is None or first is None:
      return None
    step = (
      self._added(body, result.operands[int(index)], int(index))
      if result.opcode == "tuple"
      else None
    )
    begin = start(int(index))
    return None if step is None or begin is None else max(-(-(bound - begin) // step), 0)

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
    """What a loop's body adds to the element `index` of its state, if it adds constants to it."""
    instruction, total = body[name], 0
    while instruction.opcode in ("add", "copy", "fusion"):
      if instruction.opcode == "copy":
        instruction = body[instruction.operands[0]]
        continue
      if instruction.opcode == "fusion":
        inner = self._computations[instruction.attribute(r"calls=%?([\w.\-]+)")]
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
      place = 0 if constants[0] is not None else 1
      total += constants[place]
      instruction = body[instruction.operands[1 - place]]
    is_index = instruction.opcode == "get-tuple-element" and instruction.attribute(
      r"index=(\d+)"
    ) == str(index)
    return total if is_index and total > 0 else None

  def _product_flops(self, computation, instruction: hlo.Instruction) -> float:
    out = instruction.arrays[0].sizes
    left, right = (computation[name].arrays[0].sizes for name in instruction.operands[:2])
    if instruction.opcode == "dot":
      contracting = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
      return (
        2.0
        * math.prod(out)
        * math.prod(left[int(place)] for place in contracting.split(",") if place)
      )
    labels = instruction.attribute(r"dim_labels=(\S+?)(?:,|$)")
    of_left, of_right, of_out = re.split(r"_|->", labels)
    groups = int(instruction.attribute(r"feature_group_count=(\d+)") or 1)
    attributes = instruction.attribute(r"window=\{([^}]*)\}") or ""
    spatial = [label for label in of_out if label.isdigit()]

    def by_dimension(key, default):
      """An attribute's value for each spatial dimension."""
      given = re.search(rf"\b{key}=(\S+)", attributes)
      return given[1].split("x") if given else [default] * max(len(spatial), 1)

    strides, pads = by_dimension("stride", "1"), by_dimension("pad", "0_0")
    dilations, kernel_dilations = by_dimension("lhs_dilate", "1"), by_dimension("rhs_dilate", "1")
    total = 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]
    for label in spatial:  # pairs of output and kernel places that meet an element of the input
      at = int(label)
      window = _Window(
        size=left[of_left.index(label)],
        kernel=right[of_right.index(label)],
        places=out[of_out.index(label)],
        stride=int(strides[at]),
        dilate=int(dilations[at]),
        reach=int(kernel_dilations[at]),
        pad=int(pads[at].split("_")[0]),
      )
      total *= _meetings(window)
    return (
      total / max(int(instruction.attribute(r"batch_group_count=(\d+)") or 1), 1)
      if groups
      else total
    )

  def _sent(
    self, computation, instruction: hlo.Instruction, kind: str
  ) -> list[tuple[hlo.Array, float]]:
    """(operand, bytes that a chip sends of it), by ring algorithms."""
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
    given = [computation[name].arrays for name in instruction.operands if name in computation]
    named = (
      [of[0] for of in given] if len(given) == len(arrays) and all(map(len, given)) else arrays
    )
    return [(name, times * array.num_bytes) for name, array in zip(named, arrays, strict=True)]

  def _is_sum(self, computation, permute: hlo.Instruction) -> bool:
    """Whether a permute passes on sums, as one that scatters does, or parts as they lie, as one
    that gathers does.
    """
    source, passed = (
      computation.get(permute.operands[0]),
      ("copy", "bitcast", "get-tuple-element", "fusion", _PERMUTE),
    )
    while (
      source is not None
      and source.opcode.removesuffix("-done") in passed
      and not self._adds(source)
    ):
      source = computation.get(source.operands[0])
    return source is not None and (source.opcode == "while" or self._adds(source))

  def _adds(self, instruction: hlo.Instruction) -> bool:
    """Whether it makes a sum, or its start: a select, which gives zeros in a loop's first turn."""
    if instruction.opcode == "fusion":
      return any(
        map(self._adds, self._computations[instruction.attribute(r"calls=%?([\w.\-]+)")].values())
      )
    return instruction.opcode in ("add", "dot", "convolution", "select") and bool(
      instruction.arrays[0].sizes
    )

  def _first(self, what: str, instruction: hlo.Instruction) -> bool:
    """False if this is a further part of a collective that was counted: cut up between other work,
    it shows in each.
    """
    if "chain_id=" not in instruction.attributes:
      return True
    key = what, instruction.attribute(r"channel_id=(\d+)")
    new = key not in self._counted
    self._counted.add(key)
    return new

  def _traffic(self, computation, instruction: hlo.Instruction) -> float:
    """Bytes that an instruction outside of a fusion reads from and writes to main memory."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
      return 0.0
    operands = [computation[name] for name in instruction.operands if name in computation]
    if opcode in ("copy-start", "slice-start", "async-start", "async-update"):
      # (result, source, ...) or ((sources), result, ...); an update's first operand is the start,
      # which may have no sources
      sources = operands[opcode == "async-update" :]
      if not sources:
        return 0.0
      source, result = (
        sources[0].arrays[0],
        instruction.arrays[0 if opcode == "copy-start" else len(sources)],
      )
      return min(source.num_bytes, result.num_bytes) * (source.in_memory + result.in_memory)
    if opcode in ("dynamic-slice", "slice", "gather"):
      read = instruction.arrays[0].num_bytes if operands[0].arrays[0].in_memory else 0.0
      return read + instruction.memory_bytes
    if opcode in ("dynamic-update-slice", "scatter"):
      place = 1 if opcode == "dynamic-update-slice" else -1
      update = operands[place]
      return update.memory_bytes + (
        update.arrays[0].num_bytes if instruction.arrays[0].in_memory else 0.0
      )
    if opcode != "fusion":
      return sum(operand.memory_bytes for operand in operands) + instruction.memory_bytes
    inner = self._computations[instruction.attribute(r"calls=%?([\w.\-]+)")]
    if "AsyncCollectiveDone" in self._root(inner).attributes:
      return 0.0
    if "AsyncCollectiveStart" in self._root(inner).attributes:
      for part in inner.values():
        self._first("read", part), self._first("written", part)
    read = sum(
      min(self._read(inner, self._parameter(inner, place).name), operand.memory_bytes)
      for place, operand in enumerate(operands)
      if operand.memory_bytes
    )
    return read + self._written(inner, instruction)

  def _parameter(self, computation, place: int) -> hlo.Instruction:
    return next(
      i for i in computation.values() if i.opcode == "parameter" and i.operands[0] == str(place)
    )

  def _read(self, inner, name: str) -> float:
    """Bytes of a fusion's parameter that it looks at: of a stack that it slices, the slice."""
    total = 0.0
    for user, place in (
      (i, place) for i in inner.values() for place, used in enumerate(i.operands) if used == name
    ):
      if user.opcode in ("bitcast", "reshape"):
        total += self._read(inner, user.name)
      elif user.opcode == "fusion":
        within = self._computations[user.attribute(r"calls=%?([\w.\-]+)")]
        total += self._read(within, self._parameter(within, place).name)
      elif user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
        total += sum(array.num_bytes for array in user.arrays)
      elif user.opcode == "tuple" or (user.opcode == "dynamic-update-slice" and place == 0):
        total += 0.0  # passed on, written in place
      elif user.opcode in _COLLECTIVES and not self._first("read", user):
        total += 0.0
      elif user.opcode == "scatter" and place == 0:
        total += sum(array.num_bytes for array in inner[user.operands[-1]].arrays)
      else:
        return float("inf")
    return total

  def _written(self, inner, fusion: hlo.Instruction) -> float:
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
  """Of a kernel of ours, what it says of itself (models/fused_attention.py); None of any other
  instruction.
  """
  said = [
    instruction.attribute(rf'"cost_estimate":\{{[^}}]*"{name}":"(\d+)"')
    for name in ("flops", "bytes_accessed")
  ]
  return Cost(float(said[0]), float(said[1])) if all(said) else None


class _Window(NamedTuple):
  """One dimension of a convolution.

  Attributes:
    size: elements of the input.
    kernel: places of the kernel.
    places: places of the output.
    stride: of the output places, in input places.
    dilate: input places from one element to the next; between them are gaps.
    reach: input places from one kernel place to the next.
    pad: places before the first element.
  """

  size: int
  kernel: int
  places: int
  stride: int
  dilate: int
  reach: int
  pad: int


@functools.lru_cache(maxsize=4096)
def _meetings(window: _Window) -> int:
  """How many pairs (output place, kernel place) of a window meet an element of the input, not
  padding or a gap.
  """
  size, kernel, places, stride, dilate, reach, pad = window
  total, extent = 0, (size - 1) * dilate + 1
  for k in range(kernel):
    low = k * reach - pad  # the input place of output place 0
    first = max(0, -(-(0 - low) // stride))
    last = min(places - 1, (extent - 1 - low) // stride)
    if dilate == 1:
      total += max(last - first + 1, 0)
    else:
      total += sum((low + o * stride) % dilate == 0 for o in range(first, last + 1))
  return total
