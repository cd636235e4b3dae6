"""Which arrays a program's collectives move: how many times a step each parameter is gathered, and
its gradient scattered.

Rows are split over slice, data and fsdp, so that nothing of a row need cross these axes: what does
is parameters and their gradients. What crosses tensor alone is activations. Which parameter it is,
its sizes tell: each dimension is one of the parameter's, or that divided by some of the mesh.
Parameters of the same sizes cannot be told apart and are counted together.
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
  """{names of parameters: {kind of collective: times a run}}.

  A gather or a scatter of the whole counts once, an all-reduce twice (it scatters, and gathers what
  was summed), as does a ring of permutes once that passes all parts of it. The whole is what a
  row's devices need: split over tensor, not over fsdp.

  Args:
    cost: of the program.
    params: abstract parameters, {"ends": {name: array}, "layers": {name: [Y, ...]}}.
    specs: their shardings.
    mesh: of the program.

  Returns:
    Besides the parameters, ACTIVATIONS and OTHERS (what crosses rows and has no parameter's sizes),
    in copies of all parameters. Vectors, such as the scales of norms, are left out: they belong to
    OTHERS.
  """
  names, whole, lies = (
    collections.defaultdict(list),
    collections.Counter(),
    collections.defaultdict(set),
  )
  of_one = jax.tree_util.tree_leaves_with_path(params)
  for (path, leaf), sharding in zip(of_one, jax.tree.leaves(specs), strict=True):
    stack = leaf.shape[0] if path[0].key == "layers" else 1
    sizes = leaf.shape[1:] if path[0].key == "layers" else leaf.shape
    if len(sizes) > 1:
      key, axes = tuple(sorted(sizes)), tuple(sharding.spec)[-len(sizes) :]
      gathered = [
        size // (mesh.shape["tensor"] if axis == "tensor" else 1)
        for size, axis in zip(sizes, axes, strict=True)
      ]
      names[key].append(path[-1].key)
      whole[key] += stack * math.prod(gathered)
      lies[key] |= {
        tuple(sorted(gathered)),
        tuple(sorted(sharding.shard_shape(leaf.shape)[-len(sizes) :])),
      }
  label = {sizes: ", ".join(names[sizes]) for sizes in whole}
  found = {name: collections.defaultdict(float) for name in (*label.values(), ACTIVATIONS, OTHERS)}
  for (kind, group, array), sent in cost.moved.items():
    parts, itemsize = len(group), array.num_bytes / max(math.prod(array.sizes), 1)
    if parts < 2 or not sent:
      continue
    elements = sent / itemsize * parts / (parts - 1)
    own = tuple(sorted(size for size in array.sizes if size != 1))
    surely = (sizes for sizes in whole if own in lies[sizes])
    perhaps = (sizes for sizes in whole if kind != "all-gather" and _is_part(own, sizes, mesh.size))
    sizes = next(itertools.chain(surely, perhaps), None)
    if _across(group, mesh) <= {"tensor"}:
      found[ACTIVATIONS][kind] += elements / whole.total()
    elif sizes is None:
      found[OTHERS][kind] += elements / whole.total()
    else:
      found[label[sizes]][kind] += elements / whole[sizes]
  return {name: dict(kinds) for name, kinds in found.items()}


def _across(group: Sequence[int], mesh: Mesh) -> set[str]:
  """The axes of the mesh that a group's devices differ in."""
  places = np.unravel_index(group, tuple(mesh.shape.values()))
  return {
    axis for axis, place in zip(mesh.shape, places, strict=True) if len(set(place.tolist())) > 1
  }


def _is_part(own: Sequence[int], whole: Sequence[int], devices: int) -> bool:
  """Whether an array may be a parameter of these sizes, turned or not, or what some of the mesh's
  axes leave of it.
  """

  def fits(part, size):
    return size % part == 0 and devices % (size // part) == 0

  return len(own) == len(whole) and any(
    all(map(fits, turned, whole)) for turned in itertools.permutations(own)
  )


def worst(found: dict[str, dict[str, float]]) -> tuple[float, str, str]:
  """(times, parameters, kind of collective): what moves most often, activations left out."""
  listed = [
    (times, name, kind)
    for name, kinds in found.items()
    if name != ACTIVATIONS
    for kind, times in kinds.items()
  ]
  return max(listed, default=(0.0, "", ""))


def lines(found: dict[str, dict[str, float]]) -> list[str]:
  """For a reader, a line each; what moves less than a hundredth is left out."""
  shown = {
    name: {kind: times for kind, times in kinds.items() if times >= 0.01}
    for name, kinds in found.items()
  }

  def each(kinds):
    return ", ".join(f"{kind} {times:.2f}" for kind, times in sorted(kinds.items()))

  return [f"{name}: {each(kinds)}" for name, kinds in shown.items() if kinds]
