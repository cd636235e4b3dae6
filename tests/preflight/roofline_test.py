"""Costs from HLO, against hand counts for a small program and XLA's own analysis."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.preflight import roofline

# Three turns of a loop: each multiplies x by one matrix of a stack, which a fusion within a fusion
# slices out, and sums x over four devices; S(1) is memory on the chip.
LOOP = """HloModule loop

%slice (p.0: f32[6,8,8], p.1: s32[]) -> f32[8,8] {
  %p.0 = f32[6,8,8]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,8,8]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,8,8}
  ROOT %flat = f32[8,8]{1,0} bitcast(%cut)
}

%product (q.0: f32[4,8], q.1: f32[6,8,8], q.2: s32[]) -> f32[4,8] {
  %q.0 = f32[4,8]{1,0} parameter(0)
  %q.1 = f32[6,8,8]{2,1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  %matrix = f32[8,8]{1,0} fusion(%q.1, %q.2), kind=kLoop, calls=%slice
  ROOT %out = f32[4,8]{1,0} convolution(%q.0, %matrix), dim_labels=bf_io->bf
}

%body (state: (s32[], f32[4,8], f32[6,8,8])) -> (s32[], f32[4,8], f32[6,8,8]) {
  %state = (s32[], f32[4,8]{1,0}, f32[6,8,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %two = s32[] constant(2)
  %next = s32[]{:S(6)} add(%i, %two)
  %x = f32[4,8]{1,0} get-tuple-element(%state), index=1
  %stack = f32[6,8,8]{2,1,0} get-tuple-element(%state), index=2
  %y = f32[4,8]{1,0:S(1)} fusion(%x, %stack, %i), kind=kOutput, calls=%product
  %sum = f32[4,8]{1,0} all-reduce(%y), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %new = (s32[], f32[4,8]{1,0}, f32[6,8,8]{2,1,0}) tuple(%next, %sum, %stack)
}

%condition (state.1: (s32[], f32[4,8], f32[6,8,8])) -> pred[] {
  %state.1 = (s32[], f32[4,8]{1,0}, f32[6,8,8]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %bound = s32[] constant(BOUND)
  ROOT %less = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (x.1: f32[4,8], stack.1: f32[6,8,8]) -> f32[4,8] {
  %x.1 = f32[4,8]{1,0} parameter(0)
  %stack.1 = f32[6,8,8]{2,1,0} parameter(1)
  %start = s32[] constant(1)
  %first = (s32[], f32[4,8]{1,0}, f32[6,8,8]{2,1,0}) tuple(%start, %x.1, %stack.1)
  %loop = (s32[], f32[4,8]{1,0}, f32[6,8,8]{2,1,0}) while(%first), condition=%condition, body=%body
  ROOT %end = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


# One all-gather that is cut into parts around a product: begun, carried on within a fusion that
# multiplies something else, ended.
CHAIN = """HloModule chain

%begin (a.0: f32[2,8]) -> (f32[2,8], f32[8,8]) {
  %a.0 = f32[2,8]{1,0} parameter(0)
  %part.1 = f32[8,8]{1,0} all-gather(%a.0), channel_id=7, replica_groups=[2,4]<=[8], \
frontend_attributes={chain_id="1"}
  ROOT %started = (f32[2,8]{1,0}, f32[8,8]{1,0}) custom-call(%part.1), \
custom_call_target="AsyncCollectiveStart"
}

%carry (b.0: f32[2,8], b.1: f32[8,8], b.2: f32[4,8], b.3: f32[8,8]) \
-> (f32[4,8], f32[2,8], f32[8,8], f32[8,8]) {
  %b.0 = f32[2,8]{1,0} parameter(0)
  %b.1 = f32[8,8]{1,0} parameter(1)
  %b.2 = f32[4,8]{1,0} parameter(2)
  %b.3 = f32[8,8]{1,0} parameter(3)
  %y = f32[4,8]{1,0} convolution(%b.2, %b.3), dim_labels=bf_io->bf
  %part.2 = f32[8,8]{1,0} all-gather(%b.0), channel_id=7, replica_groups=[2,4]<=[8], \
frontend_attributes={chain_id="1"}
  ROOT %carried = (f32[4,8]{1,0}, f32[2,8]{1,0}, f32[8,8]{1,0}, f32[8,8]{1,0}) tuple(%y, %b.0, \
%b.1, %part.2)
}

%end (c.0: f32[2,8], c.1: f32[8,8]) -> f32[8,8] {
  %c.0 = f32[2,8]{1,0} parameter(0)
  %c.1 = f32[8,8]{1,0} parameter(1)
  %part.3 = f32[8,8]{1,0} all-gather(%c.0), channel_id=7, replica_groups=[2,4]<=[8], \
frontend_attributes={chain_id="1"}
  ROOT %ended = f32[8,8]{1,0} custom-call(%c.0, %c.1, %part.3), \
custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x.1: f32[2,8], y.1: f32[4,8], z.1: f32[8,8]) -> f32[8,8] {
  %x.1 = f32[2,8]{1,0} parameter(0)
  %y.1 = f32[4,8]{1,0} parameter(1)
  %z.1 = f32[8,8]{1,0} parameter(2)
  %start = (f32[2,8]{1,0}, f32[8,8]{1,0}) fusion(%x.1), kind=kCustom, calls=%begin
  %s.0 = f32[2,8]{1,0} get-tuple-element(%start), index=0
  %s.1 = f32[8,8]{1,0} get-tuple-element(%start), index=1
  %work = (f32[4,8]{1,0}, f32[2,8]{1,0}, f32[8,8]{1,0}, f32[8,8]{1,0}) fusion(%s.0, %s.1, %y.1, \
%z.1), calls=%carry
  %w.0 = f32[2,8]{1,0} get-tuple-element(%work), index=1
  %w.1 = f32[8,8]{1,0} get-tuple-element(%work), index=2
  ROOT %done = f32[8,8]{1,0} fusion(%w.0, %w.1), kind=kCustom, calls=%end
}
"""


class HandTest(parameterized.TestCase):
  def test_a_collective_between_other_work(self):
    # Fails if each part of a collective sends, reads or writes all of it again, or if what a fusion
    # merely passes on counts as read or written.
    cost = roofline.Program(CHAIN, 8).cost
    self.assertEqual(dict(cost.collectives), {"all-gather": 8 * 8 * 4 * 3 / 4})
    self.assertEqual(cost.flops, 2 * 4 * 8 * 8)
    shard, whole, y = 2 * 8 * 4, 8 * 8 * 4, 4 * 8 * 4
    # The collective reads a shard and writes the whole; the product reads and writes its own.
    self.assertEqual(cost.memory_bytes, (shard + whole) + (y + whole + y))

  @parameterized.parameters(("6", 3), ("7", 3), ("8", 4), ("1", 0))
  def test_a_loop(self, bound, turns):
    # Fails if a loop's start or step is not read, if a whole stack counts where a slice is read, if
    # memory on the chip counts as main memory, or if a sum over devices is sent once instead of
    # twice, or by eight devices.
    cost = roofline.Program(LOOP.replace("BOUND", bound), 8).cost
    self.assertEqual(cost.flops, turns * 2 * 4 * 8 * 8)
    x, matrix, scalars = 4 * 8 * 4, 8 * 8 * 4, 3 * 4
    # Read x, a matrix, and three scalars (the index twice, the step); write x.
    self.assertEqual(cost.memory_bytes, turns * (x + matrix + scalars + x))
    self.assertEqual(dict(cost.collectives), {"all-reduce": turns * 2 * x * 3 / 4})
    self.assertEqual(sum(cost.moved.values()), cost.collective_bytes)

  def test_a_loop_of_unknown_length(self):
    # Fails if a loop that only the data ends counts as none, or as known.
    text = LOOP.replace(
      "%bound = s32[] constant(BOUND)", "%bound = s32[] get-tuple-element(%state.1), index=0"
    )
    program = roofline.Program(text, 8)
    self.assertEqual(program.cost.flops, 2 * 4 * 8 * 8)
    self.assertEqual(program.open_loop.flops, 2 * 4 * 8 * 8)
    self.assertIsNone(roofline.Program(LOOP.replace("BOUND", "6"), 8).open_loop)

  @parameterized.parameters(
    ("all-gather", "f32[16,8]{1,0}", "", 512 * 3 / 4),
    ("reduce-scatter", "f32[1,8]{1,0}", "", 32 * 3),
    ("all-to-all", "f32[4,8]{1,0}", "", 128 * 3 / 4),
    ("collective-permute", "f32[4,8]{1,0}", "", 128),
    ("send", "(f32[4,8]{1,0}, u32[], token[])", "", 128),
    ("all-gather-start", "(f32[4,8]{1,0}, f32[16,8]{1,0})", "", 512 * 3 / 4),
    (
      "collective-permute-start",
      "(f32[4,8]{1,0}, f32[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)})",
      "",
      128,
    ),
  )
  def test_collectives(self, opcode, shape, _, sent):
    # Fails if a kind counts as another, or if a start's operands count with its results.
    for groups in ("[2,4]<=[8]", "{{0,1,2,3},{4,5,6,7}}", "mesh['a'=2,'b'=4] {'b'}"):
      text = (
        "ENTRY %main (x: f32[4,8]) -> f32[4,8] {\n  %x = f32[4,8]{1,0} parameter(0)\n"
        f"  ROOT %y = {shape} {opcode}(%x), channel_id=1, replica_groups={groups}, "
        f"dimensions={{0}}\n}}\n"
      )
      self.assertEqual(
        dict(roofline.Program(text, 8).cost.collectives), {opcode.removesuffix("-start"): sent}
      )


class XlaTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_scanned_and_unrolled_programs_of_this_machine(self, scan):
    # Fails if products that XLA writes as dots are not counted, or the loop's length is not found.
    def run(stack, x):
      return jax.lax.scan(
        lambda x, matrix: (jnp.tanh(x @ matrix), None), x, stack, unroll=1 if scan else 5
      )[0]

    compiled = (
      jax.jit(run).lower(np.ones((5, 32, 32), np.float32), np.ones((16, 32), np.float32)).compile()
    )
    self.assertEqual(roofline.Program(compiled.as_text(), 1).cost.flops, 5 * 2 * 16 * 32 * 32)


if __name__ == "__main__":
  absltest.main()
