"""Stage export: a trained policy as a Hugging Face folder that transformers loads."""

import os
import tempfile

import jax
from etils import epath

from synthneg_jax.models import huggingface
from synthneg_jax.runtime import mesh as mesh_lib
from synthneg_jax.runtime import processes
from synthneg_jax.stages import evaluate, policies
from synthneg_jax.stages.run import Run


def run(run_: Run) -> dict:
  """Writes export/<method>/ for every trained policy of evaluate.methods that exists."""
  exported = {}
  for method in run_.config.evaluate.methods:
    stage_name = evaluate.POLICY_OF.get(method)
    if stage_name is None or not (run_.workdir / stage_name / "manifest.json").exists():
      continue
    stage = run_.stage(f"export/{method}", ["model"], [stage_name])
    if not stage.done:
      policy = run_.policy(stage_name)
      folder = stage.folder / "policy"
      params = jax.tree.map(mesh_lib.whole, policy.params) if processes.count() > 1 else policy.params
      if processes.first():
        if folder.exists():  # of a run that was killed before its manifest was written
          folder.rmtree()
        with tempfile.TemporaryDirectory() as local:  # a Hugging Face folder is written on a local disk
          in_bucket = "://" in os.fspath(folder)
          made = epath.Path(local) / "policy" if in_bucket else folder
          huggingface.save(made, policy.model, params, policies.tokenizer_folder(policy.folder))
          for path in made.iterdir() if in_bucket else ():
            path.copy(folder / path.name)
      exported[method] = stage.finish({"folder": str(folder)}, list(folder.glob("*.safetensors")))
  return exported
