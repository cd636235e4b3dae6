"""Extracts the answer text of a response: removes thoughts, turn marks and Markdown.

All regular expressions take linear time on any input.
"""

import re

# Thoughts, and the channels of gpt-oss's harmony format

_THOUGHT = re.compile(
  r"""
  <\s*/?\s*(?:seed:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|scratchpad|analysis
      |inner_thoughts?|inner_monologue|long_thought|cot|chain_of_thought|plan(?:ning)?)\s*>
  | <unused[0-9]+>(?:thought)?
  | \[/?THINK\] | ◁/?think▷
  | <\|(?:begin|end)_of_thought\|> | <\|(?:START|END)_THINKING\|>
  | <\|channel>\s*thought | <channel\|>
  """,
  re.IGNORECASE | re.VERBOSE,
)
_THOUGHT_ENDS = re.compile(r"\W*/|<\|end_|<channel|<unused[0-9]+>\Z", re.IGNORECASE)
_CHANNEL = re.compile(r"<\|channel\|>\s*([A-Za-z]+)[^<|]{0,80}<\|message\|>")
# Channels whose marks the tokenizer dropped: "analysisLet me see ... assistantfinalIt is 7."
_BARE_CHANNELS = re.compile(
  r"\A\s*analysis(?=[A-Z\s]).*assistant\s?final(?=[A-Z0-9\s\\$*#(-])", re.DOTALL
)

# Turns

_TURN_BEGINS = re.compile(
  r"""
  (?: \s* (?: <s> | <bos> | \[/INST\] | <\|begin_of_text\|> | <\|startoftext\|>
    | <\|im_start\|>\s*assistant | <\|assistant\|> | <\|start\|>\s*assistant
    | <\|start_header_id\|>\s*assistant\s*<\|end_header_id\|>
    | <\|start_of_role\|>\s*assistant\s*<\|end_of_role\|>
    | <start_of_turn>\s*model | <\|turn>\s*model | <\|START_OF_TURN_TOKEN\|>
    | <\|CHATBOT_TOKEN\|> | <｜begin▁of▁sentence｜> | <｜Assistant｜> ) )+
  """,
  re.VERBOSE,
)
_RESPONSE_MARKS = re.compile(
  r"""
  <\|(?: (?:begin|end)_of_solution | (?:START|END)_(?:RESPONSE|TEXT) | content | message )\|>
  | </?(?:response|solution|output)>
  """,
  re.VERBOSE,
)
_TURN_ENDS = re.compile(
  r"""
  </?s> | <eos> | <pad> | <EOT> | \[EOS\] | \[/?INST\] | <(?:end|start)_of_turn>
  | <end_of_utterance> | <turn\|> | <\|turn>
  | <\|[A-Za-z][\w\ .:/-]{1,40}\|> | <[｜|][^<>｜|\n]{1,40}[｜|]>
  """,
  re.VERBOSE,
)

# Markdown

_FORMULA_OR_BOX = re.compile(
  r"""
  \$\$[^$]{1,1500}+\$\$ | \$(?=\S)[^$\n]++(?<=\S)\$(?![0-9])
  | \\\((?>(?:[^\\]|\\(?!\))){1,1500})\\\) | \\\[(?>(?:[^\\]|\\(?!\])){1,1500})\\\]
  | \\(?:boxed|fbox)\{(?>(?:[^{}\n]|\{(?>(?:[^{}\n]|\{[^{}\n]*+\})*)\})*)\}
  """,
  re.VERBOSE,
)
_BOLD = re.compile(r"\*\*(?=\S)([^*\n]{1,200})(?<=\S)\*\*")
_ANNOTATION = re.compile(r"<<[^<>\n]{0,200}>>")  # GSM8K's calculator annotations
_END_OF_PROOF = re.compile(r"(?:\$?\\(?:blacksquare|square|qed|Box)\b\$?|[∎■□])\Z")
_EMPHASIS = re.compile(r"\*{1,3}|_{1,3}|~~")
_LINE_START = re.compile(
  r"^[ \t]*(?:(?:>[ \t]*)++(?:#{1,3}[ \t]+)?|(?:```|~~~)[^\n]*$|#{1,3}[ \t]+)", re.MULTILINE
)
_HTML = re.compile(
  r"</?(?:b|i|em|strong|u|code|p|br|center|span|div|mark|h[1-6])(?:\s[^<>\n]{0,80})?/?>",
  re.IGNORECASE,
)
_ENTITIES = {"&nbsp;": " ", "&lt;": "<", "&gt;": ">", "&amp;": "&", "&#36;": "$"}
_CROSS = re.compile("[❌✗✘]")
_EMOJI = re.compile("[\U0001f000-\U0001faff☀-✔✙-➓➘-➿⬛-⭕️⃣\u200d]")


def opens_thought(prompt: str) -> bool:
  """Whether a prompt ends inside a thought, as with chat templates that append <think>."""
  marks = _THOUGHT.findall(prompt[-2000:])
  return bool(marks) and not _THOUGHT_ENDS.match(marks[-1])


def _without_thoughts(text: str) -> str | None:
  """The text outside thoughts; None if the last thought does not close.

  A closing mark without an opening one ends a thought that the prompt opened, so that the text
  before it is dropped. An opening mark inside a thought is part of the thought.
  """
  kept, start, inside = [], 0, False
  for mark in _THOUGHT.finditer(text):
    if _THOUGHT_ENDS.match(mark.group()):
      kept = kept if inside else []
      inside, start = False, mark.end()
    elif not inside:
      kept.append(text[start : mark.start()])
      inside = True
  return None if inside else " ".join([*kept, text[start:]])


def answer_text(response: str) -> str | None:
  """The part of a response that may state its answer; None if it never leaves its thought."""
  channels = list(_CHANNEL.finditer(response))
  if channels:
    if channels[-1].group(1).lower() != "final":
      return None
    response = response[channels[-1].end() :]
  elif bare := _BARE_CHANNELS.match(response):
    response = response[bare.end() :]
  elif re.match(r"\s*analysis(?=[A-Z])", response):
    return None
  response = _without_thoughts(response)
  if response is None:
    return None
  start = _TURN_BEGINS.match(response)
  response = _RESPONSE_MARKS.sub(" ", response[start.end() :] if start else response)
  end = _TURN_ENDS.search(response)
  return response[: end.start()] if end else response


def _emphasis(masked: str) -> list[tuple[str, int, int]]:
  """(sign, start, end) of each emphasis mark, opening and closing marks in turn.

  Args:
    masked: the text with its formulas masked, so that their signs do not count.
  """
  pairs, opened = [], {}
  for mark in _EMPHASIS.finditer(masked):
    start, end, sign = *mark.span(), mark.group()
    before, after = masked[start - 1 : start], masked[end : end + 1]
    if before == "\\":
      continue
    can_close = before.strip() != "" and not (after.isalnum() or after in ("(", "{"))
    can_open = after.strip() != "" and not (before.isalnum() or before in (")", "]", "}"))
    same_paragraph = sign in opened and "\n\n" not in masked[opened[sign][2] : start]
    if can_close and same_paragraph:
      pairs += [opened.pop(sign), (sign, start, end)]
    elif can_open:
      opened[sign] = (sign, start, end)
  return pairs


def bold_parts(text: str) -> list[str]:
  """The bold parts of a text, without Markdown."""
  return [without_markdown(part).strip() for part in _BOLD.findall(text)]


def without_markdown(text: str) -> str:
  """Removes Markdown and emoji, but changes no formulas and boxes."""
  if not text.isascii():
    text = _EMOJI.sub(" ", _CROSS.sub(" is wrong ", text))
  text = _END_OF_PROOF.sub("", text.rstrip()).rstrip()
  if "<" in text:
    text = _HTML.sub(" ", _ANNOTATION.sub("", text))
  if "&" in text:
    for entity, sign in _ENTITIES.items():
      text = text.replace(entity, sign)
  if "*" in text or "_" in text or "~~" in text:
    masked = _FORMULA_OR_BOX.sub(lambda formula: "x" * len(formula.group()), text)
    signs, pairs = list(text), _emphasis(masked)
    for (sign, start, opened), (_, closes, end) in zip(pairs[::2], pairs[1::2], strict=True):
      signs[start:opened] = [""] * (opened - start)
      signs[closes:end] = [""] * (end - closes)
      if sign == "~~":  # strikethrough
        signs[start:end] = [""] * (end - start)
    text = "".join(signs)
  return _LINE_START.sub("", text).replace("`", " ")
