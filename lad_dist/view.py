"""Live view of a run: its report page over HTTP on the loopback address, rendered anew when the run has moved on.

Nothing is written into the run folder. The address holds a random token; every other request is answered 404, so another
user of the machine cannot read the page.
"""

from __future__ import annotations

import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lad_dist import recipe_file
from lad_dist.errors import LadDistError, StorageError
from lad_dist.report import contents, page, pictures
from lad_dist.rundir import RunDir
from lad_dist.status import Follower

LOOPBACK = "127.0.0.1"
_SHORTEST = 1.0  # seconds between two renderings, however many browsers ask
_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class LivePage:
    """The report page of a run as it is now. ``every``: seconds after which a browser reloads it, until the run has ended."""

    def __init__(self, folder: Path, every: float) -> None:
        """Raises RunDirError if ``folder`` is not a run folder."""
        self.run, self._every = RunDir.existing(folder), every
        self._follower, self._lock = Follower(folder), threading.Lock()
        self._seen: object = None
        self._looked, self._html, self._ended = 0.0, "", False

    def html(self) -> str:
        """Return the page, rendered anew if the run has moved on since. Raises as ``write_report`` does."""
        with self._lock:
            if not self._html or time.monotonic() - self._looked >= _SHORTEST:
                status = self._follower.read()
                self._looked, self._ended = time.monotonic(), status.ended
                if not self._html or status.version != self._seen:
                    found = contents.read(recipe_file.load(self.run.recipe), self.run)
                    shown = pictures.gallery(found.distilled) if found.distilled else None
                    self._html, self._seen = page.render(found, shown), status.version
            again = "" if self._ended else f'<meta http-equiv="refresh" content="{self._every:g}">'
            return self._html.replace("<head>", f"<head>{again}", 1)

    def picture(self, name: str) -> bytes | None:
        """Return a picture that lies beside the page, if the run's report has it."""
        file = self.run.report / name
        return file.read_bytes() if name in (page.SYNTHETIC, page.INITIAL) and file.is_file() else None


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing where a browser has gone away before its answer; a traceback otherwise."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextmanager
def served(folder: Path, port: int, every: float) -> Iterator[str]:
    """Serve the page of a run while the block runs; yields its address. ``port`` 0: any free one.

    Raises:
        RunDirError: ``folder`` is not a run folder.
        StorageError: the port cannot be used.
    """
    live, token = LivePage(folder, every), secrets.token_urlsafe(24)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.partition("?")[0].removeprefix(f"/{token}/")
            if name == self.path.partition("?")[0]:
                return self._send(404, b"not found", "text/plain")
            if name:
                found = live.picture(name)
                return (
                    self._send(404, b"not found", "text/plain")
                    if found is None
                    else self._send(200, found, "image/png")
                )
            try:
                text, code = live.html(), 200
            except LadDistError as error:  # as a page, since the next reload may find it mended
                text, code = f"{error}\n", 503
            self._send(code, text.encode(), "text/html; charset=utf-8" if code == 200 else "text/plain; charset=utf-8")

        def _send(self, code: int, body: bytes, kind: str) -> None:
            self.send_response(code)
            for header, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing: the address holds the token."""

    try:
        server = _Server((LOOPBACK, port), Handler)
    except OSError as error:
        raise StorageError(f"--port {port}: {error.strerror or error}; valid: a free port, or 0 for any") from error
    thread = threading.Thread(target=server.serve_forever, name="view", daemon=True)
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{server.server_address[1]}/{token}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
