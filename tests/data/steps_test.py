"""Tests of where steps end, in GSM8K's lines and in prose with LaTeX."""

import functools
import pathlib
import re
import time
import types

import pytest
import transformers
from absl.testing import absltest, parameterized
from hypothesis import example, given, settings
from hypothesis import strategies as st

import synthneg_jax.tasks
from synthneg_jax.data import problem_files, steps, token_text
from synthneg_jax.runtime import errors
from tests.data import token_text_test
from tests.models import smollm2

EXCERPT = pathlib.Path(__file__).parents[1] / "data" / "gsm8k"
MATH_ROWS = pathlib.Path(synthneg_jax.tasks.__file__).with_name("math_rows")
LINES = types.SimpleNamespace(steps="delimiter", step_delimiter="\n")
PROSE = types.SimpleNamespace(steps="prose", step_delimiter="\n")
# Parts of prose and LaTeX, whole and broken, which hypothesis combines in any order.
PIECES = [
  *("$", "$$", "\\$", "\\(", "\\)", "\\[", "\\]", "\\\\", "{", "}", "\\{", "\\}", "\\begin{align*}",
  "\\end{align*}"),
  *("\\begin{cases}", "\\end{cases}", "[asy]", "[/asy]", "\n", "\n\n", "\n \n", " ", "  ", ". ",
  ".", "! ", "? ", ".) "),
  *("...", ". A", "A", "b", "Then ", "x=2", "x=2.", "3.14", "1,000", "$5", "$x$", "$x.$ ", "e.g. ",
  "Fig. ", "No. ", "a.m. "),
  *("\u3002", "\uff1f\u300d", "5!. ", "p.m. "),
  *("1. ", "Step 2. ", "5! ", "Done! ", "\\boxed{7}", "\\text{If so. Then}", "####", " 72", "*",
  '"'),
  *("\u20ac", "\u201d", "\u00e9"),
]  # fmt: skip


@functools.cache
def tokenizers() -> dict:
  """A tokenizer trained on a few lines, whose tokens cross boundaries, and a real one."""
  return {
    "small": token_text_test.byte_level(),
    "smollm2": transformers.AutoTokenizer.from_pretrained(smollm2.smollm2_dir()),
  }


@functools.cache
def signs_of(name: str) -> list[int]:
  """Ids of tokens with characters that matter for steps."""
  pieces = map(text_of(name).bytes_of, range(text_of(name).vocab_size))
  return [i for i, piece in enumerate(pieces) if re.search(rb"[.$\n{}\\!?]", piece)]


@functools.cache
def text_of(name: str) -> token_text.TokenText:
  return token_text.TokenText(tokenizers()[name])


def solutions() -> list[str]:
  """Real text: GSM8K's, and our rows in MATH's format."""
  places = ((EXCERPT, "gsm8k"), (MATH_ROWS, "math"))
  rows = [
    problem_files.read(path, name, split).rows
    for path, name in places
    for split in ("train", "test")
  ]
  return [row.solution for part in rows for row in part]


def cut(text: str) -> list[str]:
  """Prose split after every separator."""
  data, spans = text.encode(), list(steps.prose_separators(text.encode()))
  ends = [*(stop for _, stop in spans), len(data)]
  return [
    data[start:stop].decode() for start, stop in zip([0, *ends], ends, strict=False) if start < stop
  ]


class ProseTest(parameterized.TestCase):
  # Texts with | where they are split; the comments name the rule under test.
  @parameterized.parameters(
    "It is 3.| Then 4 follows.",
    "It is 3.\n|Then 4.\n|\n|So 5.",  # lines
    "Really?| Yes!| So be it.",
    'He said "no."| She (too.)| **Bold.**| Then.',  # closers
    "It is \u201cso.\u201d| Then.",
    "about 3.14 and 1,000.5 of $2.50.| Then 0.5 is left.",  # numbers
    "It is 3. 5 is more.",  # possibly a number with a space in it
    # abbreviations
    "as in Fig. 2, e.g. x, i.e. Y, cf. Eq. (3), by Prof. Smith vs. Dr. Jones et al. The end.",
    "The U.S. Team w.r.t. Time",
    # times of day
    "at 5 p.m.| Then he eats from 7 A.M.| She left at 5 p.m. and came at 6 p.m. 3 left",
    "at 5 p.m. Monday and 6 a.m. EST, e.g. Ann, i.e. Bob",
    # before digits only
    "See No. 5.| The answer is no.| Then 5 ft. 3 in. tall.| It is 5 ft.| Then.",
    "for x. then y",  # no sentence begins with a small letter
    "wait...| Then",
    "wait... then",
    "1. First.| 2. Second.| Step 3. Third.| Case i. Fourth.| **Step 5.** Last.",  # line numbers
    "(a) 5! = 120, n! Is",  # factorials
    "It is 5!.| Then n!.| 3 more (3!).| So 5!. so",  # and a period
    # Chinese
    "\u5171\u67093\u4e2a\u3002|\u5bf9\u5417\uff1f|\u300c\u5bf9\uff01\u300d|So "
    "3.14\u3002\u201d|\u5b8c",
    # Japanese, and a formula
    "\u7b54\u3048\u306f4\u3067\u3059\u3002|$x\u3002y$\u3067\u3059\uff01\uff09|\u6b21",
    "Then $x=2.$| So $y=3.14$ and \\(z. A\\) hold.| $w$.| $v$",  # formulas, and their last period
    "a $x,\\ldots$ Then $a, b, ...$ Then",
    "It costs $5.| He has $3.| Then.",  # money is no formula
    "It costs $5.| He has $ left.| Then.",
    "It costs $5.| Then US$7.| So.",
    "It costs \\$5.| He has \\$3.| Then $2.",
    "between $ 3. A $ and so.| Then",  # spaces inside both
    "$$x. Y$$ Then.| \\[x. Y\n = z.\\]| Then.",  # displays
    # environments, over blank lines, too
    "\\begin{align*}\nx &= 2. Y\\\\[2pt]\n\ny\n\\end{align*}\n|Then.",
    "\\begin{a}\\begin{a} A. B\\end{a} C. D\\end{a} E.| F",  # nested
    "[asy]\ndraw((0,0). A);\n\nlabel();\n[/asy]\n|Then.",
    "\\text{If A. Then B} and {c. D {e. F} g. H}.| Then.",  # braces
    "{ never closed.| Then",
    "$ never closed.| Then",
    "\\[ never closed. Then\nmore\n|\n|Then.| So.",  # up to the blank line
    "\\begin{align*} never closed. Then\nmore",
    "{ over a blank.| Line\n|\n|no.| Then }",
    "$x over a blank.| Line\n|\n|no.| Then$",
    "\\\\[ is a break.| Then \\]",  # an escaped backslash opens nothing
    "\\{ is a brace.| Then \\}",
  )
  def test_cuts(self, marked):
    parts = marked.split("|")
    self.assertEqual(cut("".join(parts)), [part for part in parts if part])

  # Fails if a text of only openers, closers or stops takes more than linear time.
  @parameterized.parameters(
    "{", "$", "\\[", "\\begin{a}", "[asy]", ". ", "1. ", "}", "\\end{a}", "$ x", "\n", "a."
  )
  def test_linear(self, piece):
    data = (piece * 100_000).encode()
    start = time.process_time()
    list(steps.prose_separators(data))
    self.assertLess(time.process_time() - start, 6.0)  # seconds; about half of one was measured

  # An independent oracle for well-formed LaTeX: no split may lie inside what a plain regex
  # recognises as a formula, environment or brace.
  @settings(max_examples=400, deadline=None, database=None)
  @given(st.data())
  def test_never_inside_latex(self, data):
    words = ["A. B", "x=2. ", "3.14", "\n", "? So ", "! Now", "e.g. ", " y "]
    inner = st.lists(st.sampled_from(words), max_size=5).map("".join)
    environment = ("\\begin{align}", "\\end{align}")
    wraps = [
      ("\\[", "\\]"),
      ("\\(", "\\)"),
      ("$$", "$$"),
      ("$x", "y$"),
      ("{", "}"),
      environment,
      ("[asy]", "[/asy]"),
    ]
    parts = []
    for _ in range(data.draw(st.integers(1, 5))):
      opens, closes = data.draw(st.sampled_from(wraps))
      held = opens + re.sub(r"\n\s*\n", "\n", data.draw(inner)) + closes
      parts += [
        (data.draw(st.sampled_from(["Then ", "So. It ", "\n", "is. "])), False),
        (held, True),
      ]
    text = "".join(part for part, _ in parts)
    cuts = {len("".join(cut(text)[: n + 1])) for n in range(len(cut(text)))}
    at = 0
    for part, held in parts:
      if held:
        self.assertFalse(cuts & set(range(at + 1, at + len(part))), text)
      at += len(part)


@pytest.mark.slow  # SmolLM2's tokenizer is fetched by a process
class EndsTest(parameterized.TestCase):
  def _check(self, ids, name, task):
    """Checks that the steps concatenate to the response, for any ids."""
    text = text_of(name)
    ends = steps.ends(ids, text, task)
    parts = [list(ids[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    self.assertEqual(sum(parts, []), list(ids))
    self.assertTrue(all(parts))
    if len(parts) > 1:
      self.assertTrue(
        all(b"".join(map(text.bytes_of, part)).strip() for part in parts)
      )  # blank is ASCII's white space
    # The rest of a response after a step has the rest of its steps, so rollouts split like traces.
    for end in ends[:-1]:
      rest = [end + other for other in steps.ends(ids[end:], text, task)]
      self.assertEqual(rest, [other for other in ends if other > end], text.text(ids))
    return [text.text(part) for part in parts]

  # Fails if an end is lost, doubled, or computed from retokenised text.
  @parameterized.product(name=["small", "smollm2"], task=[LINES, PROSE])
  def test_real_text(self, name, task):
    tokenizer, cuts = tokenizers()[name], 0
    for solution in solutions():
      ids = [*tokenizer.encode(solution, add_special_tokens=False), tokenizer.eos_token_id]
      cuts += len(self._check(ids, name, task)) - 1
    self.assertGreater(cuts, 150)

  # Fails if steps of generated text, whole or broken, do not concatenate to the response or depend
  # on earlier text.
  @settings(max_examples=400, deadline=None, database=None)
  @given(
    st.sampled_from(["small", "smollm2"]),
    st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=25),
  )
  @example("small", ["$", "\n", "\xa0"])
  @example("smollm2", ["A. ", "1. ", "x"])
  @example("smollm2", ["Go. ", "$5", ". A", "$"])
  def test_generated_text(self, name, pieces):
    text = "".join(pieces).encode(errors="ignore").decode()
    ids = tokenizers()[name].encode(text, add_special_tokens=False)
    for task in (LINES, PROSE):
      self._check(ids, name, task)

  # The same for ids that no tokenizer would produce for their text, as a model may draw them.
  @settings(max_examples=200, deadline=None, database=None)
  @given(st.sampled_from(["small", "smollm2"]), st.data())
  def test_drawn_ids(self, name, data):
    size = text_of(name).vocab_size
    ids = data.draw(
      st.lists(st.sampled_from(signs_of(name)) | st.integers(0, size - 1), max_size=30)
    )
    for task in (LINES, PROSE):
      self._check(ids, name, task)

  # Fails if the space before a sentence belongs to its stop (tokens hold it with the next word, so
  # no sentence would end), or GSM8K's steps are split at sentences.
  def test_smollm2_steps(self):
    def encode(text):
      return tokenizers()["smollm2"].encode(text, add_special_tokens=False)

    text = "First, $f(2)=-1.$ Then it is 3.5. So $f(f(2))=\\boxed{5}.$"
    expected = ["First, $f(2)=-1.$", " Then it is 3.5.", " So $f(f(2))=\\boxed{5}.$"]
    self.assertEqual(self._check(encode(text), "smollm2", PROSE), expected)
    text = "She has 3. Then 4.\nIt is 7.\n#### 7"
    self.assertEqual(
      self._check(encode(text), "smollm2", LINES), ["She has 3. Then 4.\n", "It is 7.\n", "#### 7"]
    )

  # Fails if a pattern is treated as text or as bytes, its spans are misplaced after other scripts
  # or invalid UTF-8, or an empty match ends a step.
  def test_pattern(self):
    def cut_by(delimiter, *pieces):
      fake = types.SimpleNamespace(
        bytes_of=[p if isinstance(p, bytes) else p.encode() for p in pieces].__getitem__
      )
      return steps.ends(
        range(len(pieces)), fake, types.SimpleNamespace(steps="delimiter", step_delimiter=delimiter)
      )

    self.assertEqual(cut_by(r"re:\n\n+", "a\n", "b\n", "\n", "\nc\n", "\n", "d"), [5, 6])
    self.assertEqual(
      cut_by("re:[\u3002;]", "\u4e2d", "\u3002", b"\xff\xe4", ";", "\u3001", "b"), [2, 4, 6]
    )
    with self.assertRaisesRegex(errors.UserError, "task.step_delimiter.*empty string"):
      cut_by("re:(?=b)", "a", "b")

  # Fails if a token that ends one step and begins the next is split between them.
  def test_token_of_two_steps_merges_them(self):
    pieces = [b"It is", b" so. The", b"n", b".", b" Now", b"."]
    fake = types.SimpleNamespace(bytes_of=pieces.__getitem__)
    self.assertEqual(steps.ends(range(6), fake, PROSE), [4, 6])


if __name__ == "__main__":
  absltest.main()
