"""Verdicts on whole responses, ours and math-verify's, against what they should be.

  python -m benchmarks.verdicts [FILE] [--graders=ours,math-verify] [--misses]

FILE is JSONL with the fields family, kind, gold, response and correct; the default is
tests/grading/responses.jsonl. Printed is a Markdown table by family: rows, each grader's verdicts
that are as they should be, and its false positives, which call a response right that is not.
--misses lists the verdicts that are not as they should be, below the table.

math-verify is asked as its README says: the gold answer within dollars, the response as it is, its
defaults and its own timeouts. What it raises counts as not right.
"""

import argparse
import collections
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence

_DEFAULT = pathlib.Path(__file__).parents[1] / "tests" / "grading" / "responses.jsonl"

Grader = Callable[[Mapping], bool]  # a row of the file -> whether its response is called right


def ours() -> Grader:
  """Our grader, with its default conventions."""
  from synthneg_jax.grading import answers

  return lambda row: answers.grade(row["response"], row["gold"], kind=row["kind"]).correct


def math_verify() -> Grader:
  """math-verify, in this process."""
  from math_verify import parse, verify

  logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs its timeouts

  def grade(row: Mapping) -> bool:
    try:
      return bool(verify(parse(f"${row['gold']}$"), parse(row["response"])))
    except Exception:  # it raises what its parser raises
      return False

  return grade


GRADERS = {"ours": ours, "math-verify": math_verify}


def table(rows: Sequence[Mapping], verdicts: Mapping[str, Sequence[bool]]) -> str:
  """The Markdown table: a line for each family, in the file's order, and one for all."""
  counts = collections.defaultdict(collections.Counter)
  for i, row in enumerate(rows):
    for family in (row["family"], "all"):
      counts[family]["rows"] += 1
      for name, given in verdicts.items():
        counts[family][name, "as it should be"] += given[i] == row["correct"]
        counts[family][name, "false positives"] += given[i] and not row["correct"]
  columns = [(name, what) for name in verdicts for what in ("as it should be", "false positives")]
  lines = [["family", "rows", *(f"{name}: {what}" for name, what in columns)]]
  lines.append(["---", *["---:"] * (1 + len(columns))])
  for family in [*(family for family in counts if family != "all"), "all"]:
    numbers = [counts[family]["rows"], *(counts[family][column] for column in columns)]
    lines.append([family, *map(str, numbers)])
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def misses(rows: Sequence[Mapping], name: str, given: Sequence[bool]) -> str:
  """The rows with another verdict than they should have, a line each."""
  lines = [f"\n{name}:"]
  for row, right in zip(rows, given, strict=True):
    if right != row["correct"]:
      said = "right" if right else "not right"
      start = f"- {said} ({row['family']}, {row['kind']}, gold {row['gold']}): "
      lines.append(start + json.dumps(row["response"], ensure_ascii=False))
  return "\n".join(lines)


def main() -> None:
  raw = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
  parser.add_argument("file", nargs="?", type=pathlib.Path, default=_DEFAULT)
  parser.add_argument("--graders", default=",".join(GRADERS))
  parser.add_argument("--misses", action="store_true")
  args = parser.parse_args()
  names = args.graders.split(",")
  if unknown := set(names) - set(GRADERS):
    parser.error(f"--graders: {', '.join(sorted(unknown))} unknown; there are {', '.join(GRADERS)}")
  rows = [json.loads(line) for line in args.file.read_text("utf-8").splitlines() if line.strip()]
  verdicts = {}
  for name in names:
    grade = GRADERS[name]()
    verdicts[name] = [grade(row) for row in rows]
  print(table(rows, verdicts))
  if args.misses:
    for name, given in verdicts.items():
      print(misses(rows, name, given))


if __name__ == "__main__":
  main()
