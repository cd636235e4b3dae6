"""Client of an OpenAI-compatible HTTP endpoint: concurrent requests with retries and a budget.

The official `openai` client retries failed connections and statuses 408, 409, 429 and 5xx, and
honours Retry-After. This module adds what it lacks: replies that break off are requested again, and
each attempt, retries included, is charged to the budget before it is sent.

The key comes from the environment and goes only into the Authorization header; text that a server
echoes is scrubbed.
"""

import functools
import importlib
import itertools
import logging as stdlib_logging
import os
import random
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

from synthneg_jax.runtime.errors import UserError
from synthneg_jax.teacher.reply_cache import (
  Attempts,
  Budget,
  BudgetExceeded,
  Prices,
  Reply,
  Request,
  Store,
)

_TRANSIENT = {408, 409, 425, 429}  # statuses that may pass, like every 5xx
_REFUSED = {400, 413, 422}  # statuses that concern a single request
_UNFINISHED = ("error", "abort")  # finish reasons of replies that the server aborted
_FILTERED = ("content_filter", "content_policy_violation")
# Errors of httpx, by name, before a request was sent: not billed.
_NEVER_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError")
_MAX_BACKOFF_S = 60.0


class IncompleteResponse(Exception):
  """An incomplete reply, which may have been billed; `text` is the part that arrived."""

  def __init__(self, why: str, text: str = ""):
    super().__init__(why)
    self.text = text


class Exhausted(Exception):
  """No attempt brought a complete reply."""


class Refused(Exhausted):
  """The server rejects this request but may accept others; `status` is its HTTP status."""

  def __init__(self, why: str, status: int):
    super().__init__(why)
    self.status = status


class _Filtered(Exception):
  """The server's content filter rejected the request, without billing it."""


class _Stopped(BaseException):
  """The run is ending. A BaseException, because openai retries after any Exception."""


def _server_message(body) -> str:
  """The message in the body of an error: OpenAI's "message", FastAPI's "detail" or plain text."""
  if isinstance(body, str):
    return body
  if isinstance(body, list):
    return "; ".join(filter(None, map(_server_message, body)))
  if not isinstance(body, dict):
    return ""
  candidates = [_server_message(body.get(key)) for key in ("message", "detail", "error", "msg")]
  message = next(filter(None, candidates), "")
  location = body.get("loc")
  if message and location and isinstance(location, list):
    return f"{'.'.join(map(str, location))}: {message}"
  return message


def _content_text(content) -> str:
  """The text of a message's content, which may be a list of parts; skips parts of other types."""
  if isinstance(content, str):
    return content
  if isinstance(content, list):
    return "".join(map(_content_text, content))
  if isinstance(content, dict) and content.get("type", "text") in ("text", "output_text"):
    return _content_text(content.get("text"))
  return ""


def check_finish(reason, text: str) -> None:
  """Raises IncompleteResponse for a reply that the server aborted."""
  if reason in _UNFINISHED:
    raise IncompleteResponse(f"the server ended the reply with finish_reason {reason!r}", text)


def _api_key(variable: str) -> str:
  """The key in an environment variable; a placeholder if `variable` is empty."""
  if not variable:
    return "none"
  key = os.environ.get(variable, "").strip()
  if not key:
    raise UserError(
      f"endpoint.key_variable={variable}: this environment variable is not set. Set it to the "
      "endpoint's key, or clear endpoint.key_variable for a server without keys."
    )
  return key


class Endpoint:
  """One server, shared by all threads that send requests to it.

  Attributes:
    client: openai's client.
  """

  def __init__(self, section):
    """Opens no connection yet.

    Args:
      section: config section with url, model, key_variable, concurrency, timeout_s, attempts,
        backoff_s.

    Raises:
      UserError: the package openai is missing, the URL is invalid or contains a secret, or the
        model or the key is missing.
    """
    try:
      self._openai = importlib.import_module("openai")
    except ImportError as error:
      raise UserError(
        'Endpoints need the package openai: pip install "synthneg_jax[synthesize]" (in a '
        "checkout: .[synthesize])."
      ) from error
    try:
      parts = urllib.parse.urlsplit(section.url)
      is_url = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # "http://localhost:abc", "http://[::1"
      is_url = False
    if not is_url:
      raise UserError(
        f"endpoint.url={section.url!r} is not a URL such as http://localhost:8000/v1."
      )
    if parts.username or parts.password or parts.query:
      raise UserError(
        "endpoint.url contains a user, a password or a query, which the config in the workdir "
        "would reveal. Put the key into the variable that endpoint.key_variable names."
      )
    if not section.model:
      raise UserError("endpoint.model is empty: set it to the model that the endpoint serves.")
    self._section, self._key = section, _api_key(section.key_variable)
    self._host = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
    self._stop, self._local = threading.Event(), threading.local()
    # The read timeout is the longest silence within a reply, not its duration.
    http = self._openai.DefaultHttpxClient(timeout=section.timeout_s)
    http.send = functools.partial(self._send_once, http.send)  # openai's retries call it, too
    self.client = self._openai.OpenAI(
      base_url=section.url,
      api_key=self._key,
      max_retries=section.attempts - 1,
      timeout=section.timeout_s,
      http_client=http,
    )
    for name in ("openai", "httpx", "httpx2"):  # they log every request at INFO
      stdlib_logging.getLogger(name).setLevel(stdlib_logging.WARNING)

  def scrub(self, text: str) -> str:
    """Replaces the key by [key]."""
    return text if self._key == "none" else text.replace(self._key, "[key]")

  def _send_once(self, send: Callable, http_request, **kwargs):
    """Sends one HTTP request and accounts for it in the attempts of the thread's call."""
    if self._stop.is_set():
      raise _Stopped
    attempts = getattr(self._local, "attempts", None)
    if attempts is None:
      return send(http_request, **kwargs)
    attempts.begin()
    try:
      response = send(http_request, **kwargs)
    except Exception as error:
      if type(error).__name__ in _NEVER_SENT:
        attempts.drop()
      else:
        attempts.mark_lost(self.scrub(f"{type(error).__name__}: {error}"[:200]), "")
      raise
    if response.status_code >= 400:
      attempts.drop()
    return response

  def _give_up(self, error) -> Exception:
    """The exception for a status that remains after all retries."""
    body, status = error.body if isinstance(error.body, dict) else {}, error.status_code
    message = " ".join(_server_message(error.body).split()) or error.message
    sentence = f"{self._host} answered {status}: {self.scrub(message)[:300]}"
    if body.get("code") in _FILTERED:
      return _Filtered(sentence)
    if status in _REFUSED:
      return Refused(sentence, status)
    no_quota = "insufficient_quota" in (body.get("code"), body.get("type"))
    is_transient = (status >= 500 or status in _TRANSIENT) and not no_quota
    return Exhausted(sentence) if is_transient else UserError(sentence)

  def call(self, send: Callable[[], object], attempts: Attempts | None = None):
    """Calls `send` until it returns a complete reply; returns that.

    Args:
      send: makes a request with `client`; raises IncompleteResponse for an incomplete reply.
      attempts: accounts for every HTTP request.

    Raises:
      UserError: the server refuses all requests.
      Refused: the server refuses this request.
      Exhausted: no complete reply.
      BudgetExceeded: the next attempt is not affordable.
    """
    self._local.attempts = attempts
    for number in range(self._section.attempts):
      try:
        return send()
      except _Stopped:
        raise Exhausted(f"{self._host}: stopped") from None
      except self._openai.APIStatusError as error:
        raise self._give_up(error) from None
      except self._openai.APIConnectionError as error:
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {str(cause)[:200]}"
        raise Exhausted(self.scrub(f"{self._host}: {reason}")) from None
      except IncompleteResponse as error:
        reason = self.scrub(f"{type(error.__cause__ or error).__name__}: {str(error)[:200]}")
        if attempts:
          attempts.mark_lost(reason, self.scrub(error.text))
      if number + 1 < self._section.attempts:
        backoff = min(self._section.backoff_s * 2**number, _MAX_BACKOFF_S)
        self._stop.wait(backoff * random.uniform(0.5, 1.5))  # spreads the threads' retries
    raise Exhausted(f"{self._host}: {reason}")

  def many(
    self, items: Sequence, work: Callable[[object], object], max_failed: int
  ) -> Iterator[tuple[object, object]]:
    """Yields (item, `work(item)`) in order of completion, with `concurrency` threads.

    Finished results are yielded before any error is raised, so that the caller can keep them.

    Raises:
      UserError: the server refuses, or more than max_failed items failed.
      BudgetExceeded: the budget is spent.
    """
    failures, in_a_row, fatal = [], 0, None
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
              failures.append(str(error))
              in_a_row += 1
              if in_a_row >= self._section.concurrency + max_failed:
                fatal = fatal or UserError(f"{in_a_row} requests in a row failed: {failures[-1]}.")
            except (UserError, BudgetExceeded) as error:
              fatal = fatal or error
            else:
              in_a_row = 0
              yield item, result
            if fatal and not isinstance(fatal, BudgetExceeded):
              self._stop.set()  # requests in flight may finish; no new one is sent
            if not fatal:
              running |= {pool.submit(work, item): item for item in itertools.islice(queue, 1)}
      finally:
        self._stop.set()
    if fatal:
      raise fatal
    if len(failures) > max_failed:
      raise UserError(
        f"{len(failures)} of {len(items)} requests got no complete reply in "
        f"{self._section.attempts} attempts; the last error: {failures[-1]}. Re-run the same "
        "command to repeat only these requests."
      )


class Chat:
  """A capable model behind an endpoint; its replies are cached, so each is paid for once."""

  def __init__(self, endpoint: Endpoint, store: Store, budget: Budget, prices: Prices, section):
    """section: config section with stream, send_seed, max_tokens_field, max_failed, budget_usd."""
    self._endpoint, self._store, self._section = endpoint, store, section
    self._budget, self._prices = budget, prices

  def _send(self, request: Request) -> Reply:
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
      counts = [request.max_prompt_tokens, request.max_tokens]
    return Reply(self._endpoint.scrub(text), finish, *counts, counted=counted)

  def _ask(self, request: Request) -> Reply:
    attempts = Attempts(self._store, self._budget, request, self._prices.max_usd(request))
    try:
      reply = self._endpoint.call(functools.partial(self._send, request), attempts)
    except _Filtered:
      reply = Reply("", "content_filter", 0, 0, counted=True)
    return attempts.keep(reply, self._prices.usd(reply.prompt_tokens, reply.completion_tokens))

  def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Reply]]:
    """Sends requests; stores every reply before yielding it.

    Raises:
      UserError: as `Endpoint.many`, or the budget does not cover the next request.
    """
    try:
      yield from self._endpoint.many(requests, self._ask, self._section.max_failed)
    except BudgetExceeded as error:
      raise UserError(
        f"synthesis.budget_usd={self._section.budget_usd}: {self._budget.spent:.4f} US dollars are "
        f"spent, and the next request may cost {error.usd:.4f}. All replies are kept; re-run with "
        "a higher budget to continue."
      ) from None


def _read_stream(response) -> tuple[str, str, object]:
  """(text, finish reason, usage or None) of a streamed reply; raises IncompleteResponse."""
  pieces, finish, usage = [], None, None
  try:
    for chunk in response.parse():
      usage = getattr(chunk, "usage", None) or usage
      for choice in getattr(chunk, "choices", None) or ():
        pieces.append(_content_text(choice.delta.content) if choice.delta else "")
        finish = choice.finish_reason or finish
  except Exception as error:  # any error of transport or parser; keeps the text so far
    raise IncompleteResponse(str(error), "".join(pieces)) from error
  if finish is None:
    raise IncompleteResponse("the stream ended before the reply did", "".join(pieces))
  return "".join(pieces), finish, usage


def _read_whole(response) -> tuple[str, str, object]:
  """As `_read_stream`, for a reply that is not streamed."""
  try:
    completion = response.parse()
    choice = completion.choices[0]
    text = _content_text(choice.message.content)
  except Exception as error:  # not JSON, or not a completion
    raise IncompleteResponse(f"no completion ({error})", response.text[:2000]) from error
  return text, choice.finish_reason or "stop", getattr(completion, "usage", None)
