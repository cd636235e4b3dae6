"""An OpenAI-compatible HTTP endpoint: many requests at once, at the server's pace, tried again
where that may help.

The key comes from the environment and goes into the Authorization header, nowhere else: what a
server echoes is scrubbed.
"""

import email.utils
import importlib
import itertools
import logging as stdlib_logging
import os
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

from absl import logging

from synthneg_jax.runtime.errors import UserError
from synthneg_jax.teacher.reply_cache import Prices, Purse, Reply, Request, Store

_AGAIN = {
  408,
  409,
  425,
  429,
}  # statuses after which the same request may succeed, as after every 5xx; not billed
_REFUSED = {400, 413, 422}  # statuses that are about one request and say nothing of others
_UNFINISHED = ("error", "abort")  # finish reasons of replies that the server gave up
_FILTERED = ("content_filter", "content_policy_violation")
_NEVER_SENT = (
  "ConnectError",
  "ConnectTimeout",
  "PoolTimeout",
  "ProxyError",
)  # the transport's, by name: not billed
_LONGEST_BACKOFF_S = 60.0
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Broken(Exception):
  """A reply that came, but not whole: it may have been billed. `text` is what came of it."""

  def __init__(self, why: str, text: str = ""):
    super().__init__(why)
    self.text = text


class Exhausted(Exception):
  """No whole reply in all attempts."""


class Refused(Exhausted):
  """The server will not take this very request; `status` is what it answered."""

  def __init__(self, why: str, status: int):
    super().__init__(why)
    self.status = status


class Filtered(Exception):
  """The server will not answer this very request, and did not bill it. `note` is the attempt's."""

  def __init__(self, note):
    super().__init__()
    self.note = note


class OutOfMoney(Exception):
  """The budget does not cover the most that the next request can cost."""


def _duration(text: str) -> float | None:
  """Seconds of "2", "1m30s" or "250ms"; None for what is neither."""
  try:
    return max(float(text), 0.0)
  except ValueError:
    parts = _DURATION.findall(text)
    return sum(float(n) * _SECONDS[unit] for n, unit in parts) if parts else None


def wait_of(headers, now: float) -> float:
  """Seconds that a response's headers ask to wait before the next request.

  retry-after-ms, retry-after (seconds or an HTTP date); else x-ratelimit-reset-{requests,tokens}
  where the same -remaining- is 0.

  Args:
    headers: a mapping without case.
    now: seconds since 1970.
  """
  if headers.get("retry-after-ms"):
    return (_duration(headers["retry-after-ms"]) or 0.0) / 1000
  after = headers.get("retry-after")
  if after:
    seconds = _duration(after) if not re.search("[A-Za-z]{3}", after) else None
    if seconds is not None:
      return seconds
    try:
      return max(email.utils.parsedate_to_datetime(after).timestamp() - now, 0.0)
    except ValueError:
      return 0.0
  waits = [0.0]
  for kind in ("requests", "tokens"):
    if headers.get(f"x-ratelimit-remaining-{kind}") == "0":
      waits.append(_duration(headers.get(f"x-ratelimit-reset-{kind}", "")) or 0.0)
  return max(waits)


def _words_of(body) -> str:
  """What a server says in the body of an error: OpenAI's message, FastAPI's detail, or the text
  itself; "" for nothing.
  """
  if isinstance(body, str):
    return body
  if isinstance(body, list):
    return "; ".join(filter(None, map(_words_of, body)))
  if not isinstance(body, dict):
    return ""
  said = next(
    (words for key in ("message", "detail", "error", "msg") if (words := _words_of(body.get(key)))),
    "",
  )
  place = ".".join(str(part) for part in body["loc"]) if isinstance(body.get("loc"), list) else ""
  return f"{place}: {said}" if place and said else said


def text_of(content) -> str:
  """The text of a message's content, which some servers give as a list of parts; parts of other
  types are passed over.
  """
  if isinstance(content, str):
    return content
  if isinstance(content, dict):
    return (
      text_of(content.get("text")) if content.get("type", "text") in ("text", "output_text") else ""
    )
  return "".join(map(text_of, content)) if isinstance(content, list) else ""


def check_finish(reason, text: str) -> None:
  """Raises Broken for a reply that the server itself gave up."""
  if reason in _UNFINISHED:
    raise Broken(f"the server ended the reply with finish_reason {reason!r}", text)


def key_of(variable: str) -> str:
  """The key in an environment variable; a placeholder where no variable is named.

  Raises:
    UserError: the variable is not set.
  """
  if not variable:
    return "none"
  key = os.environ.get(variable, "").strip()
  if not key:
    raise UserError(
      f"endpoint.key_variable names {variable}, which is not set; set it to the endpoint's key, or "
      "give "
      "endpoint.key_variable= (empty) for a server that wants none."
    )
  return key


class Endpoint:
  """One server, shared by all threads that ask it."""

  def __init__(self, section):
    """Opens no connection yet.

    Args:
      section: config section with url, model, key_variable, concurrency, timeout_s, attempts,
        backoff_s.

    Raises:
      UserError: the package openai is not installed, the url is none or carries a secret, no model,
        or no key.
    """
    try:
      self._openai = importlib.import_module("openai")
    except ImportError as error:
      raise UserError(
        'An endpoint needs the package openai: pip install "synthneg_jax[synthesize]" (in a '
        "checkout: .[synthesize])."
      ) from error
    parts = urllib.parse.urlsplit(section.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
      raise UserError(f"endpoint.url={section.url!r} is no URL such as http://localhost:8000/v1.")
    if parts.username or parts.password or parts.query:
      raise UserError(
        "endpoint.url carries a user, a password or a query, which would be written to the workdir "
        "with the config; "
        "put the key into the variable that endpoint.key_variable names."
      )
    if not section.model:
      raise UserError("endpoint.model is empty: name the model that the endpoint is to use.")
    self._section, self._key = section, key_of(section.key_variable)
    self._where = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
    # A read that brings no byte for timeout_s ends the attempt; the client's own retries would
    # ignore our pace.
    self.client = self._openai.OpenAI(
      base_url=section.url, api_key=self._key, max_retries=0, timeout=section.timeout_s
    )
    for name in ("openai", "httpx", "httpx2"):
      stdlib_logging.getLogger(name).setLevel(
        stdlib_logging.WARNING
      )  # they would log every request
    self._lock, self._not_before = threading.Lock(), 0.0
    self._stop = threading.Event()

  def scrub(self, text: str) -> str:
    """Text without the key."""
    return text if self._key == "none" else text.replace(self._key, "[key]")

  def _pause(self, seconds: float) -> None:
    """No thread sends anything for so long."""
    if seconds > 0:
      with self._lock:
        self._not_before = max(self._not_before, time.monotonic() + seconds)
      if seconds >= 5:
        logging.info("%s asks to wait %.0f s.", self._where, seconds)

  def _await_turn(self) -> None:
    while (wait := self._not_before - time.monotonic()) > 0:
      if self._stop.wait(min(wait, 1.0)):
        return

  def _refuse(self, error) -> None:
    """Raises UserError for a status that will not go away by asking again, Refused for one that is
    about this request.
    """
    body, status = error.body if isinstance(error.body, dict) else {}, error.status_code
    if status >= 500 or status in _AGAIN - {429}:
      return
    if status == 429 and "insufficient_quota" not in (body.get("code"), body.get("type")):
      return
    said = " ".join(_words_of(error.body).split()) or error.message
    sentence = f"{self._where} answered {status}: {self.scrub(said)[:300]}"
    if status in _REFUSED:
      raise Refused(sentence, status)
    raise UserError(sentence)

  def call(self, send: Callable[[], tuple[object, object]], begin=None, free=None, lose=None):
    """Sends until a whole reply is there.

    Args:
      send: makes one attempt; returns (headers, reply), raises Broken for a reply that is not
        whole.
      begin, free, lose: told before an attempt, after one that was not billed, and after one that
        may have been (its error and what came).

    Raises:
      UserError: the server refuses for good. Filtered, Refused: it refuses this request. Exhausted:
        no whole reply. And
      what `begin` raises.
    """
    last = "stopped"
    for number in range(self._section.attempts):
      self._await_turn()
      if self._stop.is_set():
        break
      note = begin() if begin else None
      try:
        headers, reply = send()
      except self._openai.APIStatusError as error:
        if free:
          free(note)
        if isinstance(error.body, dict) and error.body.get("code") in _FILTERED:
          raise Filtered(note) from None
        self._refuse(error)
        asked = wait_of(error.response.headers, time.time())
        last = f"status {error.status_code}"
        if asked:
          self._pause(asked)  # for all threads, and in place of the backoff
          continue
      except (self._openai.APIError, Broken) as error:
        cause = type(error.__cause__ or error).__name__
        last = f"{cause}: {str(error)[:200]}"
        if cause in _NEVER_SENT and free:
          free(note)
        elif lose:
          lose(note, self.scrub(last), self.scrub(getattr(error, "text", "")))
      else:
        self._pause(wait_of(headers, time.time()))
        return note, reply
      if number + 1 < self._section.attempts:
        backoff = min(self._section.backoff_s * 2**number, _LONGEST_BACKOFF_S)
        self._stop.wait(
          backoff * random.uniform(0.5, 1.5)
        )  # so that threads do not come back all at once
    raise Exhausted(self.scrub(f"{self._where}: {last}"))

  def many(
    self, items: Sequence, work: Callable[[object], object], max_failed: int
  ) -> Iterator[tuple[object, object]]:
    """Yields (item, result of `work`) as they come, `concurrency` at a time.

    What an item has brought is yielded before any error is raised, so that the caller can keep it.

    Raises:
      UserError: the server refused, the budget is spent, or more than max_failed items brought
        nothing.
    """
    failed, in_a_row, fatal = [], 0, None
    self._stop.clear()
    with futures.ThreadPoolExecutor(self._section.concurrency) as pool:
      queue = iter(items)
      running = {
        pool.submit(work, item): item for item in itertools.islice(queue, self._section.concurrency)
      }
      try:
        while running:
          done, _ = futures.wait(running, return_when=futures.FIRST_COMPLETED)
          for future in done:
            item = running.pop(future)
            try:
              result = future.result()
            except Exhausted as error:
              failed.append(str(error))
              in_a_row += 1
              if in_a_row >= self._section.concurrency + max_failed:
                fatal = fatal or UserError(
                  f"{in_a_row} requests one after another brought nothing: {failed[-1]}."
                )
            except (UserError, OutOfMoney) as error:
              fatal = fatal or error
            else:
              in_a_row = 0
              yield item, result
            if fatal and not isinstance(fatal, OutOfMoney):
              # those that wait for their turn give up; those under way are let finish
              self._stop.set()
            if not fatal:
              running |= {pool.submit(work, item): item for item in itertools.islice(queue, 1)}
      finally:
        self._stop.set()
    if fatal:
      raise fatal
    if len(failed) > max_failed:
      raise UserError(
        f"{len(failed)} of {len(items)} requests brought no whole reply in "
        f"{self._section.attempts} attempts, the last: "
        f"{failed[-1]}. The same command asks for these again, and for nothing else."
      )


class Chat:
  """A capable model behind an endpoint, whose replies are kept and paid for once."""

  def __init__(self, endpoint: Endpoint, store: Store, purse: Purse, prices: Prices, section):
    """section: config section with stream, send_seed, max_tokens_field, max_failed, budget_usd."""
    self._endpoint, self._store, self._purse, self._prices, self._section = (
      endpoint,
      store,
      purse,
      prices,
      section,
    )

  def _send(self, request: Request) -> tuple[object, Reply]:
    arguments = {
      "model": request.model,
      "messages": [{"role": role, "content": text} for role, text in request.messages],
      "temperature": request.temperature,
      self._section.max_tokens_field: request.max_tokens,
    }
    if self._section.send_seed:
      arguments["seed"] = request.seed
    if self._section.stream:
      arguments |= {"stream": True, "stream_options": {"include_usage": True}}
    response = self._endpoint.client.chat.completions.with_raw_response.create(**arguments)
    text, finish, usage = _read_stream(response) if self._section.stream else _read_whole(response)
    check_finish(finish, text)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    counted = all(isinstance(count, int) for count in counts)
    if not counted:
      counts = [request.most_prompt_tokens, request.max_tokens]
    return response.headers, Reply(self._endpoint.scrub(text), finish, *counts, counted=counted)

  def _ask(self, request: Request) -> Reply:
    most = self._prices.most(request)

    def begin():
      if not self._purse.hold(most):
        raise OutOfMoney
      return self._store.begin(request, most)

    def free(attempt):
      self._purse.settle(most, 0.0)
      self._store.free(request, attempt)

    def lose(attempt, error, text):
      self._purse.settle(most, most)
      self._store.lose(request, attempt, most, error, text)

    try:
      attempt, reply = self._endpoint.call(lambda: self._send(request), begin, free, lose)
    except Filtered as filtered:
      attempt, reply = filtered.note, Reply("", "content_filter", 0, 0, counted=True)
      most = 0.0  # settled when it was freed
    usd = self._prices.usd(reply.prompt_tokens, reply.completion_tokens)
    reply = Reply(
      reply.text,
      reply.finish,
      reply.prompt_tokens,
      reply.completion_tokens,
      reply.counted,
      usd,
      attempt,
    )
    self._store.put(request, reply)
    self._purse.settle(most, usd)
    return reply

  def ask(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Reply]]:
    """Asks, and keeps every reply before it yields it.

    Raises:
      UserError: as `Endpoint.many`; the budget does not cover the next request.
    """
    try:
      yield from self._endpoint.many(requests, self._ask, self._section.max_failed)
    except OutOfMoney:
      raise UserError(
        f"synthesis.budget_usd={self._section.budget_usd}: {self._purse.spent:.4f} US dollars are "
        "spent, and the next request "
        f"may cost {self._purse.refused:.4f}. All replies are kept; a higher budget goes on from "
        "here."
      ) from None


def _read_stream(response) -> tuple[str, str, object]:
  """(text, finish reason, usage or None) of a reply that comes in pieces; Broken where it does not
  end.
  """
  pieces, finish, usage = [], None, None
  try:
    for chunk in response.parse():
      usage = getattr(chunk, "usage", None) or usage
      for choice in getattr(chunk, "choices", None) or ():
        pieces.append(text_of(choice.delta.content) if choice.delta else "")
        finish = choice.finish_reason or finish
  except Exception as error:  # whatever transport and parser raise: what came is handed on with it
    raise Broken(str(error), "".join(pieces)) from error
  if finish is None:
    raise Broken("the stream ended before the reply did", "".join(pieces))
  return "".join(pieces), finish, usage


def _read_whole(response) -> tuple[str, str, object]:
  """As `_read_stream`, of a reply in one piece."""
  try:
    completion = response.parse()
    choice = completion.choices[0]
    return (
      text_of(choice.message.content),
      choice.finish_reason or "stop",
      getattr(completion, "usage", None),
    )
  except Exception as error:  # the parser's; or it is no completion
    raise Broken(f"no completion ({error})", response.text[:2000]) from error
