"""`fst watch RUN`: the run folder as a live page, served to this machine only.

The standard library's server on 127.0.0.1, one HTML file (watch.html) without anything from elsewhere, and `/data`, which report/follow.py makes. Only
GET, only from a page that was opened as localhost: a page of another site that makes its own name point here (DNS rebinding) has another Host. Much
of what is shown was written by models; the page sets it as text, and its Content-Security-Policy lets no script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from fst_fast.errors import UserError, one_line
from fst_fast.report.follow import Follower
from fst_fast.run.folder import disk_errors

ADDRESS = "127.0.0.1"
LOCAL = ("127.0.0.1", "localhost")


def open_server(run_dir: Path, *, host: str, port: int) -> ThreadingHTTPServer:
    """A server that has its port; `serve_forever` runs it. Raises UserError for a folder that is no run, another host, a port that is taken."""
    if host not in LOCAL:
        raise UserError(
            f"--host {host}: the page is served on this machine only, {ADDRESS}; from another one: ssh -L {port or 8000}:{ADDRESS}:{port or 8000} "
            "THIS-MACHINE, then open the page there"
        )
    follower = Follower(run_dir)
    page = files("fst_fast.commands").joinpath("watch.html").read_bytes()
    with disk_errors(f"--port {port} cannot be taken"):
        server = ThreadingHTTPServer((ADDRESS, port), _handler(follower, page))
    server.daemon_threads = True
    return server


def watch(run_dir: Path, *, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C."""
    with open_server(run_dir, host=host, port=port) as server:
        say(f"http://{ADDRESS}:{server.server_address[1]}/ shows {run_dir}; Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("")


def policy(page: bytes) -> str:
    """The Content-Security-Policy under which the page's own script and style run, and nothing else."""
    hashes = {
        tag: base64.b64encode(hashlib.sha256(body).digest()).decode()
        for tag in ("script", "style")
        for body in re.findall(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), page, re.DOTALL)
    }
    return (
        f"default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        f"script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'"
    )


def _handler(follower: Follower, page: bytes) -> type[BaseHTTPRequestHandler]:
    headers = {
        "Content-Security-Policy": policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }

    class Handler(BaseHTTPRequestHandler):
        timeout = 30

        def do_GET(self) -> None:
            host = re.sub(r":\d+$", "", self.headers.get("Host", ""))
            url = urlsplit(self.path)
            if host not in LOCAL:
                self._send(HTTPStatus.FORBIDDEN, "text/plain", b"open this page as localhost\n")
            elif url.path == "/":
                self._send(HTTPStatus.OK, "text/html", page)
            elif url.path == "/data":
                self._send(HTTPStatus.OK, "application/json", _data(follower, dict(parse_qsl(url.query))))
            else:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", b"there is / and /data\n")

        def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing of each request."""

    return Handler


def _data(follower: Follower, have: dict[str, str]) -> bytes:
    try:
        found: dict[str, Any] = follower.snapshot(have)
    except (UserError, OSError) as error:
        found = {"error": one_line(str(error))}
    return json.dumps(found, allow_nan=False).encode()
