"""Chromium without a window, driven over two pipes by its DevTools protocol: no driver, no package."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)

# The browser reads descriptor 3 and writes descriptor 4.
_WIRED = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
for given, wanted in ((read, 3), (write, 4)):
    os.dup2(given, wanted)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Page:
    """A page of a browser.

    Attributes:
        events: what the browser has told so far, oldest first.
    """

    def __init__(self, read: int, write: int):
        self._read, self._write = read, write
        self._rest, self._last, self._session = b"", 0, None
        self.events: list[dict] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        """Asks the browser for something, and gives its answer."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") != self._last:
                self.events.append(answer)
                continue
            assert "error" not in answer, f"{method}: {answer['error']}"
            return answer["result"]

    def _next(self) -> dict:
        while b"\0" not in self._rest:
            more = os.read(self._read, 1 << 20)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def do(self, script: str):
        """The value of an expression, once its promise is kept. As if a user had asked: sound may play."""
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 30):
        """The value of an expression, once it is true."""
        end = time.monotonic() + seconds
        while not (value := self.do(script)):
            assert time.monotonic() < end, f"{script} is not so after {seconds} s; the page says: {self.text()}"
            time.sleep(0.05)
        return value

    def close(self) -> None:
        """Ends the browser."""
        self._session = None
        self.call("Browser.close")

    def text(self) -> str:
        """What the page shows."""
        return self.do("document.body.innerText")

    def open(self, address: str) -> None:
        """Goes to an address."""
        assert "errorText" not in self.call("Page.navigate", url=address)
        self.wait("document.readyState == 'complete'")

    def give(self, selector: str, *files: Path) -> None:
        """Chooses files in an `<input type=file>`."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])


@contextlib.contextmanager
def browser(home: Path, *flags: str) -> Iterator[Page]:
    """Starts a browser with a home of its own; the test is skipped where there is none."""
    program = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no Chromium is installed")
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    command = [program, *FLAGS, f"--user-data-dir={home}", *flags]
    with (home.parent / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-ISc", _WIRED, str(theirs_in), str(theirs_out), *command],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        page = Page(ours_in, ours_out)
        yield page
        page.close()
        process.wait(20)
    finally:
        for end in (ours_in, ours_out):
            os.close(end)
        if process.poll() is None:
            process.kill()
            process.wait()
