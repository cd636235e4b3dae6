"""The client against a real HTTP server that streams, stalls, rate-limits and breaks replies."""

import dataclasses
import json
import os
import pathlib
import tempfile
import threading
import time
from unittest import mock

import pytest
from absl import logging
from absl.testing import absltest, parameterized

from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.teacher.endpoint import Chat, Endpoint
from synthneg_jax.teacher.reply_cache import Budget, Prices, Request, Store
from tests.openai_server import Server

pytestmark = pytest.mark.slow  # waits for a server

KEY = "sk-very-secret-4711"
TEXT = "One two three four five six seven.\n#### 7"


def requests(count: int) -> list[Request]:
  return [
    Request("solution", "teacher", (("user", f"Problem {i}"),), 0, 0.7, 100) for i in range(count)
  ]


class EndpointTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.server = Server(lambda body: TEXT)
    self.addCleanup(self.server.close)
    self.folder = pathlib.Path(tempfile.mkdtemp())
    self.store = Store(self.folder)
    self.enterContext(mock.patch.dict(os.environ, {"TEACHER_KEY": KEY}))

  def chat(self, prices=(0.0, 0.0), budget=0.0, **changes) -> Chat:
    section = config_schema.default().synthesis
    section.endpoint.update(
      url=self.server.url,
      model="teacher",
      key_variable="TEACHER_KEY",
      timeout_s=5.0,
      backoff_s=0.01,
      attempts=4,
    )
    for name, value in changes.items():
      (section if name in section else section.endpoint)[name] = value
    self.budget = Budget(budget, self.store.spent())
    section.budget_usd = budget
    return Chat(Endpoint(section.endpoint), self.store, self.budget, Prices(*prices), section)

  @parameterized.product(stream=[True, False])
  def test_complete_reply(self, stream):
    # Fails if pieces of a stream are lost or doubled, usage is not requested, or the request is
    # wrong.
    ((request, reply),) = self.chat(stream=stream).generate(requests(1))
    self.assertEqual((reply.text, reply.finish, reply.counted), (TEXT, "stop", True))
    self.assertEqual((reply.prompt_tokens, reply.completion_tokens), (2, 9))
    body = self.server.bodies()[0]
    self.assertEqual(body["messages"], [{"role": "user", "content": "Problem 0"}])
    self.assertEqual(
      (body["temperature"], body["max_tokens"], body["seed"]), (0.7, 100, request.seed)
    )
    self.assertEqual(self.server.requests[0][1]["authorization"], f"Bearer {KEY}")

  @parameterized.product(
    stream=[True, False],
    fault=["503:0.01", "520:0.01", "524:0.01", "429:0.05", "stall", "broken_json", "die"],
  )
  def test_transient_faults_are_retried(self, stream, fault):
    # Fails if a fault ends the run, or an incomplete reply passes.
    self.server.faults = [fault, fault]
    timeout_s = 0.6 if fault == "stall" else 5.0
    replies = dict(self.chat(stream=stream, timeout_s=timeout_s).generate(requests(1)))
    self.assertEqual([reply.text for reply in replies.values()], [TEXT])
    self.assertLen(self.server.requests, 3)

  @parameterized.parameters(
    *(("stall_midway", True), ("cut", True), ("no_choices", False)),
    *((reason, stream) for reason in ("error", "abort") for stream in (True, False)),
  )
  def test_incomplete_replies_are_retried(self, fault, stream):
    # Fails if a truncated stream, a reply without choices, or one that the server aborted is kept.
    self.server.faults = [fault]
    timeout_s = 0.6 if fault == "stall_midway" else 5.0
    ((_, reply),) = self.chat(stream=stream, timeout_s=timeout_s).generate(requests(1))
    self.assertEqual((reply.text, len(self.server.requests)), (TEXT, 2))

  @parameterized.parameters("429:1.0", "503:1.0")
  def test_retry_after(self, fault):
    # Fails if Retry-After is not honoured.
    self.server.faults = [fault]
    self.assertLen(dict(self.chat(concurrency=1).generate(requests(1))), 1)
    first, second = self.server.times
    self.assertGreaterEqual(second - first, 0.95)

  def test_concurrency(self):
    # Fails if concurrency is unbounded, or requests are sequential.
    self.server.delay_s = 0.05
    self.assertLen(list(self.chat(concurrency=3).generate(requests(12))), 12)
    self.assertEqual(self.server.most_at_once, 3)

  @parameterized.parameters("401", "404", "400")
  def test_permanent_errors_stop_the_run(self, fault):
    # Fails if a refusal is retried, or its message contains the key.
    self.server.faults = [fault] * 9
    with self.assertRaises(UserError) as caught:
      list(self.chat(concurrency=1).generate(requests(5)))
    self.assertLen(self.server.requests, 1)
    self.assertNotIn(KEY, str(caught.exception))
    self.assertIn(fault, str(caught.exception))

  def test_spent_quota_stops_the_run(self):
    # Fails if a permanent 429 counts as one failed request.
    self.server.faults = ["quota"] * 9
    with self.assertRaisesRegex(UserError, "answered 429: You exceeded your quota"):
      list(self.chat(concurrency=1, attempts=1, max_failed=4).generate(requests(5)))
    self.assertLen(self.server.requests, 1)

  @parameterized.product(stream=[True, False])
  def test_content_in_parts(self, stream):
    # Fails if the text of parts is lost, or a part of another type counts as text.
    self.server.in_parts = True
    ((_, reply),) = self.chat(stream=stream).generate(requests(1))
    self.assertEqual((reply.text, reply.finish), (TEXT, "stop"))

  def test_one_refused_request(self):
    # Fails if a single refused request, such as a prompt that is too long, ends the run or is
    # retried.
    self.server.faults = ["400"]
    self.assertLen(list(self.chat(concurrency=1, max_failed=1).generate(requests(4))), 3)
    self.assertLen(self.server.requests, 4)
    self.server.faults, kept = ["", "400"], []
    with self.assertRaisesRegex(UserError, "1 of 4 requests.*answered 400: refused"):
      kept.extend(
        self.chat(concurrency=2).generate(
          [dataclasses.replace(request, index=1) for request in requests(4)]
        )
      )
    self.assertLen(kept, 3)

  def test_server_message(self):
    # Fails if FastAPI's detail is missing from the message.
    self.server.faults = ["detail"] * 9
    with self.assertRaisesRegex(
      UserError, "answered 422: body.prompt: Input should be a valid string"
    ):
      list(self.chat(concurrency=1).generate(requests(1)))

  def test_filtered_request(self):
    # Fails if a filtered request stops the others, or is retried.
    self.server.faults = ["filtered"]
    replies = dict(self.chat(concurrency=1).generate(requests(2)))
    self.assertCountEqual([reply.finish for reply in replies.values()], ["content_filter", "stop"])
    self.assertTrue(all(self.store.get(request) for request in requests(2)))

  def test_one_failing_request(self):
    # Fails if the failure is silent or stops the other requests; max_failed permits it.
    def chat(body):
      if body["messages"][0]["content"] == "Problem 1":
        raise BrokenPipeError
      return TEXT

    self.server.chat = chat
    kept = []
    with self.assertRaisesRegex(UserError, "1 of 4 requests got no complete reply in 2 attempts"):
      kept.extend(self.chat(concurrency=2, attempts=2).generate(requests(4)))
    self.assertLen(kept, 3)
    self.assertLen(list(self.chat(max_failed=1, attempts=2).generate(requests(4))), 3)

  def test_server_down(self):
    # Fails if all requests are retried against a server that is down.
    self.server.close()
    start = time.monotonic()
    with self.assertRaisesRegex(UserError, "ConnectError"):
      list(self.chat(concurrency=2, attempts=2).generate(requests(500)))
    self.assertLess(time.monotonic() - start, 5.0)

  def test_budget(self):
    # Fails if requests in flight are not counted, or replies are lost when the budget is spent. A
    # prompt has at most 25 tokens (9 bytes plus 16), a reply at most 100 and in fact 9.
    self.server.delay_s = 0.02
    kept = []
    with self.assertRaisesRegex(UserError, "budget_usd=0.001"):
      kept.extend(self.chat(prices=(0.0, 4.0), budget=0.001, concurrency=8).generate(requests(100)))
    spent = self.store.spent()
    self.assertAlmostEqual(spent, len(kept) * 9 * 4e-6, places=9)
    self.assertBetween(spent, 0.001 - 100 * 4e-6 - 1e-9, 0.001)
    self.assertAlmostEqual(self.budget.spent, spent, places=9)
    asked = len(self.server.requests)
    self.assertEqual(asked, len(kept))

  def test_lost_attempts_are_charged(self):
    # Fails if a truncated reply is free, a refused attempt is not, or the partial text is lost.
    self.server.faults = ["die", "503:0.01"]
    list(self.chat(prices=(1.0, 10.0)).generate(requests(1)))
    lost, paid = (25 * 1 + 100 * 10) * 1e-6, (2 * 1 + 9 * 10) * 1e-6
    self.assertAlmostEqual(self.store.spent(), lost + paid, places=9)
    self.assertAlmostEqual(self.budget.spent, lost + paid, places=9)
    (note,) = [json.loads(path.read_text()) for path in self.folder.glob("*/*.attempt.json")]
    self.assertTrue(note["text"] and TEXT.startswith(note["text"]), note)

  def test_lost_attempts_within_retries_of_openai(self):
    # Fails if a timed-out attempt that openai retries is free, a status is not, or a retry exceeds
    # the budget.
    self.server.faults = ["stall", "503:0.01"]
    list(self.chat(prices=(1.0, 10.0), timeout_s=0.6).generate(requests(1)))
    lost, paid = (25 * 1 + 100 * 10) * 1e-6, (2 * 1 + 9 * 10) * 1e-6
    self.assertAlmostEqual(self.store.spent(), lost + paid, places=9)
    self.assertAlmostEqual(self.budget.spent, lost + paid, places=9)
    self.server.faults = ["stall"]
    other = [dataclasses.replace(request, index=1) for request in requests(1)]
    with self.assertRaisesRegex(UserError, "budget_usd=.*the next request may cost 0.0010"):
      budget = lost + paid + 1.5 * lost
      list(self.chat(prices=(1.0, 10.0), budget=budget, timeout_s=0.6).generate(other))
    self.assertAlmostEqual(self.store.spent(), lost + paid + lost, places=9)
    self.assertLen(self.server.requests, 4)

  def test_attempt_of_a_killed_run_is_charged(self):
    # Fails if an attempt in flight when the process was killed counts for nothing.
    self.store.begin(requests(1)[0], 0.25)
    self.assertEqual(self.store.spent(), 0.25)

  def test_missing_usage_is_bounded(self):
    # Fails if such a reply costs nothing.
    self.server.usage = False
    ((_, reply),) = self.chat().generate(requests(1))
    self.assertEqual(
      (reply.prompt_tokens, reply.completion_tokens, reply.counted), (25, 100, False)
    )

  def test_key_is_never_written(self):
    # Fails if echoed text (in a reply, an error, a partial reply) is stored with the key.
    self.server.faults = ["echo", "503:0.01", "echo"]
    with self.assertLogs("absl", "DEBUG") as logs:
      logging.info("a line")
      list(self.chat(concurrency=1).generate(requests(3)))
    files = [path.read_text() for path in self.folder.rglob("*") if path.is_file()]
    self.assertTrue(any("[key]" in text for text in files))
    self.assertFalse([text for text in [*files, *logs.output] if KEY in text])

  @parameterized.parameters(
    ({"url": "localhost:8000"}, "is not a URL"),
    ({"url": "http://localhost:abc/v1"}, "is not a URL"),
    ({"url": "http://localhost:80000/v1"}, "is not a URL"),
    ({"url": "http://[::1/v1"}, "is not a URL"),
    ({"url": "http://me:secret@localhost/v1"}, "contains a user"),
    ({"url": "http://localhost/v1?key=secret"}, "contains a user"),
    ({"model": ""}, "endpoint.model is empty"),
    ({"key_variable": "NOT_SET_4711"}, "NOT_SET_4711"),
  )
  def test_invalid_settings(self, changes, message):
    # Fails if only the first request reveals them, or the message repeats a secret.
    with self.assertRaisesRegex(UserError, message) as caught:
      self.chat(**changes)
    self.assertNotIn("secret", str(caught.exception))

  @parameterized.parameters("[]", "{}", '{"reply": {"other": 1}}', "{")
  def test_a_stored_reply_that_is_none(self, content):
    # Fails if a damaged file of the cache ends in a traceback.
    (request,) = requests(1)
    path = self.folder / request.key[:2] / f"{request.key}.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with self.assertRaisesRegex(UserError, f"{request.key}.json .* Delete it to repeat"):
      self.store.get(request)


class PurseTest(absltest.TestCase):
  def test_reservations(self):
    # Fails if two requests can reserve the same money, or released money does not reach a waiting
    # one.
    budget, held = Budget(1.0, 0.0), []
    self.assertEqual([budget.reserve(0.3) for _ in range(3)], [True] * 3)
    waiting = threading.Thread(target=lambda: held.append(budget.reserve(0.3)))
    waiting.start()
    waiting.join(0.2)
    self.assertTrue(waiting.is_alive())
    budget.charge(0.3, 0.3)
    waiting.join(0.2)
    self.assertTrue(waiting.is_alive())
    budget.charge(0.3, 0.05)
    waiting.join(10)
    self.assertEqual(held, [True])
    budget.charge(0.6, 0.4)
    self.assertFalse(budget.reserve(0.3))
    self.assertAlmostEqual(budget.spent, 0.75)


if __name__ == "__main__":
  absltest.main()
