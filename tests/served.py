"""A web server on 127.0.0.1 that behaves as badly as a test asks."""

from __future__ import annotations

import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Served:
    """What the server has, how it misbehaves, and what it was asked: cuts are lengths after which an answer breaks off."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.cuts, self.ranges, self.tags = files, [], True, True
        self.status: list[int] = []  # answers to give instead, one a request
        self.requests: list[tuple[str, str | None]] = []  # (path, Range)
        self.tokens: list[str | None] = []  # the Authorization header of each request
        self.url = ""

    def tag(self, path: str) -> str:
        return f'"{hashlib.sha256(self.files[path]).hexdigest()[:8]}"'


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        served, wanted = self.server.served, self.headers.get("Range")
        served.requests.append((self.path, wanted))
        served.tokens.append(self.headers.get("Authorization"))
        if served.status and (status := served.status.pop(0)) != 200:
            return self.send_error(status)
        if self.path not in served.files:
            return self.send_error(404)
        data, start = served.files[self.path], 0
        fresh = self.headers.get("If-Range") in (None, served.tag(self.path))
        if wanted and served.ranges and fresh:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        if served.tags:
            self.send_header("ETag", served.tag(self.path))
        self.end_headers()
        self.wfile.write(data[start:][: served.cuts.pop(0) if served.cuts else None])

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(files: dict[str, bytes]):
    """Serves {"/path": bytes}; gives the Served, whose url begins every address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.served = Served(files)
    server.served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
