"""reasoning-gym datasets through the stages, with worked, scripted and bare solutions."""

import collections
import pathlib
import tempfile

import jax
import pytest
import tokenizers
import transformers
from absl.testing import absltest, parameterized
from etils import epath
from tokenizers import Regex, decoders, models, pre_tokenizers

from synthneg_jax.data.records import Problem, Shards, Trace
from synthneg_jax.models import huggingface
from synthneg_jax.models.config import ModelConfig
from synthneg_jax.models.decoder import Model
from synthneg_jax.pipeline import credit, dpo, evaluate, pairs, sample, sft, synthesize
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import config_schema
from synthneg_jax.tasks import problems, reasoning, verification
from tests import tiny_model

reasoning_gym = pytest.importorskip("reasoning_gym")
pytestmark = pytest.mark.slow  # trains


def config(dataset: str, params: str = "", **leaves):
  c = config_schema.default()
  c.task.name, c.task.reasoning_gym.dataset, c.task.reasoning_gym.params = (
    "reasoning_gym",
    dataset,
    params,
  )
  c.task.train_problems, c.task.test_problems = 8, 4
  c.model.max_length, c.engine.max_new_tokens, c.engine.lanes, c.engine.slots = 640, 48, 4, 4
  c.sft.optimizer.learning_rate, c.sft.num_epochs = 5e-3, 25
  for part in (c.sft, c.dpo):
    part.batch_size, part.row_length, part.save_every_steps = 4, 640, 0
  c.sample.num_traces, c.sample.temperature = 6, 1.0
  c.credit.num_rollouts, c.credit.best_of, c.credit.max_wrong_per_problem = 2, 1, 2
  c.evaluate.methods = ("sft", "step_dpo")
  c.update_from_flattened_dict(leaves)
  return c


def save_base(folder: pathlib.Path, c) -> None:
  """A model with random weights whose vocabulary is the words of the config's problems.

  Digits are separate tokens.
  """
  split = Regex(r"\d| ?[^\W\d]+|\s|[^\w\s]")
  texts = [text for each in ("train", "test") for problem in problems.load(c.task, 0, each,
  c.task[f"{each}_problems"])
           for text in (problem.prompt, problem.solution)]  # fmt: skip
  pieces = pre_tokenizers.Split(split, behavior="isolated")
  words = {
    piece
    for text in [*texts, "Question: \nAnswer:\n"]
    for piece, _ in pieces.pre_tokenize_str(text)
  }
  vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *sorted(words)])}
  backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
  backend.pre_tokenizer, backend.decoder = pieces, decoders.Fuse()
  backend.add_special_tokens(["<pad>", "<eos>"])
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    eos_token="<eos>",
    pad_token="<pad>",
    clean_up_tokenization_spaces=False,
  )
  tokenizer.save_pretrained(str(folder / "tokenizer"))
  sizes = dict(d_model=48, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=12, d_ff=96)
  model = Model(ModelConfig(vocab_size=len(vocabulary), scan_layers=False, **sizes))
  params = model.init(jax.random.key(0))
  huggingface.save(
    epath.Path(folder / "base"), model, params, tokenizer_folder=epath.Path(folder / "tokenizer")
  )


class ReasoningRunTest(parameterized.TestCase):
  @parameterized.parameters(
    ("gsm_symbolic", "difficulty=1.0", {"engine.max_new_tokens": 200, "sft.num_epochs": 70}),
    ("chain_sum", "min_terms=3, max_terms=3, max_digits=1", {}),
    ("spell_backward", "", {"sample.temperature": 1.5}),
  )
  def test_from_problems_to_test_errors(self, name, params, leaves):
    # Fails if a stage does not use the dataset's problems, or grading does not follow the task.
    root = pathlib.Path(tempfile.mkdtemp())
    c = config(name, params, **leaves)
    save_base(root, c)
    c.model.path = str(root / "base")
    experiment = Experiment(c, epath.Path(root / "run"), tiny_model.one_device_mesh())
    for stage in (synthesize, sft, sample, credit):
      stage.run(experiment)
    self.assertGreater(pairs.variant(experiment, "step_dpo")["pairs"], 0)
    dpo.variant(experiment, "step_dpo")
    figures = evaluate.run(experiment)
    self.assertEqual({figures[method]["num_problems"] for method in figures}, {4})
    by_id = Shards(experiment.workdir / "synthesize" / "train", Problem).read_dict()
    traces = list(Shards(experiment.workdir / "sample" / "traces", Trace).read())
    self.assertLen(collections.Counter(trace.correct for trace in traces), 2)
    for trace in traces:
      problem = by_id[trace.problem_id]
      verdict = verification.verdict(c.task, trace.text, problem)
      self.assertEqual(reasoning.is_number(problem.answer), verdict is None)
      if trace.correct:
        self.assertEndsWith(trace.text.removesuffix("<eos>"), problem.answer)


if __name__ == "__main__":
  absltest.main()
