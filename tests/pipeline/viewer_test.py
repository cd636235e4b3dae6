"""Contents of the trace viewer for a workdir: credit, rollouts, pairs with margins, and limits."""

import dataclasses
import json
import re

import numpy as np
import pytest
import transformers
from etils import epath

from synthneg_jax.data.records import Pair, Shards, StepEstimate, Trace
from synthneg_jax.pipeline import report, viewer
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.training import reference
from tests.pipeline import report_test

experiment = (
  report_test._run
)  # the fixture: two problems of four samples, three of them wrong and credited


def _data(experiment, name):
  text = (experiment.workdir / "report" / "traces.html").read_text()
  return json.loads(
    re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text).group(1)
  )


def _traces(experiment):
  """Trace id -> (row of the index, steps, credit, rollouts, pairs)."""
  index, shown, n = _data(experiment, "index"), {}, 0
  for number in range(len(index["starts"])):
    for texts, details in zip(
      _data(experiment, f"texts-{number}"), _data(experiment, f"details-{number}"), strict=True
    ):
      for (key, steps, _, _, credit), detail in zip(texts[7], details, strict=True):
        row = {name: column[n] for name, column in index["columns"].items()}
        shown[key] = row, steps, credit, *(detail or ([], []))
        n += 1
  assert n == len(index["columns"]["pit"])
  return shown


def test_credit_of_a_workdir(experiment):
  # Fails if counts, Q, advantages or pits belong to another step or trace. The numbers equal those
  # of report_test.
  assert viewer.run(experiment) == {"path": str(experiment.workdir / "report" / "traces.html")}
  traces = _traces(experiment)
  assert len(traces) == 8 and _data(experiment, "index")["total"] == 8
  row, steps, credit, _, _ = traces["p0/sample/2"]
  assert steps == [" A: X= 2 + Y= 3 A= 6\n", " B: A= 6 + Y= 3 B= 9\n", " #### 9"]
  np.testing.assert_allclose(
    credit[0], [4, 3, 0.301, 0.954, 0.75, 0.25, 0], atol=1e-3
  )  # V is 2/4; Wilson's interval
  np.testing.assert_allclose(credit[1][4:], [0.25, -0.5, 0])
  assert credit[2] == [0, 0, None, None, 0.0, -0.25, 1]
  assert row["pit"] == 2 and row["drop"] == -500
  assert traces["p1/sample/3"][0]["pit"] == 1 and traces["p0/sample/3"][0]["pit"] == 1
  row, steps, credit, *_ = traces["p0/sample/0"]
  assert credit is None and row["pit"] == -1 and "".join(steps) == report_test._RIGHT


def test_steps_that_a_schedule_left_out(experiment):
  # Fails if a step gets an advantage although its Q, or the Q before it, is unknown.
  folder = experiment.workdir / "credit" / "estimates"
  left_out = {"rollouts": 0, "successes": 0, "samples": []}
  estimates = [
    dataclasses.replace(e, **left_out if e.key == "p0/sample/2/0" else {})
    for e in Shards(folder, StepEstimate).read()
  ]
  (folder / "00000.jsonl").unlink()
  Shards(folder, StepEstimate).write(estimates)
  viewer.run(experiment)
  credit = _traces(experiment)["p0/sample/2"][2]
  assert credit[0] == [0, 0, None, None, None, None, 0] and credit[1][4:] == [0.25, None, 0]


def test_report_makes_the_viewer_too_and_pipeline_makes_it_alone(experiment):
  # Fails if index.html links to a page that does not exist.
  report.run(experiment)
  page = (experiment.workdir / "report" / "index.html").read_text()
  assert 'href="traces.html"' in page and 'href="traces.html#trace=p0%2Fsample%2F2"' in page
  assert "p0/sample/2" in _traces(experiment)


def test_rollouts_are_counted_once_and_bounded(experiment):
  # Fails if equal rollouts are listed twice, if a shared prefix has none, or if the limit of the
  # config is ignored.
  tokenizer = transformers.AutoTokenizer.from_pretrained(str(experiment.workdir / "sft" / "policy"))

  def sample(text, right):
    return {
      "ids": tokenizer.encode(text),
      "correct": right,
      "reason": "right" if right else "wrong",
    }

  drawn = [
    sample(" #### 5", True),
    sample(" #### 6", False),
    sample(" #### 5", True),
    sample(" #### 8", False),
  ]
  folder = experiment.workdir / "credit" / "estimates"
  estimates = [
    dataclasses.replace(
      e,
      samples=drawn if e.key == "p0/sample/2/0" else [],
      samples_at="p0/sample/2/0" if e.key == "p0/sample/3/0" else e.samples_at,
    )
    for e in Shards(folder, StepEstimate).read()
  ]
  (folder / "00000.jsonl").unlink()
  Shards(folder, StepEstimate).write(estimates)
  experiment.config.report.max_rollouts = 2
  viewer.run(experiment)
  expected = [[" #### 5", 1, "right", 2], [" #### 6", 0, "wrong", 1]]
  traces = _traces(experiment)
  assert traces["p0/sample/2"][3] == [expected, [], []] and traces["p0/sample/3"][3] == [
    expected,
    [],
  ]


def test_pairs_have_their_margins(experiment):
  # Fails if before and after, or chosen and rejected, are swapped, or if a pair without scores
  # breaks the page.
  tokenizer = transformers.AutoTokenizer.from_pretrained(str(experiment.workdir / "sft" / "policy"))
  encode = tokenizer.encode
  trunk = encode("P A: X= 2 + Y= 3 A= 6\n")
  scored = Pair(
    "a", "p0", "p0/sample/2", trunk, encode(" good\n"), encode(" bad\n"), "shared_prefix", 1, 0.125
  )
  alone = dataclasses.replace(scored, id="b", chosen=encode(" too long\n"))
  Shards(experiment.workdir / "pairs" / "step_dpo" / "pairs", Pair).write([scored, alone])
  report_test._stage(experiment.workdir, "pairs/step_dpo", {"pairs": 2})
  whole = dataclasses.replace(scored, id="c", pair_mode="arbitrary", pit=-1, p_flipped=0.0)
  Shards(experiment.workdir / "pairs" / "dpo" / "pairs", Pair).write([whole])
  report_test._stage(experiment.workdir, "pairs/dpo", {"pairs": 1})
  for stage, fingerprint in (("sft", "f" * 16), ("dpo/step_dpo", "e" * 16), ("dpo/dpo", "d" * 16)):
    folder = experiment.workdir / stage / "policy"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fingerprint.json").write_text(json.dumps({"fingerprint": fingerprint}))

  def key(ids):
    return reference.branch_key(trunk, len(trunk), ids)

  def values(*each):
    return np.array(each, np.float32)

  reference.Store(experiment.workdir / "dpo" / "reference" / f"{'f' * 16}-float32.npz").add(
    {key(scored.chosen): values(-1, -2), key(scored.rejected): values(-0.5, -0.25)}
  )
  reference.Store(
    experiment.workdir / "dpo" / "step_dpo" / "scores" / f"{'e' * 16}-float32.npz"
  ).add({key(scored.chosen): values(-1, -1), key(scored.rejected): values(-4, -1)})
  viewer.run(experiment)
  row, *_, pairs = _traces(experiment)["p0/sample/2"]
  branches = [" A: X= 2 + Y= 3 A= 6\n", " good\n", " bad\n"]
  old, *pairs = pairs
  assert old == [
    "dpo",
    "arbitrary",
    -1,
    "",
    *branches[1:],
    0.0,
    None,
    None,
  ]  # trained without stored scores
  assert pairs[0] == ["step_dpo", "shared_prefix", 1, *branches, 0.125, [-3.0, -2.0], [-0.75, -5.0]]
  assert pairs[1][4] == " too long\n" and pairs[1][7:] == [None, None]
  assert row["flags"] & 16 and not _traces(experiment)["p0/sample/3"][0]["flags"] & 16


def test_policies_on_one_problem(experiment):
  # Fails if two policies' responses, whose records share an id, are merged, or the base model
  # counts as a policy.
  sample = next(Shards(experiment.workdir / "sample" / "traces", Trace).read())
  (experiment.workdir / "synthesize" / "test").mkdir()
  problem = json.loads(
    (experiment.workdir / "synthesize" / "train" / "00000.jsonl").read_text().splitlines()[0]
  )
  (experiment.workdir / "synthesize" / "test" / "00000.jsonl").write_text(
    json.dumps(problem | {"id": "t0"}) + "\n"
  )
  done = {
    "test_error": 0.5,
    "ci95": [0.0, 1.0],
    "num_problems": 1,
    "reasons": {},
    "mean_tokens": 1.0,
  }

  def answer(reason):
    return dataclasses.replace(
      sample, id="t0/evaluate/0", problem_id="t0", correct=reason == "right", reason=reason
    )

  for method, reason in (("base", "wrong"), ("sft", "right"), ("rft", "right")):
    report_test._stage(experiment.workdir, f"evaluate/{method}", done)
    Shards(experiment.workdir / "evaluate" / method / "traces", Trace).write([answer(reason)])
  viewer.run(experiment)
  traces = _traces(experiment)
  assert {f"t0/evaluate/0@{method}" for method in ("base", "sft", "rft")} < set(traces)
  assert not any(row["flags"] & 8 for row, *_ in traces.values())
  report_test._stage(experiment.workdir, "evaluate/step_dpo", done)
  Shards(experiment.workdir / "evaluate" / "step_dpo" / "traces", Trace).write([answer("wrong")])
  viewer.run(experiment)
  differ = {key for key, (row, *_) in _traces(experiment).items() if row["flags"] & 8}
  assert differ == {f"t0/evaluate/0@{method}" for method in ("sft", "rft", "step_dpo")}


def test_spurious_step_of_a_right_trace(experiment):
  # Fails if right traces get pits, or their spurious step is missing.
  folder = experiment.workdir / "credit" / "estimates"
  estimates = [StepEstimate("p0/sample/0", "p0", 0, 20, 4, 1, False, False, [], "p0/sample/0/0")]
  estimates.append(StepEstimate("p0/sample/0", "p0", 1, 27, 0, 0, True, True, [], "p0/sample/0/1"))
  Shards(folder, StepEstimate).write(estimates)
  viewer.run(experiment)
  row, _, credit, *_ = _traces(experiment)["p0/sample/0"]
  assert row["spurious"] == 0 and row["pit"] == -1  # 1/4 after it, 2/4 before
  assert row["flags"] & 4 and [step[5] for step in credit] == [-0.25, 0.75]


def test_more_traces_than_asked_for(experiment):
  # Fails if the limit is exceeded, or a problem is split.
  experiment.config.report.max_traces = 5
  viewer.run(experiment)
  assert len(_traces(experiment)) == 4 and _data(experiment, "index")["total"] == 8


def test_no_traces_and_no_tokenizer(experiment, tmp_path):
  # Fails if an empty workdir is an error, or a missing tokenizer raises a traceback.
  empty = dataclasses.replace(experiment, workdir=epath.Path(tmp_path / "empty"))
  viewer.run(empty)
  assert _data(empty, "index")["columns"]["pit"] == []
  for path in (experiment.workdir / "sft" / "policy").iterdir():
    path.unlink()
  with pytest.raises(UserError, match="has no tokenizer"):
    viewer.run(experiment)
