"""The page, served on this machine alone."""

import contextlib
import functools
import http.client
import http.server
import signal
import tempfile
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from kmq_jax.core.errors import UserError, reason_of

HOST = "127.0.0.1"


def own_hosts(port: int) -> set[str]:
    """What a browser sends as `Host` for a page of this machine; the usual port goes without saying.

    >>> sorted(own_hosts(80))
    ['127.0.0.1', '127.0.0.1:80', 'localhost', 'localhost:80']
    """
    names = {HOST, "localhost"}
    return {f"{name}:{port}" for name in names} | (names if port == http.client.HTTP_PORT else set())


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Answers for the files of one directory, to pages of its own origin."""

    # Not by the system's table, which may not know .mjs and .wasm.
    extensions_map = {
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".css": "text/css",
        ".wasm": "application/wasm",
        "": "application/octet-stream",
    }

    def send_head(self) -> Any:
        # Against DNS rebinding: a page from elsewhere could point its own name here, and read the model.
        if self.headers.get("Host", "") not in own_hosts(self.server.server_port):  # type: ignore[attr-defined]
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        return super().send_head()

    def list_directory(self, path: object) -> None:
        self.send_error(HTTPStatus.NOT_FOUND)

    def end_headers(self) -> None:
        # The first two let the page use threads; a static host does without.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Content-Security-Policy", "frame-ancestors 'none'")  # the page itself holds the rest
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, *words: object) -> None:
        pass


def server(folder: Path, port: int = 0) -> http.server.ThreadingHTTPServer:
    """A server of a directory on 127.0.0.1, listening; `serve_forever` runs it.

    Args:
        folder: what is served.
        port: 0 takes a free one.

    Raises:
        UserError: the port is taken.
    """
    try:
        return http.server.ThreadingHTTPServer((HOST, port), functools.partial(_Handler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        raise UserError(f"`port` (={port}): {reason_of(error)}") from error


def serve(write: Callable[[Path], None], port: int, tell: Callable[[str], None]) -> None:
    """Serves a page until the process is interrupted (Ctrl-C) or told to end (SIGTERM).

    Args:
        write: writes the page into a directory, which is gone afterwards.
        port: 0 takes a free one.
        tell: is called with the page's address once it is served.

    Raises:
        UserError: the port is taken.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the directory is removed
    try:
        with tempfile.TemporaryDirectory() as place, server(Path(place), port) as running:
            write(Path(place))
            with contextlib.suppress(KeyboardInterrupt):
                tell(f"http://{HOST}:{running.server_port}/  (Ctrl-C ends)")
                running.serve_forever()
    finally:
        signal.signal(signal.SIGTERM, before)
