"""Tokenises a problem as the trunk and a solution as the branch to train on.

Base checkpoints get plain text; before finetuning, optionally with worked problems ("shots") in
front. Checkpoints with a chat template get chats, with the shots as earlier turns. The wording of
the plain prompt is ours.
"""

from collections.abc import Mapping, Sequence

from absl import logging

from synthneg_jax.runtime.errors import UserError

Shot = tuple[str, str]  # a problem and its worked solution


def plain_text(problem: str, shots: Sequence[Shot] = ()) -> str:
  """A prompt of style "plain", after worked problems of the same form."""
  prefix = "".join(f"Question: {shown}\nAnswer:\n{solution}\n\n" for shown, solution in shots)
  return f"{prefix}Question: {problem}\nAnswer:\n"


def _render(
  tokenizer, turns: Sequence[tuple[str, str]], template_args: Mapping, *, generate: bool = False
) -> str:
  """Renders (role, content) turns; `generate` adds the generation prompt."""
  messages = [{"role": role, "content": content} for role, content in turns]
  return tokenizer.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=generate, **template_args
  )


def _leaves_turn_closed(
  tokenizer, turns: Sequence[tuple[str, str]], template_args: Mapping, text: str
) -> bool:
  """Whether a rendered answer is separated from the prompt `text` by more than whitespace.

  If not, the template needs no generation prompt: the token that closes the user's turn ([/INST])
  also opens the assistant's.
  """
  answer = "7042"
  try:
    answered = _render(tokenizer, [*turns, ("assistant", answer)], template_args)
  except Exception:  # expressions in templates may raise anything
    return False
  between, separator, _ = answered[len(text) :].partition(answer)
  return answered.startswith(text) and bool(separator and between.strip())


def _chat(tokenizer, turns: Sequence[tuple[str, str]], template_args: Mapping) -> str:
  """Renders a chat up to the assistant's turn; UserError as in `encode_prompt`."""
  if not tokenizer.chat_template:
    raise UserError(
      "task.prompt='chat', but the tokenizer has no chat template; use --config.task.prompt=plain."
    )
  if unknown := [name for name in template_args if name not in str(tokenizer.chat_template)]:
    logging.log_first_n(
      logging.WARNING, "task.template_args: the chat template does not use %s.", 1, unknown
    )
  try:
    text = _render(tokenizer, turns, template_args, generate=True)
    no_generation_prompt = text == _render(tokenizer, turns, template_args)
  except Exception as error:  # expressions in templates may raise anything
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    raise UserError(f"task.prompt='chat': the tokenizer's chat template fails: {reason}") from error
  if no_generation_prompt and _leaves_turn_closed(tokenizer, turns, template_args, text):
    raise UserError(
      "task.prompt='chat': the tokenizer's chat template ignores add_generation_prompt and does "
      "not open the assistant's turn, so the model is not told to answer. Fix the template, or use "
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
  """Token ids of the prompt for a problem.

  Args:
    tokenizer: a transformers tokenizer.
    problem: the question.
    style: "raw" (the text unchanged), "plain" ("Question: ...\\nAnswer:\\n", for base checkpoints)
      or "chat" (the tokenizer's chat template with the generation prompt).
    instruction: added after every problem on its own line; "" for none.
    shots: worked problems that precede the question; ignored by "raw".
    template_args: arguments of the chat template, such as {"enable_thinking": False}.

  Raises:
    UserError: unknown style, a tokenizer without chat template, or a template that fails or does
      not open the assistant's turn.
  """
  if style == "raw":
    return tokenizer.encode(problem, add_special_tokens=False)
  suffix = f"\n{instruction}" if instruction else ""
  problem, shots = problem + suffix, [(shown + suffix, solution) for shown, solution in shots]
  if style == "plain":
    ids = tokenizer.encode(plain_text(problem, shots), add_special_tokens=False)
    # Only families whose tokenizer starts every text with BOS were trained with it. A tokenizer
    # may add it without naming it; one that adds EOS alone ends texts with it.
    start, bos = tokenizer.encode("")[:1], tokenizer.bos_token_id
    adds_bos = start == [bos] or (bos is None and start and start != [tokenizer.eos_token_id])
    return [*start, *ids] if adds_bos else ids
  if style == "chat":
    turns = []
    for shown, solution in shots:
      turns += [("user", shown), ("assistant", solution)]
    turns.append(("user", problem))
    text = _chat(tokenizer, turns, template_args or {})
    return tokenizer.encode(text, add_special_tokens=False)  # the template adds special tokens
  raise UserError(f"task.prompt={style!r} must be one of raw, plain, chat.")


def encode_solution(tokenizer, solution: str) -> list[int]:
  """Token ids of a known solution, EOS last."""
  return tokenizer.encode(solution, add_special_tokens=False) + [tokenizer.eos_token_id]
