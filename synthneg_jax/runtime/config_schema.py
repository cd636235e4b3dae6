"""The config schema: one `Leaf` per setting, and everything that is derived from it.

A leaf has a default, a sentence of documentation, a unit, allowed values or a range, and whether it
changes results. The default tree (`default`), the text of --help (`help_text`), the reference page
(docs/generated_pages.py), the checks (`check_values`) and the leaves that a stage's fingerprint
holds (`changes_results`) all come from `SCHEMA`.

A config file (configs/*.py) defines `get_config(arg)`, which starts from `default()` and changes
leaves; the command line changes leaves with --config.part.leaf=value.
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
    default: its value where nothing else is said; fixes its type.
    doc: one sentence.
    unit: of its value, "" where it has none.
    within: the interval of a number, or of each number of a tuple, as "[0, 1)" or "[1, inf)".
    also: numbers outside that interval that have a meaning of their own.
    choices: all values of a string, or of each string of a tuple.
    parse: reads a text with a form of its own; its UserError says what is wrong, as the end of a
      sentence.
    changes_results: False for what only says how a stage computes or what it keeps; such leaves may
      differ between the two halves of a resumed stage.
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
    """The values it may have, as text: an interval, a list of choices, or ""."""
    if self.choices:
      return ", ".join(self.choices)
    return " or ".join([*map(str, self.also), self.within]) if self.within else ""

  def problem(self, value: object) -> str:
    """What is wrong with a value, as the end of a sentence; "" if nothing is."""
    for part in value if isinstance(value, tuple | list) else (value,):
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


def step_pattern(text: str) -> re.Pattern[str]:
  """What task.step_delimiter matches: the text itself or, after "re:", a regular expression.

  Raises:
    UserError: it is empty, invalid, or matches the empty text.
  """
  if not text:
    raise UserError("must be text, not empty.")
  try:
    pattern = re.compile(text.removeprefix("re:") if text.startswith("re:") else re.escape(text))
  except re.error as error:
    raise UserError(f"must be a regular expression after re: ({error}).") from None
  if pattern.search(""):
    raise UserError("must be a pattern that does not match the empty text.")
  return pattern


_TARGETS = ("problem", "solution", "answer", "id")
_OWN_ARGUMENTS = {
  "add_generation_prompt",
  "chat_template",
  "continue_final_message",
  "conversation",
  "return_dict",
  "tokenize",
}


def field_map(text: str) -> dict[str, str]:
  """The pairs of task.fields: what a row's field is (problem, solution, answer or id) -> where it
  stands, perhaps dotted.

  Raises:
    UserError: it is no list of such pairs.
  """
  pairs = [
    [side.strip() for side in pair.split("=", 1)] for pair in text.split(",") if text.strip()
  ]
  targets = [pair[0] for pair in pairs]
  if not all(len(pair) == 2 and pair[1] for pair in pairs) or len(set(targets)) < len(targets):
    raise UserError("must be pairs such as problem=query,solution=response, each name once.")
  if not set(targets) <= set(_TARGETS):
    raise UserError(f"must be pairs whose first name is one of {', '.join(_TARGETS)}.")
  return dict(pairs)


def template_args(text: str) -> dict:
  """The arguments of task.template_args, a JSON object; {} for the empty text.

  Raises:
    UserError: it is none, or sets what the program sets itself.
  """
  try:
    arguments = json.loads(text or "{}")
  except ValueError:
    arguments = None
  if not isinstance(arguments, dict):
    raise UserError('must be a JSON object, such as {"enable_thinking": false}.')
  if taken := sorted(_OWN_ARGUMENTS & arguments.keys()):
    raise UserError(f"must be without {', '.join(taken)}, which the program sets itself.")
  return arguments


def literals(text: str) -> dict[str, object]:
  """The values of task.reasoning_gym.params, names with literals as in min_terms=2, max_terms=4.

  Raises:
    UserError: it is no list of such.
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
  raise UserError("must be names with literals, such as min_terms=2, max_terms=4.")


def _function_name(text: str) -> None:
  """UserError unless it is empty or of the form module:function."""
  if text and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
    raise UserError("must be module:function.")


MATRICES = ("query", "key", "value", "output", "gate", "up", "down")  # of a layer
COUNT, AT_LEAST_0 = "[1, inf)", "[0, inf)"


def _how(default: object, doc: str, **kwargs) -> Leaf:
  """A leaf that does not change results."""
  return Leaf(default, doc, changes_results=False, **kwargs)


def _optimizer(learning_rate: float) -> dict:
  return {
    "learning_rate": Leaf(
      learning_rate, "Peak step size of AdamW.", unit="per update", within=AT_LEAST_0
    ),
    "schedule": Leaf(
      "cosine", "Course of the step size after warm-up.", choices=("cosine", "linear", "constant")
    ),
    "warmup_fraction": Leaf(
      0.03, "Fraction of all steps over which the step size rises from 0.", within="[0, 1]"
    ),
    "clip_norm": Leaf(1.0, "Bound on the global norm of the gradient.", within="(0, inf)"),
    "beta1": Leaf(0.9, "Decay of AdamW's first moment.", unit="per step", within="[0, 1)"),
    "beta2": Leaf(0.95, "Decay of AdamW's second moment.", unit="per step", within="[0, 1)"),
    "weight_decay": Leaf(
      0.0,
      "AdamW's decoupled weight decay, times the step size; norm scales are exempt.",
      unit="per step",
      within=AT_LEAST_0,
    ),
  }


def _training(learning_rate: float, batch_size: int, num_epochs: int) -> dict:
  return {
    "optimizer": _optimizer(learning_rate),
    "batch_size": Leaf(
      batch_size,
      "Solutions (SFT, RFT, pretraining) or pairs (DPO) in a step.",
      unit="solutions or pairs",
      within=COUNT,
    ),
    "num_epochs": Leaf(num_epochs, "Passes over the solutions or pairs.", within=COUNT),
    "max_steps": Leaf(
      0, "Bound on the number of steps; 0 for none.", unit="steps", within=AT_LEAST_0
    ),
    "row_length": Leaf(
      0,
      "Length of a row into which trees are packed, and so of the longest that is trained on; 0 "
      "for rows that fit the trees, which model.max_length bounds.",
      unit="tokens",
      within="[2, inf)",
      also=(0,),
    ),
    "grad_accum_steps": _how(
      0,
      "Microbatches whose gradients are summed in a step; 0 for as few as memory allows.",
      within=AT_LEAST_0,
    ),
    "logit_chunk": Leaf(
      0,
      "Scored tokens of a row whose logits exist at once; 0 for all.",
      unit="tokens",
      within=AT_LEAST_0,
    ),
    "max_branches_per_tree": Leaf(
      5,
      "Branches of one problem in a step, at most; bounds how much one problem weighs there.",
      within=COUNT,
    ),
    "save_every_steps": _how(
      200, "Steps between checkpoints; 0 for none.", unit="steps", within=AT_LEAST_0
    ),
    "max_to_keep": _how(2, "Newest checkpoints that are kept.", within=COUNT),
    "max_to_keep_best": _how(
      0,
      "Checkpoints kept besides for the lowest mean loss since the checkpoint before.",
      within=AT_LEAST_0,
    ),
    "lora": {
      "rank": Leaf(
        0,
        "Rank of the adapter that is trained instead of all weights; 0 trains all weights.",
        within=AT_LEAST_0,
      ),
      "alpha": Leaf(
        16.0, "Scale of the adapter: it is multiplied by alpha / rank.", within="(0, inf)"
      ),
      "targets": Leaf(MATRICES, "Matrices of a layer that the adapter changes.", choices=MATRICES),
    },
  }


def _endpoint(concurrency: int) -> dict:
  return {
    "url": _how("", "Address of an OpenAI-compatible server, such as http://localhost:8000/v1."),
    "model": Leaf("", "Name of the model there."),
    "key_variable": _how(
      "OPENAI_API_KEY",
      "Environment variable that holds the API key; empty if the server wants none.",
    ),
    "concurrency": _how(concurrency, "Requests in flight at once.", within=COUNT),
    "timeout_s": _how(
      120.0,
      "Time without a byte after which an attempt is given up.",
      unit="seconds",
      within="(0, inf)",
    ),
    "attempts": _how(8, "Attempts at one request.", within=COUNT),
    "backoff_s": _how(
      1.0,
      "Wait before the second attempt; doubles with each, up to 60.",
      unit="seconds",
      within=AT_LEAST_0,
    ),
  }


def _drawing(of: str, temperature: float) -> dict:
  return {
    "temperature": Leaf(temperature, f"Temperature of {of}; 0 is greedy.", within=AT_LEAST_0),
    "top_k": Leaf(
      0, "Only the k most likely tokens are drawn; 0 for all.", unit="tokens", within=AT_LEAST_0
    ),
    "top_p": Leaf(
      1.0,
      "Only the most likely tokens that together have this probability are drawn.",
      within="(0, 1]",
    ),
  }


SCHEMA = {
  "seed": Leaf(0, "Seed of everything that is drawn.", within="[0, 4294967295]"),
  "task": {
    "name": Leaf(
      "arithmetic",
      "Generated tasks (arithmetic, jobs, star_graph, stories), those of reasoning_gym, GSM8K, "
      "competition MATH, or any file of problems (jsonl).",
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
      1000, "|D_syn|: problems with solutions that SFT sees.", unit="problems", within=COUNT
    ),
    "fresh_problems": Leaf(
      0,
      "Training problems that SFT does not see, on which traces are sampled instead of SFT's own; "
      "0 for none.",
      unit="problems",
      within=AT_LEAST_0,
    ),
    "test_problems": Leaf(
      1000, "Problems on which test errors are measured.", unit="problems", within=COUNT
    ),
    "path": Leaf(
      "",
      "Folder of both splits, file to train on, or dataset on the Hub (hf:ORG/NAME); empty: "
      "see docs/datasets.md.",
    ),
    "test_path": Leaf(
      "", "The same for the test problems, such as MATH-500; empty: those of task.path."
    ),
    "fields": Leaf(
      "",
      "Names of a row's fields where they are others: problem=query,solution=response; also of "
      "answer and id, and dotted.",
      parse=field_map,
    ),
    "decontaminate_against": Leaf(
      (),
      "More files, folders or datasets of test problems that training problems must not overlap.",
    ),
    "decontaminate_ngram": Leaf(
      13,
      "A training problem that shares this many words in a row with a test problem is dropped; 0 "
      "for never.",
      unit="words",
      within=AT_LEAST_0,
    ),
    "skip_bad_rows": _how(
      False,
      "Skip and count broken rows of problem files instead of stopping; also --skip_bad_rows.",
    ),
    "gold_disagreements": Leaf(
      "drop",
      "Training problems of files whose own solution states another answer than the gold one; test "
      "problems always stay.",
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
        "What 20% equals: 20 and 0.2 (either), 0.2 (fraction) or 20 (number).",
        choices=("either", "fraction", "number"),
      ),
      "units": Leaf(
        "optional",
        "Whether an answer may leave out a unit that the gold answer has.",
        choices=("optional", "required", "ignored"),
      ),
      "tuples": Leaf(
        "ordered", "Whether (1,2) and (2,1) differ.", choices=("ordered", "unordered")
      ),
      "lists": Leaf(
        "auto",
        "Whether the order of 1, 2, 3 without braces counts; auto: of three numbers that do not "
        "ascend.",
        choices=("auto", "ordered", "unordered"),
      ),
      "decimal_digits": Leaf(
        12,
        "Significant digits from which a rounded decimal equals what it rounds; 0 for never.",
        unit="digits",
        within=AT_LEAST_0,
      ),
      "extraction": Leaf(
        "last",
        "Whether a response without a marked answer is read by its last display or line (last) or "
        "has none (marked).",
        choices=("last", "marked"),
      ),
      "retractions": Leaf(
        "ambiguous",
        'What "The answer is 7. No wait, it is 8." states: nothing for sure (ambiguous) or 8 '
        "(last).",
        choices=("ambiguous", "last"),
      ),
      "timeout_s": Leaf(
        2.0, "Processor time that one answer may take.", unit="seconds", within="(0, inf)"
      ),
    },
    "prompt": Leaf(
      "plain",
      'Prompt form of stories, reasoning_gym and tasks from files: plain ("Question: '
      '...\\nAnswer:\\n") or the chat template.',
      choices=("plain", "chat"),
    ),
    "template_args": Leaf(
      "",
      'Arguments of the chat template as a JSON object, such as {"enable_thinking": false}; where '
      "task.prompt=chat.",
      parse=template_args,
    ),
    "instruction": Leaf(
      "", "Text appended to every problem on a line of its own. Tasks from files only."
    ),
    "steps": Leaf(
      "delimiter",
      "Where a step ends: at task.step_delimiter, or by lines and sentences outside LaTeX (prose).",
      choices=("delimiter", "prose"),
    ),
    "step_delimiter": Leaf(
      "\n",
      "Text that ends a step where task.steps=delimiter; re: and a regular expression for a "
      "pattern.",
      parse=step_pattern,
    ),
    "test_start": Leaf(
      0, "Number of the first test problem of a generated task.", within=AT_LEAST_0
    ),
    "verifier": Leaf(
      "",
      "Function, as module:function, that judges responses in place of the grader: (response, "
      "problem) -> bool.",
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
        0.0, "Probability that the teacher does an addition in its head.", within="[0, 1]"
      ),
      "num_leaves": Leaf(4, "Quantities with a given value.", within=COUNT),
      "num_operations": Leaf(6, "Operations that are defined, needed or not.", within=COUNT),
      "min_needed_ops": Leaf(3, "Fewest operations that the question rests on.", within=COUNT),
      "max_needed_ops": Leaf(5, "Most operations that the question rests on.", within=COUNT),
    },
    "star_graph": {
      "degree": Leaf(3, "Arms of a graph; chance is 1 / degree.", within="[2, inf)"),
      "path_nodes": Leaf(
        3, "Nodes of an arm, centre and leaf included.", unit="nodes", within="[2, inf)"
      ),
      "num_nodes": Leaf(20, "Names that nodes are drawn from.", within="[2, inf)"),
    },
    "jobs": {
      "fewest": Leaf(4, "Fewest jobs of a problem.", unit="jobs", within=COUNT),
      "most": Leaf(6, "Most jobs of a problem.", unit="jobs", within=COUNT),
      "slack": Leaf(
        4,
        "Most hours between a job's end in a hidden feasible order and its deadline.",
        unit="hours",
        within=AT_LEAST_0,
      ),
    },
    "stories": {
      "min_people": Leaf(4, "Fewest people of a story.", unit="people", within="[2, 18]"),
      "max_people": Leaf(6, "Most people of a story.", unit="people", within="[2, 18]"),
      "min_derivations": Leaf(
        2,
        "Fewest quantities that have to be derived before the sum.",
        unit="derivations",
        within="[0, 17]",
      ),
      "max_derivations": Leaf(
        4,
        "Most quantities that have to be derived before the sum.",
        unit="derivations",
        within="[0, 17]",
      ),
      "max_distractors": Leaf(
        3, "Most people who do not matter for the question.", unit="people", within="[0, 16]"
      ),
      "largest_value": Leaf(99, "Largest number that a person has.", within="[2, inf)"),
    },
  },
  "model": {
    "path": Leaf(
      "embedded",
      "The base model: a policy or Hugging Face folder, a model of the Hub (ORG/NAME[@REVISION]), "
      "or one that comes with the package (embedded, embedded_jobs, embedded_stories).",
    ),
    "dtype": Leaf(
      "float32", "Type of activations and matrix products.", choices=("float32", "bfloat16")
    ),
    "param_dtype": Leaf(
      "float32", "Type in which parameters are kept.", choices=("float32", "bfloat16")
    ),
    "scan_layers": _how(
      False, "Scan one compiled layer (deep models, TPU) instead of compiling each (CPU)."
    ),
    "remat": _how(
      "none",
      "What the backward pass recomputes of a layer: nothing, everything, or all but matrix "
      "products.",
      choices=("none", "full", "selective"),
    ),
    "max_length": Leaf(
      1024, "Longest prompt and response together.", unit="tokens", within="[2, inf)"
    ),
    "check_parity": _how(
      False, "Compare the base model's logits with torch's before work begins; also --check_parity."
    ),
  },
  "mesh": {
    "data": _how(
      -1, "Devices along the data axis; -1 takes what is left.", within=COUNT, also=(-1,)
    ),
    "fsdp": _how(
      1,
      "Devices along the axis over which parameters and rows are split.",
      within=COUNT,
      also=(-1,),
    ),
    "tensor": _how(
      1,
      "Devices along the axis over which heads and feed-forward width are split.",
      within=COUNT,
      also=(-1,),
    ),
    "slices": _how(
      1,
      "TPU slices joined by the data-centre network; each holds all parameters and its share of "
      "the rows.",
      within=COUNT,
    ),
  },
  "engine": {
    "lanes": _how(
      0, "Trunks that decode at once; 0 for what fits work and memory.", within=AT_LEAST_0
    ),
    "slots": _how(
      0,
      "Branches of a trunk that decode at once; 0 for what fits work and memory.",
      within=AT_LEAST_0,
    ),
    "max_new_tokens": Leaf(256, "Longest response.", unit="tokens", within=COUNT),
    "stop": Leaf((), "Strings that end a response besides EOS."),
  },
  "synthesis": {
    "provider": Leaf(
      "task",
      "Who writes D_syn: the task itself, a server, a local checkpoint, or the scripted teacher.",
      choices=("task", "endpoint", "local", "scripted"),
    ),
    "generate": Leaf(
      "problems",
      "New problems with solutions from seed problems, or solutions of the task's own problems.",
      choices=("problems", "solutions"),
    ),
    "endpoint": _endpoint(16),
    "prompts": Leaf("configs/prompts/gsm8k", "Folder with problems.txt and solution.txt."),
    "replies": _how(
      "", "Folder of all raw replies, which runs may share; empty: replies/ in the workdir."
    ),
    "seed_problems": Leaf(
      1000,
      "Training problems of the task that new ones are modelled on.",
      unit="problems",
      within=COUNT,
    ),
    "seeds_per_request": Leaf(
      3, "Seed problems shown in a request.", unit="problems", within=COUNT
    ),
    "new_per_request": Leaf(
      4, "New problems asked for in a request.", unit="problems", within=COUNT
    ),
    "num_solutions": Leaf(4, "Solutions asked for per problem.", unit="solutions", within=COUNT),
    "min_agreement": Leaf(
      0.5,
      "Fraction of the solutions that must state the same answer; other problems are dropped as "
      "unsolved.",
      within="[0, 1]",
    ),
    "temperature_problems": Leaf(
      1.0, "Temperature at which problems are sampled.", within=AT_LEAST_0
    ),
    "temperature_solutions": Leaf(
      0.7, "Temperature at which solutions are sampled.", within=AT_LEAST_0
    ),
    "max_tokens": Leaf(2048, "Longest reply.", unit="tokens", within=COUNT),
    "max_tokens_field": _how(
      "max_tokens",
      "What the server calls that limit.",
      choices=("max_tokens", "max_completion_tokens"),
    ),
    "near_duplicate": Leaf(
      0.2,
      "Problems within this edit distance of an earlier one, as a fraction of the longer text, are "
      "dropped.",
      within="[0, 1]",
    ),
    "surplus": Leaf(
      1.25, "Problems kept before balancing by difficulty, per problem wanted.", within=COUNT
    ),
    "max_rounds": _how(
      8, "Rounds of asking for more problems until there are enough.", within=COUNT
    ),
    "stream": _how(
      True, "Receive replies piece by piece, so that a stalled server is noticed sooner."
    ),
    "send_seed": Leaf(True, "Send a seed with each request."),
    "max_failed": _how(0, "Requests that may stay without a reply.", within=AT_LEAST_0),
    "usd_per_million_prompt": _how(
      0.0, "Price of a million prompt tokens.", unit="US dollars", within=AT_LEAST_0
    ),
    "usd_per_million_completion": _how(
      0.0, "Price of a million reply tokens.", unit="US dollars", within=AT_LEAST_0
    ),
    "budget_usd": _how(
      0.0,
      "Bound on the spending of all runs of the workdir together; 0 for none.",
      unit="US dollars",
      within=AT_LEAST_0,
    ),
  },
  "pretrain": {
    **_training(3e-3, 32, 1),
    "num_problems": Leaf(
      256000, "Generated problems, each seen once.", unit="problems", within=COUNT
    ),
    "random_step_fraction": Leaf(
      0.5,
      "Fraction of the problems that show legal steps without a plan or an answer.",
      within="[0, 1]",
    ),
    "max_answered_ops": Leaf(
      2, "Most operations that an answered problem rests on.", within=AT_LEAST_0
    ),
    "d_model": Leaf(64, "Width of the embedded base model.", within=COUNT),
    "num_layers": Leaf(3, "Its layers.", within=COUNT),
    "num_heads": Leaf(4, "Its attention heads.", within=COUNT),
    "d_ff": Leaf(160, "Width of its feed-forward part.", within=COUNT),
  },
  "sft": _training(1e-5, 128, 3),
  "rft": {
    **_training(1e-5, 128, 3),
    "start": Leaf("base", "Policy from which RFT starts.", choices=("base", "sft")),
    "max_per_problem": Leaf(
      4, "Solutions kept per problem, at most.", unit="solutions", within=COUNT
    ),
    "with_teacher": Leaf(False, "Also train on the teacher's solutions."),
    "keep": Leaf(
      "right",
      "Which traces are cloned: right ones; right ones with credit that contain a spurious step "
      "(spurious) or none (clean); those whose lowest step advantage is not among the worst "
      "(advantage).",
      choices=("right", "spurious", "clean", "advantage"),
    ),
    "drop_fraction": Leaf(
      0.5,
      "rft.keep=advantage: fraction of the traces, those with the lowest step advantage, that is "
      "dropped.",
      within="[0, 1)",
    ),
    "loss_mask": Leaf(
      "whole",
      "rft.keep=advantage: steps of a trace that are trained on: all, those before the first "
      "negative advantage, or those with a positive one.",
      choices=("whole", "before_negative", "positive"),
    ),
    "deduplicate": Leaf(
      "none",
      "How similar solutions of a problem are dropped before max_per_problem: one per list of "
      "equations (equations, RFT's rule), those near an earlier one (edit_distance), or all but "
      "the most different ones (most_diverse).",
      choices=("none", "equations", "edit_distance", "most_diverse"),
    ),
    "near_duplicate": Leaf(
      0.2,
      "rft.deduplicate=edit_distance: largest edit distance of a near duplicate, as a fraction of "
      "the longer text.",
      within="[0, 1)",
    ),
    "max_solutions": Leaf(
      0, "Solutions in all, at most; 0 for no bound.", unit="solutions", within=AT_LEAST_0
    ),
    "objective": Leaf(
      "next_token",
      "Next-token loss, or each step of the traces weighted by exp(advantage / advantage_beta) "
      "(equation 4).",
      choices=("next_token", "advantage_weighted"),
    ),
    "advantage_beta": Leaf(
      0.3,
      "objective=advantage_weighted: β; smaller values weigh good steps more.",
      within="(0, inf)",
    ),
    "max_weight": Leaf(
      20.0, "objective=advantage_weighted: largest weight of a step.", within="(0, inf)"
    ),
  },
  "sample": {
    "num_traces": Leaf(8, "Traces per problem.", unit="traces", within=COUNT),
    **_drawing("sampling", 0.7),
  },
  "credit": {
    "schedule": Leaf(
      "all",
      "Which prefixes get rollouts (core/rollout_schedules.py).",
      choices=("all", "until_first_zero", "bisect", "adaptive"),
    ),
    "num_rollouts": Leaf(
      10,
      "Rollouts from each prefix; at most so many for schedules other than all.",
      unit="rollouts",
      within=COUNT,
    ),
    **_drawing("rollouts", 0.7),
    "best_of": Leaf(
      5, "k of Best-of-k, the policy whose values are estimated; 1 for π_sft itself.", within=COUNT
    ),
    "max_wrong_per_problem": Leaf(
      8, "Wrong traces per problem that get credit.", unit="traces", within=AT_LEAST_0
    ),
    "max_right_per_problem": Leaf(
      0, "Right traces per problem that get credit.", unit="traces", within=AT_LEAST_0
    ),
    "max_rollouts": Leaf(
      0,
      "Budget of rollouts: problems get credit, in their order, while those before took fewer; 0 "
      "for all problems.",
      unit="rollouts",
      within=AT_LEAST_0,
    ),
    "slots": _how(
      0,
      "Branches of a trace that decode at once; 0 for what fits work and memory.",
      within=AT_LEAST_0,
    ),
    "lanes": _how(
      0, "Traces whose rollouts decode at once; 0 for what fits work and memory.", within=AT_LEAST_0
    ),
    "endpoint": _endpoint(32),
    "send_token_ids": Leaf(
      True,
      "Send prompts to the endpoint as token ids and ask for ids; False sends and receives text.",
    ),
  },
  "dpo": {
    **_training(1e-6, 64, 1),
    "beta": Leaf(0.1, "Strength of the pull to the reference.", unit="per nat", within="(0, inf)"),
    "loss": Leaf(
      "dpo", "Preference loss: DPO, IPO or DPO-Positive.", choices=("dpo", "ipo", "dpop")
    ),
    "label_smoothing": Leaf(
      0.0, "dpo.loss=dpo: assumed fraction of flipped labels.", within="[0, 0.5)"
    ),
    "tau": Leaf(
      0.1,
      "dpo.loss=ipo: strength of the pull to the reference; beta then only says which pairs are "
      "saturated.",
      unit="per nat",
      within="(0, inf)",
    ),
    "penalty": Leaf(
      50.0,
      "dpo.loss=dpop: weight of the chosen branch's fall below the reference.",
      within=AT_LEAST_0,
    ),
    "nll_weight": Leaf(
      0.0, "Weight of the chosen branch's next-token loss per token.", within=AT_LEAST_0
    ),
  },
  "pairs": {
    "pair_mode": Leaf(
      "algorithm1",
      "How pairs/step_dpo builds its pairs (docs/method.md).",
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
      "How pairs/dpo builds its pairs: arbitrary, or furthest in edit distance (Pal et al.).",
      choices=("arbitrary", "furthest"),
    ),
    "furthest": Leaf(
      "largest",
      "What furthest means: each right response takes the wrong one at the largest distance, or "
      "the shortest that is far.",
      choices=("largest", "shortest_far"),
    ),
    "pit_rule": Leaf(
      "lowest_value",
      "Which step of a wrong trace is its first pit (core/pits.py).",
      choices=("lowest_value", "first_zero", "first_dead", "least_advantage", "relative_drop"),
    ),
    "drop_ratio": Leaf(
      0.34,
      "pit_rule=relative_drop: Q after the pit is at most this fraction of Q before it.",
      within="[0, 1]",
    ),
    "min_before": Leaf(
      0.25, "pit_rule=relative_drop: Q before the pit is at least this.", within="[0, 1]"
    ),
    "spurious_below": Leaf(
      0.0,
      "pair_mode=positives_too: a right trace's step is rejected if its advantage is below this.",
      within="[-1, 1]",
    ),
    "continuation": Leaf(
      "step",
      "pair_mode=shared_prefix: what is chosen of a right rollout: its first step, or all of it.",
      choices=("step", "rollout"),
    ),
    "choice": Leaf(
      "random",
      "pair_mode=shared_prefix: which right rollout is chosen.",
      choices=("random", "shortest", "most_likely", "majority"),
    ),
    "max_per_problem": Leaf(8, "Pairs per problem, at most.", unit="pairs", within=COUNT),
    "order": Leaf(
      "sampled",
      "Per-step pairs: which traces of a problem come first where max_per_problem bounds them: as "
      "sampled; the likeliest under π_sft, per token; or those with the largest drop of Q at the "
      "blamed step.",
      choices=("sampled", "likeliest", "largest_drop"),
    ),
    "max_pairs": Leaf(
      0, "Pairs in all, at most, drawn at random; 0 for no bound.", unit="pairs", within=AT_LEAST_0
    ),
    "right_fraction": Leaf(
      -1.0,
      "pair_mode=positives_too with max_pairs: fraction of those pairs that comes from right "
      "traces; -1 for no fixed one.",
      within="[0, 1]",
      also=(-1.0,),
    ),
    "max_flip": Leaf(
      1.0,
      "Pairs whose label is flipped with a higher probability, by the rollout counts, are dropped.",
      within="[0, 1]",
    ),
  },
  "evaluate": {
    "temperature": Leaf(0.0, "Temperature of the graded response; 0 is greedy.", within=AT_LEAST_0),
    "base_shots": Leaf(
      0,
      "Worked training problems before the base model's question; needs engine.stop. Tasks from "
      "files only.",
      unit="problems",
      within=AT_LEAST_0,
    ),
    "methods": _how(
      ("base", "sft", "rft", "dpo", "step_dpo"),
      "Policies that are tested.",
      choices=("base", "sft", "rft", "dpo", "step_dpo"),
    ),
  },
  "metrics": {
    "jsonl": _how(
      True, "Write metrics.jsonl, a line per update; the report draws its curves from it."
    ),
    "tensorboard": _how(True, "Write TensorBoard event files into the stages' folders."),
    "wandb": _how("", "Weights & Biases project that receives the metrics; empty for none."),
    "wandb_mode": _how(
      "online",
      "Send at once, or keep in the stages' folders for `wandb sync`.",
      choices=("online", "offline"),
    ),
    "profile_steps": _how(
      "",
      "a:b traces updates a to b - 1 of every training stage; also --profile_steps; empty for "
      "none.",
    ),
  },
  "export": {
    "max_shard_bytes": Leaf(
      5_000_000_000,
      "Largest file of exported weights, unless one tensor is larger.",
      unit="bytes",
      within=COUNT,
    ),
    "push_to_hub": _how(
      "",
      "ORG/NAME on the Hugging Face Hub that takes the exported policy; of several, "
      "ORG/NAME-METHOD takes each. New ones are private.",
    ),
  },
  "report": {
    "num_traces": _how(5, "Traces shown with their Q.", unit="traces", within=AT_LEAST_0),
    "max_traces": _how(
      20000,
      "Traces in the trace viewer, at most; beyond that, whole problems at even distances.",
      unit="traces",
      within=COUNT,
    ),
    "max_rollouts": _how(
      8, "Different rollouts from a step that the trace viewer holds, at most.", within=AT_LEAST_0
    ),
  },
  "study": {
    "family": Leaf("", "What figures call the task."),
    "grid": Leaf(
      (), 'Cells, as rows (sizes, methods, overrides), such as ((250, 500), ("sft", "rft"), {}).'
    ),
    "settings": Leaf(
      (),
      "Overrides for all cells of some sizes or methods, as rows such as ((250, 500), "
      '{"sft.num_epochs": 10}).',
    ),
    "seeds": Leaf((0,), "One run each.", within=AT_LEAST_0),
    "baseline": Leaf("sft", "Method against which efficiency is measured."),
    "figures": Leaf(
      (), "The paper's figures that the study ends in; see experiments/scaling/figure.py."
    ),
    "reference_size": Leaf(
      500,
      "Size at which the other methods' efficiency factors are reported.",
      unit="problems",
      within=COUNT,
    ),
  },
  "star_graph": {
    "seeds": Leaf(4, "Training sets, each with its SFT and DPO runs.", within="[2, inf)"),
    "under_trained": Leaf(
      (30, 60),
      "SFT steps from which DPO starts before the training set is memorised.",
      unit="steps",
      within=AT_LEAST_0,
    ),
    "over_trained": Leaf(
      (300,), "SFT steps from which DPO starts afterwards.", unit="steps", within=AT_LEAST_0
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
RENAMED = {  # leaves of version 1
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
  """The default tree, locked."""

  def values(tree: Mapping) -> dict:
    return {
      name: leaf.default if isinstance(leaf, Leaf) else values(leaf) for name, leaf in tree.items()
    }

  return ConfigDict(values(SCHEMA)).lock()


def leaves(config: ConfigDict) -> Iterator[tuple[str, object]]:
  """(dotted name, value) of every leaf."""
  return _flatten(config)


def plain(config: ConfigDict, sections: Sequence[str] | None = None) -> dict:
  """Leaves as a flat JSON-ready dict: of these sections or single leaves, such as ("seed",
  "dpo.row_length"), or all.
  """
  return {
    name: list(value) if isinstance(value, tuple) else value
    for name, value in leaves(config)
    if sections is None or name in sections or name.split(".")[0] in sections
  }


def changes_results(leaf: str) -> bool:
  """Whether two runs that differ in this leaf make different things."""
  return LEAVES[leaf].changes_results


def may_change_results(leaf: str) -> bool:
  """The same of a leaf that a stage of any version was begun with; True of one that there is no
  more.
  """
  return leaf not in LEAVES or LEAVES[leaf].changes_results


def help_text(sections: Sequence[str]) -> str:
  """The leaves of some sections as --help shows them: name, default, allowed values, unit and
  sentence.
  """
  lines = []
  for name, leaf in LEAVES.items():
    if name.split(".")[0] in sections:
      about = ", ".join(part for part in (leaf.domain, leaf.unit) if part)
      lines.append(f"  --config.{name}={leaf.default!r}" + (f"  ({about})" if about else ""))
      lines.append(f"      {leaf.doc}")
  return "\n".join(lines)


_PIT_RULES = {  # what each schedule leaves known
  "all": LEAVES["pairs.pit_rule"].choices,
  "until_first_zero": ("lowest_value", "first_zero", "first_dead", "relative_drop"),
  "bisect": ("lowest_value", "first_zero", "first_dead"),
  "adaptive": ("first_dead",),
}


def check_values(config: ConfigDict) -> None:
  """Refuses values outside a leaf's choices or range, and values that do not go together.

  Raises:
    UserError: names the leaf and the values it may have.
  """
  values = dict(leaves(config))
  for name, leaf in LEAVES.items():
    if problem := leaf.problem(values[name]):
      raise UserError(f"{name}={values[name]!r} {problem}.")
  if values["evaluate.base_shots"] and not values["engine.stop"]:
    raise UserError(
      f"evaluate.base_shots={values['evaluate.base_shots']} needs engine.stop, such as "
      "('\\nQuestion:',): a base model that has read problems goes on to write some of its own, "
      "and the last answer is the one that is graded."
    )
  if values["task.fresh_problems"] and (
    values["synthesis.provider"] != "task" or values["rft.with_teacher"]
  ):
    raise UserError(
      f"task.fresh_problems={values['task.fresh_problems']} needs synthesis.provider='task' and "
      "rft.with_teacher=False: fresh problems are the task's own, and their solutions are not the "
      "ones that SFT has seen."
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
      f"pairs.right_fraction={values['pairs.right_fraction']} needs pairs.max_pairs, the number "
      "that it is a fraction of."
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
      f"pairs.pit_rule={rule!r} needs values that credit.schedule={schedule!r} leaves out; it goes "
      f"with {', '.join(_PIT_RULES[schedule])}."
    )
  if values["pretrain.lora.rank"]:
    raise UserError("pretrain.lora.rank must be 0: there is nothing yet that could be adapted.")
  k = values["credit.best_of"]
  for name in ("credit.num_rollouts", "sample.num_traces"):
    if values[name] < k:
      raise UserError(
        f"{name}={values[name]} is less than credit.best_of={k}: Best-of-k needs k draws at least."
      )


def check_name(name: str, where: str) -> None:
  """Refuses a dotted name that is not a leaf, with its new name if it was renamed, else with the
  nearest names.

  Raises:
    UserError: unknown leaf.
  """
  if name in LEAVES:
    return
  if name in RENAMED:
    raise UserError(f"{where}: {name} is now called {RENAMED[name]}.")
  near = difflib.get_close_matches(name, LEAVES, n=3, cutoff=0.5)
  hint = f"; did you mean {' or '.join(near)}?" if near else "."
  raise UserError(f"{where}: the config has no leaf {name!r}{hint}")
