"""A problem's text as the trunk, a solution's text as the branch that is trained on; each is tokenised once."""

import jinja2

from synthneg_jax.runtime.errors import UserError


def encode_prompt(tokenizer, problem: str, style: str) -> list[int]:
  """Token ids of a problem as the model is asked it.

  Args:
    tokenizer: of transformers.
    problem: the question.
    style: "raw" (the text as it stands), "plain" ("Question: ...\\nAnswer:\\n", for base checkpoints) or "chat" (the
      tokenizer's chat template with the generation prompt).

  Raises:
    UserError: no such style, or a tokenizer without chat template, or one whose template refuses the question.
  """
  if style == "raw":
    return tokenizer.encode(problem, add_special_tokens=False)
  if style == "plain":
    ids = tokenizer.encode(f"Question: {problem}\nAnswer:\n", add_special_tokens=False)
    bos = tokenizer.bos_token_id
    # Families whose tokenizer opens every text with BOS were trained with it; others were not.
    return [bos] + ids if bos is not None and tokenizer.encode("")[:1] == [bos] else ids
  if style == "chat":
    if not tokenizer.chat_template:
      raise UserError("task.prompt='chat', but the tokenizer has no chat template; use --config.task.prompt=plain.")
    asked = [{"role": "user", "content": problem}]
    try:
      text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, ValueError) as error:
      raise UserError(f"task.prompt='chat': the tokenizer's chat template fails: {error}") from error
    return tokenizer.encode(text, add_special_tokens=False)  # the template wrote the special tokens
  raise UserError(f"task.prompt={style!r} is none of raw, plain, chat.")


def encode_solution(tokenizer, solution: str) -> list[int]:
  """Token ids of a known solution, EOS last: its author stopped there."""
  return tokenizer.encode(solution, add_special_tokens=False) + [tokenizer.eos_token_id]
