"""Stage rft: rejection-sampling finetuning on D⁺, π_sft's own right solutions (https://arxiv.org/abs/2308.01825)."""

from synthneg_jax.core import selection
from synthneg_jax.runtime.records import Shards, Trace
from synthneg_jax.stages import traces as traces_lib
from synthneg_jax.stages import training
from synthneg_jax.stages.run import Run
from synthneg_jax.tasks import prompts
from synthneg_jax.training import objectives


def run(run_: Run) -> dict:
  """Writes rft/policy/ and rft/metrics.jsonl. Training starts from the base model by default, as in RFT's own recipe."""
  reads_base = run_.config.rft.start == "base"
  stage = run_.stage("rft", ["task", "model", "rft"], ["synthesize", "sft", "sample"], reads_base=reads_base)
  if stage.done:
    return {}
  section = run_.config.rft
  policy = run_.base() if reads_base else run_.policy("sft")
  problems = run_.problems("train")
  traces = traces_lib.by_problem(Shards(run_.workdir / "sample" / "traces", Trace).read(), problems)
  solutions = {}
  for key, of_problem in traces.items():
    kept = selection.keep_right([(trace.ids, trace.correct) for trace in of_problem], section.max_per_problem)
    solutions[key] = [of_problem[i].ids for i in kept]
    if section.with_teacher and problems[key].solution:
      solutions[key].append(prompts.encode_solution(policy.tokenizer, problems[key].solution))
  trunks = {key: training.prompt_ids(run_, policy, problems[key]) for key in solutions}
  length = min(section.row_length, run_.config.model.max_length)
  examples, names, dropped = training.solution_trees(
    trunks, solutions, min(section.max_branches_per_tree, section.batch_size), length
  )
  plan = training.plan(run_, section, examples, names)
  identity, figures = training.train(
    run_, "rft", section, policy, objectives.make_sft(policy.model, section.logit_chunk), plan, stage.folder
  )
  counts = {"solutions": sum(map(len, solutions.values())), "problems": sum(map(bool, solutions.values()))}
  return stage.finish({**counts, "too_long": dropped, **figures}, identity=identity)
