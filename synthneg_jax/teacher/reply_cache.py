"""What a capable model is asked and what it answered, kept so that nothing is paid for twice, and
what that cost.

A reply is one file, named by a hash of its request and renamed into place when it is whole. An
attempt is one more file from before it is sent until its reply is there: one that was cut off, or
that a killed run left behind, may have been billed, and counts with the most that it can have cost.
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

_TOKENS_A_MESSAGE = 16  # bound on what a chat template puts around one message


@dataclasses.dataclass(frozen=True)
class Request:
  """One question.

  Attributes:
    purpose: "problems" or "solution"; for logs.
    model: its name at the endpoint, or the fingerprint of a checkpoint.
    messages: (role, text) in order.
    index: number among the draws for these messages.
    temperature: of sampling.
    max_tokens: most tokens of the reply.
  """

  purpose: str
  model: str
  messages: tuple[tuple[str, str], ...]
  index: int
  temperature: float
  max_tokens: int

  @functools.cached_property
  def key(self) -> str:
    """Names the request: 32 hex digits of a hash of all that it is."""
    return hashlib.blake2b(
      json.dumps(dataclasses.asdict(self)).encode(), digest_size=16
    ).hexdigest()

  @functools.cached_property
  def seed(self) -> int:
    """A number in [0, 2³¹) for servers that take one; another for every draw, the same for every
    model.
    """
    text = json.dumps([self.messages, self.index])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) >> 1

  @property
  def most_prompt_tokens(self) -> int:
    """Bound on the prompt's tokens: no more than its bytes, and what a template adds."""
    return sum(len(text.encode()) + _TOKENS_A_MESSAGE for _, text in self.messages)


@dataclasses.dataclass(frozen=True)
class Reply:
  """One answer, as it came.

  Attributes:
    text: what the model wrote.
    finish: "stop", "length", "content_filter", or what else the server says.
    prompt_tokens, completion_tokens: as the server counts them, else bounds.
    counted: they are the server's.
    usd: what it cost by the prices given.
    attempt: name of the attempt that brought it.
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
  """US dollars a million tokens."""

  prompt: float
  completion: float

  def usd(self, prompt_tokens: int, completion_tokens: int) -> float:
    """US dollars of a request with its reply, by their tokens."""
    return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6

  def most(self, request: Request) -> float:
    """The most that one attempt at a request can cost."""
    return self.usd(request.most_prompt_tokens, request.max_tokens)


class Store:
  """Replies and attempts in a folder; methods may be called from several threads."""

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
        f"{path} is not whole ({error}); it was changed. Delete it to have it asked for again."
      ) from error

  def get(self, request: Request) -> Reply | None:
    """The reply to a request, if it is there."""
    path = self._path(request.key)
    return Reply(**self._read(path)["reply"]) if path.exists() else None

  def begin(self, request: Request, most_usd: float) -> str:
    """Notes that a request is about to be sent; returns the attempt's name."""
    attempt = uuid.uuid4().hex[:8]
    self._write(
      self._path(request.key, f".{attempt}.attempt"), {"attempt": attempt, "usd": most_usd}
    )
    return attempt

  def put(self, request: Request, reply: Reply) -> None:
    """Keeps a whole reply; its attempt is then settled."""
    value = {"request": dataclasses.asdict(request), "reply": dataclasses.asdict(reply)}
    self._write(self._path(request.key), value)
    self.free(request, reply.attempt)

  def free(self, request: Request, attempt: str) -> None:
    """Forgets an attempt that was not billed, or whose reply is kept."""
    self._path(request.key, f".{attempt}.attempt").unlink(missing_ok=True)

  def lose(self, request: Request, attempt: str, most_usd: float, error: str, text: str) -> None:
    """Keeps what is left of an attempt that may have been billed."""
    note = {"attempt": attempt, "usd": most_usd, "error": error, "text": text}
    self._write(self._path(request.key, f".{attempt}.attempt"), note)

  def spent(self) -> float:
    """US dollars of all replies, and the most that lost attempts can have cost."""
    total, settled, attempts = 0.0, set(), []
    for path in self._folder.glob("*/*.json") if self._folder.exists() else ():
      if path.name.endswith(".attempt.json"):
        attempts.append(self._read(path))
      else:
        reply = self._read(path)["reply"]
        settled.add(reply["attempt"])
        total += reply["usd"]
    return total + sum(note["usd"] for note in attempts if note["attempt"] not in settled)


class Purse:
  """Money that may be spent: a request is sent only if the most that it can cost is still there."""

  def __init__(self, budget_usd: float, spent_usd: float):
    """budget_usd: 0 for none. spent_usd: before."""
    self._budget, self._held, self._changed = budget_usd, 0.0, threading.Condition()
    self.spent = spent_usd
    self.refused = 0.0  # what a request would have needed when one was refused

  def hold(self, usd: float) -> bool:
    """Sets money aside, once what others hold leaves room for it; False where it never will."""
    with self._changed:
      while self._budget and self.spent + self._held + usd > self._budget:
        if self.spent + usd > self._budget or not self._held:
          self.refused = usd
          return False
        self._changed.wait()
      self._held += usd
      return True

  def settle(self, held: float, usd: float) -> None:
    """Spends `usd` of what was held, and sets the rest free."""
    with self._changed:
      self._held = (
        self._held - held if self._held - held > 1e-12 else 0.0
      )  # rounding must not hold anyone up
      self.spent += usd
      self._changed.notify_all()


def estimate(requests: Sequence[Request], prices: Prices) -> dict[str, float]:
  """What requests may come to: prompt tokens (bytes / 4, a rule of thumb), bound on the reply's
  tokens and on the cost.
  """
  prompt = sum(len(text.encode()) for request in requests for _, text in request.messages) // 4
  return {
    "prompt_tokens": prompt,
    "most_completion_tokens": sum(request.max_tokens for request in requests),
    "most_usd": sum(prices.most(request) for request in requests),
  }
