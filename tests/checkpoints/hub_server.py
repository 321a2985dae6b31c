"""A stand-in for the hub on the loopback interface: it serves folders as repositories, and fails on request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LARGE = 1 << 20
FILES_ONLY = "files"  # in place of an X-Error-Code: the repository can be listed, its files fail
COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>.+))?")
TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Hub:
    """What the stand-in serves, how it misbehaves, and what it was asked for."""

    repositories: dict[str, Path] = field(default_factory=dict)
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)  # repository -> status and X-Error-Code
    ignores_ranges: set[str] = field(default_factory=set)
    cuts_off: set[str] = field(default_factory=set)
    hiccups: dict[str, list[str]] = field(
        default_factory=dict
    )  # repository -> "429", "503" or "cut" of the next ranges
    pause_s: float = 0.0  # between the tenths of a large file
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    sent: dict[str, int] = field(default_factory=dict)  # repository -> bytes of ranges
    url: str = ""
    uploads: dict[str, Uploaded] = field(default_factory=dict)
    refuses_blobs: int = 0  # how many large files are answered with 500 before one is taken
    writers: tuple[str, ...] = ()  # tokens that may write


@dataclass
class Uploaded:
    """A repository that was made here: large files arrive first, and are in it once they are committed."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    puts: int = 0


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_POST(self) -> None:
            self._write()

        def do_PUT(self) -> None:
            self._write()

        def _write(self) -> None:
            """What an upload asks, in order: make, how to send, where to send large files, the files, the commit."""
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append((self.command, self.path, ""))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if self.command == "PUT":  # as to a store behind the hub, without a token
                repo, digest = self.path.removeprefix("/blobs/").rsplit("/", 1)
                if hub.refuses_blobs:
                    hub.refuses_blobs -= 1
                    return self._send(400, b"", {}, True)
                assert _digest(body) == digest
                hub.uploads[repo].blobs[digest] = body
                hub.uploads[repo].puts += 1
                return self._send(200, b"", {}, True)
            if self.path.startswith("/api/validate-yaml"):
                return self._json({"errors": [], "warnings": []}, True)
            if token not in hub.writers:
                return self._send(403, b'{"error": "no right to write"}', {}, True)
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                if repo in hub.uploads:
                    return self._send(409, json.dumps({"url": f"{hub.url}/{repo}"}).encode(), {}, True)
                hub.uploads[repo] = Uploaded(asked.get("private", asked.get("visibility") == "private"))
                return self._json({"url": f"{hub.url}/{repo}"}, True)
            repo = "/".join(self.path.removeprefix("/api/models").strip("/").split("/")[:2]).removesuffix(".git")
            uploaded = hub.uploads[repo]
            if "/preupload/" in self.path:
                files = json.loads(body)["files"]
                modes = [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if each["path"].endswith("safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for each in files
                ]
                return self._json({"files": modes}, True)
            if self.path.endswith("/objects/batch"):
                objects = json.loads(body)["objects"]
                for each in objects:
                    if each["oid"] not in uploaded.blobs:
                        each["actions"] = {"upload": {"href": f"{hub.url}/blobs/{repo}/{each['oid']}"}}
                return self._json({"transfer": "basic", "objects": objects}, True)
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    uploaded.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    uploaded.files[entry["value"]["path"]] = uploaded.blobs[entry["value"]["oid"]]
            self._json({"commitUrl": f"{hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}, True)

        def _answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append((self.command, path, self.headers.get("Range", "")))
            for pattern in (TREE, API, RESOLVE):
                if match := pattern.fullmatch(path):
                    break
            else:
                return self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)
            asked = match.groupdict()
            repo, revision = asked["repo"], asked["revision"] or "main"
            status, code = hub.failures.get(repo, (0, ""))
            if status and (code != FILES_ONLY or pattern is RESOLVE):
                return self._send(status, b"{}", {"X-Error-Code": code} if code else {}, with_body)
            if repo in hub.uploads and pattern is API:
                made = {"id": repo, "sha": COMMIT, "siblings": [], "tags": [], "private": hub.uploads[repo].private}
                return self._json(made, with_body)
            if repo not in hub.repositories:
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
            if revision not in ("main", "v1", COMMIT):
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
            folder = hub.repositories[repo]
            if pattern is RESOLVE:
                return self._file(repo, folder / asked["file"], with_body)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            self._json(_tree(folder, files) if pattern is TREE else _model(repo, folder, files), with_body)

        def _file(self, repo: str, path: Path, with_body: bool) -> None:
            if not path.is_file():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
            content = path.read_bytes()
            headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not wanted or repo in hub.ignores_ranges:
                return self._send(200, content, headers, with_body)
            hiccup = hub.hiccups[repo].pop(0) if hub.hiccups.get(repo) else ""
            if hiccup in ("429", "503"):
                return self._send(int(hiccup), b"", {"Retry-After": "0"}, with_body)
            begin, end = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
            piece = content[begin : begin + 4] if repo in hub.cuts_off else content[begin:end]
            hub.sent[repo] = hub.sent.get(repo, 0) + (len(piece) // 2 if hiccup else len(piece))
            self._send(206, piece, headers, with_body, cut=hiccup == "cut")

        def _json(self, value: Any, with_body: bool) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, with_body)

        def _send(
            self, status: int, body: bytes, headers: dict[str, str], with_body: bool, *, cut: bool = False
        ) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self._slowly(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut

        def _slowly(self, body: bytes) -> None:
            tenth = len(body) // 10 + 1 if hub.pause_s and len(body) > LARGE else len(body)
            for begin in range(0, len(body), tenth or 1):
                self.wfile.write(body[begin : begin + tenth])
                time.sleep(hub.pause_s if tenth < len(body) else 0)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def size_of(path: Path) -> int:
    """As the hub says; of a stand-in for something huge, what its text says."""
    size = path.stat().st_size
    content = path.read_bytes() if size < 20 else b""
    return int(content) if content.isdigit() else size


def _model(repo: str, folder: Path, files: list[Path]) -> dict[str, Any]:
    siblings = [{"rfilename": path.relative_to(folder).as_posix(), "size": size_of(path)} for path in files]
    return {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}


def _tree(folder: Path, files: list[Path]) -> list[dict[str, Any]]:
    return [
        {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in files
    ]
