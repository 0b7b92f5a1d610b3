"""A Hugging Face Hub of the tests: a cache folder of their own, and a server on localhost that answers huggingface_hub as the Hub does."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

A, B = "a" * 40, "b" * 40  # commits


class Cache:
    """A Hugging Face cache in `root`."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root / "hub"))
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(root / "assets"))

    def add(self, repo: str, files: Path, commit: str = A, ref: str = "main") -> Path:
        """Put the files of a folder there as a commit, and a branch that points at it."""
        store = self.root / "hub" / f"models--{repo.replace('/', '--')}"
        snapshot = store / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in files.iterdir():
            if file.is_file():
                (snapshot / file.name).write_bytes(file.read_bytes())
        (store / "refs").mkdir(exist_ok=True)
        (store / "refs" / ref).write_text(commit)
        return snapshot


class Server:
    """repositories: name -> branch -> (commit, folder). asked: the paths of all requests. refuse: name -> (status, X-Error-Code)."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, tuple[str, Path]]] = {}
        self.refuse: dict[str, tuple[int, str]] = {}
        self.asked: list[str] = []

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        path = path.partition("?")[0].removeprefix("/")
        self.asked.append(path)
        words = path.removeprefix("api/models/").split("/")
        repo, rest = "/".join(words[:2]), words[2:]
        if repo in self.refuse:
            status, code = self.refuse[repo]
            return status, {"X-Error-Code": code}, b"{}"
        if repo not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        branches = self.repositories[repo]
        commits = dict(branches.values())
        wanted = rest[1]
        commit = branches[wanted][0] if wanted in branches else wanted
        if commit not in commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = sorted(file for file in commits[commit].iterdir() if file.is_file())
        if rest[0] == "revision":
            siblings = [{"rfilename": file.name} for file in files]
            return 200, {}, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()
        if rest[0] == "tree":
            tree = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)} for f in files
            ]
            return 200, {}, json.dumps(tree).encode()
        file = commits[commit] / "/".join(rest[2:])
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        return 200, {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": commit}, file.read_bytes()


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Run a server and point huggingface_hub at it, online."""
    hub = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
