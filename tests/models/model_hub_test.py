"""Models of the Hub, and back to it: the real client against a server on this machine that speaks
the Hub's API.
"""

import base64
import json
import os
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized
from huggingface_hub import constants

from synthneg_jax.decoding import policy as policy_lib
from synthneg_jax.decoding.policy import Policy
from synthneg_jax.models import adapter as adapter_lib
from synthneg_jax.models import model_hub
from synthneg_jax.models.adapter import Adapter
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError
from tests import tiny_model
from tests.data import hub_test
from tests.models import hf_tokenizers_test

FIRST, SECOND = hub_test.FIRST, hub_test.SECOND


class Server(hub_test.Server):
  """The same for models, which takes commits too: `pushed` holds the files of each by their
  repository.
  """

  def __init__(self, repos, **more):
    super().__init__(repos, **more)
    self.pushed, self.made, self.forbidden = {}, {}, False
    outer = self

    def do_post(request):
      outer.take(request)

    self.http.RequestHandlerClass.do_POST = do_post

  def answer(self, request):
    if not request.path.startswith(("/api/", "/datasets/")):
      request.path = f"/datasets{request.path}"
    super().answer(request)

  def take(self, request):
    body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
    self.asked.append(("POST", request.path))
    self.tokens.add(request.headers.get("Authorization"))

    def send(value, status=200):
      return self.send(
        request, status, json.dumps(value).encode(), {"Content-Type": "application/json"}
      )

    if self.forbidden:
      send({"error": "You may not"}, 403)
    elif request.path == "/api/repos/create":
      raw = json.loads(body)
      repo = raw["name"] if "/" in raw["name"] else f"{raw.get('organization')}/{raw['name']}"
      self.made[repo] = raw
      send({"url": f"{self.url}/{repo}"})
    elif "/preupload/" in request.path:
      send(
        {
          "files": [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
          ]
        }
      )
    elif "/commit/" in request.path:
      lines = [json.loads(line) for line in body.splitlines() if line]
      files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
      }
      repo = "/".join(request.path.split("/")[3:5])
      self.pushed.setdefault(repo, []).append(files)
      send(
        {"commitUrl": f"{self.url}/{repo}/commit/{SECOND}", "commitOid": SECOND, "success": True}
      )
    else:
      send({"error": "unknown"}, 404)

  def send(self, request, status, data, headers):
    super().send(request, status, data, headers)
    if request.command == "POST":
      request.wfile.write(data)


class ModelHubTest(hf_tokenizers_test.FolderTest):
  def setUp(self):
    super().setUp()
    self.root = self.folder.parent
    self.enter_context(mock.patch.object(constants, "HF_HUB_CACHE", str(self.root / "hub")))
    self.enter_context(mock.patch.object(constants, "HF_HUB_DISABLE_XET", True))
    self.addCleanup(model_hub._download.cache_clear)
    self.write(generation={"eos_token_id": hf_tokenizers_test.END})

  def files(self) -> dict[str, bytes]:
    """The tiny model's files, with what a repository holds besides."""
    more = {
      "README.md": b"# About",
      "consolidated.safetensors": b"x",
      "onnx/model.onnx": b"x",
      "pytorch_model.bin": b"x",
    }
    return {path.name: path.read_bytes() for path in self.folder.iterdir()} | more

  def serve(self, *commits, **more) -> Server:
    server = Server(
      {"me/tiny": dict(zip((FIRST, SECOND), commits or (self.files(),), strict=False))}, **more
    )
    self.addCleanup(server.close)
    self.enter_context(mock.patch.dict(os.environ, {"HF_ENDPOINT": server.url}))
    return server

  def load(self, path="me/tiny") -> Policy:
    return Policy.load(
      policy_lib.resolve(path), config_schema.default().model, tiny_model.one_device_mesh()
    )

  def test_a_model_by_its_name(self):
    # Fails if weights, tokenizer or endings are not those of the repository, files are fetched that
    # nobody reads or twice, or the token is not sent.
    server = self.serve()
    with mock.patch.dict(os.environ, {"HF_TOKEN": "hf_secret"}):
      policy = self.load()
    self.assertEqual(policy.fingerprint, self.load(str(self.folder)).fingerprint)
    self.assertEqual(policy.eos_ids, (hf_tokenizers_test.EOS, hf_tokenizers_test.END))
    fetched = [
      path.rpartition("/")[2]
      for method, path in server.asked
      if method == "GET" and "resolve" in path
    ]
    self.assertCountEqual(set(fetched), [path.name for path in self.folder.iterdir()])
    self.assertIn("Bearer hf_secret", server.tokens)
    self.assertEqual(policy_lib.resolve("hf:me/tiny", weights=False), policy.folder)
    count = len(server.asked)
    self.assertEqual(self.load("hf:me/tiny").fingerprint, policy.fingerprint)
    self.assertLen(server.asked, count)
    self.assertEqual(model_hub.name_of(policy.folder), f"hf:me/tiny@{FIRST}")

  def test_without_weights(self):
    # Fails if a preflight fetches what it does not read.
    server = self.serve()
    folder = policy_lib.resolve("me/tiny", weights=False)
    self.assertTrue((folder / "config.json").exists())
    self.assertFalse(any(path.endswith("safetensors") for _, path in server.asked))
    self.assertEqual(self.load("me/tiny").folder, folder)

  def test_a_revision(self):
    # Fails if another commit is taken than the one that is named.
    first = self.files()
    second = first | {"generation_config.json": b'{"eos_token_id": 258}'}
    self.serve(first, second)
    self.assertEqual(self.load().eos_ids, (hf_tokenizers_test.EOS, hf_tokenizers_test.START))
    self.assertEqual(
      self.load(f"me/tiny@{FIRST}").eos_ids, (hf_tokenizers_test.EOS, hf_tokenizers_test.END)
    )

  def test_without_a_network(self):
    # Fails if a model in the cache needs the network.
    server = self.serve()
    fingerprint = self.load().fingerprint
    model_hub._download.cache_clear()
    count = len(server.asked)
    with mock.patch.object(constants, "HF_HUB_OFFLINE", True):
      self.assertEqual(self.load().fingerprint, fingerprint)
      self.assertEqual(self.load(f"me/tiny@{FIRST}").fingerprint, fingerprint)
      with self.assertRaisesRegex(
        UserError, "me/other on the Hub is not in the cache, and the Hub cannot be reached"
      ):
        self.load("hf:me/other")
    self.assertLen(server.asked, count)

  def test_a_folder_goes_first(self):
    # Fails if a folder of the same form as a name is looked for on the Hub.
    server = self.serve()
    (self.root / "me").mkdir()
    self.folder.rename(self.root / "me/tiny")
    before = os.getcwd()
    os.chdir(self.root)
    self.addCleanup(os.chdir, before)
    self.load()
    self.assertEmpty(server.asked)

  @parameterized.parameters(
    ("hf:me/none", "^The model me/none on the Hub does not exist, or it is private and HF_TOKEN"),
    (
      "me/none",
      "There is no folder me/none, and no such model was found: The model me/none on the Hub does "
      "not exist",
    ),
    ("hf:me/tiny@v9", "The model me/tiny on the Hub has no such revision"),
    ("hf:tiny", "hf:tiny is no model on the Hub; the form is hf:ORG/NAME"),
    ("hf:me/bare", "The model me/bare on the Hub has neither config.json nor adapter_config.json"),
    ("/me/none", "The model folder /me/none does not exist"),
  )
  def test_refusals(self, path, sentence):
    # Fails if what the client raises ends in a traceback.
    self.serve().repos["me/bare"] = {FIRST: {"README.md": b"x"}}
    with self.assertRaisesRegex(UserError, sentence):
      self.load(path)

  def test_a_gated_model(self):
    # Fails if the user is not told to accept the terms.
    self.serve(gated=("me/tiny",))
    with self.assertRaisesRegex(UserError, "me/tiny on the Hub is gated: accept its terms"):
      self.load()

  def test_the_base_of_an_adapter(self):
    # Fails if an adapter of PEFT on a model of the Hub needs a folder, or takes another revision
    # than it was trained on.
    first = self.files()
    self.serve(first, first | {"generation_config.json": b'{"eos_token_id": 258}'})
    folder = self.root / "adapter"
    adapter = Adapter(tiny_model.model(vocab_size=hf_tokenizers_test.IMAGE + 1), 1, 1.0, ("up",))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), adapter.abstract_params())
    adapter_lib.save_peft(folder, [(adapter, params)], "me/tiny")
    self.assertEqual(self.load(str(folder)).eos_ids[1], hf_tokenizers_test.START)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": FIRST}))
    policy = self.load(str(folder))
    self.assertEqual(policy.eos_ids[1], hf_tokenizers_test.END)
    self.assertEqual(model_hub.name_of(policy.base), f"hf:me/tiny@{FIRST}")

  def test_push(self):
    # Fails if a file is missing, or a new repository is public.
    server = self.serve()
    with mock.patch.dict(os.environ, {"HF_TOKEN": "hf_secret"}):
      self.assertEqual(model_hub.push(self.folder, "me/new"), SECOND)
    (files,) = server.pushed["me/new"]
    self.assertEqual(files, {path.name: path.read_bytes() for path in self.folder.iterdir()})
    about = server.made["me/new"]
    self.assertTrue(about.get("private") or about.get("visibility") == "private", about)
    server.forbidden = True
    with self.assertRaisesRegex(
      UserError, "me/new on the Hub may not be read or written with this HF_TOKEN .status 403"
    ):
      with mock.patch.dict(os.environ, {"HF_TOKEN": "hf_secret"}):
        model_hub.push(self.folder, "me/new")


if __name__ == "__main__":
  absltest.main()
