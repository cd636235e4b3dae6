"""Stage export: a trained policy as a Hugging Face folder that transformers loads, and its adapter, if one, for PEFT."""

import os
import tempfile

import jax
from etils import epath

from synthneg_jax.decoding.policy import tokenizer_folder
from synthneg_jax.models import adapter as adapter_lib
from synthneg_jax.models import huggingface
from synthneg_jax.pipeline import evaluate
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import device_mesh, processes


def run(experiment: Experiment) -> dict:
  """Writes export/<method>/policy for every trained policy of evaluate.methods that exists; adapters are merged in it.

  Where an adapter was trained, export/<method>/adapter holds it in the format of PEFT, for the base model that the run
  started from.
  """
  exported = {}
  for method in experiment.config.evaluate.methods:
    stage_name = evaluate.POLICY_OF.get(method)
    if stage_name is None or not (experiment.workdir / stage_name / "manifest.json").exists():
      continue
    stage = experiment.stage(f"export/{method}", ["model", "export"], [stage_name])
    if not stage.done:
      policy = experiment.policy(stage_name)
      folder = stage.folder / "policy"
      params = jax.tree.map(device_mesh.whole, policy.params) if processes.count() > 1 else policy.params
      if processes.first():
        if folder.exists():  # of a run that was killed before its manifest was written
          folder.rmtree()
        limit = experiment.config.export.max_shard_bytes
        with tempfile.TemporaryDirectory() as local:  # a Hugging Face folder is written on a local disk
          in_bucket = "://" in os.fspath(folder)
          made = epath.Path(local) if in_bucket else stage.folder
          tokenizer = tokenizer_folder(policy.about)
          huggingface.save(
            made / "policy",
            policy.model,
            params,
            tokenizer_folder=tokenizer,
            eos_ids=policy.eos_ids,
            max_shard_bytes=limit,
          )
          if policy.adapters:
            adapter_lib.save_peft(made / "adapter", policy.adapters, os.fspath(policy.base))
          for path in made.rglob("*") if in_bucket else ():
            if path.is_file():
              path.copy(stage.folder / path.relative_to(made), overwrite=True)
      exported[method] = stage.finish({"folder": str(folder)}, list(folder.glob("*.safetensors")))
  return exported
