"""The trace viewer: one self-contained page, traces.html, with many traces and their credit.

The page's scripts and styles are in page/. Its data are JSON in inert script elements: a small
index that the list filters and sorts, and chunks of whole problems that are parsed on first use.
Text by models or problem authors reaches the page only as text: JSON here, textContent there.
"""

import base64
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Sequence

from etils import epath

from synthneg_jax.report import markup

_HERE = pathlib.Path(__file__).parent
_CHUNK = 40_000  # characters of text after which a chunk is closed
# Bits of the index's flags.
_CREDITED, _WRONG_SOLVABLE, _RIGHT_DOUBTFUL, _POLICIES_DIFFER, _PAIRED = (1 << n for n in range(5))
_LATEX = re.compile(r"\\\(|\\\[|\$[^$\s](?:[^$]*[^$\s])?\$(?!\d)")


@dataclasses.dataclass(frozen=True)
class Rollout:
  """A distinct rollout from a prefix, with its frequency."""

  text: str  # after the prefix
  correct: bool
  reason: str
  times: int


@dataclasses.dataclass(frozen=True)
class Credit:
  """The credit of one step."""

  rollouts: int  # from the end of the step; 0 if exact
  successes: int
  interval: tuple[float, float] | None  # 95 %, of the success rate; None without rollouts
  q: float | None  # under Best-of-k; None if unknown
  advantage: float | None  # None if q or the previous q is unknown
  exact: bool  # the last step: q is the verdict
  drawn: Sequence[Rollout] = ()  # the rollouts shown on the page


@dataclasses.dataclass(frozen=True)
class PairView:
  """A pair from a trace."""

  stage: str  # dpo or step_dpo
  mode: str
  pit: int  # step of the trace from 0; -1 if no pit was used
  trunk: str  # after the problem
  chosen: str
  rejected: str
  p_flipped: float  # estimated probability that the label is flipped
  chosen_logp: tuple[float, float] | None  # nats, (before, after) training; None if not recorded
  rejected_logp: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class TraceView:
  """One trace."""

  id: str  # unique in the page
  source: int  # index into Viewer.sources
  steps: Sequence[str]  # texts
  reason: str  # of the verdict
  extracted: str | None  # the graded answer
  finish_reason: str
  credit: Sequence[Credit] | None = None  # one per step; None for a trace without credit
  pit: int = -1  # step from 0
  spurious: int = -1  # spurious step of a right trace, from 0
  pairs: Sequence[PairView] = ()


@dataclasses.dataclass(frozen=True)
class ProblemView:
  """A problem with all its traces."""

  id: str
  text: str
  gold: str
  solution: str  # the known one; empty if there is none
  value: float | None  # of the problem alone, under Best-of-k
  right: int  # right samples behind `value`
  samples: int
  traces: Sequence[TraceView]


@dataclasses.dataclass(frozen=True)
class Viewer:
  """The contents of the page."""

  title: str
  sources: Sequence[str]  # policy and purpose of traces, such as "SFT, samples"
  tested: Sequence[int]  # indices of sources that answer the test problems
  compared: Sequence[int]  # those of `tested` that "policies differ" compares
  problems: Iterable[ProblemView]
  total: int  # traces in the run; the page may hold fewer
  best_of: int
  num_rollouts: int
  max_rollouts: int  # distinct rollouts shown per step
  pit_rule: str


def share_before_verdict(trace: TraceView) -> float | None:
  """The success rate of rollouts from the last step but one; None without rollouts."""
  if trace.credit is None or len(trace.credit) < 2 or not trace.credit[-2].rollouts:
    return None
  return trace.credit[-2].successes / trace.credit[-2].rollouts


def flags(trace: TraceView, differ: bool) -> int:
  """The bits that the page filters by: credit, pairs, and three kinds of disagreement.

  Q and the verdict disagree if a trace is wrong but at least half of the rollouts from its last
  step but one are right, or if it is right but fewer than half are. Policies differ if some of the
  compared ones answer a test problem right and others do not.

  Args:
    trace: the trace.
    differ: whether the compared policies differ on its problem.
  """
  bits = _CREDITED * (trace.credit is not None)
  bits += _POLICIES_DIFFER * differ + _PAIRED * bool(trace.pairs)
  share = share_before_verdict(trace)
  if share is not None:
    bits += _WRONG_SOLVABLE * (trace.reason != "right" and share >= 0.5)
    bits += _RIGHT_DOUBTFUL * (trace.reason == "right" and share < 0.5)
  return bits


def has_latex(text: str) -> bool:
  """Whether a text may hold formulas; dollar amounts may be mistaken for one."""
  return bool(_LATEX.search(text))


def _rounded(value: float | None, digits: int = 3) -> float | None:
  return None if value is None else round(value, digits)


def _step(credit: Credit) -> list:
  low, high = credit.interval or (None, None)
  numbers = [_rounded(value) for value in (low, high, credit.q, credit.advantage)]
  return [credit.rollouts, credit.successes, *numbers, int(credit.exact)]


def _trace(trace: TraceView) -> list:
  credit = None if trace.credit is None else [_step(step) for step in trace.credit]
  return [trace.id, list(trace.steps), trace.extracted, trace.finish_reason, credit]


def _details(trace: TraceView) -> list:
  """Data that the page parses on a click: rollouts by step, and pairs."""
  drawn = [
    [[r.text, int(r.correct), r.reason, r.times] for r in step.drawn] for step in trace.credit or ()
  ]
  pairs = [
    [p.stage, p.mode, p.pit, p.trunk, p.chosen, p.rejected, _rounded(p.p_flipped)]
    + [logp and [_rounded(value) for value in logp] for logp in (p.chosen_logp, p.rejected_logp)]
    for p in trace.pairs
  ]
  return [drawn, pairs] if any(drawn) or pairs else []


class _Chunks:
  """Packs problems into the page's script elements."""

  def __init__(self, viewer: Viewer):
    self.compared = set(viewer.compared)
    self.columns = {
      name: []
      for name in ("problem", "source", "reason", "pit", "spurious", "flags", "drop", "length")
    }
    self.reasons, self.starts, self.elements, self.latex = {}, [], [], False
    self._problems = self._size = 0
    self._texts, self._details = [], []
    for problem in viewer.problems:
      self._add(problem)
    self._close()

  def _add(self, problem: ProblemView) -> None:
    if self._size >= _CHUNK:
      self._close()
    verdicts = {
      trace.reason == "right" for trace in problem.traces if trace.source in self.compared
    }
    for trace in problem.traces:
      drops = [step.advantage for step in trace.credit or () if step.advantage is not None]
      row = {
        "problem": self._problems,
        "source": trace.source,
        "reason": self.reasons.setdefault(trace.reason, len(self.reasons)),
        "pit": trace.pit,
        "spurious": trace.spurious,
        "flags": flags(trace, len(verdicts) == 2 and trace.source in self.compared),
        "drop": round(1000 * min(drops)) if drops else None,
        "length": len(trace.steps),
      }
      for name, value in row.items():
        self.columns[name].append(value)
    head = [problem.id, problem.text, problem.gold, problem.solution, _rounded(problem.value, 4)]
    traces = [_trace(trace) for trace in problem.traces]
    details = [_details(trace) for trace in problem.traces]
    self._texts.append([*head, problem.right, problem.samples, traces])
    self._details.append(details)
    self._size += len(problem.text) + len(problem.solution)
    self._size += sum(len(step) for trace in problem.traces for step in trace.steps)
    if not self.latex:
      self.latex = any(map(has_latex, _strings([head, traces, details])))
    self._problems += 1

  def _close(self) -> None:
    if self._texts:
      number = len(self.starts)
      self.starts.append(self._problems - len(self._texts))
      self.elements += [
        _data(f"texts-{number}", self._texts),
        _data(f"details-{number}", self._details),
      ]
    self._texts, self._details, self._size = [], [], 0


def _strings(value) -> Iterable[str]:
  if isinstance(value, str):
    yield value
  elif isinstance(value, list):
    for part in value:
      yield from _strings(part)


def _data(name: str, value) -> str:
  """JSON as an inert script element, in ASCII and without "<", so that text cannot close it."""
  text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
  text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
  return f'<script type="application/json" id="{name}">{text}</script>\n'


def _katex() -> tuple[str, str]:
  """KaTeX as (script, style) with embedded fonts."""
  folder = _HERE / "katex"

  def inline(match: re.Match) -> str:
    font = base64.b64encode((folder / match.group(1)).read_bytes()).decode()
    return f"src:url(data:font/woff2;base64,{font}) format('woff2')"

  style = re.sub(r"src:url\((fonts/[\w-]+\.woff2)\) format\(\"woff2\"\)(?:,url\([^)]*\) "
                 r"format\(\"\w+\"\))*", inline,
                 (folder / "katex.min.css").read_text())  # fmt: skip
  licence = (
    "/* KaTeX 0.19.1, MIT License, Copyright (c) 2013-2020 Khan Academy and other contributors */\n"
  )
  return licence + (folder / "katex.min.js").read_text(), style


def page(viewer: Viewer) -> str:
  """The page as HTML."""
  chunks = _Chunks(viewer)

  def read(name):
    return (_HERE / "page" / name).read_text()

  scripts = [read(name) for name in ("text.js", "data.js", "trace.js", "list.js")]
  styles = [read("traces.css")]
  if chunks.latex:
    script, style = _katex()
    scripts.insert(0, script)
    styles.append(style)
  index = {
    "title": viewer.title,
    "sources": list(viewer.sources),
    "tested": list(viewer.tested),
    "reasons": list(chunks.reasons),
    "reasonNames": markup.REASONS,
    "starts": chunks.starts,
    "columns": chunks.columns,
    "total": viewer.total,
    "bestOf": viewer.best_of,
    "numRollouts": viewer.num_rollouts,
    "maxRollouts": viewer.max_rollouts,
    "pitRule": viewer.pit_rule,
  }

  def digest(text):
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

  allowed = " ".join(f"'sha256-{digest(script)}'" for script in scripts)
  policy = (
    f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; font-src data:; "
    "base-uri 'none'; form-action 'none'"
  )
  parts = {
    "POLICY": markup.escape(policy),
    "TITLE": markup.escape(viewer.title),
    "STYLES": "".join(f"<style>{style}</style>\n" for style in styles),
    "DATA": _data("index", index) + "".join(chunks.elements),
    "SCRIPTS": "".join(f"<script>{script}</script>\n" for script in scripts),
  }
  return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match.group(1)], read("traces.html"))


def write(viewer: Viewer, folder: epath.PathLike) -> epath.Path:
  """Writes traces.html, creating the folder if needed; returns its path."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  path, temporary = folder / "traces.html", folder / "traces.html.tmp"
  temporary.write_text(page(viewer))
  temporary.replace(path)
  return path
