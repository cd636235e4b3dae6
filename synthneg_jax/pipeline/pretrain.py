"""Stage pretrain: trains a generated task's base model from random weights."""

import jax
import tokenizers
import transformers
from etils import epath

from synthneg_jax.core.tree import Branch, Tree
from synthneg_jax.data import prompts
from synthneg_jax.decoding.policy import param_shardings
from synthneg_jax.models import huggingface
from synthneg_jax.models.config import ModelConfig
from synthneg_jax.models.decoder import Model
from synthneg_jax.pipeline import train_policy
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import device_mesh, distributed
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import generated, problems
from synthneg_jax.training import loop, objectives
from synthneg_jax.training.batch import Example


def run(experiment: Experiment) -> dict:
  """Writes pretrain/policy/, a Hugging Face folder with weights and tokenizer.

  Raises:
    UserError: the task is not a generated one.
  """
  stage = experiment.stage("pretrain", ["task", "model", "pretrain"])
  if stage.done:
    return {}
  c = experiment.config
  if c.task.name not in generated.TASKS:
    raise UserError(
      f"Stage pretrain trains base models for generated tasks ({', '.join(generated.TASKS)}); "
      f"with task.name={c.task.name!r}, set model.path instead."
    )
  section = c.pretrain
  tokenizer = generated.TASKS[c.task.name].tokenizer(c.task)
  documents = generated.pretraining(c.task, section, c.seed)

  def ids(text):
    return tokenizer.encode(text).ids

  eos = tokenizer.token_to_id(generated.EOS)
  as_text = str if problems.prompt_style(c.task) == "raw" else prompts.plain_text
  trunks = [ids(as_text(document.prompt)) for document in documents]
  examples = [
    Example(Tree(trunk, (Branch(len(trunk), ids(document.solution) + [eos]),)))
    for trunk, document in zip(trunks, documents, strict=True)
  ]
  model = Model(
    ModelConfig(
      vocab_size=tokenizer.get_vocab_size(),
      d_model=section.d_model,
      num_layers=section.num_layers,
      num_heads=section.num_heads,
      num_kv_heads=section.num_heads,
      head_dim=section.d_model // section.num_heads,
      d_ff=section.d_ff,
      tie_embeddings=False,
      scan_layers=c.model.scan_layers,
      dtype=c.model.dtype,
    )
  )
  shardings = param_shardings(model, experiment.mesh)
  params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(c.seed))
  training = train_policy.make_run(
    experiment,
    stage,
    section,
    model=model,
    objective=objectives.make_sft(model, section.logit_chunk),
    trees=train_policy.Trees(examples, [document.id for document in documents]),
  )
  params, last = loop.fit(training, params)
  params = jax.tree.map(device_mesh.whole, params) if distributed.count() > 1 else params
  if distributed.is_primary():
    _save(stage.folder, tokenizer, model, params)
  figures = {"parameters": model.config.num_params, "steps": training.batches.num_steps, **last}
  return stage.finish(figures, list((stage.folder / "policy").glob("*.safetensors")))


def _save(folder: epath.Path, tokenizer: tokenizers.Tokenizer, model: Model, params) -> None:
  tokenizer_folder = folder / "tokenizer"
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    eos_token=generated.EOS,
    pad_token=generated.PAD,
    clean_up_tokenization_spaces=False,
  ).save_pretrained(str(tokenizer_folder))
  if (folder / "policy").exists():  # left by a run that was killed before writing its manifest
    (folder / "policy").rmtree()
  huggingface.save(folder / "policy", model, params, tokenizer_folder=tokenizer_folder)
