"""The embedded base model: its training command runs, and the shipped weights load and generate."""

import collections
import pathlib
import tempfile

import jax
import numpy as np
import pytest
from absl.testing import absltest

from synthneg_jax.core.geometry import Lanes
from synthneg_jax.decoding.engine import Engine
from synthneg_jax.decoding.policy import EMBEDDED, Policy
from synthneg_jax.decoding.sampling import Sampling
from synthneg_jax.pipeline import traces
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import config_schema
from synthneg_jax.tasks import arithmetic
from tests import tiny_model
from tests.pipeline import stages_test

pytestmark = pytest.mark.slow  # starts processes


class PretrainTest(absltest.TestCase):
  def test_the_command_makes_a_folder_that_loads(self):
    # Fails if the stage omits the tokenizer or the weights, or writes another architecture.
    workdir = pathlib.Path(tempfile.mkdtemp())
    done = stages_test.launch(workdir, program="pretrain")
    self.assertEqual(done.returncode, 0, done.stderr[-2000:])
    policy = Policy.load(
      workdir / "pretrain/policy", config_schema.default().model, tiny_model.one_device_mesh()
    )
    shipped = Policy.load(EMBEDDED, config_schema.default().model, tiny_model.one_device_mesh())
    self.assertEqual(policy.model.config, shipped.model.config)
    self.assertEqual(policy.tokenizer.get_vocab(), shipped.tokenizer.get_vocab())
    self.assertNotEqual(policy.fingerprint, shipped.fingerprint)

  def test_shipped_weights_execute(self):
    # Fails if the weights do not belong to the tokenizer or the task: legal steps would be rare.
    config = config_schema.default()
    run = Experiment(config, None, tiny_model.one_device_mesh())
    policy = Policy.load(EMBEDDED, config.model, run.mesh)
    engine = Engine(policy.model, run.mesh, policy.stops(()), lanes=Lanes(32, 1), max_new_tokens=64)
    rng, puzzles = np.random.default_rng(7), []
    while len(puzzles) < 64:
      puzzles.append(arithmetic.make_puzzle(rng, 4, 6, (3, 5)))
    trunks = []
    for number, puzzle in enumerate(puzzles):
      problem = traces.Problem(f"p{number}", puzzle.prompt, "", "0", "test")
      trunks.append(
        traces.response_trunk(run, policy.tokenizer.encode(puzzle.prompt), problem, "test", 1)
      )
    with jax.debug_nans(False):
      generations = dict(engine.run(policy.params, trunks, Sampling(temperature=0.0)))
    verdicts = collections.Counter()
    for number, puzzle in enumerate(puzzles):
      known = set()
      for line in policy.token_text.text(generations[number][0].ids.tolist()).split("\n"):
        if line and not line.startswith(" ####"):
          verdicts[arithmetic.judge_step(puzzle, known, line)] += 1
          known.add(line.split()[0][:-1])
    self.assertGreater(verdicts["legal"] / verdicts.total(), 0.9, verdicts)


if __name__ == "__main__":
  absltest.main()
