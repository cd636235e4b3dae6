"""A server that speaks as much of Cloud Storage's JSON API as a lease needs: objects in memory,
with generations.

tensorstore's gs:// driver reaches it where TENSORSTORE_GCS_HTTP_URL is its url.
"""

import http.server
import json
import threading
import urllib.parse


class Server:
  """Reads, writes and deletes objects; `objects` has (content, generation) by name, `refused`
  counts failed preconditions.
  """

  def __init__(self):
    self.objects, self.generation, self.refused, self.lock = {}, 0, 0, threading.Lock()
    handler = type("Handler", (_Handler,), {"server_of": self})
    self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    self._http.daemon_threads = True
    self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
    threading.Thread(
      target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    ).start()

  def environment(self) -> dict[str, str]:
    """For programs that are to take it for Cloud Storage; it has no metadata, so they come without
    credentials.
    """
    return {
      "TENSORSTORE_GCS_HTTP_URL": self.url,
      "GCE_METADATA_ROOT": self.url.removeprefix("http://"),
    }

  def close(self) -> None:
    self._http.shutdown()
    self._http.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  server_of: Server

  def _request(self) -> tuple[str, dict[str, str]]:
    parts = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(parts.query))
    return query.get("name") or urllib.parse.unquote(parts.path.rsplit("/o/")[-1]), query

  def _reply(self, status: int, body: bytes = b"", generation: int = 0) -> None:
    self.send_response(status)
    if generation:
      self.send_header("x-goog-generation", str(generation))
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def _change(self, content: bytes | None) -> None:
    """Writes or deletes, if the object is of the generation that the request names."""
    name, query = self._request()
    server = self.server_of
    with server.lock:
      _, current = server.objects.get(name, (b"", 0))
      if int(query.get("ifGenerationMatch", current)) != current:
        server.refused += 1
        return self._reply(412, b"{}")
      if content is None:
        server.objects.pop(name, None)
        return self._reply(204)
      server.generation += 1
      server.objects[name] = (content, server.generation)
      return self._reply(
        200, json.dumps({"name": name, "generation": str(server.generation)}).encode()
      )

  def do_GET(self):
    found = self.server_of.objects.get(self._request()[0])
    self._reply(200, *found) if found else self._reply(404, b"{}")

  def do_POST(self):
    self._change(self.rfile.read(int(self.headers["Content-Length"])))

  def do_DELETE(self):
    self._change(None)

  def log_message(self, *_):
    pass
