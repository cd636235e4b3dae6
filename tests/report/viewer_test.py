"""The trace viewer: correct data, no execution of model text, no freezing with 20,000 traces."""

import ast
import dataclasses
import html.parser
import json
import pathlib
import random
import re
import time

import pytest

from synthneg_jax.report import viewer_page
from tests import browser as browser_lib

# Hostile text of a model, a problem's author or a gold answer. window.owned must stay undefined.
HOSTILE = (
  "</script><script>window.owned = 1</script><img src=x onerror='window.owned = 2'>"
  "</script ><script >window.owned = 10</script ><!--<script <svg onload='window.owned = "
  "3'><iframe src='https://evil.example/'></iframe><!-- <script>"
  " javascript:window.owned=4 \u2028\u2029\ud800 &lt;b&gt; {{DATA}} ${window.owned=5} "
  "$\\href{javascript:window.owned=6}{click}$ $\\htmlData{onclick=window.owned=7}{x^2}$ "
  "$\\includegraphics{https://evil.example/x.png}$ \\(\\def\\x{\\x\\x}\\x\\) "
  "$\\url{javascript:window.owned=8}$"
)


def _credit(rollouts, successes, q, advantage, *, exact=False, drawn=()):
  return viewer_page.Credit(
    rollouts, successes, (0.1, 0.9) if rollouts else None, q, advantage, exact, drawn
  )


def _trace(
  number, *, problem="p/0", source=0, reason="wrong", steps=(" one\n", " two\n", " #### 3"), **more
):
  extracted = None if reason == "no_answer" else "3"
  return viewer_page.TraceView(
    f"{problem}/sample/{number}", source, steps, reason, extracted, "eos", **more
  )


def _toy() -> viewer_page.Viewer:
  """Two training problems with samples, one test problem with two policies' answers."""
  rollouts = [
    viewer_page.Rollout(" two again\n #### 4", True, "right", 3),
    viewer_page.Rollout(" two\n #### 3", False, "wrong", 1),
  ]
  pair = viewer_page.PairView(
    "step_dpo",
    "shared_prefix",
    1,
    " one\n",
    " better two\n",
    " two\n",
    0.02,
    (-3.0, -2.5),
    (-1.0, -4.0),
  )
  old = viewer_page.PairView(
    "dpo", "arbitrary", -1, "", " all right", " all wrong", 0.0, None, None
  )
  blamed = _trace(
    0,
    credit=[
      _credit(4, 3, 0.75, 0.25, drawn=rollouts),
      _credit(4, 1, 0.25, -0.5),
      _credit(0, 0, 0.0, -0.25, exact=True),
    ],
    pit=1,
    pairs=[pair, old],
  )
  unlucky = _trace(
    1,
    credit=[_credit(4, 2, 0.5, 0.0), _credit(4, 4, 1.0, 0.5), _credit(0, 0, 0.0, -1.0, exact=True)],
    pit=2,
  )
  lucky = _trace(
    2, reason="right", credit=[_credit(4, 1, 0.25, -0.25), _credit(0, 0, 1.0, 0.75, exact=True)],
    spurious=0,
    steps=(" slip\n", " #### 4"),
  )  # fmt: skip
  plain = _trace(
    0,
    problem="p/1",
    reason="right",
    steps=(" $x^2 + 1$ costs $5 and $10 \n", " \\[\\frac{1}{2}\\]"),
  )

  def at(source, reason, steps):
    return viewer_page.TraceView(f"t/0/evaluate/0@{source}", source, steps, reason, "1", "eos")

  tested = [
    at(1, "wrong", (" same\n", " then\n", " #### 1")),
    at(2, "right", (" same\n", " else\n", " #### 1")),
  ]
  problems = [
    viewer_page.ProblemView(
      "p/0", "What is 1 + 2?", "4", " the known way", 0.5, 1, 3, [blamed, unlucky, lucky]
    ),
    viewer_page.ProblemView("p/1", "Solve it", "5", "", None, 1, 1, [plain]),
    viewer_page.ProblemView("t/0", "A question", "1", "", None, 0, 0, tested),
  ]
  sources = ("SFT, samples", "SFT, test", "per-step DPO, test")
  return viewer_page.Viewer("Toy", sources, (1, 2), (1, 2), problems, 9, 1, 4, 8, "lowest_value")


def _hostile(text=HOSTILE) -> viewer_page.Viewer:
  steps = (text, text)
  drawn = [viewer_page.Rollout(text, False, text, 1)]
  pair = viewer_page.PairView(text, "shared_prefix", 1, text, text, text, 0.0, None, None)
  credit = [_credit(4, 1, 0.25, -0.25, drawn=drawn), _credit(0, 0, 0.0, -0.25, exact=True)]
  trace = viewer_page.TraceView(f"x{text}", 0, steps, "wrong", text, "eos", credit, 1, -1, [pair])
  problem = viewer_page.ProblemView(text, text, text, text, 0.5, 1, 2, [trace])
  return viewer_page.Viewer(
    f"Title {text}".replace("\ud800", ""), (text,), (), (), [problem], 1, 1, 4, 8, "rule"
  )


class _Scripts(html.parser.HTMLParser):
  """The page's script elements as (attributes, text), as an HTML parser sees them."""

  def __init__(self, text):
    super().__init__()
    self.found, self.tags, self._in = [], [], False
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self._in = tag == "script"
    if self._in:
      self.found.append([dict(attrs), ""])

  def handle_endtag(self, tag):
    self._in = False

  def handle_data(self, data):
    if self._in:
      self.found[-1][1] += data

  def data(self, name):
    return next(json.loads(text) for attributes, text in self.found if attributes.get("id") == name)


def test_flags():
  # Fails if the step before the verdict is another one, or exactly half does not count as at least
  # half.
  problem = _toy().problems[0].traces
  assert [viewer_page.share_before_verdict(trace) for trace in problem] == [0.25, 1.0, 0.25]
  paired, credited, solvable, doubtful, differ = 16, 1, 2, 4, 8
  assert viewer_page.flags(problem[0], False) == credited + paired
  assert viewer_page.flags(problem[1], False) == credited + solvable
  assert viewer_page.flags(problem[2], False) == credited + doubtful
  assert viewer_page.flags(_toy().problems[1].traces[0], True) == differ
  half = _trace(0, credit=[_credit(4, 2, 0.5, 0.0), _credit(0, 0, 0.0, -0.5, exact=True)])
  assert viewer_page.flags(half, False) == credited + solvable
  assert viewer_page.flags(dataclasses.replace(half, reason="right"), False) == credited


def test_index_and_chunks():
  # Fails if a column is misaligned with the traces, or a number of the credit is wrong.
  page = _Scripts(viewer_page.page(_toy()))
  index = page.data("index")
  columns = index["columns"]
  assert columns["problem"] == [0, 0, 0, 1, 2, 2] and columns["source"] == [0, 0, 0, 0, 1, 2]
  assert columns["pit"] == [1, 2, -1, -1, -1, -1] and columns["spurious"] == [-1, -1, 0, -1, -1, -1]
  assert columns["drop"] == [-500, -1000, -250, None, None, None]
  assert columns["flags"][4:] == [8, 8]
  assert [index["reasons"][reason] for reason in columns["reason"]] == ["wrong"] * 2 + [
    "right"
  ] * 2 + [
    "wrong",
    "right",
  ]
  first = page.data("texts-0")[0]
  assert first[:7] == ["p/0", "What is 1 + 2?", "4", " the known way", 0.5, 1, 3]
  assert first[7][0][4] == [
    [4, 3, 0.1, 0.9, 0.75, 0.25, 0],
    [4, 1, 0.1, 0.9, 0.25, -0.5, 0],
    [0, 0, None, None, 0.0, -0.25, 1],
  ]
  assert page.data("details-0")[0][0][0][0] == [
    [" two again\n #### 4", 1, "right", 3],
    [" two\n #### 3", 0, "wrong", 1],
  ]


def test_hostile_text_stays_data():
  # Fails if "<" is not escaped in the JSON: then the first </script> ends the element.
  page = _Scripts(viewer_page.page(_hostile()))
  assert [a.get("type") for a, _ in page.found] == ["application/json"] * 3 + [
    None
  ] * 5  # KaTeX and four of ours
  assert not {"img", "iframe", "svg", "link"} & set(page.tags)
  trace = page.data("texts-0")[0][7][0]
  assert trace[1] == [HOSTILE, HOSTILE]
  assert all(
    text.isascii() and not set("<>&") & set(text) for attributes, text in page.found if attributes
  )


@pytest.mark.parametrize(
  "text, needed",
  [("a $x^2$ b", True), ("\\(x\\)", True), ("$5 and $10", False), ("5 = 5 #### 3", False)],
)
def test_katex_is_embedded_only_for_latex(text, needed):
  # Fails if every page carries KaTeX's 700 kB, or if none does.
  problem = viewer_page.ProblemView("p", "q", "1", "", None, 0, 1, [_trace(0, steps=(text,))])
  page = viewer_page.page(viewer_page.Viewer("T", ("s",), (), (), [problem], 1, 1, 4, 8, "r"))
  assert ("KaTeX_Main" in page) == needed
  assert len(page) < (60_000 if not needed else 1_000_000)
  assert "url(fonts" not in page


@pytest.fixture(name="browser", scope="module")
def _browser():
  made = browser_lib.Browser()
  yield made
  made.close()


def _open(browser, tmp_path, made, hash_="", width=1440, dark=False):
  browser.requests.clear()
  browser.complaints.clear()
  browser.size(width, 900, dark)
  path = viewer_page.write(made, tmp_path / "page")
  browser.open(path, hash_)
  return path


def _quiet(browser):
  assert browser.requests == [] and browser.complaints == []


TITLES = (
  "[...document.querySelectorAll('#list .row')].sort((a, b) => a.ariaPosInSet - "
  "b.ariaPosInSet).map(e => e.innerText)"
)
STATUS = "document.getElementById('status').textContent"


def _choose(browser, name, text):
  """Selects the first option of a filter with this prefix, as a user does."""
  browser.js(
    f"(() => {{ const s = document.getElementById('{name}');"
    f" s.value = [...s.options].find(o => o.text.startsWith({json.dumps(text)})).value;"
    " s.dispatchEvent(new Event('change')); })()"
  )


@pytest.mark.browser
def test_steps_rollouts_and_pairs(browser, tmp_path):
  # Fails if credit, pit, rollouts or a pair's margins are missing or at another step.
  _open(browser, tmp_path, _toy(), "#trace=p%2F0%2Fsample%2F0")
  browser.wait("document.querySelector('article')")
  steps = browser.js(
    "[...document.querySelectorAll('.step')].map(e => e.innerText.replace(/\\s+/g, ' '))"
  )
  assert (
    "Q 0.75 0.10–0.90" in steps[0]
    and "▲ advantage +0.25" in steps[0]
    and "4 rollouts, 3 right" in steps[0]
  )
  assert (
    "▼ advantage −0.50" in steps[1] and "◀ pit" in steps[1] and "pit" not in steps[0] + steps[2]
  )
  assert "the verdict" in steps[2]
  range_, dot = (f"document.querySelector('.{name}').style" for name in ("range", "dot"))
  assert browser.js(f"[{range_}.left, {range_}.width, {dot}.left]") == ["10%", "80%", "75%"]
  assert not browser.js("Boolean(document.querySelector('.rollouts li'))")
  browser.click(".roll")
  browser.wait("document.querySelector('.rollouts li')")
  opened = browser.js("document.querySelector('.rollouts').innerText.replace(/\\s+/g, ' ')")
  assert "✓ right ×3" in opened and "two again" in opened and "✗ wrong answer" in opened
  assert browser.js("document.querySelector('.roll').getAttribute('aria-expanded')") == "true"
  assert "not kept" not in opened
  browser.click(".roll")
  assert browser.js("document.querySelector('.rollouts').hidden")
  browser.js("document.querySelectorAll('.roll')[1].click()")
  assert "4 more rollouts not in this page" in browser.js(
    "document.querySelectorAll('.rollouts')[1].innerText"
  )
  pairs = browser.js(
    "[...document.querySelectorAll('.pair')].map(e => e.innerText.replace(/\\s+/g, ' '))"
  )
  assert "Per-step DPO at step 2" in pairs[0] and "Trunk: the problem and step 1" in pairs[0]
  assert "better two" in pairs[0] and "chosen − rejected −2.00 1.50 +3.50" in pairs[0]
  assert "not recorded" in pairs[1] and "Trunk: the problem alone." in pairs[1]
  article = browser.js("document.querySelector('article').innerText")
  assert "✗ wrong answer" in article and "gold 4" in article
  _quiet(browser)


@pytest.mark.browser
def test_filters_search_and_order(browser, tmp_path):
  # Fails if a filter shows other traces or hides matching ones.
  _open(browser, tmp_path, _toy())
  browser.wait(f"{STATUS}.startsWith('6 of')")
  assert "6 in this page (the run has 9) traces" in browser.js(STATUS)
  order = browser.js("shown.map(idOf)")
  assert order[:3] == ["p/0/sample/1", "p/0/sample/0", "p/0/sample/2"]  # by the largest drop
  for name, text, left in (
    ("verdict", "not right", ["p/0/sample/1", "p/0/sample/0", "t/0/evaluate/0@1"]),
    ("pit", "at step 2", ["p/0/sample/0"]),
    ("credit", "right, with a spurious step", ["p/0/sample/2"]),
    ("disagreement", "wrong, but Q", ["p/0/sample/1"]),
    ("disagreement", "right, but Q", ["p/0/sample/2"]),
    ("disagreement", "policies differ", ["t/0/evaluate/0@1", "t/0/evaluate/0@2"]),
    (
      "disagreement",
      "any",
      ["p/0/sample/1", "p/0/sample/2", "t/0/evaluate/0@1", "t/0/evaluate/0@2"],
    ),
    ("pit", "has a pit", ["p/0/sample/1", "p/0/sample/0"]),
    ("credit", "with pairs", ["p/0/sample/0"]),
    ("credit", "without credit", ["p/1/sample/0", "t/0/evaluate/0@1", "t/0/evaluate/0@2"]),
    ("source", "per-step DPO, test", ["t/0/evaluate/0@2"]),
  ):
    _choose(browser, name, text)
    browser.wait(f"shown.length === {len(left)}")
    assert browser.js("shown.map(idOf)") == left, (name, text)
    assert len(browser.js(TITLES)) == len(left)
    browser.click("#clear")
    browser.wait("shown.length === 6")
  _choose(browser, "verdict", "not right")
  _choose(browser, "pit", "at step 2")
  browser.wait("shown.length === 1")  # both filters at once
  browser.click("#clear")
  browser.wait("shown.length === 6")
  _choose(browser, "order", "most steps first")
  assert browser.js("shown.map(t => COLUMNS.length[t])") == [3, 3, 3, 3, 2, 2]
  _choose(browser, "order", "as recorded")
  assert browser.js("shown.map(t => COLUMNS.length[t])") == [3, 3, 2, 2, 3, 3]
  browser.press("/")
  assert browser.js("document.activeElement.id") == "search"
  browser.type("SLIP")
  browser.wait("shown.length === 1")
  assert browser.js("shown.map(idOf)") == ["p/0/sample/2"]
  browser.js("document.getElementById('search').select()")
  browser.type("no such words")
  browser.wait(f"{STATUS}.startsWith('0 of')")
  assert browser.js(TITLES) == []
  _quiet(browser)


@pytest.mark.browser
def test_keys_links_and_two_side_by_side(browser, tmp_path):
  # Fails if a key has no effect, a link opens another trace, or the first difference is misplaced.
  path = _open(browser, tmp_path, _toy())
  browser.wait("document.querySelector('article')")
  browser.js("document.getElementById('list').focus()")
  browser.press("ArrowDown")
  assert browser.js("location.hash") == "#trace=p%2F0%2Fsample%2F0"
  assert browser.js("document.querySelector('article').dataset.trace") == "p/0/sample/0"
  assert browser.js("document.querySelector('[aria-selected=true]').id") == "row-1"
  assert (
    browser.js("document.getElementById('list').getAttribute('aria-activedescendant')") == "row-1"
  )
  browser.press("End")
  assert browser.js("document.querySelector('article').dataset.trace") == "t/0/evaluate/0@2"
  browser.press("k")
  assert browser.js("document.querySelector('article').dataset.trace") == "t/0/evaluate/0@1"
  browser.press("Enter")
  assert browser.js("document.activeElement.id") == "detail"
  _choose(browser, "beside", "✓ per-step DPO, test")
  browser.wait("document.querySelectorAll('article').length === 2")
  assert browser.js("[...document.querySelectorAll('article h2')].map(e => e.textContent)") == [
    "SFT, test",
    "per-step DPO, test",
  ]
  parts = "[...document.querySelectorAll('.step')].map(e => e.classList.contains('parts'))"
  assert browser.js(parts) == [False, True, False] * 2
  assert (
    browser.js("document.documentElement.scrollHeight") <= 900
  )  # list and trace scroll, not the page
  link = browser.js("location.hash")
  browser.open(path, link)
  browser.wait("document.querySelectorAll('article').length === 2")
  browser.open(path, "#trace=nobody")
  browser.wait("document.querySelector('#detail .note')")
  assert "holds no trace nobody" in browser.js("document.querySelector('#detail').innerText")
  _quiet(browser)


@pytest.mark.browser
def test_phone_layout(browser, tmp_path):
  # Fails if list and trace overlap, or anything is wider than the phone.
  _open(browser, tmp_path, _toy(), width=390, dark=True)
  browser.wait("document.querySelector('.row')")

  def seen(selector):
    return browser.js(f"document.querySelector('{selector}').getClientRects().length > 0")

  assert seen("#list") and not seen("#detail")
  browser.click("#row-1")
  browser.wait("document.querySelector('article')")
  assert seen("#detail") and not seen("#list")
  assert browser.js("document.documentElement.scrollWidth") <= 390
  browser.click(".back")
  browser.wait("!document.body.classList.contains('reading')")
  assert seen("#list") and not seen("#detail")
  _quiet(browser)


@pytest.mark.browser
def test_formulas(browser, tmp_path):
  # Fails if dollar amounts become formulas, formulas stay unrendered, or KaTeX's fonts are not
  # embedded.
  _open(browser, tmp_path, _toy(), "#trace=p%2F1%2Fsample%2F0")
  browser.wait("document.querySelectorAll('.step .katex').length === 2")
  assert (
    browser.js("document.querySelector('.step .text').innerText")
    .rstrip()
    .endswith("costs $5 and $10")
  )
  assert browser.js("document.querySelectorAll('.apart .mfrac').length") == 1
  assert browser.js("document.fonts.load('16px KaTeX_Main').then(found => found.length)") == 1

  def cut(text):
    return browser.js(f"pieces({json.dumps(text)}).filter(p => p[1]).map(p => p[0])")

  for text, formulas in {
    "pay $5, $6 or $7": [],
    "$5-$3=$2": [],
    "so $x$ is $-3y$, not $y+1$": ["x", "-3y", "y+1"],
    "$12$ lies in $[0, 30)$": ["12", "[0, 30)"],
    "$$a\n+b$$ and \\(c\\)": ["a\n+b", "c"],
    "\\$5 and $x_1$": ["x_1"],
    "$a = \\$5$": ["a = \\$5"],
    "an open $x_1": [],
    "\\\\(no\\\\)": [],
  }.items():
    assert cut(text) == formulas, text
  _quiet(browser)


@pytest.mark.browser
def test_hostile_text_runs_nothing(browser, tmp_path):
  # Fails if any text reaches innerHTML, KaTeX trusts it, or the page's policy allows a request.
  _open(browser, tmp_path, _hostile())
  browser.wait("document.querySelector('article')")
  for selector in (".roll", ".problem summary", ".pair summary"):
    browser.click(selector)
  browser.wait("document.querySelector('.rollouts li')")
  browser.js("document.querySelectorAll('.katex, .enclosing').forEach(e => e.click())")
  browser.js("new Promise(done => setTimeout(done, 100))")
  assert browser.js("typeof window.owned") == "undefined"
  assert (
    browser.js(
      "document.querySelectorAll('#detail img, #detail a, #detail iframe, #detail script').length"
    )
    == 0
  )
  assert (
    browser.js(
      "document.querySelectorAll('#detail [onclick], #detail [data-onclick], #detail "
      "[href]').length"
    )
    == 0
  )
  assert "</script><script>window.owned = 1</script><img src=x" in browser.js(
    "document.querySelector('.step').innerText"
  )
  _quiet(browser)
  # The page's policy stops an injected script and request.
  browser.js(
    "document.body.append(Object.assign(document.createElement('script'), {textContent: "
    "'window.owned = 9'}))"
  )
  browser.js(
    "document.body.append(Object.assign(new Image(), {src: 'https://evil.example/x.png'}))"
  )
  browser.js("new Promise(done => setTimeout(done, 100))")
  assert browser.js("typeof window.owned") == "undefined"
  assert len(browser.complaints) >= 2 and all(
    "Content Security Policy" in text for text in browser.complaints
  )


@pytest.mark.browser
def test_markup_without_formulas_is_text(browser, tmp_path):
  # Fails if a text without $ and backslash, which KaTeX never sees, reaches innerHTML.
  text = "<img src=x onerror='window.owned = 2'><b>bold</b>"
  _open(browser, tmp_path, _hostile(text))
  browser.wait("document.querySelector('article')")
  browser.click(".roll")
  browser.wait("document.querySelector('.rollouts li')")
  assert browser.js("document.querySelectorAll('.text img, .text b, .row img, .row b').length") == 0
  assert browser.js("document.querySelector('.step .text').textContent") == text
  _quiet(browser)


def _luminance(colour):
  linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a, b):
  high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
  return (high + 0.05) / (low + 0.05)


def _over(top, bottom, share):
  return [share * t + (1 - share) * b for t, b in zip(top, bottom, strict=True)]


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
def test_contrast(browser, tmp_path, dark):
  # Fails if any text's contrast is below 4.5 to 1 (WCAG AA) in either mode; the deepest shade of a
  # step is 0.45.
  _open(browser, tmp_path, _toy(), dark=dark)

  def colour(name):
    text = browser.js(
      f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')"
    ).strip()
    if text.startswith("#"):
      return [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [int(part) / 255 for part in text.split(",")]

  fg, bg, soft = colour("fg"), colour("bg"), colour("soft")
  assert (_luminance(bg) < 0.1) == dark
  for name in ("fg", "dim", "link", "bad-text", "good-text"):
    for ground in (bg, soft):
      assert _contrast(colour(name), ground) >= 4.5, name
  for name in ("bad", "good"):
    step = _over(colour(name), soft, 0.45)
    assert _contrast(fg, step) >= 4.5
    assert _contrast(_over(fg, step, 0.86), step) >= 4.5  # the interval's numbers
  shades = browser.js(
    "[...document.querySelectorAll('.step')].map(e => Number(e.style.getPropertyValue('--shade') "
    "|| 0))"
  )
  assert max(shades) == 0.45  # an advantage of -1 is among them
  _quiet(browser)


def _many(count) -> viewer_page.Viewer:
  """`count` traces of GSM8K's length, eight per problem, two in eight with credit and rollouts."""
  draw = random.Random(0)
  words = (
    "each week Anna buys apples for her class and sells what is left at the market so that "
    "she earns"
  ).split()

  def text(n):
    return " ".join(draw.choice(words) for _ in range(n))

  texts = [f" {text(14)} {draw.randrange(99)} + {draw.randrange(99)}\n" for _ in range(3000)]

  def trace(p, i):
    steps = [draw.choice(texts) for _ in range(5)] + [" #### 42"]
    if i >= 2:
      return _trace(
        i, problem=f"gsm8k/train/{p:05d}", steps=steps, reason="right" if i % 2 else "wrong"
      )
    credit, before = [], 0.5
    for _ in range(5):
      right = draw.randrange(9)
      drawn = [
        viewer_page.Rollout(draw.choice(texts) * 2, k < right, "right" if k < right else "wrong", 1)
        for k in range(8)
      ]
      credit.append(_credit(8, right, right / 8, right / 8 - before, drawn=drawn))
      before = right / 8
    credit.append(_credit(0, 0, 0.0, -before, exact=True))
    return _trace(
      i, problem=f"gsm8k/train/{p:05d}", steps=steps, credit=credit, pit=draw.randrange(5)
    )

  problems = (
    viewer_page.ProblemView(
      f"gsm8k/train/{p:05d}", text(45), "42", text(60), 0.5, 4, 8, [trace(p, i) for i in range(8)]
    )
    for p in range(count // 8)
  )
  return viewer_page.Viewer(
    "Many", ("SFT, samples",), (), (), problems, count, 1, 8, 8, "lowest_value"
  )


@pytest.mark.browser
def test_twenty_thousand_traces_do_not_freeze(browser, tmp_path):
  # Fails if all rows exist, all chunks are parsed at the start, or a search runs in one go
  # (measured: see docs/report.md).
  started = time.time()
  path = _open(browser, tmp_path, _many(20_000))
  browser.wait("document.querySelector('article') && shown.length === 20000", 60)
  loaded = time.time() - started
  parsed = browser.js("parsed.size")
  assert browser.js("INDEX.starts.length") > 40
  gaps = """(() => { let last = performance.now(); window.gap = 0;
    setInterval(() => {
      const now = performance.now(); gap = Math.max(gap, now - last); last = now; }, 5); })()"""
  browser.js(gaps)
  browser.js("""(async () => { for (let i = 0; i < 60; i += 1) { list.scrollTop = i * 21000;
    await new Promise(done => requestAnimationFrame(done)); } })()""")
  assert browser.js("document.querySelectorAll('.row').length") < 60
  scroll = browser.js("gap")
  browser.js("gap = 0")
  browser.press("/")
  browser.type("no such words")
  browser.wait(f"/^0 of 20.000 traces$/.test({STATUS})", 40)
  searched = browser.js("gap")
  size = len(path.read_bytes()) / 1e6
  loading = browser.js("performance.getEntriesByType('navigation')[0].loadEventEnd")
  print(
    f"{size:.1f} MB, loaded in {loading:.0f} ms; longest pauses: scroll {scroll:.0f} ms, search "
    f"{searched:.0f} ms"
  )
  print(f"made, written and open in {loaded:.1f} s; chunks parsed by then: {parsed}")
  assert size < 80 and parsed < 40
  assert scroll < 3000 and searched < 3000  # generous: other work may share the machine
  _quiet(browser)


def test_page_loads_nothing():
  # Fails if the page loads any resource.
  page = viewer_page.page(_toy())
  outside = re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.DOTALL)
  assert "http" not in outside.replace("http-equiv", "")
  assert re.findall(r"url\((?!data:)", page) == [] and "@import" not in page


def test_page_is_package_data():
  # Fails if setup.py omits a part of the page, which then works only from a checkout.
  root = pathlib.Path(viewer_page.__file__).parents[1]
  patterns = ast.literal_eval(
    re.search(
      r"package_data=\{.*?\"synthneg_jax\": (\[.*?\])",
      (root.parent / "setup.py").read_text(),
      re.DOTALL,
    ).group(1)
  )
  installed = {path for pattern in patterns for path in root.glob(pattern)}
  parts = {
    p
    for p in (root / "report").rglob("*")
    if p.suffix in (".js", ".css", ".html", ".woff2") or p.name == "LICENSE"
  }
  assert len(parts) == 30 and parts <= installed
