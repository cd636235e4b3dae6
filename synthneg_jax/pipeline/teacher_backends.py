"""Capable models for stage synthesize: an endpoint, a local checkpoint, or the scripted teacher."""

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging

from synthneg_jax.data import prompts
from synthneg_jax.decoding.engine import Trunk, Work
from synthneg_jax.decoding.policy import Policy, files_identity, resolve
from synthneg_jax.decoding.sampling import Sampling
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import config_schema, keys
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.runtime.progress import Progress
from synthneg_jax.teacher import reply_cache, scripted
from synthneg_jax.teacher.endpoint import Chat, Endpoint
from synthneg_jax.teacher.reply_cache import Reply, Request

_BATCH = 512  # prompts per engine run; replies are cached after each run


def _settings(config) -> str:
  """A hash of the settings outside `synthesis` by which a local checkpoint replies."""
  settings = (
    config.task.template_args,
    list(config.engine.stop),
    config.seed,
    config.model.dtype,
  )
  return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]


class _Local:
  """A local checkpoint: a chat model, or a base model with prompts that it can complete."""

  def __init__(self, experiment: Experiment, store: reply_cache.Store):
    c = experiment.config
    if not c.synthesis.endpoint.model:
      raise UserError(
        "synthesis.provider='local' needs synthesis.endpoint.model, the checkpoint's folder."
      )
    self._policy = Policy.load(resolve(c.synthesis.endpoint.model), c.model, experiment.mesh)
    self._seed, self._store = c.seed, store
    self.model = f"{self._policy.fingerprint}/{_settings(c)}"  # replies are cached by this name
    self._template_args = config_schema.template_args(c.task.template_args)
    self._style = "chat" if self._policy.tokenizer.chat_template else "raw"
    max_new_tokens = c.synthesis.max_tokens

    def work() -> Work:  # reply lengths are unknown; assumes uniform ones
      shape = (_BATCH, c.synthesis.num_solutions)
      sizes = np.random.default_rng(0).integers(1, max_new_tokens + 1, shape)
      return Work(sizes=sizes.tolist(), longest=c.model.max_length)

    self._engine = experiment.engine(
      self._policy,
      work,
      lanes=c.engine.lanes,
      slots=min(c.engine.slots, c.synthesis.num_solutions),
      max_new_tokens=max_new_tokens,
    )

  def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Reply]]:
    """Yields each request with its reply."""
    groups = {}  # requests with the same prompt share a trunk
    for request in requests:
      groups.setdefault((request.messages, request.temperature), []).append(request)
    for temperature in sorted({temperature for _, temperature in groups}):
      batch = [group for (_, t), group in groups.items() if t == temperature]
      for start in range(0, len(batch), _BATCH):
        yield from self._answer(batch[start : start + _BATCH], temperature)

  def _answer(
    self, batch: Sequence[Sequence[Request]], temperature: float
  ) -> Iterator[tuple[Request, Reply]]:
    trunks = []
    for group in batch:
      text = group[0].messages[-1][1]
      ids = prompts.encode_prompt(
        self._policy.tokenizer, text, self._style, template_args=self._template_args
      )
      draw_keys = [
        keys.draw_key(self._seed, "synthesize", 0, request.key, "", request.index)
        for request in group
      ]
      trunks.append(Trunk(ids, [len(ids)] * len(group), np.stack(draw_keys)))
    for index, generations in self._engine.run(self._policy.params, trunks, Sampling(temperature)):
      for request, generation in zip(batch[index], generations, strict=True):
        finish = "length" if generation.finish_reason == "length" else "stop"
        text = self._policy.token_text.text(generation.ids.tolist())
        reply = Reply(text, finish, len(trunks[index].ids), len(generation.ids), counted=True)
        self._store.put(request, reply)
        yield request, reply


class Teacher:
  """Asks the capable model, caches its replies and counts their cost.

  Attributes:
    model: name or fingerprint of the model.
    asked: number of requests sent.
    tokens: tokens of their prompts and replies.
  """

  def __init__(self, experiment: Experiment):
    """Opens the provider of synthesis.provider.

    Raises:
      UserError: unknown model, no endpoint, or no key.
    """
    section = experiment.config.synthesis
    self._section, self._task = section, experiment.config.task
    self._prices = reply_cache.Prices(
      section.usd_per_million_prompt, section.usd_per_million_completion
    )
    self._store = reply_cache.Store(section.replies or experiment.workdir / "replies")
    self._budget = reply_cache.Budget(
      section.budget_usd, self._store.spent() if section.provider == "endpoint" else 0.0
    )
    if section.provider == "endpoint":
      endpoint = Endpoint(section.endpoint)
      self._provider = Chat(endpoint, self._store, self._budget, self._prices, section)
      self.model = section.endpoint.model
    elif section.provider == "local":
      self._provider = _Local(experiment, self._store)
      self.model = self._provider.model
    else:
      self._provider, self.model = None, "scripted teacher"
    self.tokens, self.asked = 0, 0

  @property
  def spent_usd(self) -> float:
    """The cost of cached replies and lost attempts in US dollars, including earlier runs."""
    return self._budget.spent

  def request(self, purpose: str, text: str, index: int, temperature: float) -> Request:
    """A request to this model."""
    return Request(
      purpose, self.model, (("user", text),), index, temperature, self._section.max_tokens
    )

  def generate(self, name: str, requests: Sequence[Request]) -> dict[str, Reply]:
    """Returns replies by request key and sends only requests without a cached reply.

    At most synthesis.max_failed requests remain without a reply.

    Raises:
      UserError: as `Chat.ask`.
    """
    replies, missing = {}, []
    if self._provider is None:
      for request in requests:
        text = scripted.reply(self._task, request.messages, request.seed)
        replies[request.key] = Reply(text, "stop", 0, 0, counted=False)
      return replies
    for request in requests:
      reply = self._store.get(request)
      if reply is None:
        missing.append(request)
      else:
        replies[request.key] = reply
    self._announce(name, missing, len(replies))
    with Progress(f"synthesize {name}", len(missing), "replies") as progress:
      for request, reply in self._provider.generate(missing):
        replies[request.key] = reply
        self.asked += 1
        self.tokens += reply.prompt_tokens + reply.completion_tokens
        progress.update(1, tokens=self.tokens, usd=self._budget.spent)
    return replies

  def _announce(self, name: str, missing: Sequence[Request], num_cached: int) -> None:
    """Logs the expected and the maximum cost before anything is sent."""
    if self._section.provider != "endpoint":
      return
    estimate = reply_cache.estimate(missing, self._prices)
    logging.info(
      "synthesize %s: %d requests (%d replies are cached), about %d prompt tokens, at most %d "
      "reply tokens and %.4f US dollars; %.4f spent before, budget %s.",
      name,
      len(missing),
      num_cached,
      estimate["prompt_tokens"],
      estimate["most_completion_tokens"],
      estimate["most_usd"],
      self._budget.spent,
      self._section.budget_usd or "none",
    )


def identity(experiment: Experiment) -> str:
  """Identifies the capable model without loading it: a checkpoint by its files, else by name."""
  section = experiment.config.synthesis
  if section.provider == "local":
    files = files_identity(resolve(section.endpoint.model))
    return f"{files}/{_settings(experiment.config)}"
  return section.endpoint.model if section.provider == "endpoint" else "scripted teacher"
