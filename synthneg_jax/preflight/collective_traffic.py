"""Arrays moved by a program's collectives: how often parameters are gathered, gradients scattered.

Rows are split over slice, data and fsdp, so only parameters and their gradients need to cross these
axes. Collectives over tensor alone move activations. A parameter is identified by its sizes: each
dimension of the moved array equals the parameter's, or that divided by part of the mesh. Parameters
with the same sizes are counted together.
"""

import collections
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from synthneg_jax.preflight import roofline

ACTIVATIONS, OTHERS = "activations", "others"


def moves(cost: roofline.Cost, params, specs, mesh: Mesh) -> dict[str, dict[str, float]]:
  """Counts how many times per run each parameter, or its gradient, is moved.

  Moving a full copy, split over tensor but not over fsdp, counts once for a gather, a scatter, or a
  ring of permutes that passes all its parts, and twice for an all-reduce.

  Args:
    cost: of the program.
    params: abstract parameters, {"ends": {name: array}, "layers": {name: [Y, ...]}}.
    specs: their shardings.
    mesh: of the program.

  Returns:
    {names of parameters: {kind of collective: times per run}}, and likewise for ACTIVATIONS and
    OTHERS, in copies of all parameters. OTHERS are arrays that cross rows without a parameter's
    sizes; they include vectors, such as the scales of norms.
  """
  names = collections.defaultdict(list)  # by sizes
  whole = collections.Counter()  # elements of full copies, by sizes
  layouts = collections.defaultdict(set)  # gathered and sharded sizes, by sizes
  leaves = jax.tree_util.tree_leaves_with_path(params)
  for (path, leaf), sharding in zip(leaves, jax.tree.leaves(specs), strict=True):
    stacked = path[0].key == "layers"
    stack, sizes = (leaf.shape[0], leaf.shape[1:]) if stacked else (1, leaf.shape)
    if len(sizes) > 1:
      key, axes = tuple(sorted(sizes)), tuple(sharding.spec)[-len(sizes) :]
      gathered = [
        size // (mesh.shape["tensor"] if axis == "tensor" else 1)
        for size, axis in zip(sizes, axes, strict=True)
      ]
      names[key].append(path[-1].key)
      whole[key] += stack * math.prod(gathered)
      layouts[key] |= {
        tuple(sorted(gathered)),
        tuple(sorted(sharding.shard_shape(leaf.shape)[-len(sizes) :])),
      }
  label = {sizes: ", ".join(names[sizes]) for sizes in whole}
  times = {name: collections.defaultdict(float) for name in (*label.values(), ACTIVATIONS, OTHERS)}
  for (kind, group, array), sent in cost.moved.items():
    parts, itemsize = len(group), array.num_bytes / max(math.prod(array.sizes), 1)
    if parts < 2 or not sent:
      continue
    elements = sent / itemsize * parts / (parts - 1)
    own = tuple(sorted(size for size in array.sizes if size != 1))
    exact = (sizes for sizes in whole if own in layouts[sizes])
    partial = (sizes for sizes in whole if kind != "all-gather" and _is_part(own, sizes, mesh.size))
    sizes = next(itertools.chain(exact, partial), None)
    if _across(group, mesh) <= {"tensor"}:
      times[ACTIVATIONS][kind] += elements / whole.total()
    elif sizes is None:
      times[OTHERS][kind] += elements / whole.total()
    else:
      times[label[sizes]][kind] += elements / whole[sizes]
  return {name: dict(kinds) for name, kinds in times.items()}


def _across(group: Sequence[int], mesh: Mesh) -> set[str]:
  """The mesh axes along which a group's devices differ."""
  coordinates = np.unravel_index(group, tuple(mesh.shape.values()))
  return {axis for axis, x in zip(mesh.shape, coordinates, strict=True) if len(set(x.tolist())) > 1}


def _is_part(own: Sequence[int], whole: Sequence[int], devices: int) -> bool:
  """Whether an array may be a parameter of these sizes, or a part of it, in any axis order."""

  def fits(part, size):
    return size % part == 0 and devices % (size // part) == 0

  return len(own) == len(whole) and any(
    all(map(fits, permuted, whole)) for permuted in itertools.permutations(own)
  )


def lines(moved: dict[str, dict[str, float]]) -> list[str]:
  """One printed line per parameter; omits what moves less than 0.01 times."""
  text = []
  for name, kinds in moved.items():
    shown = [f"{kind} {times:.2f}" for kind, times in sorted(kinds.items()) if times >= 0.01]
    if shown:
      text.append(f"{name}: {', '.join(shown)}")
  return text
