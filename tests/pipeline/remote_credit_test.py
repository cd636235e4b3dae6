"""Rollouts from an HTTP server give the estimates of our own engine for the same samples."""

import dataclasses

import pytest
from absl.testing import absltest, parameterized

from synthneg_jax.data.records import Problem, Shards, StepEstimate, Trace
from synthneg_jax.decoding import remote
from synthneg_jax.pipeline import credit, pairs, train_policy
from synthneg_jax.runtime import keys
from synthneg_jax.runtime.errors import UserError
from tests.openai_server import Server
from tests.pipeline import small_run

pytestmark = pytest.mark.slow  # trains


def estimates(workdir) -> list[StepEstimate]:
  return list(Shards(workdir / "credit/estimates", StepEstimate).read())


class _Policy:
  """The rollouts of our own engine by prompt and seed: the model behind the server."""

  def __init__(self):
    experiment = small_run.opened(small_run.finished())
    self.policy = experiment.policy("sft")
    traces = {t.id: t for t in Shards(experiment.workdir / "sample/traces", Trace).read()}
    problems = {p.id: p for p in Shards(experiment.workdir / "synthesize/train", Problem).read()}
    self.known = {}
    for estimate in estimates(experiment.workdir):
      prefix = traces[estimate.trace_id].ids[: estimate.prefix_end]
      prompt = (
        train_policy.prompt_ids(experiment, self.policy.tokenizer, problems[estimate.problem_id])
        + prefix
      )
      for index, sample in enumerate(estimate.samples):
        key = keys.draw_key(
          experiment.config.seed, "credit", 0, estimate.problem_id, keys.hash_ids(prefix), index
        )
        self.known[tuple(prompt), remote.seed_of(key)] = sample

  def sample(self, body: dict) -> dict:
    prompt = body["prompt"]
    if isinstance(prompt, str):
      prompt = self.policy.tokenizer.encode(prompt, add_special_tokens=False)
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.8, 1.0, 72)
    return self.known[tuple(prompt), body["seed"]]

  def like_vllm(self, body: dict) -> list[dict]:
    """Ids and log-probs, including EOS; the text without EOS."""
    assert body["return_token_ids"]
    sample = self.sample(body)
    ids, first = sample["ids"], self.first(sample["ids"])
    # Log-probs that sum to those of the record: the first token has all of the first step, the last
    # token has the rest.
    logprobs = [0.0] * len(ids)
    logprobs[0] += sample["step_logp"]
    logprobs[-1] += sample["logp"] - sample["step_logp"]
    if first == len(ids):
      logprobs = [sample["logp"], *[0.0] * (len(ids) - 1)]
    tokens = [self.policy.token_text.text([i], special=True) for i in ids]
    finish = "length" if sample["finish_reason"] == "length" else "stop"
    return [
      {
        "index": 0,
        "text": self.policy.token_text.text(ids),
        "finish_reason": finish,
        "stop_reason": None,
        "token_ids": ids,
        "prompt_token_ids": list(body["prompt"]),
        "logprobs": {
          "tokens": tokens,
          "token_logprobs": logprobs,
          "top_logprobs": [],
          "text_offset": [],
        },
      }
    ]

  def first(self, ids) -> int:
    from synthneg_jax.data.token_text import step_ends

    return step_ends(ids, self.policy.token_text)[0]

  def text_alone(self, body: dict) -> list[dict]:
    """The minimal response that the protocol requires."""
    assert isinstance(body["prompt"], str) and "return_token_ids" not in body
    sample = self.sample(body)
    finish = "length" if sample["finish_reason"] == "length" else "stop"
    text = self.policy.token_text.text(sample["ids"])
    return [{"index": 0, "text": text, "finish_reason": finish, "logprobs": None}]


class RemoteCreditTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = _Policy()

  def run_credit(self, complete, faults=(), **changes):
    workdir = small_run.copied("synthesize", "sft", "sample")
    with Server(complete=complete) as server:
      server.faults = list(faults)
      changes = {
        "credit.endpoint.url": server.url,
        "credit.endpoint.model": "sft",
        "credit.endpoint.key_variable": "",
        "credit.endpoint.backoff_s": 0.01,
        "credit.endpoint.timeout_s": 2.0,
      } | changes
      experiment = small_run.opened(workdir, **changes)
      return experiment, credit.run(experiment), server

  def test_ids_there_and_back(self):
    # Fails if a fork, seed or count differs from our engine, if ids or log-probs change on the way,
    # or if a retried request leaves a gap.
    faults = ["503", "", "429:0.05", "", "stall", "401"[:0]]
    experiment, figures, server = self.run_credit(self.model.like_vllm, faults)
    ours = estimates(small_run.finished())
    for estimate, known in zip(estimates(experiment.workdir), ours, strict=True):
      for sample, drawn in zip(estimate.samples, known.samples, strict=True):
        for name in ("step_logp", "logp"):
          self.assertAlmostEqual(sample.pop(name), drawn[name], delta=2e-5)
        self.assertEqual(
          sample, {name: value for name, value in drawn.items() if not name.endswith("logp")}
        )

      def same(e):
        return dataclasses.replace(e, samples=[])

      self.assertEqual(same(estimate), same(known))
    self.assertEqual((figures["requests"], figures["retokenised"]), (figures["rollouts"], 0))
    self.assertLen(server.requests, figures["rollouts"] + 3)

  def test_text_alone(self):
    # Fails if EOS is not restored for a rollout that ended by itself, or log-probs are invented.
    experiment, figures, _ = self.run_credit(
      self.model.text_alone, **{"credit.send_token_ids": False}
    )
    ours = estimates(small_run.finished())
    for estimate, known in zip(estimates(experiment.workdir), ours, strict=True):
      self.assertEqual((estimate.successes, estimate.rollouts), (known.successes, known.rollouts))
      self.assertEqual([s["ids"] for s in estimate.samples], [s["ids"] for s in known.samples])
      self.assertTrue(all(sample["logp"] is None for sample in estimate.samples))
    self.assertEqual(figures["retokenised"], figures["rollouts"])
    built, _ = pairs.build(experiment, "shared_prefix")
    self.assertNotEmpty(built)
    experiment.config.pairs.choice = "most_likely"
    with self.assertRaisesRegex(UserError, "most_likely.*returned none"):
      pairs.build(experiment, "shared_prefix")

  def test_a_server_that_refuses_ids(self):
    # Fails if the run ends although text would work, or if a rollout that the server aborted
    # counts.
    def complete(body):
      assert isinstance(body["prompt"], str) and "return_token_ids" not in body
      return self.model.text_alone(body)

    _, figures, server = self.run_credit(
      complete, ["detail", "error", "abort"], **{"credit.endpoint.concurrency": 1}
    )
    self.assertEqual(figures["retokenised"], figures["rollouts"])
    self.assertLen(server.requests, figures["rollouts"] + 3)
    self.assertLen([body for body in server.bodies() if isinstance(body["prompt"], list)], 1)

  def test_a_schedule(self):
    # Fails if several rounds request other rollouts than one round: the first ones of each prefix
    # must be equal.
    changes = {"credit.schedule": "until_first_zero"}
    experiment, figures, _ = self.run_credit(self.model.like_vllm, **changes)
    drawn = 0
    for estimate, known in zip(
      estimates(experiment.workdir), estimates(small_run.finished()), strict=True
    ):
      ids = [sample["ids"] for sample in estimate.samples]
      self.assertEqual(ids, [sample["ids"] for sample in known.samples[: len(ids)]])
      drawn += len(ids)
    self.assertEqual(drawn, figures["requests"])
    self.assertLess(drawn, sum(len(known.samples) for known in estimates(small_run.finished())))

  def test_a_server_without_the_model(self):
    # Fails if the server's error message does not reach the user.
    with self.assertRaisesRegex(UserError, "answered 404"):
      self.run_credit(self.model.like_vllm, ["404"] * 64)


class GenerationTest(parameterized.TestCase):
  def generation(self, choice: dict, stop=()):
    from openai.types import CompletionChoice

    engine = remote.RemoteEngine.__new__(remote.RemoteEngine)
    pieces = {1: "a", 2: "b", 3: "."}
    ids_of = {piece: i for i, piece in pieces.items()}
    engine._stop = list(stop)
    engine._codec = remote.Codec(
      encode=lambda text: [ids_of[c] for c in text],
      decode=lambda ids: "".join(pieces.get(i, "") for i in ids),
      eos_ids=(0, 9),
    )
    return engine._generation(
      CompletionChoice.model_validate({"index": 0, "logprobs": None} | choice)
    )

  def test_ids_in_the_names_of_tokens(self):
    # Fails if ids in vLLM's older format are retokenised.
    logprobs = {"tokens": ["token_id:1", "token_id:0"], "token_logprobs": [-1.0, -0.5]}
    generation, retokenised = self.generation(
      {"text": "zzz", "finish_reason": "stop", "logprobs": logprobs}
    )
    self.assertEqual(
      (generation.ids.tolist(), generation.logp.tolist(), generation.finish_reason, retokenised),
      ([1, 0], [-1.0, -0.5], "eos", False),
    )

  @parameterized.parameters(
    ({"text": "a.", "finish_reason": "stop"}, ["."], [1, 3], "stop"),
    ({"text": "a", "finish_reason": "stop", "stop_reason": "."}, ["."], [1], "stop"),
    ({"text": "a", "finish_reason": "stop", "matched_stop": "."}, ["."], [1], "stop"),
    ({"text": "a", "finish_reason": "stop", "stop_reason": None}, ["."], [1, 0], "eos"),
    ({"text": "a", "finish_reason": "stop"}, ["."], [1], "stop"),
    ({"text": "a", "finish_reason": "stop"}, [], [1, 0], "eos"),
    ({"text": "a", "finish_reason": "length"}, [], [1], "length"),
    ({"text": "", "finish_reason": "stop", "token_ids": [0]}, [], [0], "eos"),
    ({"text": "ab", "finish_reason": "length", "token_ids": [2, 1]}, [], [2, 1], "length"),
    ({"text": "a", "finish_reason": "stop", "token_ids": [1, 9]}, [], [1, 9], "eos"),
  )
  def test_how_it_ended(self, choice, stop, ids, finish):
    # Fails if a stop string, or the length limit, is taken for EOS.
    generation, _ = self.generation(choice, stop)
    self.assertEqual((generation.ids.tolist(), generation.finish_reason), (ids, finish))

  def test_log_probs_of_other_tokens(self):
    # Fails if log-probs of other ids are kept.
    for tokens in (["ab"], ["a", "x"]):
      logprobs = {"tokens": tokens, "token_logprobs": [-1.0] * len(tokens)}
      generation, _ = self.generation(
        {"text": "ab", "finish_reason": "length", "logprobs": logprobs}
      )
      self.assertIsNone(generation.logp)
    logprobs = {"tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0]}
    generation, _ = self.generation({"text": "ab", "finish_reason": "length", "logprobs": logprobs})
    self.assertEqual(generation.logp.tolist(), [-1.0, -2.0])


if __name__ == "__main__":
  absltest.main()
