"""The grading report: a workdir's verdicts by reason, with examples, doubtful reasons first."""

import collections
from collections.abc import Callable, Mapping, Sequence

from etils import epath

from synthneg_jax.data.records import Problem, Shards, Trace
from synthneg_jax.runtime.errors import UserError

ORDER = (
  "unparsable",
  "ambiguous",
  "timeout",
  "too_large",
  "no_answer",
  "truncated",
  "wrong",
  "right",
)
_TAIL = 300  # characters shown from the end of a response

Opinion = Callable[[str, str], bool | None]  # (response, gold) -> right, or None for no opinion


def math_verify() -> Opinion:
  """math-verify as a second opinion; it never decides a verdict.

  Raises:
    UserError: math-verify is not installed.
  """
  try:
    from math_verify import parse, verify
  except ImportError:
    raise UserError(
      "--second_opinion needs math-verify: pip install 'synthneg_jax[grading]'."
    ) from None

  def opinion(response: str, gold: str) -> bool | None:
    try:
      wanted, stated = parse(f"${gold}$"), parse(response)
      return bool(verify(wanted, stated)) if wanted else None
    except Exception:  # its parser raises many types
      return None

  return opinion


def _line(text: str) -> str:
  return "`" + " ".join(text.split()).replace("`", "'") + "`"


def _rows(examples: Sequence[tuple[Trace, Problem]], most: int) -> list[str]:
  lines = []
  for trace, problem in examples[:most]:
    lines.append(f"- {trace.id}: gold {_line(problem.answer)}, read {_line(trace.extracted or '')}")
    lines.append(f"  … {_line(trace.text[-_TAIL:])}")
  if len(examples) > most:
    lines.append(f"- and {len(examples) - most} more")
  return lines


def markdown(
  traces: Mapping[str, Sequence[Trace]],
  problems: Mapping[str, Problem],
  *,
  opinion: Opinion | None = None,
  most: int,
) -> str:
  """The report as Markdown.

  Args:
    traces: traces by set, such as "sample".
    problems: problems by id.
    opinion: a second grader; its disagreements are listed.
    most: maximum number of examples per reason and set.
  """
  names = list(traces)
  counts = {
    name: collections.Counter(trace.reason for trace in group) for name, group in traces.items()
  }
  lines = [
    "# Verdicts",
    "",
    f"| reason | {' | '.join(names)} |",
    "| --- |" + " ---: |" * len(names),
  ]
  for reason in ORDER:
    if any(counts[name][reason] for name in names):
      lines.append(f"| {reason} | {' | '.join(str(counts[name][reason]) for name in names)} |")
  lines.append(f"| all | {' | '.join(str(len(traces[name])) for name in names)} |")
  for reason in ORDER:
    for name in names:
      examples = [(t, problems[t.problem_id]) for t in traces[name] if t.reason == reason]
      if examples:
        lines += ["", f"## {reason}: {name}, {len(examples)}", "", *_rows(examples, most)]
  if opinion is not None:
    lines += ["", "# Disagreements with the second opinion"]
    for name in names:
      opinions = [opinion(t.text, problems[t.problem_id].answer) for t in traces[name]]
      for title, correct in (("wrong here, right there", False), ("right here, wrong there", True)):
        differing = [
          (t, problems[t.problem_id])
          for t, right in zip(traces[name], opinions, strict=True)
          if t.correct == correct and right is (not correct)
        ]
        total = sum(t.correct == correct for t in traces[name])
        lines += ["", f"## {title}: {name}, {len(differing)} of {total}", ""]
        lines += _rows(differing, most)
      if None in opinions:
        count = opinions.count(None)
        lines += ["", f"It has no opinion on {count} of {len(opinions)}: {name}."]
  return "\n".join(lines) + "\n"


def report(workdir: str, second_opinion: bool, most: int) -> epath.Path:
  """Writes WORKDIR/report/grading.md from the traces of sample and evaluate.

  Raises:
    UserError: no traces exist, or math-verify is requested but not installed.
  """
  opinion = math_verify() if second_opinion else None
  folder = epath.Path(workdir)
  names = ["sample"]
  if (folder / "evaluate").exists():
    names += [f"evaluate/{path.name}" for path in sorted((folder / "evaluate").iterdir())]
  traces = {}
  for name in names:
    if group := list(Shards(folder / name / "traces", Trace).read()):
      traces[name] = group
  if not traces:
    raise UserError(f"{folder} holds no traces of sample or evaluate to report on.")
  problems = {}
  for split in ("train", "test"):
    problems |= Shards(folder / "synthesize" / split, Problem).read_dict()
  path = folder / "report" / "grading.md"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(markdown(traces, problems, opinion=opinion, most=most))
  return path
