"""Peak performance of accelerators, from their makers' published figures."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """Capacities of a chip.

  Attributes:
    hbm_bytes: size of main memory.
    flops: bfloat16 FLOPs per second of dense matrix products.
    memory_rate: bytes per second to and from main memory.
    link_rate: bytes per second to other chips over all links.
  """

  hbm_bytes: int
  flops: float
  memory_rate: float
  link_rate: float


# By generation; https://cloud.google.com/tpu/docs/v5e and its neighbours.
CHIPS = {
  "v4": Chip(32 << 30, 275e12, 1.2e12, 300e9),
  "v5e": Chip(16 << 30, 197e12, 0.82e12, 200e9),
  "v5p": Chip(95 << 30, 459e12, 2.77e12, 600e9),
  "v6e": Chip(32 << 30, 918e12, 1.64e12, 448e9),
}
# By a word of JAX's device kind; from NVIDIA's data sheets (SXM modules, without sparsity).
GPUS = {
  "H200": Chip(141 * 10**9, 989e12, 4.8e12, 900e9),
  "H100": Chip(80 * 10**9, 989e12, 3.35e12, 900e9),
  "A100": Chip(80 * 10**9, 312e12, 2.04e12, 600e9),
  "L4": Chip(24 * 10**9, 121e12, 0.3e12, 64e9),
}
_TPU_KINDS = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
}


def from_device_kind(device_kind: str) -> Chip | None:
  """The chip with this JAX device kind ("NVIDIA H200", "TPU v5 lite"); None if unknown."""
  if device_kind in _TPU_KINDS:
    return CHIPS[_TPU_KINDS[device_kind]]
  words = device_kind.replace("-", " ").split()
  return next((chip for name, chip in GPUS.items() if name in words), None)
