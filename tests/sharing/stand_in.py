"""A hub on 127.0.0.1 that keeps data set repositories in memory: the requests that huggingface_hub makes to push and pull."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_tests"


@dataclass
class Repository:
    """Commits by id, each a file's bytes by name; ``refs`` name commits."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        content = b"".join(name.encode() + hashlib.sha1(data).digest() for name, data in sorted(files.items()))
        oid = hashlib.sha1(str(len(self.commits)).encode() + content).hexdigest()
        self.commits[oid], self.refs["main"] = files, oid
        return oid

    @property
    def files(self) -> dict[str, bytes]:
        """Of the main branch."""
        return self.commits[self.refs["main"]]


class Hub(ThreadingHTTPServer):
    """``repositories`` by OWNER/NAME; ``seen``: method and path of every request; ``failing``: answer 503 to all."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.seen: list[str] = []
        self.failing = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers in the block."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._begun()
        if self.server.failing:
            return self._refused(503, "")
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            name, what, revision = found[1], found[2], found[3] or "main"
        elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, what, revision = found[1], found[3], found[2]
        else:
            return self._refused(404, "")
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self._authorized):
            return self._refused(404, "RepoNotFound")
        oid = repository.refs.get(revision, revision)
        if oid not in repository.commits:
            return self._refused(404, "RevisionNotFound")
        files = repository.commits[oid]
        if what == "tree":
            entries = [{"type": "file", "path": n, "size": len(b), "oid": _blob(b)} for n, b in files.items()]
            return self._answer(entries)
        if what in (None, "revision"):
            siblings = [{"rfilename": n} for n in files]
            return self._answer({"id": name, "sha": oid, "private": repository.private, "siblings": siblings})
        if what not in files:
            return self._refused(404, "EntryNotFound")
        self._send(200, files[what], {"ETag": f'"{_blob(files[what])}"', "X-Repo-Commit": oid})

    def do_POST(self) -> None:
        path = self._begun()
        body = self._body()
        if self.server.failing:
            return self._refused(503, "")
        if not self._authorized:
            return self._refused(401, "")
        if path == "/api/validate-yaml":
            head = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            assert {"license", "tags", "pretty_name"} <= set(head)
            return self._answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        found = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/(preupload|commit)/main", path)
        repository = self.server.repositories[found[1]] if found else None
        if found is None or repository is None:
            return self._refused(404, "RepoNotFound")
        if found[2] == "preupload":
            wanted = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer({"files": wanted})
        oid = self._commit(repository, [json.loads(line) for line in body.splitlines()])
        if oid is None:
            return self._refused(412, "")
        self._answer({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{found[1]}/commit/{oid}"})

    def _create(self, asked: dict[str, Any]) -> None:
        assert asked["type"] == "dataset"
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "somebody-else":
            return self._refused(403, "")
        if name in self.server.repositories:
            return self._answer({"error": "You already created this dataset repo", "url": name}, 409)
        made = self.server.repositories[name] = Repository(private=asked.get("visibility") == "private")
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self._answer({"url": f"{self.server.url}/datasets/{name}"})

    def _commit(self, repository: Repository, lines: list[dict[str, Any]]) -> str | None:
        files = dict(repository.files)
        if lines[0]["value"].get("parentCommit") != repository.refs["main"]:
            return None
        for line in lines[1:]:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            else:
                assert line["key"] == "deletedFile"
                del files[line["value"]["path"]]
        return repository.commit(files)

    @property
    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _begun(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.server.seen.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, document: object, status: int = 200) -> None:
        self._send(status, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _refused(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _blob(content: bytes) -> str:
    """git's id of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
