"""Preflight at depth 2 on v5e:4x4: every program compiles, and figures match hand counts."""

import contextlib
import functools
import io
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from unittest import mock

import pytest

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from synthneg_jax.models import attention
from synthneg_jax.preflight import cost_model, preflight
from synthneg_jax.preflight.compiled_programs import PROGRAMS, Program, Recipe, architecture
from synthneg_jax.runtime import config_schema, device_mesh
from synthneg_jax.runtime.errors import UserError

pytestmark = pytest.mark.slow  # compiles for TPUs

SIZES = {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 512}
LENGTHS = cost_model.Lengths(prompt=12, response=24, steps=4, pass_rate=0.5)


def make_config(folder: pathlib.Path, **model):
  """A default config with a narrow model on 16 chips."""
  sizes = {"model_type": "llama", "num_attention_heads": 4, **SIZES, **model}
  (folder / "config.json").write_text(json.dumps(sizes))
  c = config_schema.default()
  c.model.path = str(folder)
  c.model.dtype, c.model.scan_layers, c.model.remat = "bfloat16", True, "selective"
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 2, 4, 2
  for section in (c.sft, c.rft, c.dpo):
    section.row_length, section.batch_size = 128, 24
  c.dpo.batch_size = 16
  c.engine.lanes = c.credit.lanes = 8
  c.engine.slots = c.credit.slots = 2
  c.engine.max_new_tokens = 32
  c.sample.num_traces, c.credit.num_rollouts = 5, 5
  return c


def run(config, topology="v5e:4x4", stages=None, out=None):
  """The text that preflight prints."""
  text = io.StringIO()
  with contextlib.redirect_stdout(text):
    preflight.main(config, topology, stages, out, LENGTHS, 0.5)
  return text.getvalue()


def preflight_reports(config, stages):
  """The reports of preflight."""
  with contextlib.redirect_stdout(io.StringIO()):
    return preflight.main(config, "v5e:4x4", stages, None, LENGTHS, 0.5)


def kinds(text: str, name: str) -> dict[str, float]:
  """Bytes sent by a program, by kind, parsed from the printed text."""
  lines = text[text.index(f"\n{name}: ") + 1 :].splitlines()
  found = re.search(
    r"GB by kind: (.*)\)", next(line for line in lines if line.startswith("  links"))
  ).group(1)
  return {
    kind: 1e9 * float(size) for kind, size in (part.rsplit(" ", 1) for part in found.split(", "))
  }


class PreflightTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.addClassCleanup(
      jax.config.update, "jax_enable_compilation_cache", jax.config.jax_enable_compilation_cache
    )
    cls.folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    cls.config = make_config(cls.folder)
    cls.text = run(cls.config, out=str(cls.folder / "figures.json"))
    cls.result = json.loads((cls.folder / "figures.json").read_text())
    cls.programs = {entry["name"]: entry for entry in cls.result["programs"]}

  def test_form(self):
    # Fails if a program of a stage is left out, if a figure changes its name, or if the last line
    # is not the figures.
    self.assertEqual(list(self.programs), list(PROGRAMS))
    self.assertEqual(set(self.result), {"topology", "programs", "bill"})
    self.assertEqual(json.loads(self.text.splitlines()[-1]), self.result)
    for entry in self.programs.values():
      self.assertEqual(
        list(entry),
        [
          "name",
          "fits",
          "peak_bytes_per_chip",
          "hbm_bytes_per_chip",
          "flops_per_chip",
          "model_flops_per_chip",
          "collective_bytes_per_chip",
          "bound_by",
        ],
      )
      self.assertTrue(entry["fits"])
      self.assertEqual(entry["hbm_bytes_per_chip"], 16 << 30)
      self.assertIn(entry["bound_by"], ("compute", "memory", "interconnect"))

  def test_memory(self):
    # Fails if moments are left out or not split (fsdp=4 x tensor=2), or if the cache is not split
    # over lanes and heads.
    params = 4 * architecture(self.config).config.num_params
    for name in ("sft", "rft", "dpo/dpo", "dpo/step_dpo"):
      self.assertGreater(self.programs[name]["peak_bytes_per_chip"], 3 * params / 8)
      self.assertLess(self.programs[name]["peak_bytes_per_chip"], 3 * params / 8 + 30e6)
    for name in ("sample", "credit", "evaluate"):
      self.assertGreater(self.programs[f"{name}/decode"]["peak_bytes_per_chip"], params / 8)
      self.assertLess(self.programs[f"{name}/decode"]["peak_bytes_per_chip"], params / 8 + 15e6)

  def test_model_flops(self):
    # Fails if padding counts, if the backward pass is left out, if the embedding counts as a
    # product, or if a branch looks at other branches. By hand, of SFT: 24 trees of a prompt of 12
    # and a response of 24.
    layers = 2 * (4 * 256 * 256 + 3 * 256 * 512)
    keys = 36 * 37 / 2
    tree = 2 * layers * 36 + 4 * 2 * 256 * keys + 2 * 512 * 256 * 24
    self.assertAlmostEqual(
      self.programs["sft"]["model_flops_per_chip"] / (3 * 24 * tree / 16), 1.0, places=6
    )
    # 16 slots that each look at a prompt of 12 and half of 24 new tokens.
    step = 16 * (2 * layers + 4 * 2 * 256 * 24 + 2 * 512 * 256)
    self.assertAlmostEqual(
      self.programs["sample/decode"]["model_flops_per_chip"] / (step / 16), 1.0, places=6
    )

  def test_flops(self):
    # Fails if the body of the loop over layers counts once, or a loop counts too often: training
    # takes what the model takes for whole rows (here the rows are 84 % full at best, S is 1.1 times
    # too wide, and layers run twice forward).
    for name in ("sft", "rft", "dpo/dpo", "dpo/step_dpo"):
      entry = self.programs[name]
      self.assertBetween(entry["flops_per_chip"] / entry["model_flops_per_chip"], 1.0, 8.0, name)

  def test_selective_rematerialisation(self):
    # Fails if the backward pass of "selective" computes a product anew, or if that of "full" keeps
    # one: by hand, 3 times all products of 8 rows of 128 tokens and attention's 2 once more; or all
    # but a layer's last once more.
    rows, matrices, tokens = 8, 2 * (4 * 256 * 256 + 3 * 256 * 512), 8 * 128
    # two blocks of 64 queries, each against the keys up to its end
    keys = sum(range(64, 129, 64)) * 64 * rows
    logits = 2 * 512 * 256 * rows * math.ceil(1.1 * 0.95 * 128 / 36 * 24)
    selective = 3 * (2 * matrices * tokens + logits) + (3 + 1) * 2 * (2 * 2 * 256 * keys)
    self.assertAlmostEqual(
      self.programs["sft"]["flops_per_chip"] * 16 / selective, 1.0, delta=0.003
    )
    config = make_config(self.folder)
    config.model.remat = "full"
    (full,) = preflight_reports(config, ["sft"])
    again = 2 * 2 * (4 * 256 * 256 + 2 * 256 * 512) * tokens
    self.assertAlmostEqual((full.cost.flops * 16 - selective) / again, 1.0, delta=0.05)

  def test_an_adapter(self):
    # Fails if moments or gradients of all weights are counted where an adapter is trained, if the
    # base is left out, or if the bill keeps the base with every policy. By hand: the base's part of
    # a chip in float32, an adapter with two moments; the base's products forward and back to what
    # they multiply; attention 4 times, as ever, and the adapter's own, too.
    config = make_config(self.folder)
    config.sft.lora.rank = 4
    (report,) = preflight_reports(config, ["sft"])
    base, adapter = (
      4 * architecture(config).config.num_params,
      2 * 4 * (4 * (256 + 256) + 3 * (256 + 512)),
    )
    self.assertIn(f"adapter of {adapter / 1e6:.3g} M parameters", report.program.sizes)
    self.assertBetween(
      report.argument_bytes, base / 8 + 3 * 4 * adapter / 4, base / 8 + 3 * 4 * adapter
    )
    self.assertEqual(report.cost.collectives["reduce-scatter"], 0)
    rows, matrices, tokens, keys = (
      8,
      2 * (4 * 256 * 256 + 3 * 256 * 512),
      8 * 128,
      8 * (64 + 128) * 64,
    )
    logits = 2 * 512 * 256 * rows * math.ceil(1.1 * 0.95 * 128 / 36 * 24)
    counted = (
      2 * (2 * matrices * tokens + logits)
      + (3 + 1) * 2 * (2 * 2 * 256 * keys)
      + 4 * 2 * adapter * tokens
    )
    self.assertAlmostEqual(report.cost.flops * 16 / counted, 1.0, delta=0.03)
    own = 24 * (
      2 * (2 * matrices * 36 + 2 * 512 * 256 * 24)
      + 3 * (4 * 2 * 256 * 36 * 37 / 2 + 2 * adapter * 36)
    )
    self.assertAlmostEqual(report.program.model_flops / own, 1.0, places=6)
    stored = cost_model.storage(config, architecture(config), self.result["bill"]["by_stage"])
    self.assertEqual(stored["policies"], 3 * base + 4 * adapter)
    self.assertEqual(stored["checkpoints"], 3 * 2 * (3 * base + 4 * adapter))

  def test_gradients_are_scattered(self):
    # Fails if a gradient is summed on every chip and a part of it taken then, or if parameters are
    # gathered more than twice. fsdp=4: a ring sends 3 of 4 parts of what it gathers or scatters,
    # here one of tensor=2 parts in bfloat16.
    sent = kinds(self.text, "sft")
    copy = 0.75 * 2 * architecture(self.config).config.num_params / 2
    self.assertBetween(sent["reduce-scatter"] / copy, 0.95, 1.1)
    self.assertBetween(sent["all-gather"] / copy, 1.5, 2.0)
    self.assertLess(sent["all-reduce"] / copy, 1.3)  # activations over tensor
    self.assertLess(kinds(self.text, "dpo/reference")["all-gather"] / copy, 1.1)

  def test_no_parameter_moves_more_than_twice(self):
    # Fails if the backward pass gathers a matrix a third time, if a gradient is summed whole, or if
    # what moves is not told from activations: by hand, query, key, value and output are gathered
    # forward and backward, and scattered once.
    for name, gathers in (
      ("sft", 2.0),
      ("rft", 2.0),
      ("dpo/dpo", 2.0),
      ("dpo/step_dpo", 2.0),
      ("dpo/reference", 1.0),
    ):
      lines = self.text[self.text.index(f"\n{name}: ") + 1 :].split("  bound")[0].splitlines()
      found = dict(
        line.removeprefix("    times ").split(": ")
        for line in lines
        if line.startswith("    times ")
      )
      times = {
        array: dict(part.rsplit(" ", 1) for part in kinds.split(", "))
        for array, kinds in found.items()
      }
      squares = times["key, output, query, value"]
      self.assertAlmostEqual(float(squares["all-gather"]), gathers, delta=0.02, msg=name)
      self.assertAlmostEqual(
        float(squares.get("reduce-scatter", 0)), gathers - 1, delta=0.02, msg=name
      )
      for array in times.keys() - {"activations"}:
        self.assertLessEqual(max(map(float, times[array].values())), 2.02, (name, array))

  def test_scoring_is_one_forward_pass(self):
    # Fails if the reference pass computes a backward pass, or if its rows are not counted.
    entry = self.programs["dpo/reference"]
    self.assertBetween(entry["flops_per_chip"] / entry["model_flops_per_chip"], 1.0, 1.2)

  @parameterized.parameters(2, 8)
  def test_decoding_holds_one_cache(self, heads):
    # Fails if suffixes are copied as the loop begins or ends, or padded: by hand, 2 layers' keys
    # and values of one lane's 2 slots, half of the heads; those of 8 heads are more than the memory
    # on the chip holds.
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    config = make_config(folder, num_attention_heads=heads, hidden_size=128 * heads)
    config.engine.max_new_tokens = 32768
    (report,) = preflight_reports(config, ["sample/decode"])
    suffixes = 2 * 2 * 2 * (heads // 2) * 32768 * 128 * 2
    self.assertLess(report.temporary_bytes, 0.5 * suffixes)
    self.assertBetween(report.argument_bytes / suffixes, 1.0, 1.2)
    if heads == 8:
      self.assertBetween(report.cost.memory_bytes / report.program.least_read, 0.9, 1.25)

  def test_two_slices(self):
    # Fails if gradients do not cross the data-centre network, or if parameters do: a slice sends
    # the parts of its sums that it keeps, in bfloat16, and of the embedding, in float32.
    config = make_config(self.folder)
    config.mesh.slices = 2
    (report,) = preflight_reports(config, ["sft"])
    part = architecture(config).config.num_params / 8
    self.assertBetween(report.cost.collectives["send"] / part, 1.0, 4.0)

  def test_bill(self):
    # Fails if an epoch, a trace, a step's rollouts or a method's answers are not counted.
    c, made = self.config, self.result["bill"]
    self.assertEqual(made["by_stage"]["sft"], {"steps": 125, "tokens_trained": 3 * 1000 * 36})
    self.assertEqual(made["by_stage"]["sample"]["tokens_decoded"], 1000 * 5 * 24)
    wrong = 0.5 * 5  # of a problem's traces
    self.assertEqual(made["by_stage"]["credit"]["rollouts"], 1000 * wrong * 3 * 5)
    self.assertEqual(made["by_stage"]["evaluate"]["traces"], 1000 * len(c.evaluate.methods))
    self.assertEqual(made["rollouts"], 1000 * wrong * 3 * 5)
    self.assertEqual(set(made["chip_hours"]), set(PROGRAMS))
    self.assertAlmostEqual(
      sum(made["chip_hours"].values()) / made["chip_hours_total"], 1.0, places=2
    )
    self.assertEqual(made["storage_bytes"]["policies"], 4 * 4 * architecture(c).config.num_params)


class LoopsTest(absltest.TestCase):
  def test_scanned_equals_unrolled(self):
    # Fails if the body of the loop over layers is not multiplied by their number, or by something
    # else.
    folder, found = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())), []
    for scan in (True, False):
      config = make_config(folder, num_hidden_layers=5)
      config.model.scan_layers, config.model.remat = scan, "none"
      devices, chip = preflight.devices_of("v5e:4x4")
      recipe = Recipe(
        config, device_mesh.make_mesh(**config.mesh, devices=devices), LENGTHS, chip.hbm_bytes
      )
      (program,) = recipe.programs(["sft"])
      found.append(preflight.compile_program(program, chip, 16).cost)
    self.assertAlmostEqual(found[0].flops / found[1].flops, 1.0, delta=0.03)

  def test_scanned_equals_unrolled_between_chips(self):
    # Fails if what a loop's body sends counts once. Each layer gathers its matrix by hand, so that
    # the compiler has no choice between the two.
    devices, chip = preflight.devices_of("v5e:4x4")
    mesh = device_mesh.make_mesh(1, 16, 1, devices=devices)
    rows, split = device_mesh.rows(mesh), NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    def loss(stack, x, scan):
      def layer(x, matrix):
        return jnp.tanh(x @ jax.lax.all_gather(matrix, "fsdp", tiled=True)), None

      return jnp.sum(jax.lax.scan(layer, x, stack, unroll=not scan)[0])

    found = []
    for scan in (True, False):
      grad = jax.grad(functools.partial(loss, scan=scan), argnums=(0, 1))
      run = jax.jit(
        jax.shard_map(
          grad, mesh=mesh, in_specs=(split.spec, rows.spec), out_specs=(split.spec, rows.spec)
        )
      )
      stack = jax.ShapeDtypeStruct((7, 1024, 1024), jnp.bfloat16, sharding=split)
      x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=rows)
      program = Program("p", functools.partial(run.lower, stack, x), 1, 1.0, "", "")
      found.append(preflight.compile_program(program, chip, 16).cost)
    scanned, unrolled = found
    self.assertAlmostEqual(scanned.flops / unrolled.flops, 1.0, delta=0.03)
    self.assertAlmostEqual(scanned.collective_bytes / unrolled.collective_bytes, 1.0, delta=0.03)
    # Gathered forward and backward, and its gradient scattered: three times 15 of 16 parts of 7
    # matrices at least.
    self.assertGreater(scanned.collective_bytes, 2.5 * 7 * 1024 * 1024 * 2 * 15 / 16)
    # Forward one product, backward two, for 64 rows a chip.
    self.assertAlmostEqual(scanned.flops / (3 * 7 * 2 * 64 * 1024 * 1024), 1.0, delta=0.03)


class FusedTest(absltest.TestCase):
  def test_fused_attention_counts_as_dense_attention_does(self):
    # Fails if a kernel is not counted, counted once for all layers of the scan, or counted
    # otherwise than by its visits: its backward pass computes scores anew, one product of nine more
    # than what dense attention does.
    folder, found = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())), []
    config = make_config(
      folder, hidden_size=1024, num_attention_heads=8, num_key_value_heads=4, intermediate_size=4096
    )
    config.sft.row_length = 1024
    for fused_from in (1024, 2048):
      with mock.patch.object(attention, "_FUSED_FROM", fused_from):
        found += preflight_reports(config, ["sft"])
    fused, dense = (report.cost for report in found)
    self.assertBetween(fused.flops / dense.flops, 1.0, 1.02)
    # Dense attention keeps its small scores on the chip.
    self.assertBetween(fused.memory_bytes / dense.memory_bytes, 0.7, 1.5)


class RefusalTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def refusal(self, *args, **kwargs) -> str:
    with self.assertRaises(UserError) as caught:
      run(*args, **kwargs)
    return str(caught.exception)

  def test_a_config_that_does_not_fit(self):
    # Fails if it passes, or if the sentence lacks the program, the sizes or what to change.
    small = preflight.Chip(1 << 20, 1e12, 1e12, 1e12)
    with mock.patch.dict(preflight.CHIPS, {"v5e": small}):
      said = self.refusal(
        make_config(self.folder), stages=["sample/decode"], out=str(self.folder / "out.json")
      )
    self.assertRegex(
      said,
      r"^sample/decode does not fit: \d+\.\d\d of 0\.00 GB a chip of v5e:4x4, most of it \w+; "
      r"lower engine\.lanes, engine\.slots or engine\.max_new_tokens, or raise mesh\.tensor\.$",
    )
    self.assertFalse(json.loads((self.folder / "out.json").read_text())["programs"][0]["fits"])

  def test_what_the_compiler_refuses(self):
    # Fails if XLA's refusal comes out as a traceback, or if its size is not read.
    devices, chip = preflight.devices_of("v5e:4x4")
    x = jax.ShapeDtypeStruct(
      (1 << 16, 1 << 10), jnp.float32, sharding=SingleDeviceSharding(devices[0])
    )
    sort = jax.jit(lambda x: jnp.sort(x @ x.T, axis=0))
    report = preflight.compile_program(
      Program("p", lambda: sort.lower(x), 1, 1.0, "", "buy more."), chip, 1
    )
    self.assertFalse(report.fits)
    self.assertGreater(report.peak_bytes, 16 << 30)
    self.assertLess(report.peak_bytes, 64 << 30)
    self.assertEqual(report.too_large, "temporaries")

  def test_what_jax_cannot_read_back(self):
    # Fails if a program whose HLO jax cannot read (a v6e's, with a large embedding) is not read
    # from what the compiler wrote.
    config, found = make_config(self.folder), []
    unreadable = mock.patch.object(
      jax.stages.Compiled, "as_text", side_effect=jax.errors.JaxRuntimeError("RET_CHECK")
    )
    for context in (contextlib.nullcontext(), unreadable):
      with context:
        (report,) = preflight_reports(config, ["dpo/reference"])
      found.append(report.cost)
    self.assertEqual(found[0], found[1])

  def test_the_command(self):
    # Fails if the launcher does not get as far as its topology, or if it says what is wrong
    # otherwise than in a sentence.
    root = pathlib.Path(__file__).parents[2]
    words = [
      "launch/preflight.py",
      "--config=configs/gsm8k.py:model=llama2_7b",
      "--topology=v5e:3x9",
    ]
    done = subprocess.run(
      [sys.executable, *words], cwd=root, capture_output=True, text=True, check=False
    )
    self.assertEqual(done.returncode, 1)
    self.assertStartsWith(done.stderr.splitlines()[-1], "preflight.py: --topology=v5e:3x9: ")

  def test_without_libtpu(self):
    # Fails if the missing compiler comes out as a traceback.
    with mock.patch("importlib.util.find_spec", return_value=None):
      said = self.refusal(make_config(self.folder))
    self.assertIn("pip install -e '.[preflight]'", said)

  @parameterized.parameters("v5e", "v9:4x4", "v5e:3x9", "4x4", "v5e:4xx4")
  def test_unknown_topologies(self, topology):
    # Fails if libtpu's exception comes out as it is.
    self.assertStartsWith(
      self.refusal(make_config(self.folder), topology=topology), f"--topology={topology}: "
    )

  def test_slices(self):
    # Fails if the slices of a pod are not asked for, or if the outermost axis runs across them.
    devices, chip = preflight.devices_of("v5e:4x4", 2)
    self.assertEqual(chip, preflight.CHIPS["v5e"])
    mesh = device_mesh.make_mesh(-1, 4, 2, slices=2, devices=devices)
    self.assertEqual(tuple(mesh.shape.values()), (2, 2, 4, 2))
    for index in range(2):
      self.assertEqual({device.slice_index for device in mesh.devices[index].reshape(-1)}, {index})

  def test_names_and_models(self):
    # Fails if an unknown stage is skipped in silence, or if a path that is neither a folder nor a
    # preset is not named.
    config = make_config(self.folder)
    self.assertStartsWith(
      self.refusal(config, stages=["sampel"]),
      "--stages: 'sampel' is neither a stage (sft, rft, dpo, ",
    )
    config.model.path = "nowhere/mistral"
    self.assertStartsWith(
      self.refusal(config, stages=["sft"]),
      "model.path=nowhere/mistral is neither a folder nor a preset (",
    )
    config = make_config(self.folder, vocab_size=511)
    self.assertEqual(
      self.refusal(config), "ends.embedding: dimension vocab=511 does not divide by tensor=2."
    )

  @parameterized.parameters(("deepseek_math_7b", 6.91), ("llama2_7b", 6.74))
  def test_presets(self, name, billions):
    # Fails if a size of a published model is mistyped: its parameters are known.
    config = make_config(self.folder)
    config.model.path = name
    self.assertAlmostEqual(architecture(config).config.num_params / 1e9, billions, places=2)


if __name__ == "__main__":
  absltest.main()
