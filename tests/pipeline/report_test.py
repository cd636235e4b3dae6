"""The report has the right numbers, escapes model output, needs no network, and renders."""

import dataclasses
import html.parser
import importlib.util
import json
import string

import numpy as np
import pytest
import tokenizers
import transformers
from etils import epath
from matplotlib import image
from tokenizers import decoders, models, pre_tokenizers

from synthneg_jax.data.records import Pair, Problem, Shards, StepEstimate, Trace
from synthneg_jax.data.token_text import TokenText, step_ends
from synthneg_jax.pipeline import report
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.report import report_page, trace_cards
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError
from tests import browser as browser_lib

HOSTILE = (
  '</span><script>document.title = "owned"</script><img src="https://evil.example/x.png" '
  "onerror=alert(1)>"
)


class _Page(html.parser.HTMLParser):
  """Collects tags, attributes and text."""

  def __init__(self, text: str):
    super().__init__()
    self.tags, self.attributes, self.text = [], [], ""
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(tag, name, value or "") for name, value in attrs]

  def handle_data(self, data):
    self.text += data


def _hand_made() -> report_page.Report:
  def step(text, right, q, a):
    return trace_cards.Step(text, 4, right, (0.1, 0.9), q, a, False)

  last = trace_cards.Step(f" #### 5{HOSTILE}", 0, 0, None, 0.0, -0.25, True)
  trace = trace_cards.ShownTrace(
    "t/0/sample/1",
    f"What is 2 + 3?{HOSTILE}",
    "5",
    HOSTILE,
    "wrong",
    2,
    4,
    0.5,
    [step("two and three", 3, 0.75, 0.25), step(HOSTILE, 1, 0.25, -0.5), last],
    1,
    HOSTILE,
  )
  states = [
    report_page.StageState("sft", "done", {"seconds": 3.5, "steps": 12345, "loss/per_token": 0.25}),
    report_page.StageState("credit", "begun", {}),
    report_page.StageState("dpo/dpo", "not begun", {}),
  ]
  return report_page.Report(
    title="Toy",
    methods=[report_page.Method("SFT", 0.4, 0.3, 0.5, 100), report_page.Method("RFT")],
    values=report_page.MeanValues(
      [0.5, 0.25, 0.0], [3, 2, 0], 0.6, 2, [-0.1, 0.25, 0.0], [3, 2, 0]
    ),
    pits=[1, 0, -1],
    traces=[trace],
    reasons={"SFT, test": {"right": 60, "wrong": 40}},
    stages=states,
    training={
      "sft": (
        "SFT",
        [{"step": n, "loss/per_token": 1 / (n + 1), "grad_norm": 2.0} for n in range(60)],
      )
    },
    config={"seed": 0, "model.path": HOSTILE},
    changed=["model.path"],
    versions={"jax": "1"},
    commits=["abc+"],
    devices=["cpu"],
    command="python x.py",
    num_rollouts=4,
    best_of=1,
    pit_rule="lowest_value",
    pair_mode="shared_prefix",
  )


def _unfinished(contents: report_page.Report) -> report_page.Report:
  states = [report_page.StageState(stage.name, "begun", {}) for stage in contents.stages[1:]]
  rest = {
    "values": None,
    "pits": None,
    "traces": None,
    "reasons": {},
    "training": {},
    "stages": states,
  }
  return dataclasses.replace(contents, methods=[report_page.Method("SFT")], **rest)


def test_what_a_model_wrote_is_escaped(tmp_path):
  page = _Page(report_page.write(_hand_made(), tmp_path).read_text())
  assert "script" not in page.tags and "img" not in page.tags
  assert page.text.count(HOSTILE) == 6  # problem, answer, two steps, preferred, config


@pytest.mark.parametrize("change", [lambda contents: contents, _unfinished])
def test_no_resource_is_fetched(tmp_path, change):
  text = report_page.write(change(_hand_made()), tmp_path).read_text()
  page = _Page(text)
  loads = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
  assert all(
    value.startswith(("#", "traces.html")) for _, name, value in page.attributes if name in loads
  )
  assert not any(
    "traces.html" in value for tag, _, value in page.attributes if tag != "a"
  )  # a link, not a resource
  assert not {"link", "iframe", "object", "script", "img"} & set(page.tags)
  assert not any(
    "http:" in value or "https:" in value or "url(h" in value for _, _, value in page.attributes
  )
  assert "@import" not in text
  assert "//" not in text.replace(
    "https://evil.example", ""
  )  # the only address occurs in the text of a trace
  ids = [value for _, name, value in page.attributes if name == "id"]
  assert len(ids) == len(set(ids))


def test_unfinished_parts_are_said(tmp_path):
  text = _Page(report_page.write(_unfinished(_hand_made()), tmp_path).read_text()).text
  for sentence in (
    "Not finished yet: credit, dpo/dpo.",
    "No policy has been trained yet",
    "No stage is done yet",
    "Stage evaluate is not done",
    "Stage credit is not done",
    "No response has been graded yet",
    "begun, not finished",
  ):
    assert sentence in text, sentence
  assert not list(tmp_path.glob("*.png"))


def test_figures_are_kept_as_png_and_csv_and_repeat(tmp_path):
  first = report_page.write(_hand_made(), tmp_path / "a").read_text()
  assert report_page.write(_hand_made(), tmp_path / "b").read_text() == first
  for name in ("errors", "mean_q", "mean_advantage", "pits", "training_sft", "time"):
    assert (tmp_path / "a" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  assert (tmp_path / "a" / "errors.csv").read_text().splitlines()[1] == "SFT,0.4,0.3,0.5,100"
  assert (
    tmp_path / "a" / "mean_q.csv"
  ).read_text() == "step,mean_q,traces\n0,0.6,3\n1,0.5,3\n2,0.25,2\n3,,0\n"
  assert (
    tmp_path / "a" / "mean_advantage.csv"
  ).read_text() == "step,mean_advantage,traces\n1,-0.1,3\n2,0.25,2\n3,,0\n"
  assert (tmp_path / "a" / "training_sft.csv").read_text().splitlines()[:3] == [
    "step,loss/per_token,grad_norm",
    "0,1.0,2.0",
    "1,0.5,2.0",
  ]
  assert (
    tmp_path / "a" / "time.csv"
  ).read_text() == "stage,seconds,responses_drawn,tokens_drawn\nsft,3.5,,\n"
  assert (tmp_path / "a" / "pits.csv").read_text() == "step,traces\n1,1\n2,1\n3,0\nnone,1\n"


def test_step_shows_its_credit(tmp_path):
  text = _Page(report_page.write(_hand_made(), tmp_path).read_text()).text
  assert "Q 3/4 = 0.75 (0.10 – 0.90), advantage +0.25" in text
  assert "Q 1/4 = 0.25 (0.10 – 0.90), advantage −0.50 ◀ pit" in text
  assert "Q = 0, the verdict" in text
  best = _Page(
    report_page.write(dataclasses.replace(_hand_made(), best_of=2), tmp_path).read_text()
  ).text
  assert "right 1/4 = 0.25 (0.10 – 0.90), Q 0.25" in best and "under Best-of-2" in best


def test_numbers_are_not_rounded_into_falsehoods(tmp_path):
  contents = _hand_made()
  (trace,) = contents.traces
  still = dataclasses.replace(trace.steps[0], advantage=-0.001)
  trace = dataclasses.replace(
    trace, v0=0.125, right_samples=1, samples=8, steps=[still, *trace.steps[1:]]
  )
  contents = dataclasses.replace(
    contents, traces=[trace], pits=[1, 0, 2], reasons={"x": {"right": 3999, "unparsable": 1}}
  )
  text = _Page(report_page.write(contents, tmp_path).read_text()).text
  assert "1 of 8 samples of the problem are right (value 0.125)" in text
  assert "(0.10 – 0.90), advantage 0.00" in text and "−0.00" not in text
  assert "1 < 0.1" in text and "1 0.0" not in text
  assert "the rule finds one in every trace" in text and "in none of them" not in text


# The workdir: two problems with four samples each. Steps are lines, and the last one states the
# answer.
_RIGHT = " A: X= 2 + Y= 3 A= 5\n #### 5"
_WRONG = (" A: X= 2 + Y= 3 A= 6\n B: A= 6 + Y= 3 B= 9\n #### 9", " A: X= 2 + Y= 3 A= 7\n #### 7")
_SUCCESSES = {
  "p0/sample/2": (3, 1),
  "p0/sample/3": (1,),
  "p1/sample/3": (2, 0),
}  # of 4 rollouts, but for the last step


def _stage(workdir, name, figures=None, config=None):
  (workdir / name).mkdir(parents=True, exist_ok=True)
  (workdir / name / "begun.json").write_text(json.dumps({"config": config or {}, "inputs": {}}))
  if figures is not None:
    (workdir / name / "manifest.json").write_text(
      json.dumps(
        {
          "figures": {"seconds": 1.5, **figures},
          "files": {},
          "versions": {"jax": "9.9"},
          "git_commit": "abc123",
        }
      )
    )


@pytest.fixture(name="experiment")
def _run(tmp_path) -> Experiment:
  """A workdir in which only credit, its inputs and the evaluation of sft are done."""
  workdir = epath.Path(tmp_path / "run")
  config = config_schema.default()
  config.credit.num_rollouts, config.credit.best_of, config.report.num_traces = 4, 1, 2
  config.pairs.pit_rule = "lowest_value"
  letters = tokenizers.Tokenizer(
    models.WordLevel({c: i for i, c in enumerate(["<eos>", *string.printable])}, "<eos>")
  )
  letters.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
  letters.decoder = decoders.Fuse()
  transformers.PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>").save_pretrained(
    str(workdir / "sft" / "policy")
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(str(workdir / "sft" / "policy"))
  token_text = TokenText(tokenizer)

  def trace(problem, index, text):
    ids = tokenizer.encode(text) + [tokenizer.eos_token_id]
    return Trace(
      f"{problem}/sample/{index}",
      problem,
      index,
      ids,
      step_ends(ids, token_text),
      text,
      text == _RIGHT,
      "right" if text == _RIGHT else "wrong",
      text[-1],
      "eos",
      [0.0] * len(ids),
      [0.0] * len(ids),
      "f" * 16,
    )

  traces = [
    trace("p0", 0, _RIGHT),
    trace("p0", 1, _RIGHT),
    trace("p0", 2, _WRONG[0]),
    trace("p0", 3, _WRONG[1]),
    trace("p1", 0, _RIGHT),
    trace("p1", 1, _RIGHT),
    trace("p1", 2, _RIGHT),
    trace("p1", 3, _WRONG[0]),
  ]
  estimates = []
  for trace in traces:
    if trace.correct:
      continue
    for step, end in enumerate(trace.step_ends):
      exact = step == len(trace.step_ends) - 1
      right = 0 if exact else _SUCCESSES[trace.id][step]
      estimates.append(
        StepEstimate(
          trace.id,
          trace.problem_id,
          step,
          end,
          0 if exact else 4,
          right,
          exact,
          False,
          [],
          f"{trace.id}/{step}",
        )
      )
  Shards(workdir / "synthesize" / "train", Problem).write(
    [Problem(key, f" Y= 3 X= 2 ? A={HOSTILE}\n", _RIGHT, "5", "hand") for key in ("p0", "p1")]
  )
  Shards(workdir / "sample" / "traces", Trace).write(traces)
  Shards(workdir / "credit" / "estimates", StepEstimate).write(estimates)
  _stage(workdir, "synthesize", {"train": 2})
  _stage(workdir, "sft", {"steps": 7})
  (workdir / "sft" / "metrics.jsonl").write_text(
    '{"step": 0, "loss/per_token": 0.5}\n{"step": 1, "loss/per_'
  )  # it was cut
  _stage(workdir, "sample", {"traces": 8, "tokens": 400, "reasons": {"right": 5, "wrong": 3}})
  drawn = {"traces": 3, "steps": 8, "rollouts": 20, "rollout_tokens": 100}
  _stage(workdir, "credit", drawn, {"credit.best_of": 1})
  _stage(workdir, "dpo/dpo")
  _stage(
    workdir,
    "evaluate/sft",
    {
      "test_error": 0.25,
      "ci95": [0.1, 0.5],
      "num_problems": 16,
      "reasons": {"right": 12, "wrong": 3, "truncated": 1},
      "mean_tokens": 30.0,
    },
  )
  return Experiment(config, workdir, None)


def test_stage_from_a_workdir(experiment):
  path = epath.Path(report.run(experiment)["path"])
  assert path == experiment.workdir / "report" / "index.html"
  lines = (path.parent / "mean_q.csv").read_text().splitlines()[1:]
  # V: 2/4, 2/4, 3/4. Step 1: 3/4, 1/4, 2/4. Step 2: 1/4, the last step of the second trace, 0/4.
  # Step 3: two last ones.
  expected = [(0, 7 / 12, 3), (1, 0.5, 3), (2, 1 / 12, 3), (3, 0.0, 2)]
  np.testing.assert_allclose(
    [[float(cell) for cell in line.split(",")] for line in lines], expected, atol=1e-6
  )
  # Their advantages by trace: 1/4, -2/4, -1/4; then -1/4, -1/4; then -1/4, -2/4, 0.
  lines = (path.parent / "mean_advantage.csv").read_text().splitlines()[1:]
  expected = [(1, -1 / 12, 3), (2, -5 / 12, 3), (3, -1 / 8, 2)]
  np.testing.assert_allclose(
    [[float(cell) for cell in line.split(",")] for line in lines], expected, atol=1e-6
  )
  assert (path.parent / "training_sft.csv").read_text() == "step,loss/per_token\n0,0.5\n"
  # Steps that first reach the lowest Q: the third, the second and the second.
  assert (path.parent / "pits.csv").read_text() == "step,traces\n1,0\n2,2\n3,1\nnone,0\n"
  page = _Page(path.read_text())
  text = page.text
  assert "script" not in page.tags and HOSTILE in text
  assert (
    "p0/sample/2" in text and "p1/sample/3" in text and "p0/sample/3" not in text
  )  # one a problem
  assert "1. A: X= 2 + Y= 3 A= 6" in text
  assert (
    "Q 3/4 = 0.75 (0.30 – 0.95), advantage +0.25" in text
  )  # V is 2/4; Wilson's interval of 3 in 4
  assert "2 of 4 samples of the problem are right (value 0.50)" in text
  assert (
    "Not finished yet: rft, pairs/dpo, pairs/step_dpo, dpo/dpo, dpo/step_dpo, evaluate/base" in text
  )
  seconds = [
    float(line.split(",")[1] or 0)
    for line in (path.parent / "time.csv").read_text().splitlines()[1:]
  ]
  assert len(seconds) > 2 and f"all{sum(seconds):.1f}" in text
  assert "25.0 %" in text and "10.0 – 50.0 %" in text and "cut off at the length limit" in text
  assert "would be 20; 20 were drawn" in text and "Seed 0" in text
  assert "abc123" in text and "jax 9.9" in text


def test_stage_shows_the_preferred_branch(experiment):
  tokenizer = transformers.AutoTokenizer.from_pretrained(str(experiment.workdir / "sft" / "policy"))
  chosen = tokenizer.encode(" A: X= 2 + Y= 3 A= 5\n")
  Shards(experiment.workdir / "pairs" / "step_dpo" / "pairs", Pair).write(
    [Pair("a", "p1", "p1/sample/3", [1], chosen, [2], "shared_prefix", 1, 0.0)]
  )
  _stage(experiment.workdir, "pairs/step_dpo", {"pairs": 1})
  text = _Page(epath.Path(report.run(experiment)["path"]).read_text()).text
  assert text.count("The per-step pair prefers") == 1 and "A: X= 2 + Y= 3 A= 5" in text
  assert text.count("This trace gave no per-step pair") == 1  # p0/sample/2 has a pit and no pair


def test_stage_in_an_empty_workdir(tmp_path):
  path = report.run(Experiment(config_schema.default(), epath.Path(tmp_path), None))["path"]
  text = _Page(epath.Path(path).read_text()).text
  assert (
    "Not finished yet: synthesize, sft, sample, rft, credit" in text
    and "Stage credit is not done" in text
  )


def test_stage_refuses_another_config(experiment):
  experiment.config.credit.best_of = 5
  with pytest.raises(UserError, match="credit.best_of=1, now it is 5"):
    report.run(experiment)


def test_config_beside_the_page_gives_the_config(experiment):
  experiment.config.engine.stop = ("\n\n", 'a"b')
  experiment.config.sft.num_epochs = 2
  report.run(experiment)
  spec = importlib.util.spec_from_file_location("kept", experiment.workdir / "report" / "config.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert module.get_config() == experiment.config


@pytest.mark.browser
@pytest.mark.parametrize("width, dark", [(390, True), (1440, False)])
def test_renders_in_a_browser(experiment, tmp_path, width, dark):
  page = report.run(experiment)["path"]
  browser = browser_lib.Browser()
  try:
    browser.size(width, 900, dark)
    browser.open(page)
    title = browser.js("document.title")
    assert (
      title == "Learning from wrong solutions: arithmetic"
    )  # no script of a trace has changed it
    assert browser.js("document.querySelectorAll('svg').length") == 6
    assert "◀ pit" in browser.js("document.body.innerText")
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.requests == [] and browser.complaints == []
    browser.screenshot(tmp_path / "shot.png")
  finally:
    browser.close()
  pixels = image.imread(str(tmp_path / "shot.png"))
  assert pixels.shape[1] == width and pixels.std() > 0.02  # something is drawn
  assert (np.median(pixels[..., :3]) < 0.3) == dark
