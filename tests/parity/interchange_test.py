"""What launch/export_records.py writes is what TRL and datasets read: pairs train a step, labels
load with their types.
"""

import pathlib
import tempfile

import datasets
import jax
import numpy as np
import torch
import transformers
import trl
from absl.testing import absltest
from etils import epath

from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.data.records import Pair, Shards
from synthneg_jax.decoding.policy import EMBEDDED
from synthneg_jax.pipeline import export_formats
from synthneg_jax.training import reference
from tests.pipeline import small_run


class Tokens(trl.DPOTrainer):
  """TRL's trainer on the ids as they stand (docs/interchange.md)."""

  def _prepare_dataset(self, dataset, *_):
    return dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])


def load(what: str, suffix: str = ".jsonl") -> datasets.Dataset:
  out = pathlib.Path(tempfile.mkdtemp()) / f"{what}{suffix}"
  export_formats.write(small_run.opened(small_run.finished()), what, str(out))
  kind = "json" if suffix == ".jsonl" else "parquet"
  return datasets.load_dataset(
    kind, data_files=str(out), split="train", cache_dir=str(out.parent / "cache")
  )


def trainer(kind, dataset):
  embedded = str(EMBEDDED)
  model = transformers.AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
  tokenizer = transformers.AutoTokenizer.from_pretrained(embedded)
  arguments = trl.DPOConfig(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=len(dataset),
    max_steps=1,
    use_cpu=True,
    report_to=[],
    bf16=False,
    gradient_checkpointing=False,
    max_length=None,
  )
  return kind(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)


class TrlTest(absltest.TestCase):
  def test_pairs_by_ids_are_our_pairs(self):
    # Fails if TRL's batch of exported ids holds other tokens than ours, or scores them otherwise:
    # its log-probs under the embedded model must be those of our own pass over the same pairs.
    dataset = load("pairs")
    made = trainer(Tokens, dataset)
    batch = next(iter(made.get_train_dataloader()))
    with torch.no_grad():
      logits = made.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["input_ids"],
      )
    self.assertIsNotNone(logits)
    pairs = list(Shards(epath.Path(small_run.finished()) / "pairs/step_dpo/pairs", Pair).read())
    rows = {
      tuple(ids[mask].tolist())
      for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    }
    self.assertEqual(
      rows, {tuple(p.trunk + branch) for p in pairs for branch in (p.chosen, p.rejected)}
    )
    scored = batch["completion_mask"].sum().item()
    self.assertEqual(scored, sum(len(p.chosen) + len(p.rejected) for p in pairs))
    output = made.train()
    self.assertTrue(np.isfinite(output.training_loss))
    self.assertAlmostEqual(output.training_loss, float(np.log(2)), delta=1e-3)

  def test_pairs_by_text_get_eos(self):
    # Fails once TRL stops putting EOS behind unfinished steps: then docs/interchange.md warns of
    # nothing.
    dataset = load("pairs")
    self.assertTrue(any(ids[-1] != 1 for ids in dataset["rejected_ids"]))
    prepared = trainer(
      trl.DPOTrainer, dataset.select_columns(["prompt", "chosen", "rejected"])
    ).train_dataset
    self.assertTrue(all(ids[-1] == 1 for ids in prepared["rejected_ids"]))

  def test_our_log_probs_of_the_same_rows(self):
    # Fails if prompt and branch come apart elsewhere than TRL's do.
    experiment = small_run.opened(small_run.finished())
    base, rows = experiment.base(), load("pairs").to_list()[:4]
    trees = [
      Tree(row["prompt_ids"], (Branch(len(row["prompt_ids"]), tuple(row["rejected_ids"])),))
      for row in rows
    ]
    store = reference.Store(epath.Path(tempfile.mkdtemp()) / "r.npz")
    reference.score(
      base.model, base.params, trees, store=store, packing=reference.Packing(experiment.mesh, 160)
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(str(EMBEDDED), dtype=torch.float32)
    for row, tree in zip(rows, trees, strict=True):
      ids = torch.tensor([row["prompt_ids"] + row["rejected_ids"]])
      logp = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
      ours = store[reference.branch_key(tree.trunk, len(tree.trunk), tree.branches[0].ids)]
      np.testing.assert_allclose(
        ours, logp[len(row["prompt_ids"]) - 1 :].detach().numpy(), atol=1e-4
      )

  def test_labels_load(self):
    # Fails if a column's type differs from what TRL documents for stepwise supervision, or from row
    # to row.
    for suffix in (".jsonl", ".parquet"):
      features = load("stepwise", suffix).features
      self.assertEqual(features["prompt"].dtype, "string")
      self.assertEqual(features["completions"].feature.dtype, "string")
      self.assertEqual(features["labels"].feature.dtype, "bool")
    self.assertGreater(len(load("math_shepherd")), 3)
    self.assertEqual(set(load("prm800k")[0]["label"]), {"steps", "total_time", "finish_reason"})
    self.assertGreater(len(load("traces", ".parquet")), 100)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  absltest.main()
