"""The one default config tree. Every leaf has a comment with its unit; an unknown leaf is refused with the nearest names.

A config file (configs/*.py) defines `get_config(arg)` which starts from `default()` and changes leaves; the command line
changes leaves with --config.part.leaf=value.
"""

import difflib
from collections.abc import Iterator

from ml_collections import ConfigDict

from synthneg_jax.runtime.errors import UserError


def _optimizer(learning_rate: float) -> ConfigDict:
  return ConfigDict(
    {
      "learning_rate": learning_rate,  # peak step size of AdamW, per update
      "schedule": "cosine",  # after warm-up: cosine or linear to zero, or constant
      "warmup_share": 0.03,  # share of all steps in which the rate rises
      "clip_norm": 1.0,  # bound on the gradient's global norm
      "beta1": 0.9,  # decay of AdamW's first moment, per step
      "beta2": 0.95,  # decay of AdamW's second moment, per step
      "weight_decay": 0.0,  # AdamW's decoupled decay, times the rate, per step; norms' scales are spared
    }
  )


MATRICES = ("query", "key", "value", "output", "gate", "up", "down")  # of a layer


def _training(learning_rate: float, batch_size: int, num_epochs: float) -> dict:
  return {
    "optimizer": _optimizer(learning_rate),
    "batch_size": batch_size,  # solutions (SFT, RFT, pretraining) or pairs (DPO) a step
    "num_epochs": num_epochs,  # passes over the solutions or pairs
    "max_steps": 0,  # bound on the steps; 0 for none
    "row_length": 1024,  # tokens a row into which trees are packed
    "accumulate": 1,  # microbatches a step
    "logit_chunk": 0,  # scored tokens a row whose logits exist at once; 0 for all
    "max_branches_per_tree": 5,  # branches of one problem in a step; bounds how much it weighs there
    "save_every_steps": 200,  # steps between checkpoints; 0 for none
    "keep_checkpoints": 2,  # newest checkpoints kept
    "keep_best": 0,  # checkpoints with the lowest loss, mean since the one before, kept besides
    "lora": {
      "rank": 0,  # of the adapter that is trained in place of all weights; 0 trains all weights
      "alpha": 16.0,  # the adapter counts alpha / rank times, no unit
      "targets": MATRICES,  # matrices of a layer that it adapts
    },
  }


def _endpoint(concurrency: int) -> dict:
  return {
    "url": "",  # of an OpenAI-compatible server, such as http://localhost:8000/v1
    "model": "",  # its name there
    "key_variable": "OPENAI_API_KEY",  # environment variable that holds the key; empty for a server that wants none
    "concurrency": concurrency,  # requests under way at once
    "timeout_s": 120.0,  # seconds without a byte after which an attempt is given up
    "attempts": 8,  # attempts at one request
    "backoff_s": 1.0,  # seconds before the second attempt; doubles, up to 60
  }


def default() -> ConfigDict:
  """The default tree, locked."""
  return ConfigDict(
    {
      "seed": 0,  # of everything that is drawn
      "task": {
        "name": "arithmetic",  # arithmetic, jobs or star_graph (generated), gsm8k, math (competition MATH) or jsonl (any file)
        "train_problems": 1000,  # |D_syn|: problems with solutions that SFT sees
        "test_problems": 1000,  # problems that figures are reported on
        "path": "",  # files: folder of both splits, or file to train on; empty: docs/datasets.md says what is taken
        "test_path": "",  # files: file or folder of the test problems, such as MATH-500; empty: the path's own
        "apart_from": (),  # files: more files or folders with test problems that training must not overlap
        "overlap_words": 13,  # files: a training problem with so many words in a row of a test problem goes; 0: none
        "skip_bad_rows": False,  # leave broken rows out, counted, instead of stopping at the first; also --skip_bad_rows
        "answers": "integer",  # how answers compare: integer (after ####), math (in \boxed{}) or exact (the whole response)
        "grading": {  # what counts as the same answer, of answers=math; docs/grading.md
          "percent": "either",  # what 20% equals: either (20 and 0.2), fraction (0.2) or number (20)
          "units": "optional",  # a unit that the answer leaves out: optional, required or ignored
          "tuples": "ordered",  # ordered, or unordered: (1,2) is (2,1)
          "lists": "auto",  # 1, 2, 3 without braces: ordered, unordered, or auto (three numbers that do not ascend are ordered)
          "decimal_digits": 12,  # significant digits from which a rounded decimal equals what it rounds; 0: never
          "extraction": "last",  # last: an unmarked response is read for its last formula or number; marked: it has no answer
          "timeout_s": 2.0,  # seconds of a processor that one answer may take
        },
        "prompt": "plain",  # files: plain ("Question: ...\nAnswer:\n") or chat (the tokenizer's template)
        "instruction": "",  # files: text put after every problem, on a line of its own
        "steps": "delimiter",  # where a step ends: delimiter (task.step_delimiter) or prose (lines, sentences, not in LaTeX)
        "step_delimiter": "\n",  # steps=delimiter: text that ends a step
        "leap": 0.0,  # arithmetic: probability that the teacher does an addition in its head
        "num_leaves": 4,  # arithmetic: quantities with a given value
        "num_operations": 6,  # arithmetic: operations defined, needed or not
        "needed_min": 3,  # arithmetic: fewest operations that the question rests on
        "needed_max": 5,  # arithmetic: most of them
        "degree": 3,  # star_graph: arms of a graph; chance is 1 / degree
        "path_nodes": 3,  # star_graph: nodes of an arm, centre and leaf included
        "num_nodes": 20,  # star_graph: names that nodes are drawn from
        "jobs": {
          "fewest": 4,  # jobs: jobs of a problem, at least
          "most": 6,  # jobs: at most
          "slack": 4,  # jobs: hours that a deadline lies behind the job's end in a hidden order, at most
        },
        "test_start": 0,  # generated tasks: number of the first test problem
      },
      "model": {
        "path": "embedded",  # policy or Hugging Face folder of the base model; embedded, embedded_jobs: in the package
        "dtype": "float32",  # of activations and matrix products: float32 or bfloat16
        "param_dtype": "float32",  # that parameters are kept in
        "scan_layers": False,  # one compiled layer scanned (deep models, TPU) or one a layer (CPU)
        "remat": "none",  # what of a layer the backward pass computes anew: none, full, or selective (all but products)
        "max_length": 1024,  # tokens of prompt and response together, at most
        "check_parity": False,  # hold the base model's logits against torch's before work begins; --check_parity sets it
      },
      "mesh": {
        "data": -1,  # devices along the data axis; -1 takes what is left
        "fsdp": 1,  # devices along the axis that parameters and rows are split over
        "tensor": 1,  # devices along the axis that heads and feed-forward width are split over
        "slices": 1,  # TPU slices, joined by the data-centre network; each holds all parameters and its part of the rows
      },
      "engine": {
        "lanes": 32,  # trunks that decode at once
        "slots": 8,  # branches of a trunk that decode at once
        "max_new_tokens": 256,  # tokens of a response, at most
        "stop": (),  # strings that end a response besides EOS
      },
      "synthesis": {
        "provider": "task",  # who writes D_syn: task (its own problems and solutions), endpoint, local or scripted
        "ask": "problems",  # problems (new ones with solutions, from seeds) or solutions (of the task's own problems)
        "endpoint": ConfigDict(_endpoint(16)),  # where the model is asked; local: its model is a checkpoint's folder
        "prompts": "configs/prompts/gsm8k",  # folder with problems.txt and solution.txt
        "replies": "",  # folder of all raw replies, may be shared by runs; empty: replies/ in the workdir
        "seed_problems": 1000,  # the task's training problems that new ones are modelled on
        "seeds_per_request": 3,  # of them shown in a request
        "new_per_request": 4,  # new problems asked for in a request
        "num_solutions": 4,  # solutions asked for, a problem
        "min_agreement": 0.5,  # share of them that must state the answer; others are dropped as unsolved
        "temperature_problems": 1.0,  # of sampling problems
        "temperature_solutions": 0.7,  # of sampling solutions
        "max_tokens": 2048,  # tokens of a reply, at most
        "max_tokens_field": "max_tokens",  # what the server calls that: max_tokens or max_completion_tokens
        "near_duplicate": 0.2,  # problems within this edit distance, as a share of the longer, of one before are dropped
        "surplus": 1.25,  # problems kept before balancing by difficulty, per problem wanted
        "max_rounds": 8,  # of asking for more problems until there are enough
        "stream": True,  # replies come piece by piece: a server that stalls is noticed sooner
        "send_seed": True,  # send a seed of each draw
        "max_failed": 0,  # requests that may stay without a reply
        "usd_per_million_prompt": 0.0,  # price of a million prompt tokens, US dollars
        "usd_per_million_completion": 0.0,  # price of a million tokens of replies, US dollars
        "budget_usd": 0.0,  # never spend more than this, all runs of the workdir together; 0 for no limit
      },
      "pretrain": {
        **_training(3e-3, 32, 1),
        "num_problems": 256000,  # generated problems, each seen once
        "wander_share": 0.5,  # share of them that shows legal steps without plan or answer
        "answered_max": 2,  # most operations that an answered problem rests on
        "d_model": 64,  # width of the embedded base model
        "num_layers": 3,  # its layers
        "num_heads": 4,  # its attention heads
        "d_ff": 160,  # width of its feed-forward part
      },
      "sft": _training(1e-5, 128, 3),
      "rft": {
        **_training(1e-5, 128, 3),
        "start": "base",  # base or sft: where RFT's training starts
        "max_per_problem": 4,  # right solutions kept a problem
        "with_teacher": False,  # also train on the known solutions
        "keep": "right",  # right; of those with credit: spurious or clean (right, with or without a step back), advantage
        "drop_share": 0.5,  # advantage: share of right and wrong responses, those with the lowest step, that goes
        "clone": "whole",  # advantage: what of a response is learned: whole, before_negative steps, or positive steps
        "max_solutions": 0,  # solutions in all, at most; 0 for no bound
      },
      "sample": {
        "num_traces": 8,  # traces a problem
        "temperature": 0.7,  # of sampling
        "top_k": 0,  # only the k most likely tokens; 0 for all
        "top_p": 1.0,  # only the most likely tokens with this much probability
      },
      "credit": {
        "schedule": "all",  # which prefixes get rollouts: all, until_first_zero, bisect or adaptive (core/rollout_schedules.py)
        "num_rollouts": 10,  # rollouts from each prefix; of the schedules but all, at most
        "temperature": 0.7,  # of rollouts
        "top_k": 0,  # as in sample
        "top_p": 1.0,  # as in sample
        "best_of": 5,  # k of Best-of-k, the policy that values are of; 1 for the SFT policy itself
        "max_wrong_per_problem": 8,  # wrong traces that get credit, a problem
        "max_right_per_problem": 0,  # right traces that get credit, a problem
        "slots": 8,  # branches of a trace that decode at once
        "lanes": 8,  # traces whose rollouts decode at once
        "endpoint": ConfigDict(_endpoint(32)),  # a server of the SFT policy for rollouts; url empty: our own engine
        "endpoint_ids": True,  # prompts go there as token ids, and ids are asked for; False: both ways as text
      },
      "dpo": {
        **_training(1e-6, 64, 1),
        "beta": 0.1,  # strength of the pull to the reference, per nat
        "loss": "dpo",  # dpo, ipo or dpop (DPO-Positive)
        "label_smoothing": 0.0,  # dpo: assumed share of flipped labels, in [0, 0.5)
        "tau": 0.1,  # ipo: strength of the pull to the reference, per nat; beta then only tells which pairs are saturated
        "penalty": 50.0,  # dpop: weight of the chosen branch's fall below the reference, no unit
        "nll_weight": 0.0,  # weight of the chosen branch's next-token loss per token
      },
      "pairs": {
        "pair_mode": "algorithm1",  # of step_dpo: algorithm1, shared_prefix, positives_too, random_step, arbitrary, furthest
        "outcome_mode": "arbitrary",  # of dpo: arbitrary, or furthest in edit distance (Pal et al.)
        "furthest": "largest",  # furthest: each right takes the largest distance, or shortest_far, the shortest that is far
        "pit_rule": "lowest_value",  # lowest_value, first_zero, first_dead, least_advantage or relative_drop
        "drop_ratio": 0.34,  # relative_drop: Q falls to this share of Q before, or below
        "min_before": 0.25,  # relative_drop: and Q before is at least this
        "spurious_below": 0.0,  # positives_too: a right trace's step is rejected if its advantage is below this
        "continuation": "step",  # shared_prefix: what is chosen of a right rollout: its first step, or all (rollout)
        "choice": "random",  # shared_prefix: which right rollout: random, shortest, most_likely or majority
        "max_per_problem": 8,  # pairs a problem
        "max_flip": 1.0,  # pairs whose label is flipped with a higher probability, by the counts, are dropped
      },
      "star_graph": {
        "seeds": 4,  # training sets, each with its SFT and DPO runs; at least 2
        "under_trained": (30, 60),  # steps of SFT from which DPO starts, before the training set is known by heart
        "over_trained": (300,),  # and after
        "every_steps": 50,  # steps of SFT or DPO between measurements
      },
      "evaluate": {
        "temperature": 0.0,  # of the reported response; 0 for greedy
        "base_shots": 0,  # files: worked training problems before the base model's question; goes with engine.stop
        "methods": ("base", "sft", "rft", "dpo", "step_dpo"),  # policies to be tested
      },
      "metrics": {  # of the training stages
        "jsonl": True,  # metrics.jsonl, a line an update; the report draws its curves from it
        "tensorboard": True,  # TensorBoard event files in the stages' folders; sample and credit write some too
        "wandb": "",  # project of Weights & Biases that takes them; empty for none
        "wandb_mode": "online",  # online, or offline: kept in the stages' folders for `wandb sync`
        "profile_steps": "",  # a:b, updates a to b - 1 of every training are traced; also --profile_steps; empty for none
      },
      "export": {
        "max_shard_bytes": 5_000_000_000,  # largest file of exported weights, but for a larger tensor
      },
      "study": {
        "family": "",  # what figures call the task
        "grid": (),  # lines "SIZE SIZE ...: METHOD METHOD ...", sizes in problems; methods: experiments/scaling/methods.py
        "settings": (),  # lines "SIZE SIZE ...: LEAF=VALUE ...", or with methods in place of sizes: leaves that differ there
        "seeds": (0,),  # one run each
        "baseline": "sft",  # method that efficiency is told against
        "figures": (),  # the paper's figures that it ends in; experiments/scaling/figure.py has them
        "factor_at": 500,  # problems that the other methods have where their factor is told
      },
      "report": {
        "num_traces": 5,  # traces shown with their Q
        "max_traces": 20000,  # traces in the trace viewer, at most; of more, whole problems at even distances
        "max_rollouts": 8,  # different rollouts from a step that the trace viewer holds, at most
      },
    }
  ).lock()


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
  """(dotted name, value) of every leaf."""
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from leaves(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def plain(config: ConfigDict, sections=None) -> dict:
  """Leaves as a flat JSON-ready dict, of these top-level sections or leaves, or of all."""
  return {
    name: list(value) if isinstance(value, tuple) else value
    for name, value in leaves(config)
    if sections is None or name.split(".")[0] in sections
  }


CHOICES = {
  "task.name": ("arithmetic", "jobs", "star_graph", "gsm8k", "math", "jsonl"),
  "task.prompt": ("plain", "chat"),
  "task.answers": ("integer", "math", "exact"),
  "task.grading.percent": ("either", "fraction", "number"),
  "task.grading.units": ("optional", "required", "ignored"),
  "task.grading.tuples": ("ordered", "unordered"),
  "task.grading.lists": ("auto", "ordered", "unordered"),
  "task.grading.extraction": ("last", "marked"),
  "task.steps": ("delimiter", "prose"),
  "metrics.wandb_mode": ("online", "offline"),
  "model.dtype": ("float32", "bfloat16"),
  "model.param_dtype": ("float32", "bfloat16"),
  "model.remat": ("none", "full", "selective"),
  "synthesis.provider": ("task", "endpoint", "local", "scripted"),
  "synthesis.ask": ("problems", "solutions"),
  "synthesis.max_tokens_field": ("max_tokens", "max_completion_tokens"),
  "rft.start": ("base", "sft"),
  "rft.keep": ("right", "spurious", "clean", "advantage"),
  "rft.clone": ("whole", "before_negative", "positive"),
  "credit.schedule": ("all", "until_first_zero", "bisect", "adaptive"),
  "dpo.loss": ("dpo", "ipo", "dpop"),
  "pairs.pair_mode": ("algorithm1", "shared_prefix", "positives_too", "random_step", "arbitrary", "furthest"),
  "pairs.outcome_mode": ("arbitrary", "furthest"),
  "pairs.furthest": ("largest", "shortest_far"),
  "pairs.pit_rule": ("lowest_value", "first_zero", "first_dead", "least_advantage", "relative_drop"),
  "pairs.continuation": ("step", "rollout"),
  "pairs.choice": ("random", "shortest", "most_likely", "majority"),
}
_PIT_RULES = {  # what each schedule leaves known
  "all": CHOICES["pairs.pit_rule"],
  "until_first_zero": ("lowest_value", "first_zero", "first_dead", "relative_drop"),
  "bisect": ("lowest_value", "first_zero", "first_dead"),
  "adaptive": ("first_dead",),
}
_POSITIVE = (
  "task.train_problems",
  "task.test_problems",
  "sample.num_traces",
  "credit.num_rollouts",
  "credit.best_of",
  "engine.lanes",
  "engine.slots",
  "engine.max_new_tokens",
  "synthesis.seed_problems",
  "synthesis.seeds_per_request",
  "synthesis.new_per_request",
  "synthesis.num_solutions",
  "synthesis.max_tokens",
  "synthesis.max_rounds",
  "synthesis.surplus",
  "synthesis.endpoint.concurrency",
  "synthesis.endpoint.attempts",
  "credit.endpoint.concurrency",
  "credit.endpoint.attempts",
)


def check_values(config: ConfigDict) -> None:
  """Refuses values that some stage would stumble over hours later.

  Raises:
    UserError: names the leaf and what it may be.
  """
  values = dict(leaves(config))
  for name, allowed in CHOICES.items():
    if values[name] not in allowed:
      raise UserError(f"{name}={values[name]!r} is none of {', '.join(allowed)}.")
  for name in _POSITIVE:
    if values[name] < 1:
      raise UserError(f"{name}={values[name]} must be at least 1.")
  for name in ("task.overlap_words", "task.test_start", "evaluate.base_shots"):
    if values[name] < 0:
      raise UserError(f"{name}={values[name]} must not be negative; 0 is none.")
  if values["evaluate.base_shots"] and not values["engine.stop"]:
    raise UserError(
      f"evaluate.base_shots={values['evaluate.base_shots']} needs engine.stop, such as ('\\nQuestion:',): a base model that "
      "has read problems goes on to write some of its own, and the last answer is the one that is graded."
    )
  if values["pairs.pair_mode"] == "positives_too" and values["credit.max_right_per_problem"] < 1:
    raise UserError("pairs.pair_mode='positives_too' needs credit of right traces: credit.max_right_per_problem is 0.")
  if values["synthesis.budget_usd"] and not (
    values["synthesis.usd_per_million_prompt"] or values["synthesis.usd_per_million_completion"]
  ):
    raise UserError("synthesis.budget_usd needs prices: synthesis.usd_per_million_prompt and _completion are 0.")
  rule, schedule = values["pairs.pit_rule"], values["credit.schedule"]
  if rule not in _PIT_RULES[schedule]:
    raise UserError(
      f"pairs.pit_rule={rule!r} needs values that credit.schedule={schedule!r} leaves out; it goes with "
      f"{', '.join(_PIT_RULES[schedule])}."
    )
  for part in ("sft", "rft", "dpo"):
    for target in values[f"{part}.lora.targets"]:
      if target not in MATRICES:
        raise UserError(f"{part}.lora.targets names {target!r}, none of {', '.join(MATRICES)}.")
  if values["pretrain.lora.rank"]:
    raise UserError("pretrain.lora.rank must be 0: there is nothing yet that could be adapted.")
  k = values["credit.best_of"]
  for name in ("credit.num_rollouts", "sample.num_traces"):
    if values[name] < k:
      raise UserError(f"{name}={values[name]} is less than credit.best_of={k}: Best-of-k needs k draws at least.")


def check_name(name: str, where: str) -> None:
  """Refuses a dotted name that is no leaf of the default tree, with the nearest names.

  Raises:
    UserError: unknown leaf.
  """
  known = [known for known, _ in leaves(default())]
  if name not in known:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise UserError(f"{where}: the config has no leaf {name!r}{hint}")
