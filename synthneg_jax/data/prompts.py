"""A problem's text as the trunk, a solution's text as the branch that is trained on; each is
tokenised once.

Base checkpoints take plain text, with worked problems before the question where they have not been
finetuned ("shots"); checkpoints with a chat template take that, worked problems being earlier
turns. The plain text's wording is ours.
"""

from collections.abc import Mapping, Sequence

from absl import logging

from synthneg_jax.runtime.errors import UserError

Shot = tuple[str, str]  # a problem and its worked solution


def plain_text(problem: str, shots: Sequence[Shot] = ()) -> str:
  """The text of style "plain", after worked problems of the same form."""
  question = "Question: {}\nAnswer:\n".format
  return "".join(f"{question(shown)}{solution}\n\n" for shown, solution in shots) + question(
    problem
  )


def _render(
  tokenizer, turns: Sequence[tuple[str, str]], template_args: Mapping, generate: bool = False
) -> str:
  """The text of (role, content) turns by the chat template, with the generation prompt if
  `generate`.
  """
  messages = [{"role": role, "content": content} for role, content in turns]
  return tokenizer.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=generate, **template_args
  )


def _leaves_turn_closed(
  tokenizer, turns: Sequence[tuple[str, str]], template_args: Mapping, text: str
) -> bool:
  """Whether the template, answered, puts more than white space between the prompt's text and the
  answer.

  Some templates need no generation prompt: what closes the user's turn ([/INST]) opens the
  assistant's.
  """
  answer = "7042"
  try:
    answered = _render(tokenizer, [*turns, ("assistant", answer)], template_args)
  except Exception:  # whatever its expressions raise
    return False
  before, found, _ = answered[len(text) :].partition(answer)
  return answered.startswith(text) and bool(found and before.strip())


def _chat(tokenizer, turns: Sequence[tuple[str, str]], template_args: Mapping) -> str:
  """The text of a chat in which the assistant is next; UserError as in `encode_prompt`."""
  if not tokenizer.chat_template:
    raise UserError(
      "task.prompt='chat', but the tokenizer has no chat template; use --config.task.prompt=plain."
    )
  if unknown := [name for name in template_args if name not in str(tokenizer.chat_template)]:
    logging.log_first_n(
      logging.WARNING, "The chat template does not use %s of task.template_args.", 1, unknown
    )
  try:
    text = _render(tokenizer, turns, template_args, generate=True)
    no_generation_prompt = text == _render(tokenizer, turns, template_args)
  except Exception as error:  # a template may raise whatever its expressions do
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    raise UserError(f"task.prompt='chat': the tokenizer's chat template fails: {reason}") from error
  if no_generation_prompt and _leaves_turn_closed(tokenizer, turns, template_args, text):
    raise UserError(
      "task.prompt='chat': the tokenizer's chat template ignores add_generation_prompt and does "
      "not open the "
      "assistant's turn, so the model cannot know that it is to answer; mend it, or use "
      "--config.task.prompt=plain."
    )
  return text


def encode_prompt(
  tokenizer,
  problem: str,
  style: str,
  *,
  instruction: str = "",
  shots: Sequence[Shot] = (),
  template_args: Mapping[str, object] | None = None,
) -> list[int]:
  """Token ids of a problem as the model is asked it.

  Args:
    tokenizer: of transformers.
    problem: the question.
    style: "raw" (the text as it stands, nothing else), "plain" ("Question: ...\\nAnswer:\\n", for
      base checkpoints) or "chat" (the tokenizer's chat template with the generation prompt).
    instruction: put after every problem, on a line of its own; "" for none.
    shots: worked problems that come first, as text of the same form.
    template_args: of the chat template, such as {"enable_thinking": False}.

  Raises:
    UserError: no such style, or a tokenizer without chat template, or one whose template refuses
      the question or does not open the assistant's turn.
  """
  if style == "raw":
    return tokenizer.encode(problem, add_special_tokens=False)
  asked = (lambda text: f"{text}\n{instruction}") if instruction else (lambda text: text)
  problem, shots = asked(problem), [(asked(shown), solution) for shown, solution in shots]
  if style == "plain":
    ids = tokenizer.encode(plain_text(problem, shots), add_special_tokens=False)
    bos = tokenizer.bos_token_id
    # Families whose tokenizer opens every text with BOS were trained with it; others were not.
    return [bos] + ids if bos is not None and tokenizer.encode("")[:1] == [bos] else ids
  if style == "chat":
    turns = [turn for shot in shots for turn in zip(("user", "assistant"), shot, strict=True)] + [
      ("user", problem)
    ]
    text = _chat(tokenizer, turns, template_args or {})
    return tokenizer.encode(text, add_special_tokens=False)  # the template wrote the special tokens
  raise UserError(f"task.prompt={style!r} is none of raw, plain, chat.")


def encode_solution(tokenizer, solution: str) -> list[int]:
  """Token ids of a known solution, EOS last: its author stopped there."""
  return tokenizer.encode(solution, add_special_tokens=False) + [tokenizer.eos_token_id]
