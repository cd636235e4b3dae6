"""Requests to a capable model, a cache of its replies, and a budget, so nothing is paid for twice.

A reply is one file, named by a hash of its request and renamed into place when complete. An attempt
is another file, from before it is sent until its reply is stored. An attempt that broke off or that
a killed run left behind may have been billed, so it counts with the most it can have cost.
"""

import dataclasses
import functools
import hashlib
import json
import threading
import uuid
from collections.abc import Sequence

from etils import epath

from synthneg_jax.runtime.errors import UserError

_TEMPLATE_TOKENS = 16  # upper bound on the tokens that a chat template adds to a message


@dataclasses.dataclass(frozen=True)
class Request:
  """One request.

  Attributes:
    purpose: "problems" or "solution"; for logs.
    model: its name at the endpoint, or the fingerprint of a checkpoint.
    messages: (role, text) in order.
    index: of the draw among those for these messages.
    temperature: of sampling.
    max_tokens: maximum length of the reply in tokens.
  """

  purpose: str
  model: str
  messages: tuple[tuple[str, str], ...]
  index: int
  temperature: float
  max_tokens: int

  @functools.cached_property
  def key(self) -> str:
    """Unique key: a hash of all fields, 32 hex digits."""
    return hashlib.blake2b(
      json.dumps(dataclasses.asdict(self)).encode(), digest_size=16
    ).hexdigest()

  @functools.cached_property
  def seed(self) -> int:
    """Seed in [0, 2³¹), different for each draw and independent of the model."""
    text = json.dumps([self.messages, self.index])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) >> 1

  @property
  def max_prompt_tokens(self) -> int:
    """Upper bound on the prompt's tokens: its bytes plus the chat template's tokens."""
    return sum(len(text.encode()) + _TEMPLATE_TOKENS for _, text in self.messages)


@dataclasses.dataclass(frozen=True)
class Reply:
  """One reply.

  Attributes:
    text: the model's text.
    finish: "stop", "length", "content_filter", or another reason given by the server.
    prompt_tokens, completion_tokens: the server's counts, else upper bounds.
    counted: whether the counts are the server's.
    usd: cost by the configured prices.
    attempt: name of the attempt that brought it; "" for a filtered request.
  """

  text: str
  finish: str
  prompt_tokens: int
  completion_tokens: int
  counted: bool
  usd: float = 0.0
  attempt: str = ""


@dataclasses.dataclass(frozen=True)
class Prices:
  """US dollars per million tokens."""

  prompt: float
  completion: float

  def usd(self, prompt_tokens: int, completion_tokens: int) -> float:
    """Cost of a request with its reply in US dollars."""
    return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6

  def max_usd(self, request: Request) -> float:
    """The most that one attempt can cost, in US dollars."""
    return self.usd(request.max_prompt_tokens, request.max_tokens)


class Store:
  """Replies and attempts in a folder; thread-safe."""

  def __init__(self, folder: epath.PathLike):
    self._folder = epath.Path(folder)

  def _path(self, key: str, kind: str = "") -> epath.Path:
    return self._folder / key[:2] / f"{key}{kind}.json"

  def _write(self, path: epath.Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{path.name}.{uuid.uuid4().hex}.tmp"
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)

  def _read(self, path: epath.Path) -> dict:
    try:
      return json.loads(path.read_text())
    except ValueError as error:
      raise UserError(
        f"{path} is not valid JSON ({error}). Delete it to repeat the request."
      ) from error

  def get(self, request: Request) -> Reply | None:
    """The stored reply to a request, or None."""
    path = self._path(request.key)
    if not path.exists():
      return None
    try:
      return Reply(**self._read(path)["reply"])
    except (KeyError, TypeError) as error:
      raise UserError(
        f"{path} holds no reply ({error!r}). Delete it to repeat the request."
      ) from error

  def begin(self, request: Request, most_usd: float) -> str:
    """Records that a request is about to be sent; returns the attempt's name."""
    attempt = uuid.uuid4().hex[:8]
    self._write(
      self._path(request.key, f".{attempt}.attempt"), {"attempt": attempt, "usd": most_usd}
    )
    return attempt

  def put(self, request: Request, reply: Reply) -> None:
    """Stores a complete reply and drops its attempt."""
    value = {"request": dataclasses.asdict(request), "reply": dataclasses.asdict(reply)}
    self._write(self._path(request.key), value)
    self.drop(request, reply.attempt)

  def drop(self, request: Request, attempt: str) -> None:
    """Deletes the record of an attempt that was not billed, or whose reply is stored."""
    self._path(request.key, f".{attempt}.attempt").unlink(missing_ok=True)

  def mark_lost(self, request: Request, attempt: str, usd: float, *, error: str, text: str):
    """Records the error and the partial text of an attempt that may have been billed."""
    note = {"attempt": attempt, "usd": usd, "error": error, "text": text}
    self._write(self._path(request.key, f".{attempt}.attempt"), note)

  def spent(self) -> float:
    """US dollars spent: the cost of all replies plus the maximum cost of lost attempts."""
    total, settled, attempts = 0.0, set(), []
    for path in self._folder.glob("*/*.json") if self._folder.exists() else ():
      if path.name.endswith(".attempt.json"):
        attempts.append(self._read(path))
      else:
        reply = self._read(path)["reply"]
        settled.add(reply["attempt"])
        total += reply["usd"]
    return total + sum(note["usd"] for note in attempts if note["attempt"] not in settled)


class Budget:
  """A budget: a request is sent only if the rest covers the most that it can cost.

  Attributes:
    spent: US dollars.
  """

  def __init__(self, budget_usd: float, spent_usd: float):
    """budget_usd: 0 for no limit. spent_usd: spent before."""
    self._limit, self._reserved, self._changed = budget_usd, 0.0, threading.Condition()
    self.spent = spent_usd

  def reserve(self, usd: float) -> bool:
    """Reserves money, waiting for other reservations to be charged; False if it cannot suffice."""
    with self._changed:
      while self._limit and self.spent + self._reserved + usd > self._limit:
        if self.spent + usd > self._limit or not self._reserved:
          return False
        self._changed.wait()
      self._reserved += usd
      return True

  def charge(self, reserved: float, usd: float) -> None:
    """Spends `usd` of a reservation and releases the rest."""
    with self._changed:
      rest = self._reserved - reserved
      self._reserved = rest if rest > 1e-12 else 0.0  # a rounding error must not block others
      self.spent += usd
      self._changed.notify_all()


class BudgetExceeded(BaseException):
  """The budget does not cover the next attempt, which may cost `usd`.

  A BaseException, because openai retries after any Exception.
  """

  def __init__(self, usd: float):
    super().__init__(usd)
    self.usd = usd


class Attempts:
  """Accounts for the attempts at one request, in the budget and in the store."""

  def __init__(self, store: Store, budget: Budget, request: Request, most_usd: float):
    """most_usd: the most that one attempt can cost."""
    self._store, self._budget, self._request, self._most = store, budget, request, most_usd
    self._name = ""  # of the attempt under way

  def begin(self) -> None:
    """Starts an attempt; BudgetExceeded if the budget does not cover it."""
    if not self._budget.reserve(self._most):
      raise BudgetExceeded(self._most)
    self._name = self._store.begin(self._request, self._most)

  def drop(self) -> None:
    """Ends an attempt that was not billed."""
    self._store.drop(self._request, self._name)
    self._end(0.0)

  def mark_lost(self, error: str, text: str) -> None:
    """Ends an attempt that may have been billed; `text` is the part of the reply that arrived."""
    self._store.mark_lost(self._request, self._name, self._most, error=error, text=text)
    self._end(self._most)

  def keep(self, reply: Reply, usd: float) -> Reply:
    """Stores a reply with its cost and attempt, and returns it."""
    reply = dataclasses.replace(reply, usd=usd, attempt=self._name)
    self._store.put(self._request, reply)
    if self._name:  # none is under way after the server filtered the request
      self._end(usd)
    return reply

  def _end(self, usd: float) -> None:
    self._budget.charge(self._most, usd)
    self._name = ""


def estimate(requests: Sequence[Request], prices: Prices) -> dict[str, float]:
  """Estimated prompt tokens (bytes / 4), and upper bounds on reply tokens and cost."""
  prompt = sum(len(text.encode()) for request in requests for _, text in request.messages) // 4
  return {
    "prompt_tokens": prompt,
    "most_completion_tokens": sum(request.max_tokens for request in requests),
    "most_usd": sum(prices.max_usd(request) for request in requests),
  }
