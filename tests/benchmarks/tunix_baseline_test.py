"""The rows against google-tunix: which rows there are where, and, where it is installed, its tokens
beside ours.
"""

import functools
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from benchmarks import items as benchmark_items
from benchmarks import ours, torch_baselines, tunix_baseline
from synthneg_jax.decoding.engine import Trunk
from synthneg_jax.models.config import ModelConfig
from synthneg_jax.runtime.errors import UserError

TOY = ModelConfig(
  vocab_size=32,
  d_model=16,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  d_ff=24,
  scan_layers=False,
)


class RowsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(
      mock.patch.object(benchmark_items, "Side", return_value=mock.MagicMock(size="T"))
    )
    self.enterContext(mock.patch.object(ours, "make_engine"))

  def baselines(self, torch: bool, tunix: bool) -> tuple[list[str], str]:
    """Names of the rows' other sides, and what was logged."""
    with (
      mock.patch.object(torch_baselines, "installed", return_value=torch),
      mock.patch.object(torch_baselines, "load"),
      mock.patch.object(tunix_baseline, "installed", return_value=tunix),
      mock.patch.object(tunix_baseline, "Sampler"),
      mock.patch.object(benchmark_items.logging, "info") as info,
    ):
      names = [
        baseline.name
        for item in benchmark_items.sampling(full=False)
        for baseline in item.baselines
      ]
    return names, "\n".join(call.args[0] % call.args[1:] for call in info.call_args_list)

  @parameterized.parameters(
    (True, True, ["generate"] * 6 + ["tunix"] * 6, ""),
    (True, False, ["generate"] * 6, "No rows against tunix: google-tunix is not installed here"),
    (False, True, ["tunix"] * 6, "No rows against transformers: torch is not installed here"),
  )
  def test_rows_are_of_what_is_installed(self, torch, tunix, names, line):
    # Fails if an environment without one of the two has no rows of the other, or if nothing says
    # what was left out.
    found, logged = self.baselines(torch, tunix)
    self.assertEqual(found, names)
    self.assertIn(line, logged)
    self.assertEqual(logged.count("No rows"), bool(line))

  def test_without_either_it_says_what_to_install(self):
    # Fails if a suite without any row passes for a measurement.
    with (
      mock.patch.object(tunix_baseline, "installed", return_value=False),
      mock.patch.object(torch_baselines, "installed", return_value=False),
      mock.patch.dict("sys.modules", torch=None),
      self.assertRaisesRegex(UserError, r'needs torch: pip install -e "\.\[bench\]"'),
    ):
      next(benchmark_items.sampling(full=False))


class SamplerTest(absltest.TestCase):
  def test_no_program_is_compiled_while_it_is_timed(self):
    # Fails if the other side meets a temperature for the first time in a timed call.
    side, calls = mock.MagicMock(size="T"), []

    def other(prompts, new):
      return lambda temperature: calls.append(temperature) or []

    with mock.patch.object(ours, "make_engine"), mock.patch.object(ours, "grow", return_value=[]):
      for item in benchmark_items._sampling(side, "tunix", 1, 4, other):
        self.assertEqual(item.baselines[0].differs(), "")
        before = len(calls)
        item.baselines[0].run()
        self.assertIn(calls[-1], calls[:before])

  def test_no_id_is_padding_or_an_end(self):
    # Fails if a drawn 0 is masked as padding, if an id ends a sequence, or if a beginning is put
    # before the prompt.
    ids = tunix_baseline._Ids()
    self.assertEqual(ids.encode(ids.decode([3, 0, 12])), [3, 0, 12])
    self.assertLess(max(ids.pad_id(), ids.eos_id()), 0)
    self.assertNotEqual(ids.pad_id(), ids.eos_id())
    self.assertFalse(ids.bos_id())

  @absltest.skipUnless(tunix_baseline.installed(), "google-tunix is not installed")
  def test_greedy_tokens_are_ours(self):
    # Fails if a weight lands elsewhere, or if the base of the rotary embedding is not the one that
    # tunix computes with.
    with mock.patch.dict(ours.SIZES, T=TOY):
      for tied in (False, True):
        side = ours.Side("T", rope_theta=tunix_baseline.ROPE_THETA, tie_embeddings=tied)
        prompts = side.ids(3, 16).tolist()
        trunks = [Trunk(prompt, [16], ours.draw_keys(i, 1)) for i, prompt in enumerate(prompts)]
        made = functools.partial(ours.grow, ours.make_engine(side, 3, 1, 12), side, trunks)
        sampler = tunix_baseline.Sampler(side.folder, side.config, prompts, 12)
        np.testing.assert_array_equal([items[0] for items in made(0.0)], sampler(0.0))
        self.assertEqual([len(row) for row in sampler(1.0)], [12] * 3)


if __name__ == "__main__":
  absltest.main()
