"""The grading report: which verdicts a workdir's responses got, and on which answers, those worth a
look first.
"""

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
_TAIL = 300  # characters of a response that are shown, from its end

Opinion = Callable[[str, str], bool | None]  # (response, gold) -> right, or None for no opinion


def math_verify() -> Opinion:
  """math-verify as a second opinion; it is asked, and never judges.

  Raises:
    UserError: it is not installed.
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
    except Exception:  # it raises what its parser raises
      return None

  return opinion


def _line(text: str) -> str:
  return "`" + " ".join(text.split()).replace("`", "'") + "`"


def _rows(found: Sequence[tuple[Trace, Problem]], most: int) -> list[str]:
  lines = []
  for trace, problem in found[:most]:
    lines.append(f"- {trace.id}: gold {_line(problem.answer)}, read {_line(trace.extracted or '')}")
    lines.append(f"  … {_line(trace.text[-_TAIL:])}")
  if len(found) > most:
    lines.append(f"- and {len(found) - most} more")
  return lines


def markdown(
  traces: Mapping[str, Sequence[Trace]],
  problems: Mapping[str, Problem],
  opinion: Opinion | None,
  most: int,
) -> str:
  """The report as Markdown.

  Args:
    traces: by the set that they belong to, such as "sample".
    problems: by id.
    opinion: a second grader, whose disagreements are listed; None for none.
    most: answers shown for each reason of each set.
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
      found = [
        (trace, problems[trace.problem_id]) for trace in traces[name] if trace.reason == reason
      ]
      if found:
        lines += ["", f"## {reason}: {name}, {len(found)}", "", *_rows(found, most)]
  if opinion is not None:
    lines += ["", "# Where the second opinion differs"]
    for name in names:
      asked = [(trace, problems[trace.problem_id]) for trace in traces[name]]
      said = [opinion(trace.text, problem.answer) for trace, problem in asked]
      for claim, correct in (("wrong here, right there", False), ("right here, wrong there", True)):
        found = [
          pair
          for pair, right in zip(asked, said, strict=True)
          if pair[0].correct == correct and right is (not correct)
        ]
        of = sum(trace.correct == correct for trace, _ in asked)
        lines += ["", f"## {claim}: {name}, {len(found)} of {of}", "", *_rows(found, most)]
      if None in said:
        lines += ["", f"It has no opinion on {said.count(None)} of {len(said)}: {name}."]
  return "\n".join(lines) + "\n"


def report(workdir: str, second_opinion: bool, most: int) -> epath.Path:
  """Writes WORKDIR/report/grading.md from the traces of sample and evaluate that are there.

  Raises:
    UserError: there are none, or the second grader is not installed.
  """
  opinion = math_verify() if second_opinion else None
  folder = epath.Path(workdir)
  places = {"sample": folder / "sample" / "traces"}
  if (folder / "evaluate").exists():
    places |= {
      f"evaluate/{path.name}": path / "traces" for path in sorted((folder / "evaluate").iterdir())
    }
  traces = {
    name: list(Shards(path, Trace).read()) for name, path in places.items() if path.exists()
  }
  traces = {name: group for name, group in traces.items() if group}
  if not traces:
    raise UserError(f"{folder} holds no traces of sample or evaluate to report on.")
  problems = {}
  for split in ("train", "test"):
    problems |= Shards(folder / "synthesize" / split, Problem).read_dict()
  path = folder / "report" / "grading.md"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(markdown(traces, problems, opinion, most))
  return path
