"""Arrays moved by collectives, against hand counts for a small program on a 2 x 4 x 2 mesh."""

from absl.testing import absltest, parameterized
from jax import ShapeDtypeStruct
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from synthneg_jax.preflight import collective_traffic, hlo, roofline

MESH = AbstractMesh((1, 2, 4, 2), ("slice", "data", "fsdp", "tensor"))
PARAMS = {
  "ends": {
    "embedding": ShapeDtypeStruct((96, 16), "float32"),
    "scale": ShapeDtypeStruct((16,), "float32"),
  },
  "layers": {
    "up": ShapeDtypeStruct((3, 16, 40), "float32"),
    "down": ShapeDtypeStruct((3, 40, 16), "float32"),
  },
}
SPECS = {
  "ends": {"embedding": PartitionSpec("tensor", "fsdp"), "scale": PartitionSpec(None)},
  "layers": {
    "up": PartitionSpec(None, "fsdp", "tensor"),
    "down": PartitionSpec(None, "tensor", "fsdp"),
  },
}
FSDP = "replica_groups={{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}"
TENSOR = "replica_groups=[8,2]<=[16]"


def moves(*collectives: str) -> dict[str, dict[str, float]]:
  """The moves of a program with these collectives, each "operand result opcode groups"."""
  lines = []
  for place, (operand, result, opcode, groups) in enumerate(
    text.split(" ", 3) for text in collectives
  ):
    lines.append(f"  %x.{place} = {operand}{{1,0}} parameter({place})")
    lines.append(
      f"  %y.{place} = {result}{{1,0}} {opcode}(%x.{place}), channel_id={place + 1}, {groups}"
    )
  text = "ENTRY %main () -> f32[] {\n" + "\n".join(lines) + "\n}\n"
  cost = roofline.Program(text, MESH.size).cost
  shardings = {
    room: {name: NamedSharding(MESH, spec) for name, spec in of.items()}
    for room, of in SPECS.items()
  }
  return collective_traffic.moves(cost, PARAMS, shardings, MESH)


class MovementTest(parameterized.TestCase):
  def test_gathers_and_scatters(self):
    # Fails if layers, the parameters of one shape, the split over tensor or the bytes of a number
    # are not counted: of six matrices of 16 x 20 two are gathered, one of them in float32, and of
    # one the gradient is scattered.
    found = moves(
      f"bf16[4,20] bf16[16,20] all-gather {FSDP}",
      f"f32[1,20,4] f32[1,20,16] all-gather {FSDP}",
      f"bf16[16,20] bf16[4,20] reduce-scatter {FSDP}",
    )
    self.assertEqual(set(found), {"embedding", "down, up", "activations", "others"})
    self.assertAlmostEqual(found["down, up"]["all-gather"], 2 / 6)
    self.assertAlmostEqual(found["down, up"]["reduce-scatter"], 1 / 6)
    self.assertEqual(found["embedding"], {})

  def test_sums_count_twice_and_rings_once(self):
    # Fails if an all-reduce counts as a scatter, or a ring of permutes as less or more than what it
    # passes on: 3 of 4 parts.
    ring = "source_target_pairs={{0,2},{2,4},{4,6},{6,0},{8,10},{10,12},{12,14},{14,8}}"
    found = moves(
      # over data and fsdp, of the other half
      "f32[96,8] f32[96,8] all-reduce replica_groups=[2,8]<=[8,2]T(1,0)",
      *3 * (f"bf16[4,20] bf16[4,20] collective-permute {ring}",),
    )
    self.assertAlmostEqual(found["embedding"]["all-reduce"], 2.0)
    self.assertAlmostEqual(found["down, up"]["collective-permute of parts"], 1 / 6)

  def test_rings_of_parts_and_of_sums(self):
    # Fails if a ring that scatters sums counts as one that gathers, or the other way round.
    text = """%begin (p: bf16[4,20]) -> bf16[4,20] {
  %p = bf16[4,20]{1,0} parameter(0)
  ROOT %s = bf16[4,20]{1,0} OPCODE(%p, %p)
}

ENTRY %main (x: bf16[4,20]) -> bf16[4,20] {
  %x = bf16[4,20]{1,0} parameter(0)
  %f = bf16[4,20]{1,0} fusion(%x), kind=kLoop, calls=%begin
  %c = bf16[4,20]{1,0} bitcast(%f)
  ROOT %y = bf16[4,20]{1,0} collective-permute(%c), channel_id=1, \
source_target_pairs={{0,2},{2,4},{4,6},{6,0}}
}
"""
    for opcode, what in (("add", "sums"), ("convert", "parts")):
      moved = roofline.Program(text.replace("OPCODE", opcode), MESH.size).cost.moved
      self.assertEqual(
        [(kind, group) for kind, group, _ in moved],
        [(f"collective-permute of {what}", (0, 2, 4, 6))],
      )

  def test_activations(self):
    # Fails if what crosses tensor counts as a parameter, though it has its sizes, or if what
    # crosses rows and is no parameter counts as activations.
    found = moves(
      f"f32[16,20] f32[16,20] all-reduce {TENSOR}", f"f32[14,20] f32[56,20] all-gather {FSDP}"
    )
    copy = 48 * 16 + 6 * 16 * 20
    self.assertAlmostEqual(found["activations"]["all-reduce"], 2 * 320 / copy)
    self.assertAlmostEqual(found["others"]["all-gather"], 56 * 20 / copy)
    self.assertEqual(found["down, up"], {})
    self.assertEqual(
      collective_traffic.lines(found), ["activations: all-reduce 0.24", "others: all-gather 0.42"]
    )

  @parameterized.parameters(
    ("replica_groups=[4,4]<=[2,4,2]T(0,2,1)", (0, 2, 4, 6)),
    ("replica_groups=[8,2]<=[16]", (0, 1)),
    ("replica_groups={{1,9},{0,8}}", (1, 9)),
    ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'a','c'}", (0, 1, 8, 9)),
    ("replica_groups={}", tuple(range(16))),
    ("source_target_pairs={{0,0},{2,6},{6,4},{4,2}}", (2, 6, 4)),
    ("source_target_pairs={{3,5}}", (3, 5)),
  )
  def test_groups(self, written, group):
    # Fails if a way to write groups is misread, or if a permute is not followed to where it began
    # or ends.
    collective = hlo.instruction(
      f"  %y = f32[4]{{0}} all-gather(%x), channel_id=1, {written}, dimensions={{0}}"
    )
    self.assertEqual(hlo.group(collective, 16), group)


if __name__ == "__main__":
  absltest.main()
