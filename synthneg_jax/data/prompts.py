"""A problem's text as the trunk, a solution's text as the branch that is trained on; each is tokenised once.

Base checkpoints take plain text, with worked problems before the question where they have not been finetuned ("shots");
checkpoints with a chat template take that, worked problems being earlier turns. The plain text's wording is ours.
"""

from collections.abc import Sequence

import jinja2

from synthneg_jax.runtime.errors import UserError

Shot = tuple[str, str]  # a problem and its worked solution


def _plain(problem: str, shots: Sequence[Shot]) -> str:
  question = "Question: {}\nAnswer:\n".format
  return "".join(f"{question(shown)}{solution}\n\n" for shown, solution in shots) + question(problem)


def encode_prompt(
  tokenizer, problem: str, style: str, *, instruction: str = "", shots: Sequence[Shot] = ()
) -> list[int]:
  """Token ids of a problem as the model is asked it.

  Args:
    tokenizer: of transformers.
    problem: the question.
    style: "raw" (the text as it stands, nothing else), "plain" ("Question: ...\\nAnswer:\\n", for base checkpoints) or
      "chat" (the tokenizer's chat template with the generation prompt).
    instruction: put after every problem, on a line of its own; "" for none.
    shots: worked problems that come first, as text of the same form.

  Raises:
    UserError: no such style, or a tokenizer without chat template, or one whose template refuses the question.
  """
  if style == "raw":
    return tokenizer.encode(problem, add_special_tokens=False)
  asked = (lambda text: f"{text}\n{instruction}") if instruction else (lambda text: text)
  problem, shots = asked(problem), [(asked(shown), solution) for shown, solution in shots]
  if style == "plain":
    ids = tokenizer.encode(_plain(problem, shots), add_special_tokens=False)
    bos = tokenizer.bos_token_id
    # Families whose tokenizer opens every text with BOS were trained with it; others were not.
    return [bos] + ids if bos is not None and tokenizer.encode("")[:1] == [bos] else ids
  if style == "chat":
    if not tokenizer.chat_template:
      raise UserError("task.prompt='chat', but the tokenizer has no chat template; use --config.task.prompt=plain.")
    turns = [turn for shot in shots for turn in zip(("user", "assistant"), shot, strict=True)] + [("user", problem)]
    asked = [{"role": role, "content": content} for role, content in turns]
    try:
      text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, ValueError) as error:
      raise UserError(f"task.prompt='chat': the tokenizer's chat template fails: {error}") from error
    return tokenizer.encode(text, add_special_tokens=False)  # the template wrote the special tokens
  raise UserError(f"task.prompt={style!r} is none of raw, plain, chat.")


def encode_solution(tokenizer, solution: str) -> list[int]:
  """Token ids of a known solution, EOS last: its author stopped there."""
  return tokenizer.encode(solution, add_special_tokens=False) + [tokenizer.eos_token_id]
