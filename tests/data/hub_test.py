"""Datasets on the Hub: the real client against a local server that implements the Hub's API."""

import hashlib
import http.server
import json
import os
import pathlib
import tempfile
import threading
from unittest import mock

import pyarrow
from absl.testing import absltest, parameterized
from huggingface_hub import constants
from pyarrow import parquet

from synthneg_jax.data import datasets, hub, problem_files
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import problems

FIRST, SECOND = "a" * 40, "b" * 40  # commits


def lines(*numbers: int) -> bytes:
  """JSON lines of problems."""
  return "".join(
    json.dumps({"problem": f"p{i}", "answer": str(i)}) + "\n" for i in numbers
  ).encode()


def table(*numbers: int) -> bytes:
  """The same as Parquet."""
  sink = pyarrow.BufferOutputStream()
  parquet.write_table(
    pyarrow.Table.from_pylist([{"problem": f"p{i}", "answer": str(i)} for i in numbers]), sink
  )
  return sink.getvalue().to_pybytes()


def card(configs: str) -> bytes:
  """A dataset card."""
  return f"---\nlicense: mit\n{configs}\n---\n# About\n".encode()


class Server:
  """Serves datasets by name: commit -> file -> bytes; the last commit is main.

  `asked` lists (method, path) of all requests.
  """

  def __init__(self, repos: dict[str, dict[str, dict[str, bytes]]], gated: tuple[str, ...] = ()):
    self.repos, self.gated, self.asked, self.tokens = repos, gated, [], set()
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def log_message(self, *args):
        pass

      def do_HEAD(self):
        outer.answer(self)

      do_GET = do_HEAD

    self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
    self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

  def close(self):
    self.http.shutdown()
    self.http.server_close()

  def answer(self, request):
    path = request.path.partition("?")[0]
    self.asked.append((request.command, path))
    self.tokens.add(request.headers.get("Authorization"))
    parts = path.strip("/").split("/")
    is_api = parts[0] == "api"
    repo = "/".join(parts[2:4] if is_api else parts[1:3])
    rest = parts[4:] if is_api else parts[3:]  # [revision, REV] or [resolve, REV, *FILE]
    if repo not in self.repos:
      return self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
    commits = self.repos[repo]
    revision = rest[1] if len(rest) > 1 else "main"
    commit = list(commits)[-1] if revision == "main" else revision
    if commit not in commits:
      return self.send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
    if is_api:
      about = {
        "id": repo,
        "sha": commit,
        "siblings": [{"rfilename": name} for name in commits[commit]],
      }
      return self.send(
        request, 200, json.dumps(about).encode(), {"Content-Type": "application/json"}
      )
    if repo in self.gated:
      return self.send(request, 403, b"", {"X-Error-Code": "GatedRepo"})
    data = commits[commit].get("/".join(rest[2:]))
    if data is None:
      return self.send(
        request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
      )
    etag = f'"{hashlib.sha256(data).hexdigest()}"'
    return self.send(request, 200, data, {"ETag": etag, "X-Repo-Commit": commit})

  def send(self, request, status, data, headers):
    request.send_response(status)
    for name, value in (headers | {"Content-Length": str(len(data))}).items():
      request.send_header(name, value)
    request.end_headers()
    if request.command == "GET":
      request.wfile.write(data)


class HubTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    self.enter_context(mock.patch.object(constants, "HF_HUB_CACHE", str(self.folder / "hub")))
    self.enter_context(mock.patch.dict(os.environ, {"TFDS_DATA_DIR": str(self.folder / "tfds")}))
    self.addCleanup(hub._snapshot.cache_clear)

  def serve(self, files, **more) -> Server:
    """Serves the dataset me/data; `files` may be a list for two commits."""
    commits = dict(
      zip((FIRST, SECOND), files if isinstance(files, list) else [files], strict=False)
    )
    server = Server({"me/data": commits}, **more)
    self.addCleanup(server.close)
    self.enter_context(mock.patch.dict(os.environ, {"HF_ENDPOINT": server.url}))
    return server

  def answers(self, path, split="train"):
    return [row.answer for row in problem_files.read(path, "jsonl", split).rows]

  # Fails if a split's files, by card or by name, differ from those of the `datasets` library.
  @parameterized.named_parameters(
    ("parts", "",
    {"data/train-00000-of-00002.parquet": table(1), "data/train-00001-of-00002.parquet": table(2),
                   "data/test-00000-of-00001.parquet": table(9)}, "", ["1", "2"]),
    ("file", "", {"train.jsonl": lines(1, 2), "test.jsonl": lines(9), "dataset_infos.json": b"{}"},
    "", ["1", "2"]),
    ("folders", "",
    {"train/a.jsonl": lines(1), "train/b.jsonl": lines(2), "testing/a.jsonl": lines(9)}, "",
    ["1", "2"]),
    ("no split", "", {"data/all-17k.parquet": table(1, 2), ".x/y.parquet": table(9)}, "",
    ["1", "2"]),
    ("json list", "", {"Math-395K.json": b"[" + lines(1).strip() + b"," + lines(2).strip() + b"]",
                        "dataset_infos.json": b"{}"}, "", ["1", "2"]),
    ("two forms", "", {"train.jsonl": lines(1, 2), "train.parquet": table(9)}, "", ["1", "2"]),
    ("card", "configs:\n- data_files:\n  - split: train\n    path: d/t-*\n  - split: test\n    "
             "path: d/*.jsonl",
     {"d/t-1.jsonl": lines(1), "d/t-2.jsonl": lines(2), "d/z.jsonl": lines(3),
     "d/t-/e.jsonl": lines(9)}, "", ["1", "2"]),
    ("text", "configs:\n- config_name: x\n  data_files: '**/[ab].jsonl'",
     {"d/a.jsonl": lines(1), "b.jsonl": lines(2), "c.jsonl": lines(9)}, "", ["2", "1"]),
    ("list", "configs:\n- data_files: [b.jsonl, a.jsonl]",
    {"a.jsonl": lines(1), "b.jsonl": lines(2)}, "", ["2", "1"]),
    ("paths", "configs:\n- data_files:\n  - split: train\n    path: [a.jsonl, b.jsonl]",
     {"a.jsonl": lines(1), "b.jsonl": lines(2)}, "", ["1", "2"]),
    ("data_dir", "configs:\n- config_name: x\n  data_dir: ./d",
     {"d/train.jsonl": lines(1), "e/train.jsonl": lines(9)}, "", ["1"]),
    ("default", "configs:\n- config_name: x\n  data_files: a.jsonl\n- config_name: y\n  "
                "data_files: b.jsonl\n  default: true",
     {"a.jsonl": lines(9), "b.jsonl": lines(1)}, "", ["1"]),
    ("named", "configs:\n- config_name: x\n  data_files: a.jsonl\n- config_name: y\n  data_files: "
              "b.jsonl",
     {"a.jsonl": lines(9), "b.jsonl": lines(1)}, "/y", ["1"]),
    ("all", "configs:\n- config_name: x\n  data_files: a.jsonl\n- config_name: y\n  data_files: "
            "b.jsonl",
     {"a.jsonl": lines(2), "b.jsonl": lines(1)}, "/*", ["2", "1"]),
    ("subfolder", "", {"main/train.jsonl": lines(1), "other/train.jsonl": lines(9)}, "/main",
    ["1"]),
    ("split", "", {"train.jsonl": lines(9), "dev.jsonl": lines(1)}, ":validation", ["1"]),
  )  # fmt: skip
  def test_files_of_a_split(self, configs, files, more, expected):
    self.serve(files | ({"README.md": card(configs)} if configs else {}))
    self.assertEqual(self.answers(f"hf:me/data{more}"), expected)

  # Fails if an error does not name the dataset and the alternatives.
  @parameterized.parameters(
    ("hf:me/data:test", "hf:me/data:test has no split 'test'; it has train, validation"),
    ("hf:me/none", "The dataset me/none on the Hub does not exist"),
    ("hf:me/data@v9", "me/data on the Hub has no such revision"),
    ("hf:me/data/z", "me/data on the Hub has no subset 'z'"),
    ("hf:data", "hf:data is not a dataset on the Hub; the form is"),
    ("hf:me/-bad-", "The dataset me/-bad- on the Hub could not be accessed .HFValidationError"),
  )
  def test_refusals(self, path, sentence):
    self.serve({"train.jsonl": lines(1), "val.jsonl": lines(2), "README.md": b"# No front matter"})
    with self.assertRaisesRegex(UserError, sentence):
      problem_files.find(path, "train")

  # Fails if one of several subsets is guessed.
  def test_several_subsets(self):
    configs = card(
      "configs:\n- config_name: x\n  data_files: a.jsonl\n- config_name: y\n  data_files: a.jsonl"
    )
    self.serve({"README.md": configs, "a.jsonl": lines(1)})
    with self.assertRaisesRegex(
      UserError, "me/data on the Hub has several subsets: x, y; choose one, such as hf:me/data/x"
    ):
      problem_files.find("hf:me/data", "train")

  # Fails if a gated dataset or a missing network ends in a traceback.
  def test_no_access(self):
    self.serve({"train.jsonl": lines(1)}, gated=("me/data",))
    with self.assertRaisesRegex(UserError, "me/data on the Hub is gated: .*HF_TOKEN"):
      problem_files.find("hf:me/data", "train")
    with mock.patch.dict(os.environ, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
      with self.assertRaisesRegex(UserError, "me/other on the Hub could not be accessed"):
        problem_files.find("hf:me/other", "train")

  # Fails if the token is not sent, files are downloaded twice, a branch resolves to the wrong
  # commit, or a dataset prepared from one commit is reused for another.
  def test_commits(self):
    server = self.serve([{"train.jsonl": lines(1)}, {"train.jsonl": lines(2)}])

    def read(path):
      return [row.answer for row in datasets.from_files(path, "jsonl", "train").rows]

    with mock.patch.dict(os.environ, {"HF_TOKEN": "hf_secret"}):
      self.assertEqual((read("hf:me/data"), hub.commit("hf:me/data")), (["2"], SECOND))
    self.assertIn("Bearer hf_secret", server.tokens)
    self.assertEqual(
      (read(f"hf:me/data@{FIRST}"), hub.commit(f"hf:me/data@{FIRST}")), (["1"], FIRST)
    )
    count = len(server.asked)
    self.assertEqual((read("hf:me/data"), read(f"hf:me/data@{FIRST}")), (["2"], ["1"]))
    self.assertLen(server.asked, count)
    fetched = [
      path for method, path in server.asked if method == "GET" and path.endswith("train.jsonl")
    ]
    self.assertLen(fetched, 2)

  # Fails if a cached dataset needs the network, by branch or by commit, or if a partial split
  # passes.
  def test_offline(self):
    names = [
      f"data/{split}-0000{i}-of-00002.parquet" for split in ("train", "test") for i in range(2)
    ]
    configs = card(
      "configs:\n- config_name: x\n  data_files:\n  - split: train\n    path: data/train-*"
    )
    server = self.serve({name: table(i) for i, name in enumerate(names)} | {"README.md": configs})
    self.assertEqual(self.answers("hf:me/data"), ["0", "1"])
    hub._snapshot.cache_clear()
    server.asked.clear()
    with mock.patch.object(constants, "HF_HUB_OFFLINE", True):
      self.assertEqual(self.answers("hf:me/data"), ["0", "1"])
      self.assertEqual(self.answers(f"hf:me/data@{FIRST}"), ["0", "1"])
      self.assertEqual(hub.commit("hf:me/data"), FIRST)
      with self.assertRaisesRegex(
        UserError, "me/more on the Hub could not be accessed .OfflineMode"
      ):
        problem_files.find("hf:me/more", "train")
      next((self.folder / "hub").rglob("train-00001-of-00002.parquet")).unlink()
      hub._snapshot.cache_clear()
      with self.assertRaisesRegex(UserError, "the cache holds only some of its files"):
        problem_files.find("hf:me/data", "train")
    self.assertEmpty(server.asked)

  # Fails if a task cannot use the Hub, a training split serves as test problems, or the commit is
  # not recorded.
  def test_task(self):
    self.serve({"train.jsonl": lines(1, 2), "dev.jsonl": lines(3), "test.jsonl": lines(4)})
    task = config_schema.default().task
    task.update(name="jsonl", path="hf:me/data", train_problems=2, test_problems=1)
    chosen = problems.choose_splits(task, 0)
    self.assertEqual([problem.prompt for problem in chosen.test], ["p4"])
    self.assertEqual(chosen.figures["hub_commits"], {"hf:me/data": FIRST})
    task.path, task.test_path = "hf:me/data:train", "hf:me/data:validation"
    self.assertEqual([problem.prompt for problem in problems.choose_splits(task, 0).test], ["p3"])
    task.test_path = ""
    with self.assertRaisesRegex(
      UserError, "task.path=hf:me/data:train is a split .*task.test_path"
    ):
      problems.choose_splits(task, 0)


if __name__ == "__main__":
  absltest.main()
