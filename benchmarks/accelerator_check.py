"""Checks one accelerator: its numbers against a CPU's, and how near training and decoding come to
what it can do.

python -m benchmarks.accelerator_check [--toy] [--seconds=N] [--parts=NAME,...] [--out=FILE]

A part (accelerator_parts.py) has a time of its own. One that fails, dies or runs out of time is
reported with the reason and the others go on; the file is written anew after each. This process
never touches the device: parts run in processes of their own, ours in one, then PyTorch's in
another, so that neither holds the other's memory.
"""

import argparse
import itertools
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

_COMMAND = (sys.executable, "-m", "benchmarks.accelerator_parts")
# for all parts together; with another number each part's own time changes in proportion
_SECONDS = 225.0
_START = 40.0  # seconds that a process may take to start, on top of its first part's
_SIZES = ("1B", "135M", "7B")  # in the order in which they are measured
PARTS = {  # name: seconds that it may take, compilation included
  "device": 20,
  "numerics": 45,
  "attention": 45,
  **{f"{kind}/{size}": 40 for size in _SIZES for kind in ("sft", "dpo", "decode")},
  **{f"transformers/{kind}/{size}": 25 for size in _SIZES for kind in ("sft", "decode")},
  **{f"trl/dpo/{size}": 25 for size in _SIZES},
}
# On an H200: shares of its peak FLOP/s (training) and bandwidth (decoding), tokens/s, and times as
# fast.
GOALS = {
  "attention": ("ratio", 2.0),
  "sft/135M": ("tokens_per_s", 310e3),
  **{f"sft/{size}": ("flops_share", 0.45) for size in ("1B", "7B")},
  **{f"dpo/{size}": ("flops_share", 0.35) for size in _SIZES},
  **{f"decode/{size}": ("bytes_share", 0.70) for size in _SIZES},
}


class Worker:
  """A process that runs parts in order and says a JSON line after each."""

  def __init__(self, parts: Sequence[str], toy: bool):
    peers = parts[0].count("/") == 2
    memory = (
      {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
      if peers
      else {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    )
    self._errors = tempfile.TemporaryFile("w+")
    command = [*_COMMAND, *(["--toy"] if toy else []), *parts]
    self._process = subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=self._errors, text=True, env={**memory, **os.environ}
    )
    self._lines = queue.Queue()
    threading.Thread(target=self._read, daemon=True).start()

  def _read(self) -> None:
    for line in self._process.stdout:
      if line.startswith('{"part"'):
        self._lines.put(json.loads(line))
    self._lines.put(None)

  def next(self, seconds: float) -> dict:
    """What the next part says within so many seconds; else why it says nothing, after which the
    process is gone.
    """
    try:
      found = self._lines.get(timeout=seconds)
    except queue.Empty:
      self.close()
      return {"failed": f"it was stopped after {seconds:.0f} s"}
    if found is not None:
      return found
    status = self._process.wait()
    self._errors.seek(0)
    last = [line.strip() for line in self._errors if line.strip()][-1:]
    return {"failed": f"its process ended with status {status}: {' '.join(last)[:400]}"}

  def close(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.wait()


def _shares(result: dict, device: dict) -> dict:
  """The result with its shares of the device's peaks; where these are not published, of what a
  product and a copy reached.
  """
  for what, peaks in {
    "flops": ("peak_flops", "product_flops"),
    "bytes": ("peak_bytes", "copy_bytes"),
  }.items():
    peak = next((device[name] for name in peaks if device.get(name)), None)
    if f"{what}_per_s" in result and peak:
      result[f"{what}_share"] = result[f"{what}_per_s"] / peak
  return result


def run(parts: Sequence[str], *, seconds: float, toy: bool, out: pathlib.Path | None) -> dict:
  """Runs parts by name and returns what is written to `out`: goals, seconds, and each part's
  figures or failure.
  """
  start, found = time.monotonic(), {}
  report = {"toy": toy, "goals": GOALS, "parts": found}

  def note(part: str, result: dict) -> None:
    found[part] = _shares(
      {name: value for name, value in result.items() if name != "part"}, found.get("device", {})
    )
    report["seconds"] = time.monotonic() - start
    print(f"{part}: {summary(found[part])}", file=sys.stderr, flush=True)
    if out:
      draft = out.with_name(f"{out.name}.tmp")
      draft.write_text(json.dumps(report, indent=1) + "\n")
      draft.replace(out)

  for _, group in itertools.groupby(parts, key=lambda part: part.count("/") == 2):
    waiting = list(group)
    while waiting:
      worker, allowance = Worker(waiting, toy), _START
      try:
        while waiting:
          left = seconds - (time.monotonic() - start)
          if left <= 0:
            note(waiting.pop(0), {"failed": f"no time was left of {seconds:.0f} s"})
            continue
          most = (PARTS[waiting[0]] + allowance) * seconds / _SECONDS
          result, allowance = worker.next(min(most, left)), 0.0
          note(waiting.pop(0), result)
          if "part" not in result:
            break
      finally:
        worker.close()
  return report


def summary(result: dict) -> str:
  """A part's figures in a few words."""
  if "failed" in result:
    return f"failed: {result['failed']}"
  words = [f"{result['layers']} layers, {result['size']}"] if "layers" in result else []
  if "tokens_per_s" in result:
    words.append(f"{result['tokens_per_s']:,.0f} tokens/s")
  words += [
    f"{100 * result[f'{what}_share']:.0f} % of peak {name}"
    for what, name in (("flops", "FLOP/s"), ("bytes", "bandwidth"))
    if f"{what}_share" in result
  ]
  if "ratio" in result:
    words.append(f"fused {result['ratio']:.2f}x dense at {result['tokens']} tokens, at least")
  if "kind" in result:
    words.append(
      f"{result['kind']}, {result['product_flops'] / 1e12:.3g} TFLOP/s, "
      f"{result['copy_bytes'] / 1e9:.4g} GB/s"
    )
  if "holds" in result:
    words.append("numbers hold" if result["holds"] else f"NUMBERS DIFFER: {json.dumps(result)}")
  return ", ".join(words)


def table(report: dict) -> str:
  """The report in Markdown: what was seen, the goal, and what others do on the same device."""
  parts = report["parts"]
  lines = ["| part | seen | goal on an H200 | others |", "|---|---|---|---|"]
  for part, result in parts.items():
    if part.count("/") == 2:
      continue
    goal, met = "", ""
    if part in report["goals"]:
      what, least = report["goals"][part]
      goal = (
        f"{100 * least:.0f} %"
        if what.endswith("share")
        else f"{least:,.0f} tokens/s"
        if least > 100
        else f"{least}x"
      )
      met = "" if what not in result else ": met" if result[what] >= least else ": missed"
    others = []
    for name, other in parts.items():
      if name.endswith(f"/{part}"):
        ratio = (
          result["tokens_per_s"] / other["tokens_per_s"]
          if "tokens_per_s" in result and "tokens_per_s" in other
          else 0
        )
        others.append(
          f"{name.split('/')[0]} {summary(other)}" + (f" (ours {ratio:.2f}x)" if ratio else "")
        )
    lines.append(f"| {part} | {summary(result)} | {goal}{met} | {'; '.join(others)} |")
  return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
  """Returns 0 if numbers hold and no part of ours failed."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--toy", action="store_true", help="tiny shapes: a rehearsal on any machine")
  parser.add_argument("--seconds", type=float, default=_SECONDS, help="for all parts together")
  parser.add_argument("--parts", default=",".join(PARTS), help="some of them, by name")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("accelerator_check.json"))
  given = parser.parse_args(arguments)
  parts = given.parts.split(",")
  if unknown := set(parts) - set(PARTS):
    parser.error(f"--parts: {', '.join(sorted(unknown))} unknown; there are {', '.join(PARTS)}")
  given.out.parent.mkdir(parents=True, exist_ok=True)
  report = run(parts, seconds=given.seconds, toy=given.toy, out=given.out)
  print(table(report))
  print(f"{report['seconds']:.0f} s; figures in {given.out}")
  ours = [result for part, result in report["parts"].items() if part.count("/") < 2]
  return int(any("failed" in result or not result.get("holds", True) for result in ours))


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
