"""The clients against a server that others wrote: `transformers serve` with a tiny model."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import numpy as np
import pytest
from absl.testing import absltest

from synthneg_jax.decoding.engine import Trunk
from synthneg_jax.decoding.policy import Policy
from synthneg_jax.decoding.remote import Codec, RemoteEngine
from synthneg_jax.decoding.sampling import Sampling
from synthneg_jax.runtime import config_schema
from synthneg_jax.teacher.endpoint import Chat, Endpoint
from synthneg_jax.teacher.reply_cache import Budget, Prices, Request, Store
from tests import tiny_model
from tests.models import hf_tokenizers_test

for package in ("fastapi", "uvicorn", "accelerate"):
  pytest.importorskip(package)


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


class ServeTest(hf_tokenizers_test.FolderTest):
  def setUp(self):
    super().setUp()
    self.write(
      generation={"eos_token_id": hf_tokenizers_test.END},
      tokenizer={"chat_template": hf_tokenizers_test.TEMPLATE},
    )
    port = free_port()
    self.url = f"http://127.0.0.1:{port}/v1"
    command = [
      sys.executable,
      "-m",
      "transformers.cli.transformers",
      "serve",
      str(self.folder),
      f"--port={port}",
    ]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    log = self.enterContext(tempfile.TemporaryFile())
    server = subprocess.Popen(
      [*command, "--host=127.0.0.1", "--device=cpu"], env=env, stdout=log, stderr=log
    )
    self.addCleanup(server.wait)
    self.addCleanup(server.kill)
    for _ in range(240):
      with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/models", timeout=5):
        return
      if server.poll() is not None:
        break
      time.sleep(0.5)
    log.seek(0)
    self.fail(f"The server did not start: {log.read()[-2000:].decode(errors='replace')}")

  def section(self):
    section = config_schema.default().synthesis
    section.endpoint.update(
      url=self.url,
      model=str(self.folder),
      key_variable="",
      timeout_s=60.0,
      attempts=2,
      concurrency=2,
    )
    return section

  def test_replies_and_rollouts(self):
    # Fails if a reply is lost in its stream or whole, rollouts end where the server refuses ids, or
    # they are not the policy's own tokens.
    for stream in (True, False):
      section = self.section()
      section.stream = stream
      store = Store(pathlib.Path(tempfile.mkdtemp()))
      chat = Chat(Endpoint(section.endpoint), store, Budget(0.0, 0.0), Prices(0.0, 0.0), section)
      model = section.endpoint.model
      requests = [Request("solution", model, (("user", f"Add {i}"),), 0, 0.7, 6) for i in range(3)]
      replies = dict(chat.generate(requests))
      self.assertLen(replies, 3)
      self.assertTrue(
        all(reply.finish in ("length", "stop") for reply in replies.values()), replies
      )
      self.assertTrue(
        all(reply.counted and reply.completion_tokens <= 6 for reply in replies.values()), replies
      )

    policy = Policy.load(self.folder, config_schema.default().model, tiny_model.one_device_mesh())
    codec = Codec(
      policy.eos_ids,
      encode=lambda text: policy.tokenizer.encode(text, add_special_tokens=False),
      decode=lambda ids: policy.token_text.text(ids, special=True),
    )
    engine = RemoteEngine(self.section().endpoint, codec, stop=(), max_new_tokens=5, send_ids=True)
    prompt = policy.tokenizer.encode("1 + 2 =")
    trunk = Trunk(prompt, [len(prompt)] * 4, np.arange(8, dtype=np.uint32).reshape(4, 2))
    with self.assertLogs("absl", "WARNING") as logs:
      ((_, branches),) = engine.run(None, [trunk], Sampling(0.8))
    self.assertIn("The server refuses token ids", "".join(logs.output))
    self.assertEqual((engine.stats["requests"], engine.stats["retokenised"]), (4, 4))
    self.assertTrue(
      all(branch.finish_reason in ("eos", "length") and branch.logp is None for branch in branches)
    )


if __name__ == "__main__":
  absltest.main()
