"""Rollouts from a server that holds the policy (vLLM, SGLang, or what else speaks OpenAI's
completions), as the engine's.

One request a rollout, each with a seed of its own: what is drawn does not hang on what was asked
beside it, and servers keep the shared prefix's cache. The prompt goes out as token ids and the
drawn ids come back, where the server can do that.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from synthneg_jax.decoding.engine import Generation, Trunk
from synthneg_jax.decoding.sampling import Sampling
from synthneg_jax.teacher.endpoint import Broken, Endpoint, Refused, check_finish

_TOKEN_ID = re.compile(r"token_id:(\d+)")  # vLLM's --return-tokens-as-token-ids


def seed_of(key: np.ndarray) -> int:
  """A draw's key (uint32 [2]) as a number in [0, 2⁶³)."""
  return (int(key[0]) << 32 | int(key[1])) >> 1


class Codec(NamedTuple):
  """What the engine needs of the policy's tokenizer.

  Attributes:
    eos_ids: the tokens that end a response; the first is added where the server leaves it out.
    encode: text -> ids, without special tokens.
    decode: ids -> text, with them.
  """

  eos_ids: tuple[int, ...]
  encode: Callable[[str], list[int]]
  decode: Callable[[Sequence[int]], str]


class RemoteEngine:
  """Has the engine's `run` and `stats`.

  Attributes:
    stats: the engine's, 0 here, and: requests; retokenised, rollouts that came as text and were
      tokenised once; without_logp, rollouts whose log-probs did not come.
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
      send_ids: send the prompt as ids and ask for ids; otherwise, and where the server refuses ids,
        text goes both ways.

    Raises:
      UserError: as `Endpoint`.
    """
    self._endpoint, self._model = Endpoint(section), section.model
    self._eos_ids, self._encode, self._decode, self._send_ids = *codec, send_ids
    self._stop, self._new = list(stop), max_new_tokens
    self._ids_taken = False  # once the server has taken ids, a refusal is about something else
    self.stats = {"steps": 0, "busy_slots": 0, "slots": 0, "prefill_tokens": 0}
    self.stats |= {"requests": 0, "retokenised": 0, "without_logp": 0}

  def run(
    self, params, trunks: Sequence[Trunk], sampling: Sampling, *, longest: int = 0
  ) -> Iterator[tuple[int, list[Generation]]]:
    """Yields (index of the trunk, its branches in the order of its items) as trunks are complete;
    params are not read.

    Raises:
      UserError: the server refuses, or a request brought nothing in all attempts.
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
      drawn = self._ask(trunk, number, sampling, with_ids=with_ids)
    except Refused as error:
      if not with_ids or self._ids_taken:
        raise
      logging.log_first_n(
        logging.WARNING,
        "The server refuses token ids (%s); text goes both ways, and is tokenised here.",
        1,
        error,
      )
      self._send_ids = False
      return self._ask(trunk, number, sampling, with_ids=False)
    self._ids_taken |= with_ids
    return drawn

  def _ask(
    self, trunk: Trunk, number: int, sampling: Sampling, *, with_ids: bool
  ) -> tuple[Generation, bool]:
    ids = [int(i) for i in trunk.ids[: trunk.forks[number]]]
    extra = {"return_token_ids": True} if with_ids else {}
    if sampling.top_k:
      extra["top_k"] = sampling.top_k
    arguments = {
      "model": self._model,
      "prompt": ids if with_ids else self._decode(ids),
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
      except Broken:
        raise
      except Exception as error:  # the parser's; or it is no completion
        raise Broken(f"no completion ({error})", response.text[:2000]) from error

    return self._endpoint.call(send)[1]

  def _generation(self, choice) -> tuple[Generation, bool]:
    """A choice as (branch, whether its text had to be tokenised)."""
    ids, logprobs = getattr(choice, "token_ids", None), choice.logprobs
    tokens = (logprobs.tokens if logprobs else None) or []
    logp = (logprobs.token_logprobs if logprobs else None) or None
    if ids is None and tokens and all(_TOKEN_ID.fullmatch(token) for token in tokens):
      ids = [int(_TOKEN_ID.fullmatch(token).group(1)) for token in tokens]
    retokenised = ids is None
    if retokenised:
      ids = self._encode(choice.text)
      if [token.encode() for token in tokens] != [self._decode([i]).encode() for i in ids]:
        logp = None  # they are of other tokens
    ids = list(ids)
    at_string = choice.finish_reason == "stop" and any(
      stop in self._decode(ids) for stop in self._stop
    )
    named = getattr(choice, "stop_reason", None)  # vLLM: the stop string; none where EOS ended it
    ended = bool(ids) and ids[-1] in self._eos_ids
    if (
      choice.finish_reason == "stop" and not at_string and not isinstance(named, str) and not ended
    ):
      ids.append(self._eos_ids[0])  # its author stopped here; the server left EOS out
    if logp is not None and (len(logp) != len(ids) or any(value is None for value in logp)):
      logp = None
    if ids and ids[-1] in self._eos_ids:
      finish = "eos"
    else:
      finish = "stop" if choice.finish_reason == "stop" else "length"
    logp = None if logp is None else np.asarray(logp, np.float32)
    return Generation(np.asarray(ids, np.int32), logp, logp, finish), retokenised
