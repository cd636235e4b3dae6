"""Rollouts from a server of OpenAI's completions API (vLLM, SGLang, ...), as an `Engine`.

Each rollout is one request with its own seed, so results do not depend on concurrent requests, and
servers cache the shared prefix. Prompts and completions are token ids if the server supports them.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from synthneg_jax.decoding.engine import Generation, Trunk
from synthneg_jax.decoding.sampling import Sampling
from synthneg_jax.teacher.endpoint import Endpoint, IncompleteResponse, Refused, check_finish

_TOKEN_ID = re.compile(r"token_id:(\d+)")  # vLLM's --return-tokens-as-token-ids


def seed_of(key: np.ndarray) -> int:
  """A seed in [0, 2⁶³) from a draw's key, uint32 [2]."""
  return (int(key[0]) << 32 | int(key[1])) >> 1


class Codec(NamedTuple):
  """The policy's tokenizer, as `RemoteEngine` uses it.

  Attributes:
    eos_ids: the tokens that end a response; the first is appended if the server omits it.
    encode: text -> ids, without special tokens.
    decode: ids -> text, with special tokens.
  """

  eos_ids: tuple[int, ...]
  encode: Callable[[str], list[int]]
  decode: Callable[[Sequence[int]], str]


class RemoteEngine:
  """An engine with the same `run` and `stats` as `Engine`.

  Attributes:
    stats: those of `Engine`, all 0, and: requests; retokenised, rollouts returned as text;
      without_logp, rollouts without usable log-probs.
  """

  def __init__(
    self, section, codec: Codec, *, stop: Sequence[str], max_new_tokens: int, send_ids: bool
  ):
    """Opens no connection yet.

    Args:
      section: config section of the endpoint.
      codec: the policy's tokenizer.
      stop: strings that end a response besides EOS.
      max_new_tokens: L.
      send_ids: send prompts as ids and request ids; if False or refused, use text both ways.

    Raises:
      UserError: as `Endpoint`.
    """
    self._endpoint, self._model, self._codec = Endpoint(section), section.model, codec
    self._stop, self._new, self._send_ids = list(stop), max_new_tokens, send_ids
    self._accepts_ids = False  # once the server has accepted ids, a refusal has another cause
    self.stats = {"steps": 0, "busy_slots": 0, "slots": 0, "prefill_tokens": 0}
    self.stats |= {"requests": 0, "retokenised": 0, "without_logp": 0}

  def run(
    self, params, trunks: Sequence[Trunk], sampling: Sampling, *, longest: int = 0
  ) -> Iterator[tuple[int, list[Generation]]]:
    """Yields (index of the trunk, its branches in the order of its items) as trunks finish.

    `params` and `longest` are ignored.

    Raises:
      UserError: the server refuses a request, or all attempts of a request failed.
    """
    del params, longest
    items = [(t, n) for t, trunk in enumerate(trunks) for n in range(len(trunk.forks))]
    branches = [[None] * len(trunk.forks) for trunk in trunks]

    def draw(item):
      t, n = item
      return self._draw(trunks[t], n, sampling)

    for (t, n), (generation, retokenised) in self._endpoint.many(items, draw, max_failed=0):
      branches[t][n] = generation
      self.stats["requests"] += 1
      self.stats["retokenised"] += retokenised
      self.stats["without_logp"] += generation.logp is None
      if all(branches[t]):
        yield t, branches[t]

  def _draw(self, trunk: Trunk, number: int, sampling: Sampling) -> tuple[Generation, bool]:
    with_ids = self._send_ids
    try:
      drawn = self._request(trunk, number, sampling, with_ids=with_ids)
    except Refused as error:
      if not with_ids or self._accepts_ids:
        raise
      logging.log_first_n(
        logging.WARNING,
        "The server refuses token ids (%s); falling back to text, tokenised locally.",
        1,
        error,
      )
      self._send_ids = False
      return self._request(trunk, number, sampling, with_ids=False)
    self._accepts_ids |= with_ids
    return drawn

  def _request(
    self, trunk: Trunk, number: int, sampling: Sampling, *, with_ids: bool
  ) -> tuple[Generation, bool]:
    ids = [int(i) for i in trunk.ids[: trunk.forks[number]]]
    extra = {"return_token_ids": True} if with_ids else {}
    if sampling.top_k:
      extra["top_k"] = sampling.top_k
    arguments = {
      "model": self._model,
      "prompt": ids if with_ids else self._codec.decode(ids),
      "max_tokens": int(trunk.limits[number]) if trunk.limits else self._new,
      "temperature": sampling.temperature,
      "top_p": sampling.top_p,
      "seed": seed_of(trunk.keys[number]),
      "logprobs": 1,
      "extra_body": extra,
    }
    if self._stop:
      arguments["stop"] = self._stop

    def send():
      response = self._endpoint.client.completions.with_raw_response.create(**arguments)
      try:
        choice = response.parse().choices[0]
        check_finish(choice.finish_reason, choice.text)
        return response.headers, self._generation(choice)
      except IncompleteResponse:
        raise
      except Exception as error:  # not a completion, or one the parser rejects
        raise IncompleteResponse(f"no completion ({error})", response.text[:2000]) from error

    return self._endpoint.call(send)[1]

  def _generation(self, choice) -> tuple[Generation, bool]:
    """(branch, whether its text had to be tokenised) of a choice."""
    decode, eos_ids = self._codec.decode, self._codec.eos_ids
    ids, logprobs = getattr(choice, "token_ids", None), choice.logprobs
    tokens = (logprobs.tokens if logprobs else None) or []
    logp = (logprobs.token_logprobs if logprobs else None) or None
    if ids is None and tokens and all(_TOKEN_ID.fullmatch(token) for token in tokens):
      ids = [int(_TOKEN_ID.fullmatch(token).group(1)) for token in tokens]
    retokenised = ids is None
    if retokenised:
      ids = self._codec.encode(choice.text)
      if [token.encode() for token in tokens] != [decode([i]).encode() for i in ids]:
        logp = None  # of other tokens
    ids = list(ids)
    stopped = choice.finish_reason == "stop"
    # The stop string, or None after EOS; a server that names neither may have cut a stop string.
    names = [name for name in ("stop_reason", "matched_stop") if hasattr(choice, name)]
    reasons = [getattr(choice, name) for name in names]
    at_string = any(isinstance(reason, str) for reason in reasons) or any(
      stop in decode(ids) for stop in self._stop
    )
    at_string = at_string or bool(self._stop and not names)
    if stopped and not at_string and not (ids and ids[-1] in eos_ids):
      ids.append(eos_ids[0])  # the model ended the response, and the server omitted EOS
    if logp is not None and (len(logp) != len(ids) or any(value is None for value in logp)):
      logp = None
    if ids and ids[-1] in eos_ids:
      finish = "eos"
    else:
      finish = "stop" if stopped else "length"
    logp = None if logp is None else np.asarray(logp, np.float32)
    return Generation(np.asarray(ids, np.int32), logp, logp, finish), retokenised
