"""A headless Chromium driven over a pipe by the DevTools protocol, with the standard library alone.

Pages are opened as files. Every request that is not of a file or of data: is counted; so is
whatever a page says to its console as a warning or an error, and every exception.
"""

import base64
import fcntl
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import time

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
  "--headless=new",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--remote-debugging-pipe",
)
# Chromium reads the protocol from descriptor 3 and writes it to 4; this puts ours there and becomes
# Chromium.
_START = (
  "import os, sys\nos.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), "
  "4)\nos.execv(sys.argv[3], sys.argv[3:])"
)
_TIMEOUT = 60  # seconds that an answer may take


def find() -> str:
  """Path of the browser; the test fails where there is none."""
  for name in _NAMES:
    if path := shutil.which(name):
      return path
  pytest.fail("No browser found: install the Debian package chromium (apt-get install chromium).")


class Browser:
  """One browser with one page.

  Attributes:
    requests: addresses that the page has asked the network for.
    complaints: warnings, errors and exceptions of the page.
  """

  def __init__(self):
    self.requests, self.complaints = [], []
    self._profile = tempfile.mkdtemp(prefix="browser_")
    (to_read, to_write), (from_read, from_write) = os.pipe(), os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_read, from_write)]
    command = [
      sys.executable,
      "-c",
      _START,
      *map(str, high),
      find(),
      *_FLAGS,
      f"--user-data-dir={self._profile}",
    ]
    self._process = subprocess.Popen(
      [*command, "about:blank"], pass_fds=high, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for end in (*high, to_read, from_write):
      os.close(end)
    self._to, self._from = to_write, from_read
    self._rest, self._number, self._session = b"", 0, None
    target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
    attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
    self._session = attached["sessionId"]
    for domain in ("Page", "Runtime", "Network", "Log"):
      self.call(f"{domain}.enable")

  def close(self) -> None:
    self._process.kill()
    self._process.wait()
    os.close(self._to)
    os.close(self._from)
    shutil.rmtree(self._profile, ignore_errors=True)

  def _message(self, until: float) -> dict:
    while b"\0" not in self._rest:
      ready, _, _ = select.select([self._from], [], [], max(0.0, until - time.time()))
      part = os.read(self._from, 1 << 20) if ready else b""
      if not part:
        raise TimeoutError("The browser does not answer." if not ready else "The browser has gone.")
      self._rest += part
    line, self._rest = self._rest.split(b"\0", 1)
    return json.loads(line)

  def _take(self, message: dict) -> None:
    method, given = message.get("method"), message.get("params", {})
    if method == "Network.requestWillBeSent":
      url = given["request"]["url"]
      if not url.startswith(("file:", "data:")):
        self.requests.append(url)
    elif method == "Runtime.exceptionThrown":
      details = given["exceptionDetails"]
      self.complaints.append(details.get("exception", {}).get("description", details["text"]))
    elif method == "Runtime.consoleAPICalled" and given["type"] in ("warning", "error", "assert"):
      self.complaints.append(" ".join(str(arg.get("value")) for arg in given["args"]))
    elif method == "Log.entryAdded" and given["entry"]["level"] in ("warning", "error"):
      self.complaints.append(given["entry"]["text"])
    elif method == "Page.javascriptDialogOpening":  # an alert would wait for ever
      self.complaints.append(f"dialog: {given['message']}")
      self._send("Page.handleJavaScriptDialog", accept=True)

  def _send(self, method: str, **given) -> int:
    self._number += 1
    message = {"id": self._number, "method": method, "params": given}
    if self._session:
      message["sessionId"] = self._session
    data = json.dumps(message).encode() + b"\0"
    while data:
      data = data[os.write(self._to, data) :]
    return self._number

  def call(self, method: str, **given) -> dict:
    """One call of the protocol; raises RuntimeError with what the browser refuses."""
    number, until = self._send(method, **given), time.time() + _TIMEOUT
    while (message := self._message(until)).get("id") != number:
      self._take(message)
    if "error" in message:
      raise RuntimeError(f"{method}: {message['error']}")
    return message["result"]

  def open(self, path, hash_: str = "") -> None:
    """Opens a file and waits until it is loaded."""
    self.call("Page.navigate", url="about:blank")
    self.call("Page.navigate", url=pathlib.Path(path).resolve().as_uri() + hash_)
    self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

  def js(self, expression: str):
    """The awaited value of an expression in the page; exceptions there raise RuntimeError here."""
    made = self.call(
      "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
    )
    if "exceptionDetails" in made:
      raise RuntimeError(
        made["exceptionDetails"].get("exception", {}).get("description", str(made))
      )
    return made["result"].get("value")

  def wait(self, condition: str, seconds: float = 20.0) -> None:
    """Waits until an expression is true in the page."""
    until = time.time() + seconds
    while not self.js(f"Boolean({condition})"):
      if time.time() > until:
        raise TimeoutError(f"This has not come true: {condition}")
      time.sleep(0.02)

  def click(self, selector: str) -> None:
    """A real click in the middle of the element, scrolled into sight first."""
    x, y = self.js(
      f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
      " e.scrollIntoView({block: 'center', behavior: 'instant'}); const r = "
      "e.getBoundingClientRect();"
      " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
      self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

  def press(self, key: str) -> None:
    """One key, by its name or its letter."""
    code = {
      "Enter": 13,
      "Escape": 27,
      "ArrowDown": 40,
      "ArrowUp": 38,
      "End": 35,
      "Home": 36,
      "Tab": 9,
    }.get(key, 0)
    text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
    self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
    self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

  def type(self, text: str) -> None:
    """Text into what has the focus."""
    self.call("Input.insertText", text=text)

  def size(self, width: int, height: int, dark: bool = False) -> None:
    """Sets the window's size in CSS pixels and the colour scheme."""
    self.call(
      "Emulation.setDeviceMetricsOverride",
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=width < 600,
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    self.call("Emulation.setEmulatedMedia", features=[scheme])

  def screenshot(self, path) -> None:
    """A PNG of what is in sight."""
    pathlib.Path(path).write_bytes(
      base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
    )
