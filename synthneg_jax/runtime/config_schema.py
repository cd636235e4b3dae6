"""The config schema: one `Leaf` per setting, and everything derived from it.

A leaf has a default, a sentence of documentation, a unit, allowed values or a range, and whether it
changes results. The default tree (`default`), the text of --help (`help_text`), the reference page
(docs/generated_pages.py), the checks (`check_values`) and the leaves in a stage's fingerprint
(`changes_results`) are all derived from `SCHEMA`.

A config file (configs/*.py) defines `get_config(arg)`, which starts from `default()` and sets
leaves; the command line sets leaves with --config.part.leaf=value.
"""

import ast
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from ml_collections import ConfigDict

from synthneg_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One setting.

  Attributes:
    default: also determines the type.
    doc: one sentence.
    unit: of the value, or "".
    within: interval of a number, or of each number in a tuple, such as "[0, 1)" or "[1, inf)".
    also: numbers outside that interval with a special meaning.
    choices: allowed values of a string, or of each string in a tuple.
    parse: parses a string with its own syntax; its UserError is the predicate of a sentence.
    changes_results: False if the leaf only affects how a stage computes or what it saves; such a
      leaf may change when a stage is resumed.
  """

  default: object
  doc: str
  _: dataclasses.KW_ONLY
  unit: str = ""
  within: str = ""
  also: tuple = ()
  choices: tuple[str, ...] = ()
  parse: Callable[[str], object] | None = None
  changes_results: bool = True

  @property
  def domain(self) -> str:
    """The allowed values as text: an interval, a list of choices, or ""."""
    if self.choices:
      return ", ".join(self.choices)
    return " or ".join([*map(str, self.also), self.within]) if self.within else ""

  def problem(self, value: object) -> str:
    """The problem with a value, as the predicate of a sentence, or ""."""
    for part in value if isinstance(value, tuple | list) else (value,):
      if self.within and (isinstance(part, str) or not isinstance(part, int | float)):
        return f"must hold numbers, not {part!r}"
      if self.choices and part not in self.choices:
        return f"must be one of {', '.join(self.choices)}"
      if self.within and part not in self.also and not _inside(part, self.within):
        return f"must be in {self.domain}"
    if self.parse is not None:
      try:
        self.parse(value)
      except UserError as error:
        return str(error).removesuffix(".")
    return ""


def _inside(value: float, interval: str) -> bool:
  """Whether a number lies in an interval such as "(0, 1]"; a NaN lies in none."""
  low, high = (float(bound) for bound in interval[1:-1].split(","))
  above = value >= low if interval[0] == "[" else value > low
  below = value <= high if interval[-1] == "]" else value < high
  return above and below and not (math.isinf(value) and math.isinf(high))


def _strings(values: Sequence[object]) -> None:
  """Raises UserError unless all values are strings that are not empty."""
  if wrong := [value for value in values if not isinstance(value, str) or not value]:
    raise UserError(f"must hold strings that are not empty, not {wrong[0]!r}.")


def step_pattern(text: str) -> re.Pattern[str]:
  """The pattern of task.step_delimiter: literal text or, after "re:", a regular expression.

  Raises:
    UserError: the text is empty or invalid, or matches the empty string.
  """
  if not text:
    raise UserError("must not be empty.")
  try:
    pattern = re.compile(text.removeprefix("re:") if text.startswith("re:") else re.escape(text))
  except re.error as error:
    raise UserError(f"must be a valid regular expression after re: ({error}).") from None
  if pattern.search(""):
    raise UserError("must not match the empty string.")
  return pattern


_TARGETS = ("problem", "solution", "answer", "id")
_RESERVED_ARGUMENTS = {
  "add_generation_prompt",
  "chat_template",
  "continue_final_message",
  "conversation",
  "return_dict",
  "tokenize",
}


def field_map(text: str) -> dict[str, str]:
  """Parses task.fields: maps problem, solution, answer or id to a row's field name, maybe dotted.

  Raises:
    UserError: the text is not a list of pairs with these names.
  """
  pairs = [
    [side.strip() for side in pair.split("=", 1)] for pair in text.split(",") if text.strip()
  ]
  targets = [pair[0] for pair in pairs]
  if not all(len(pair) == 2 and pair[1] for pair in pairs) or len(set(targets)) < len(targets):
    raise UserError("must be pairs such as problem=query,solution=response, with each name once.")
  if not set(targets) <= set(_TARGETS):
    raise UserError(f"must be pairs whose first name is one of {', '.join(_TARGETS)}.")
  return dict(pairs)


def template_args(text: str) -> dict:
  """Parses task.template_args, a JSON object; {} for the empty text.

  Raises:
    UserError: the text is not a JSON object, or sets an argument that the program sets itself.
  """
  try:
    arguments = json.loads(text or "{}")
  except ValueError:
    arguments = None
  if not isinstance(arguments, dict):
    raise UserError('must be a JSON object, such as {"enable_thinking": false}.')
  if taken := sorted(_RESERVED_ARGUMENTS & arguments.keys()):
    raise UserError(f"must not set {', '.join(taken)}, which the program sets itself.")
  return arguments


def literals(text: str) -> dict[str, object]:
  """Parses task.reasoning_gym.params, keyword arguments such as min_terms=2, max_terms=4.

  Raises:
    UserError: the text is not a list of keyword arguments with literal values.
  """
  try:
    call = ast.parse(f"parameters({text})", mode="eval").body
    named = (
      isinstance(call, ast.Call) and not call.args and all(keyword.arg for keyword in call.keywords)
    )
    if named:
      return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
  except (SyntaxError, ValueError, MemoryError, RecursionError):
    pass
  raise UserError("must be names with literal values, such as min_terms=2, max_terms=4.")


def _function_name(text: str) -> None:
  """Raises UserError unless the text is empty or of the form module:function."""
  if text and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
    raise UserError("must be module:function.")


MATRICES = ("query", "key", "value", "output", "gate", "up", "down")  # of a layer
COUNT, AT_LEAST_0 = "[1, inf)", "[0, inf)"


def _neutral(default: object, doc: str, **kwargs) -> Leaf:
  """A leaf that does not change results."""
  return Leaf(default, doc, changes_results=False, **kwargs)


def _optimizer(learning_rate: float) -> dict:
  return {
    "learning_rate": Leaf(
      learning_rate, "Peak step size of AdamW.", unit="per update", within=AT_LEAST_0
    ),
    "schedule": Leaf(
      "cosine", "Step size schedule after warm-up.", choices=("cosine", "linear", "constant")
    ),
    "warmup_fraction": Leaf(
      0.03, "Fraction of all steps with linear warm-up of the step size from 0.", within="[0, 1]"
    ),
    "clip_norm": Leaf(1.0, "Bound on the global norm of the gradient.", within="(0, inf)"),
    "beta1": Leaf(0.9, "Decay of AdamW's first moment.", unit="per step", within="[0, 1)"),
    "beta2": Leaf(0.95, "Decay of AdamW's second moment.", unit="per step", within="[0, 1)"),
    "weight_decay": Leaf(
      0.0,
      "AdamW's decoupled weight decay, multiplied by the step size; norm scales are exempt.",
      unit="per step",
      within=AT_LEAST_0,
    ),
  }


def _training(learning_rate: float, batch_size: int, num_epochs: int) -> dict:
  return {
    "optimizer": _optimizer(learning_rate),
    "batch_size": Leaf(
      batch_size,
      "Solutions (SFT, RFT, pretraining) or pairs (DPO) per step.",
      unit="solutions or pairs",
      within=COUNT,
    ),
    "num_epochs": Leaf(num_epochs, "Passes over the solutions or pairs.", within=COUNT),
    "max_steps": Leaf(
      0, "Maximum number of steps; 0 for no limit.", unit="steps", within=AT_LEAST_0
    ),
    "row_length": Leaf(
      0,
      "Length of the rows into which trees are packed; longer trees are not trained on. 0 chooses "
      "a length that fits the trees, up to model.max_length.",
      unit="tokens",
      within="[2, inf)",
      also=(0,),
    ),
    "grad_accum_steps": _neutral(
      0,
      "Microbatches whose gradients are summed per step; 0 for as few as memory allows.",
      within=AT_LEAST_0,
    ),
    "logit_chunk": Leaf(
      0,
      "Scored tokens of a row whose logits are computed at once; 0 for all.",
      unit="tokens",
      within=AT_LEAST_0,
    ),
    "max_branches_per_tree": Leaf(
      5,
      "Maximum branches of one problem per step; limits the weight of one problem.",
      within=COUNT,
    ),
    "save_every_steps": _neutral(
      200, "Steps between checkpoints; 0 for none.", unit="steps", within=AT_LEAST_0
    ),
    "max_to_keep": _neutral(2, "Newest checkpoints to keep.", within=COUNT),
    "max_to_keep_best": _neutral(
      0,
      "Additional checkpoints to keep, with the lowest mean loss since the previous checkpoint.",
      within=AT_LEAST_0,
    ),
    "lora": {
      "rank": Leaf(
        0,
        "Rank of the LoRA adapter to train; 0 trains all weights.",
        within=AT_LEAST_0,
      ),
      "alpha": Leaf(16.0, "The adapter's output is multiplied by alpha / rank.", within="(0, inf)"),
      "targets": Leaf(
        MATRICES, "Matrices of each layer that the adapter changes.", choices=MATRICES
      ),
    },
  }


def _endpoint(concurrency: int) -> dict:
  return {
    "url": _neutral("", "URL of an OpenAI-compatible server, such as http://localhost:8000/v1."),
    "model": Leaf("", "Name of the model on the server."),
    "key_variable": _neutral(
      "OPENAI_API_KEY",
      "Environment variable with the API key; empty if the server needs none.",
    ),
    "concurrency": _neutral(concurrency, "Requests in flight at once.", within=COUNT),
    "timeout_s": _neutral(
      120.0,
      "Time without any data after which an attempt is abandoned.",
      unit="seconds",
      within="(0, inf)",
    ),
    "attempts": _neutral(8, "Attempts per request.", within=COUNT),
    "backoff_s": _neutral(
      1.0,
      "Wait before the second attempt; doubles with each attempt, up to 60.",
      unit="seconds",
      within=AT_LEAST_0,
    ),
  }


def _sampling(purpose: str, temperature: float) -> dict:
  return {
    "temperature": Leaf(temperature, f"Temperature of {purpose}; 0 is greedy.", within=AT_LEAST_0),
    "top_k": Leaf(
      0, "Sample from the k most likely tokens; 0 for all.", unit="tokens", within=AT_LEAST_0
    ),
    "top_p": Leaf(
      1.0,
      "Sample from the most likely tokens whose probabilities sum to this.",
      within="(0, 1]",
    ),
  }


SCHEMA = {
  "seed": Leaf(0, "Seed of all random draws.", within="[0, 4294967295]"),
  "task": {
    "name": Leaf(
      "arithmetic",
      "A generated task (arithmetic, jobs, star_graph, stories), a task of reasoning_gym, GSM8K, "
      "competition MATH, or a file of problems (jsonl).",
      choices=(
        "arithmetic",
        "jobs",
        "star_graph",
        "stories",
        "reasoning_gym",
        "gsm8k",
        "math",
        "jsonl",
      ),
    ),
    "train_problems": Leaf(
      1000, "|D_syn|: problems with solutions on which SFT trains.", unit="problems", within=COUNT
    ),
    "fresh_problems": Leaf(
      0,
      "Training problems held out from SFT, on which traces are sampled instead of those of SFT; "
      "0 for none.",
      unit="problems",
      within=AT_LEAST_0,
    ),
    "test_problems": Leaf(
      1000, "Problems for measuring test errors.", unit="problems", within=COUNT
    ),
    "path": Leaf(
      "",
      "Folder with both splits, training file, or dataset on the Hub (hf:ORG/NAME); empty: see "
      "docs/datasets.md.",
    ),
    "test_path": Leaf(
      "", "The same for test problems, such as MATH-500; empty: those of task.path."
    ),
    "fields": Leaf(
      "",
      "Names of a row's fields if they differ: problem=query,solution=response; also for answer "
      "and id; names may be dotted.",
      parse=field_map,
    ),
    "decontaminate_against": Leaf(
      (),
      "Further files, folders or datasets of test problems that training must not overlap.",
    ),
    "decontaminate_ngram": Leaf(
      13,
      "Drop training problems that share this many consecutive words with a test problem; 0 for "
      "never.",
      unit="words",
      within=AT_LEAST_0,
    ),
    "skip_bad_rows": _neutral(
      False,
      "Skip and count broken rows of problem files instead of stopping; also --skip_bad_rows.",
    ),
    "gold_disagreements": Leaf(
      "drop",
      "Training problems from files whose solution states another answer than the gold answer; "
      "test problems are always kept.",
      choices=("drop", "keep"),
    ),
    "answers": Leaf(
      "integer",
      "How answers are compared: integer (after ####), math (in \\boxed{}) or exact (the whole "
      "response).",
      choices=("integer", "math", "exact"),
    ),
    "grading": {
      "percent": Leaf(
        "either",
        "Value of 20%: 20 or 0.2 (either), 0.2 (fraction) or 20 (number).",
        choices=("either", "fraction", "number"),
      ),
      "units": Leaf(
        "optional",
        "Whether an answer may omit the unit of the gold answer.",
        choices=("optional", "required", "ignored"),
      ),
      "tuples": Leaf(
        "ordered", "Whether (1,2) and (2,1) differ.", choices=("ordered", "unordered")
      ),
      "lists": Leaf(
        "auto",
        "Whether the order of 1, 2, 3 without braces counts; auto: for three numbers that do not "
        "ascend.",
        choices=("auto", "ordered", "unordered"),
      ),
      "decimal_digits": Leaf(
        12,
        "Significant digits from which a rounded decimal equals the exact value; 0 for never.",
        unit="digits",
        within=AT_LEAST_0,
      ),
      "extraction": Leaf(
        "last",
        "Answer of a response without a marked one: from its last display or line (last), or none "
        "(marked).",
        choices=("last", "marked"),
      ),
      "retractions": Leaf(
        "ambiguous",
        'Answer of "The answer is 7. No wait, it is 8.": none (ambiguous) or 8 (last).',
        choices=("ambiguous", "last"),
      ),
      "timeout_s": Leaf(2.0, "CPU time limit per answer.", unit="seconds", within="(0, inf)"),
    },
    "prompt": Leaf(
      "plain",
      'Prompt form of stories, reasoning_gym and tasks from files: plain ("Question: '
      '...\\nAnswer:\\n") or the chat template.',
      choices=("plain", "chat"),
    ),
    "template_args": Leaf(
      "",
      'task.prompt=chat: arguments of the chat template, such as {"enable_thinking": false}.',
      parse=template_args,
    ),
    "instruction": Leaf(
      "", "Text appended to every problem on its own line. Tasks from files only."
    ),
    "steps": Leaf(
      "delimiter",
      "End of a step: task.step_delimiter, or lines and sentences outside LaTeX (prose).",
      choices=("delimiter", "prose"),
    ),
    "step_delimiter": Leaf(
      "\n",
      "task.steps=delimiter: text that ends a step, or a regular expression after re:.",
      parse=step_pattern,
    ),
    "test_start": Leaf(
      0, "Index of the first test problem of a generated task.", within=AT_LEAST_0
    ),
    "verifier": Leaf(
      "",
      "Function, as module:function, that replaces the grader: (response, problem) -> bool.",
      parse=_function_name,
    ),
    "reasoning_gym": {
      "dataset": Leaf("gsm_symbolic", "Name of the dataset in reasoning-gym."),
      "params": Leaf(
        "", "Parameters of the dataset's config, such as min_terms=2, max_terms=4.", parse=literals
      ),
    },
    "arithmetic": {
      "skip_step_prob": Leaf(
        0.0, "Probability that the teacher skips writing an addition.", within="[0, 1]"
      ),
      "num_leaves": Leaf(4, "Quantities with given values.", within=COUNT),
      "num_operations": Leaf(6, "Operations defined in a problem, needed or not.", within=COUNT),
      "min_needed_ops": Leaf(3, "Minimum operations needed for the answer.", within=COUNT),
      "max_needed_ops": Leaf(5, "Maximum operations needed for the answer.", within=COUNT),
    },
    "star_graph": {
      "degree": Leaf(3, "Arms of a graph; chance is 1 / degree.", within="[2, inf)"),
      "path_nodes": Leaf(
        3, "Nodes of an arm, including centre and leaf.", unit="nodes", within="[2, inf)"
      ),
      "num_nodes": Leaf(20, "Number of node names to draw from.", within="[2, inf)"),
    },
    "jobs": {
      "fewest": Leaf(4, "Minimum jobs per problem.", unit="jobs", within=COUNT),
      "most": Leaf(6, "Maximum jobs per problem.", unit="jobs", within=COUNT),
      "slack": Leaf(
        4,
        "Maximum time between a job's end in a hidden feasible order and its deadline.",
        unit="hours",
        within=AT_LEAST_0,
      ),
    },
    "stories": {
      "min_people": Leaf(4, "Minimum people per story.", unit="people", within="[2, 18]"),
      "max_people": Leaf(6, "Maximum people per story.", unit="people", within="[2, 18]"),
      "min_derivations": Leaf(
        2,
        "Minimum quantities derived before the sum.",
        unit="derivations",
        within="[0, 17]",
      ),
      "max_derivations": Leaf(
        4,
        "Maximum quantities derived before the sum.",
        unit="derivations",
        within="[0, 17]",
      ),
      "max_distractors": Leaf(
        3, "Maximum people irrelevant to the question.", unit="people", within="[0, 16]"
      ),
      "largest_value": Leaf(99, "Largest value that a person has.", within="[2, inf)"),
    },
  },
  "model": {
    "path": Leaf(
      "embedded",
      "Base model: a policy or Hugging Face folder, a model on the Hub (ORG/NAME[@REVISION]), or "
      "one shipped with the package (embedded, embedded_jobs, embedded_stories).",
    ),
    "dtype": Leaf(
      "float32", "Dtype of activations and matrix products.", choices=("float32", "bfloat16")
    ),
    "param_dtype": Leaf("float32", "Dtype of stored parameters.", choices=("float32", "bfloat16")),
    "scan_layers": _neutral(
      False,
      "Scan over one compiled layer (deep models, TPU) instead of compiling each layer (CPU).",
    ),
    "remat": _neutral(
      "none",
      "Rematerialisation of a layer in the backward pass: nothing, everything, or all but matrix "
      "products.",
      choices=("none", "full", "selective"),
    ),
    "max_length": Leaf(
      1024, "Maximum length of prompt and response together.", unit="tokens", within="[2, inf)"
    ),
    "check_parity": _neutral(
      False, "Compare the base model's logits with torch's before any work; also --check_parity."
    ),
  },
  "mesh": {
    "data": _neutral(
      -1, "Devices along the data axis; -1 takes the remaining devices.", within=COUNT, also=(-1,)
    ),
    "fsdp": _neutral(
      1,
      "Devices along the axis over which parameters and rows are split.",
      within=COUNT,
      also=(-1,),
    ),
    "tensor": _neutral(
      1,
      "Devices along the axis over which heads and feed-forward width are split.",
      within=COUNT,
      also=(-1,),
    ),
    "slices": _neutral(
      1,
      "TPU slices connected by the data-centre network; each holds all parameters and its share "
      "of the rows.",
      within=COUNT,
    ),
  },
  "engine": {
    "lanes": _neutral(
      0, "Trunks decoded at once; 0 chooses by workload and memory.", within=AT_LEAST_0
    ),
    "slots": _neutral(
      0,
      "Branches of a trunk decoded at once; 0 chooses by workload and memory.",
      within=AT_LEAST_0,
    ),
    "max_new_tokens": Leaf(
      256,
      "Maximum response length; of a rollout, without its prefix.",
      unit="tokens",
      within=COUNT,
    ),
    "stop": Leaf((), "Strings that end a response, in addition to EOS.", parse=_strings),
  },
  "synthesis": {
    "provider": Leaf(
      "task",
      "Source of D_syn: the task itself, a server, a local checkpoint, or the scripted teacher.",
      choices=("task", "endpoint", "local", "scripted"),
    ),
    "generate": Leaf(
      "problems",
      "Generate new problems and solutions from seed problems, or solutions of the task's own.",
      choices=("problems", "solutions"),
    ),
    "endpoint": _endpoint(16),
    "prompts": Leaf(
      "configs/prompts/gsm8k", "Folder with the prompts problems.txt and solution.txt."
    ),
    "replies": _neutral(
      "", "Folder of all raw replies, which runs may share; empty: replies/ in the workdir."
    ),
    "seed_problems": Leaf(
      1000,
      "Training problems of the task on which new problems are modelled.",
      unit="problems",
      within=COUNT,
    ),
    "seeds_per_request": Leaf(3, "Seed problems shown per request.", unit="problems", within=COUNT),
    "new_per_request": Leaf(
      4, "New problems requested per request.", unit="problems", within=COUNT
    ),
    "num_solutions": Leaf(4, "Solutions requested per problem.", unit="solutions", within=COUNT),
    "min_agreement": Leaf(
      0.5,
      "Minimum fraction of solutions with the same answer; other problems are dropped as unsolved.",
      within="[0, 1]",
    ),
    "temperature_problems": Leaf(1.0, "Sampling temperature of problems.", within=AT_LEAST_0),
    "temperature_solutions": Leaf(0.7, "Sampling temperature of solutions.", within=AT_LEAST_0),
    "max_tokens": Leaf(2048, "Maximum reply length.", unit="tokens", within=COUNT),
    "max_tokens_field": _neutral(
      "max_tokens",
      "The server's name for this limit.",
      choices=("max_tokens", "max_completion_tokens"),
    ),
    "near_duplicate": Leaf(
      0.2,
      "Drop problems within this edit distance of an earlier one (fraction of the longer text).",
      within="[0, 1]",
    ),
    "surplus": Leaf(
      1.25, "Problems kept before balancing by difficulty, per problem wanted.", within=COUNT
    ),
    "max_rounds": _neutral(
      8, "Maximum rounds of requesting more problems until there are enough.", within=COUNT
    ),
    "stream": _neutral(True, "Stream replies, so that a stalled server is noticed sooner."),
    "send_seed": Leaf(True, "Send a seed with each request."),
    "max_failed": _neutral(
      0, "Requests that may fail without stopping the stage.", within=AT_LEAST_0
    ),
    "usd_per_million_prompt": _neutral(
      0.0, "Price per million prompt tokens.", unit="US dollars", within=AT_LEAST_0
    ),
    "usd_per_million_completion": _neutral(
      0.0, "Price per million reply tokens.", unit="US dollars", within=AT_LEAST_0
    ),
    "budget_usd": _neutral(
      0.0,
      "Spending limit over all runs of the workdir; 0 for no limit.",
      unit="US dollars",
      within=AT_LEAST_0,
    ),
  },
  "pretrain": {
    **_training(3e-3, 32, 1),
    "num_problems": Leaf(
      256000, "Generated problems, each used once.", unit="problems", within=COUNT
    ),
    "random_step_fraction": Leaf(
      0.5,
      "Fraction of problems with random legal steps, without a plan or an answer.",
      within="[0, 1]",
    ),
    "max_answered_ops": Leaf(
      2, "Maximum operations needed in problems with an answer.", within=AT_LEAST_0
    ),
    "d_model": Leaf(64, "Width of the embedded base model.", within=COUNT),
    "num_layers": Leaf(3, "Layers of the embedded base model.", within=COUNT),
    "num_heads": Leaf(4, "Attention heads of the embedded base model.", within=COUNT),
    "d_ff": Leaf(160, "Feed-forward width of the embedded base model.", within=COUNT),
  },
  "sft": _training(1e-5, 128, 3),
  "rft": {
    **_training(1e-5, 128, 3),
    "start": Leaf("base", "Initial policy of RFT.", choices=("base", "sft")),
    "max_per_problem": Leaf(
      4, "Maximum solutions kept per problem.", unit="solutions", within=COUNT
    ),
    "with_teacher": Leaf(False, "Also train on the teacher's solutions."),
    "keep": Leaf(
      "right",
      "Traces to train on: all right ones (right); right ones with credit that contain a spurious "
      "step (spurious) or none (clean); those whose lowest step advantage is not among the worst "
      "(advantage).",
      choices=("right", "spurious", "clean", "advantage"),
    ),
    "drop_fraction": Leaf(
      0.5,
      "rft.keep=advantage: fraction of traces to drop, those with the lowest step advantage.",
      within="[0, 1)",
    ),
    "loss_mask": Leaf(
      "whole",
      "rft.keep=advantage: steps to train on: all, those before the first negative advantage, or "
      "those with a positive advantage.",
      choices=("whole", "before_negative", "positive"),
    ),
    "deduplicate": Leaf(
      "none",
      "Deduplication of a problem's solutions before max_per_problem: keep one per list of "
      "equations (equations, RFT's rule), drop those near an earlier one (edit_distance), or keep "
      "the most diverse ones (most_diverse).",
      choices=("none", "equations", "edit_distance", "most_diverse"),
    ),
    "near_duplicate": Leaf(
      0.2,
      "rft.deduplicate=edit_distance: maximum edit distance of near duplicates, as a fraction of "
      "the longer text.",
      within="[0, 1)",
    ),
    "max_solutions": Leaf(
      0, "Maximum solutions in total; 0 for no limit.", unit="solutions", within=AT_LEAST_0
    ),
    "objective": Leaf(
      "next_token",
      "Next-token loss, or each step of the traces weighted by exp(advantage / advantage_beta) "
      "(equation 4).",
      choices=("next_token", "advantage_weighted"),
    ),
    "advantage_beta": Leaf(
      0.3,
      "objective=advantage_weighted: β; smaller values give good steps more weight.",
      within="(0, inf)",
    ),
    "max_weight": Leaf(
      20.0, "objective=advantage_weighted: maximum weight of a step.", within="(0, inf)"
    ),
  },
  "sample": {
    "num_traces": Leaf(8, "Traces per problem.", unit="traces", within=COUNT),
    **_sampling("sampling", 0.7),
  },
  "credit": {
    "schedule": Leaf(
      "all",
      "Prefixes that get rollouts (core/rollout_schedules.py).",
      choices=("all", "until_first_zero", "bisect", "adaptive"),
    ),
    "num_rollouts": Leaf(
      10,
      "Rollouts per prefix; the maximum for schedules other than all.",
      unit="rollouts",
      within=COUNT,
    ),
    **_sampling("rollouts", 0.7),
    "best_of": Leaf(
      5, "k of Best-of-k, the policy whose values are estimated; 1 for π_sft itself.", within=COUNT
    ),
    "max_wrong_per_problem": Leaf(
      8, "Wrong traces per problem that get credit, at most.", unit="traces", within=AT_LEAST_0
    ),
    "max_right_per_problem": Leaf(
      0, "Right traces per problem that get credit, at most.", unit="traces", within=AT_LEAST_0
    ),
    "max_rollouts": Leaf(
      0,
      "Rollout budget: problems get credit in order until it is used up; 0 for all problems.",
      unit="rollouts",
      within=AT_LEAST_0,
    ),
    "slots": _neutral(
      0,
      "Branches of a trace decoded at once; 0 chooses by workload and memory.",
      within=AT_LEAST_0,
    ),
    "lanes": _neutral(
      0,
      "Traces whose rollouts are decoded at once; 0 chooses by workload and memory.",
      within=AT_LEAST_0,
    ),
    "endpoint": _endpoint(32),
    "send_token_ids": Leaf(
      True,
      "Exchange token ids with the endpoint; False exchanges text.",
    ),
  },
  "dpo": {
    **_training(1e-6, 64, 1),
    "beta": Leaf(
      0.1,
      "Strength of the KL regularisation towards the reference.",
      unit="per nat",
      within="(0, inf)",
    ),
    "loss": Leaf(
      "dpo", "Preference loss: DPO, IPO or DPO-Positive.", choices=("dpo", "ipo", "dpop")
    ),
    "label_smoothing": Leaf(
      0.0, "dpo.loss=dpo: assumed fraction of flipped labels.", within="[0, 0.5)"
    ),
    "tau": Leaf(
      0.1,
      "dpo.loss=ipo: strength of the regularisation towards the reference; beta then only "
      "determines which pairs count as saturated.",
      unit="per nat",
      within="(0, inf)",
    ),
    "penalty": Leaf(
      50.0,
      "dpo.loss=dpop: penalty weight if the chosen branch is less likely than in the reference.",
      within=AT_LEAST_0,
    ),
    "nll_weight": Leaf(
      0.0, "Weight of the chosen branch's next-token loss per token.", within=AT_LEAST_0
    ),
  },
  "pairs": {
    "pair_mode": Leaf(
      "algorithm1",
      "Construction of pairs/step_dpo's pairs (docs/method.md).",
      choices=(
        "algorithm1",
        "prefix_protected",
        "shared_prefix",
        "positives_too",
        "random_step",
        "arbitrary",
        "furthest",
      ),
    ),
    "outcome_mode": Leaf(
      "arbitrary",
      "Construction of pairs/dpo's pairs: arbitrary, or furthest by edit distance (Pal et al.).",
      choices=("arbitrary", "furthest"),
    ),
    "furthest": Leaf(
      "largest",
      "Mode furthest: pair each right response with the wrong one at the largest distance, or "
      "with the shortest one that is far.",
      choices=("largest", "shortest_far"),
    ),
    "pit_rule": Leaf(
      "lowest_value",
      "Rule for the first pit of a wrong trace (core/pits.py).",
      choices=("lowest_value", "first_zero", "first_dead", "least_advantage", "relative_drop"),
    ),
    "drop_ratio": Leaf(
      0.34,
      "pit_rule=relative_drop: maximum ratio of Q after the pit to Q before it.",
      within="[0, 1]",
    ),
    "min_before": Leaf(0.25, "pit_rule=relative_drop: minimum Q before the pit.", within="[0, 1]"),
    "spurious_below": Leaf(
      0.0,
      "pair_mode=positives_too: reject steps of right traces with an advantage below this.",
      within="[-1, 1]",
    ),
    "continuation": Leaf(
      "step",
      "pair_mode=shared_prefix: chosen part of a right rollout: its first step, or all of it.",
      choices=("step", "rollout"),
    ),
    "choice": Leaf(
      "random",
      "pair_mode=shared_prefix: which right rollout to choose.",
      choices=("random", "shortest", "most_likely", "majority"),
    ),
    "max_per_problem": Leaf(8, "Maximum pairs per problem.", unit="pairs", within=COUNT),
    "order": Leaf(
      "sampled",
      "Per-step pairs: order of a problem's traces before max_per_problem is applied: as sampled; "
      "by likelihood per token under π_sft; or by the drop of Q at the rejected step.",
      choices=("sampled", "likeliest", "largest_drop"),
    ),
    "max_pairs": Leaf(
      0, "Maximum pairs in total, drawn at random; 0 for no limit.", unit="pairs", within=AT_LEAST_0
    ),
    "right_fraction": Leaf(
      -1.0,
      "pair_mode=positives_too with max_pairs: fraction of pairs from right traces; -1 to leave it "
      "free.",
      within="[0, 1]",
      also=(-1.0,),
    ),
    "max_flip": Leaf(
      1.0,
      "Drop pairs whose label is flipped with a higher probability, given the rollout counts.",
      within="[0, 1]",
    ),
  },
  "evaluate": {
    "temperature": Leaf(0.0, "Temperature of the graded response; 0 is greedy.", within=AT_LEAST_0),
    "base_shots": Leaf(
      0,
      "Solved training problems in the base model's prompt; needs engine.stop. Tasks from files "
      "only.",
      unit="problems",
      within=AT_LEAST_0,
    ),
    "methods": _neutral(
      ("base", "sft", "rft", "dpo", "step_dpo"),
      "Policies to test.",
      choices=("base", "sft", "rft", "dpo", "step_dpo"),
    ),
  },
  "metrics": {
    "jsonl": _neutral(True, "Write metrics.jsonl, one line per update; the report plots it."),
    "tensorboard": _neutral(True, "Write TensorBoard event files to the stages' folders."),
    "wandb": _neutral("", "Weights & Biases project for metrics; empty for none."),
    "wandb_mode": _neutral(
      "online",
      "Send metrics at once, or keep them in the stages' folders for `wandb sync`.",
      choices=("online", "offline"),
    ),
    "profile_steps": _neutral(
      "",
      "a:b traces updates a to b - 1 of every training stage; also --profile_steps; empty for "
      "none.",
    ),
  },
  "export": {
    "max_shard_bytes": Leaf(
      5_000_000_000,
      "Maximum size of a file of exported weights, unless a single tensor is larger.",
      unit="bytes",
      within=COUNT,
    ),
    "push_to_hub": _neutral(
      "",
      "Hugging Face Hub repository, ORG/NAME, for the exported policy; for several policies, "
      "ORG/NAME-METHOD each. New repositories are private.",
    ),
  },
  "report": {
    "num_traces": _neutral(
      5, "Traces shown with their Q values.", unit="traces", within=AT_LEAST_0
    ),
    "max_traces": _neutral(
      20000,
      "Maximum traces in the trace viewer; beyond that, whole problems at equal intervals.",
      unit="traces",
      within=COUNT,
    ),
    "max_rollouts": _neutral(
      8, "Maximum distinct rollouts per step in the trace viewer.", within=AT_LEAST_0
    ),
  },
  "study": {
    "family": Leaf("", "Name of the task in figures."),
    "grid": Leaf(
      (), 'Cells as rows (sizes, methods, overrides), such as ((250, 500), ("sft", "rft"), {}).'
    ),
    "settings": Leaf(
      (),
      "Overrides for all cells of some sizes or methods, as rows such as ((250, 500), "
      '{"sft.num_epochs": 10}).',
    ),
    "seeds": Leaf((0,), "Seeds, with one run each.", within=AT_LEAST_0),
    "baseline": Leaf("sft", "Method relative to which data efficiency is measured."),
    "figures": Leaf(
      (), "Figures to draw at the end of the study; see experiments/scaling/figure.py."
    ),
    "reference_size": Leaf(
      500,
      "Size at which the other methods' efficiency factors are reported.",
      unit="problems",
      within=COUNT,
    ),
  },
  "star_graph": {
    "seeds": Leaf(4, "Training sets, each with its own SFT and DPO runs.", within="[2, inf)"),
    "under_trained": Leaf(
      (30, 60),
      "SFT checkpoints from which DPO starts, before the training set is memorised.",
      unit="steps",
      within=AT_LEAST_0,
    ),
    "over_trained": Leaf(
      (300,),
      "SFT checkpoints from which DPO starts, after the training set is memorised.",
      unit="steps",
      within=AT_LEAST_0,
    ),
    "every_steps": Leaf(50, "SFT or DPO steps between measurements.", unit="steps", within=COUNT),
  },
}

_TRAINING_RENAMES = {
  "optimizer.warmup_share": "optimizer.warmup_fraction",
  "accumulate": "grad_accum_steps",
  "keep_checkpoints": "max_to_keep",
  "keep_best": "max_to_keep_best",
}
RENAMED = {  # leaves of version 1 -> new names
  **{
    f"{part}.{old}": f"{part}.{new}"
    for part in ("pretrain", "sft", "rft", "dpo")
    for old, new in _TRAINING_RENAMES.items()
  },
  "task.apart_from": "task.decontaminate_against",
  "task.overlap_words": "task.decontaminate_ngram",
  "task.leap": "task.arithmetic.skip_step_prob",
  "task.num_leaves": "task.arithmetic.num_leaves",
  "task.num_operations": "task.arithmetic.num_operations",
  "task.needed_min": "task.arithmetic.min_needed_ops",
  "task.needed_max": "task.arithmetic.max_needed_ops",
  "task.degree": "task.star_graph.degree",
  "task.path_nodes": "task.star_graph.path_nodes",
  "task.num_nodes": "task.star_graph.num_nodes",
  "pretrain.wander_share": "pretrain.random_step_fraction",
  "pretrain.answered_max": "pretrain.max_answered_ops",
  "rft.clone": "rft.loss_mask",
  "rft.drop_share": "rft.drop_fraction",
  "synthesis.ask": "synthesis.generate",
  "study.factor_at": "study.reference_size",
  "credit.endpoint_ids": "credit.send_token_ids",
}


def _flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
  for name, value in tree.items():
    if isinstance(value, Mapping | ConfigDict):
      yield from _flatten(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


LEAVES: dict[str, Leaf] = dict(_flatten(SCHEMA))


def default() -> ConfigDict:
  """The locked default tree."""

  def values(tree: Mapping) -> dict:
    return {
      name: leaf.default if isinstance(leaf, Leaf) else values(leaf) for name, leaf in tree.items()
    }

  return ConfigDict(values(SCHEMA)).lock()


def leaves(config: ConfigDict) -> Iterator[tuple[str, object]]:
  """Yields (dotted name, value) of every leaf."""
  return _flatten(config)


def plain(config: ConfigDict, sections: Sequence[str] | None = None) -> dict:
  """Leaves as a flat JSON-ready dict.

  Args:
    config: the tree.
    sections: sections or single leaves, such as ("seed", "dpo.row_length"); None for all.
  """
  return {
    name: list(value) if isinstance(value, tuple) else value
    for name, value in leaves(config)
    if sections is None or name in sections or name.split(".")[0] in sections
  }


def changes_results(leaf: str) -> bool:
  """Whether two runs that differ in this leaf have different results."""
  return LEAVES[leaf].changes_results


def may_change_results(leaf: str) -> bool:
  """`changes_results` for leaves of any version; True for leaves that no longer exist."""
  return leaf not in LEAVES or LEAVES[leaf].changes_results


def help_text(sections: Sequence[str]) -> str:
  """The --help text of some sections: name, default, allowed values, unit and sentence per leaf."""
  lines = []
  for name, leaf in LEAVES.items():
    if name.split(".")[0] in sections:
      about = ", ".join(part for part in (leaf.domain, leaf.unit) if part)
      lines.append(f"  --config.{name}={leaf.default!r}" + (f"  ({about})" if about else ""))
      lines.append(f"      {leaf.doc}")
  return "\n".join(lines)


_PIT_RULES = {  # rules whose inputs each schedule estimates
  "all": LEAVES["pairs.pit_rule"].choices,
  "until_first_zero": ("lowest_value", "first_zero", "first_dead", "relative_drop"),
  "bisect": ("lowest_value", "first_zero", "first_dead"),
  "adaptive": ("first_dead",),
}


def check_values(config: ConfigDict) -> None:
  """Checks every leaf's choices and range, and combinations of leaves.

  Raises:
    UserError: names the leaf and its allowed values.
  """
  values = dict(leaves(config))
  for name, leaf in LEAVES.items():
    if problem := leaf.problem(values[name]):
      raise UserError(f"{name}={values[name]!r} {problem}.")
  if values["evaluate.base_shots"] and not values["engine.stop"]:
    raise UserError(
      f"evaluate.base_shots={values['evaluate.base_shots']} needs engine.stop, such as "
      "('\\nQuestion:',): after solved examples a base model continues with problems of its own, "
      "and the last answer is graded."
    )
  if values["task.fresh_problems"] and (
    values["synthesis.provider"] != "task" or values["rft.with_teacher"]
  ):
    raise UserError(
      f"task.fresh_problems={values['task.fresh_problems']} needs synthesis.provider='task' and "
      "rft.with_teacher=False: fresh problems come from the task, and SFT has not seen their "
      "solutions."
    )
  if values["rft.objective"] == "advantage_weighted" and (
    values["rft.keep"] != "advantage" or values["rft.with_teacher"]
  ):
    raise UserError(
      "rft.objective='advantage_weighted' needs rft.keep='advantage' and rft.with_teacher=False: "
      "only traces with credit have advantages."
    )
  if values["pairs.right_fraction"] >= 0 and not values["pairs.max_pairs"]:
    raise UserError(
      f"pairs.right_fraction={values['pairs.right_fraction']} needs pairs.max_pairs, of "
      "which it is a fraction."
    )
  if values["pairs.pair_mode"] == "positives_too" and values["credit.max_right_per_problem"] < 1:
    raise UserError(
      "pairs.pair_mode='positives_too' needs credit of right traces: credit.max_right_per_problem "
      "is 0."
    )
  if values["synthesis.budget_usd"] and not (
    values["synthesis.usd_per_million_prompt"] or values["synthesis.usd_per_million_completion"]
  ):
    raise UserError(
      "synthesis.budget_usd needs prices: synthesis.usd_per_million_prompt and _completion are 0."
    )
  rule, schedule = values["pairs.pit_rule"], values["credit.schedule"]
  if rule not in _PIT_RULES[schedule]:
    raise UserError(
      f"pairs.pit_rule={rule!r} needs values that credit.schedule={schedule!r} does not estimate; "
      f"with this schedule, use {', '.join(_PIT_RULES[schedule])}."
    )
  if values["pretrain.lora.rank"]:
    raise UserError("pretrain.lora.rank must be 0: pretraining has no base model to adapt.")
  k = values["credit.best_of"]
  for name in ("credit.num_rollouts", "sample.num_traces"):
    if values[name] < k:
      raise UserError(
        f"{name}={values[name]} is less than credit.best_of={k}: Best-of-k needs k samples or more."
      )
  if schedule == "adaptive" and values["credit.num_rollouts"] == k:
    raise UserError(
      f"credit.schedule='adaptive' may decide one rollout before credit.num_rollouts={k}, fewer "
      f"than credit.best_of={k} needs: raise num_rollouts or lower best_of."
    )


def check_name(name: str, where: str) -> None:
  """Checks that a dotted name is a leaf.

  Raises:
    UserError: unknown leaf; gives its new name if it was renamed, otherwise the closest names.
  """
  if name in LEAVES:
    return
  if name in RENAMED:
    raise UserError(f"{where}: {name} is now called {RENAMED[name]}.")
  near = difflib.get_close_matches(name, LEAVES, n=3, cutoff=0.5)
  hint = f"; did you mean {' or '.join(near)}?" if near else "."
  raise UserError(f"{where}: unknown config leaf {name!r}{hint}")
