"""A server that speaks OpenAI's protocol over real HTTP and misbehaves on demand; run alone, it
serves the scripted teacher.

python tests/openai_server.py --port=8123
"""

import argparse
import http.server
import json
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, it finds the checkout


class Server:
  """Answers POST /v1/chat/completions and /v1/completions.

  Attributes:
    url: what a client takes as base_url.
    faults: each request takes the first and misbehaves so; see `_Handler`. Requests beyond them are
      served.
    requests: (path, headers, body) of every request, in the order of their coming.
    times: when each came, seconds.
    delay_s: before a request without a fault is answered.
    most_at_once: the most requests that were under way together.
  """

  def __init__(
    self,
    chat: Callable[[dict], str] = None,
    complete: Callable[[dict], list[dict]] = None,
    port: int = 0,
  ):
    """chat: the text of a reply to a body; complete: the choices. port: 0 for a free one."""
    self.chat, self.complete, self.faults, self.requests = chat, complete, [], []
    self.times, self.delay_s, self.headers, self.usage = [], 0.0, {}, True
    self.in_parts = False
    self.lock, self.at_once, self.most_at_once = threading.Lock(), 0, 0
    self.released = threading.Event()
    handler = type("Handler", (_Handler,), {"server_of": self})
    self._http = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    self._http.daemon_threads = True
    self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
    self._thread = threading.Thread(
      target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    self._thread.start()

  def close(self) -> None:
    self.released.set()
    self._http.shutdown()
    self._http.server_close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def bodies(self) -> list[dict]:
    return [body for _, _, body in self.requests]


class _Handler(http.server.BaseHTTPRequestHandler):
  """Faults: a status such as "503"; "429:0.2" (with retry-after, seconds); "quota" (429 for good);
  "401" (echoes the key); "filtered"; "stall" (no byte); "stall_midway"; "broken_json";
  "no_choices"; "die" (the connection, half-way); "cut" (the stream ends properly before the reply
  does); "echo" (the key stands in the reply); "detail" (422 in FastAPI's words); "error", "abort"
  (the finish reason of half a reply).
  """

  protocol_version = "HTTP/1.1"
  server_of: Server

  def log_message(self, *_):
    pass

  def do_POST(self):
    owner = self.server_of
    body = json.loads(self.rfile.read(int(self.headers["content-length"])))
    with owner.lock:
      owner.requests.append(
        (self.path, {name.lower(): value for name, value in self.headers.items()}, body)
      )
      owner.times.append(time.monotonic())
      fault = owner.faults.pop(0) if owner.faults else ""
      owner.at_once += 1
      owner.most_at_once = max(owner.most_at_once, owner.at_once)
    try:
      if not fault:
        time.sleep(owner.delay_s)
      self._answer(owner, body, fault)
    except (BrokenPipeError, ConnectionResetError):
      self.close_connection = True
    finally:
      with owner.lock:
        owner.at_once -= 1

  def _answer(self, owner: Server, body: dict, fault: str) -> None:
    status, _, after = fault.partition(":")
    if fault == "quota":
      self._json(
        429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
      )
    elif fault == "detail":
      about = {
        "type": "string_type",
        "loc": ["body", "prompt"],
        "msg": "Input should be a valid string",
        "input": [1],
      }
      self._json(422, {"detail": [about]})
    elif fault == "filtered":
      self._json(400, {"error": {"message": "filtered", "code": "content_filter"}})
    elif status.isdigit():
      echoed = f"refused: {self.headers['authorization']}"
      self._json(
        int(status), {"error": {"message": echoed}}, {"retry-after": after} if after else {}
      )
    elif fault == "stall":
      owner.released.wait(20)
    elif self.path == "/v1/chat/completions":
      text = owner.chat(body)
      if fault == "echo":
        text = f"{text}\nfor {self.headers['authorization']}"
      self._stream(body, text, fault) if body.get("stream") else self._whole(body, text, fault)
    elif self.path == "/v1/completions" and fault in ("error", "abort"):
      choice = {"index": 0, "text": "half", "logprobs": None, "finish_reason": fault}
      self._json(
        200,
        {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]},
      )
    elif self.path == "/v1/completions":
      answer = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"]}
      self._json(200, answer | {"choices": owner.complete(body)})
    else:
      self._json(404, {"error": {"message": f"no {self.path}"}})

  def _json(self, status: int, value, headers=None) -> None:
    self._bytes(status, json.dumps(value).encode(), headers)

  def _bytes(self, status: int, data: bytes, headers=None) -> None:
    self.send_response(status)
    for name, content in (
      {"content-type": "application/json"} | self.server_of.headers | (headers or {})
    ).items():
      self.send_header(name, content)
    self.send_header("content-length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def _usage(self, body: dict, text: str) -> dict | None:
    prompt = sum(len(message["content"].split()) for message in body["messages"])
    completion = len(text.split())
    counts = {
      "prompt_tokens": prompt,
      "completion_tokens": completion,
      "total_tokens": prompt + completion,
    }
    return counts if self.server_of.usage else None

  def _whole(self, body: dict, text: str, fault: str) -> None:
    content = (
      [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": text}]
      if self.server_of.in_parts
      else text
    )
    message = {"role": "assistant", "content": content}
    finish = fault if fault in ("error", "abort") else "stop"
    value = {
      "id": "chatcmpl-1",
      "object": "chat.completion",
      "created": 1,
      "model": body["model"],
      "choices": []
      if fault == "no_choices"
      else [{"index": 0, "message": message, "finish_reason": finish}],
      "usage": self._usage(body, text),
    }
    data = json.dumps(value).encode()
    if fault == "broken_json":
      data = data[: len(data) // 2]
    if fault == "die":
      self.send_response(200)
      self.send_header("content-type", "application/json")
      self.send_header("content-length", str(len(data)))
      self.end_headers()
      self.wfile.write(data[: len(data) // 2])
      self.close_connection = True
      return
    self._bytes(200, data)

  def _chunks(self, body: dict, text: str, fault: str) -> Iterator[dict]:
    base = {
      "id": "chatcmpl-1",
      "object": "chat.completion.chunk",
      "created": 1,
      "model": body["model"],
    }
    size = max(len(text) // 4, 1)
    for start in range(0, len(text), size):
      piece = text[start : start + size]
      content = [{"type": "text", "text": piece}] if self.server_of.in_parts else piece
      delta = {"role": "assistant", "content": content}
      yield base | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    finish = fault if fault in ("error", "abort") else "stop"
    yield base | {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}
    if self.server_of.usage:
      yield base | {"choices": [], "usage": self._usage(body, text)}

  def _stream(self, body: dict, text: str, fault: str) -> None:
    self.send_response(200)
    for name, content in ({"content-type": "text/event-stream"} | self.server_of.headers).items():
      self.send_header(name, content)
    self.send_header("transfer-encoding", "chunked")
    self.end_headers()
    for number, chunk in enumerate(self._chunks(body, text, fault)):
      if number == 2 and fault == "die":
        self.close_connection = True
        return
      if number == 2 and fault == "stall_midway":
        self.server_of.released.wait(20)
        return
      if number == 2 and fault == "cut":
        break
      data = json.dumps(chunk)
      if number == 2 and fault == "broken_json":
        data = data[: len(data) // 2]
      self._chunk(f"data: {data}\n\n")
    self._chunk("data: [DONE]\n\n")
    self.wfile.write(b"0\r\n\r\n")

  def _chunk(self, text: str) -> None:
    data = text.encode()
    self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    self.wfile.flush()


def scripted_chat(task) -> Callable[[dict], str]:
  """The embedded task's teacher as what a server says."""
  from synthneg_jax.teacher import scripted

  def chat(body: dict) -> str:
    messages = [(message["role"], message["content"]) for message in body["messages"]]
    return scripted.reply(task, messages, body.get("seed", 0))

  return chat


def main():
  parser = argparse.ArgumentParser(
    description="Serves the embedded task's scripted teacher as a chat model."
  )
  parser.add_argument("--port", type=int, default=8123, help="port on 127.0.0.1")
  port = parser.parse_args().port
  from configs import arithmetic

  server = Server(scripted_chat(arithmetic.get_config().task), port=port)
  print(f"Serving the scripted teacher at {server.url}; end with Ctrl-C.", flush=True)
  try:
    threading.Event().wait()
  except KeyboardInterrupt:
    server.close()


if __name__ == "__main__":
  main()
