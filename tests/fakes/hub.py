"""A hub on loopback, as `huggingface_hub` knows it, with a CDN beside it, and everything that goes wrong.

The API tells of repositories and their files; `resolve` gives small files itself and sends one to the CDN, on
another port, for large ones, with an address that is signed. Each request is noted.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".gguf", ".safetensors", ".bin", "tokenizer.json")
"""Kept with Git LFS, so that their SHA-256 is told."""
_PIECE = 64 * 1024
_SIGNATURE = "5d4f"


@dataclass
class Faults:
    """What goes wrong with one file."""

    cuts: list[int] = field(default_factory=list)
    """The next answers end after so many bytes each."""
    flipped: int | None = None
    """This byte is another one than was promised."""
    told_size: int | None = None
    """What the API says of its size."""
    unavailable: int = 0
    """So many answers are 503."""
    endless: bool = False
    knows_ranges: bool = True
    pause_seconds: float = 0.0
    """Before each piece of 64 KiB."""
    hold_after: int | None = None
    """No more bytes after so many, until `FakeHub.release` is set."""
    location: str | None = None
    """Where one is sent to, in place of the CDN."""


@dataclass
class Repo:
    files: dict[str, bytes]
    tags: list[str] = field(default_factory=list)
    gated: bool = False
    private: bool = False
    more_siblings: list[dict[str, Any]] = field(default_factory=list)
    """As the API would list them."""
    faults: dict[str, Faults] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def siblings(self) -> list[dict[str, Any]]:
        return [self._sibling(name, content) for name, content in self.files.items()] + self.more_siblings

    def _sibling(self, name: str, content: bytes) -> dict[str, Any]:
        told = self.faults.get(name, Faults()).told_size
        size = len(content) if told is None else told
        found: dict[str, Any] = {"rfilename": name, "size": size, "blobId": blob_id(content)}
        if name.endswith(LARGE):
            sha256 = hashlib.sha256(content).hexdigest()
            found |= {"blobId": blob_id(sha256.encode())}  # of the pointer that lies in git in its place
            found |= {"lfs": {"sha256": sha256, "size": size, "pointerSize": 135}}
        return found


@dataclass(frozen=True)
class Asked:
    """One request."""

    server: str
    method: str
    path: str
    range: str | None
    token: str | None
    agent: str


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub:
    """Runs while the block lasts."""

    def __init__(self, *, token: str | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.token = token
        """Whom gated and private repositories are shown."""
        self.asked: list[Asked] = []
        self.sent: dict[str, int] = {}
        """Bytes of each file's content that went out, by file name."""
        self.unavailable = 0
        """So many answers of the API are 503."""
        self.broken_api: bytes | None = None
        """What the API answers in place of what it should."""
        self.release = threading.Event()
        self._lock = threading.Lock()
        self._old: dict[tuple[str, str], Repo] = {}
        self._hub = _Server(self, "hub")
        self._cdn = _Server(self, "cdn")

    def __enter__(self) -> FakeHub:
        for server in (self._hub, self._cdn):
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._hub.server_port}"

    @property
    def cdn(self) -> str:
        return f"http://127.0.0.1:{self._cdn.server_port}"

    def add(self, name: str, files: dict[str, bytes], **more: Any) -> Repo:
        """A repository, or its next commit: the earlier one can still be asked for."""
        if name in self.repos:
            self._old[name, self.repos[name].commit] = self.repos[name]
        self.repos[name] = Repo(files, **more)
        return self.repos[name]

    def at(self, name: str, revision: str) -> Repo | None:
        repo = self.repos.get(name)
        if repo is None or revision in ("main", repo.commit):
            return repo
        return self._old.get((name, revision))

    def note(self, asked: Asked) -> None:
        with self._lock:
            self.asked.append(asked)

    def count(self, name: str, sent: int) -> None:
        with self._lock:
            self.sent[name] = self.sent.get(name, 0) + sent

    def asked_for(self, part: str, server: str = "cdn") -> list[Asked]:
        return [asked for asked in self.asked if asked.server == server and part in unquote(asked.path)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: FakeHub, role: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.role = role

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave in the middle are expected."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # type: ignore[assignment]
    _ERRORS: ClassVar = {"GatedRepo": 403, "RepoNotFound": 404, "RevisionNotFound": 404, "EntryNotFound": 404}

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server.hub
        asked = Asked(
            self.server.role,
            self.command,
            self.path,
            self.headers.get("Range"),
            self.headers.get("Authorization"),
            self.headers.get("User-Agent", ""),
        )
        hub.note(asked)
        path = unquote(urlsplit(self.path).path)
        if self.server.role == "cdn":
            self._from_cdn(path.strip("/"))
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            name, _, rest = path.strip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            self._resolve(name, revision, file)
        else:
            self._error("EntryNotFound")

    def _api(self, rest: str) -> None:
        hub = self.server.hub
        name, _, revision = rest.partition("/revision/")
        if hub.unavailable > 0:
            hub.unavailable -= 1
            self._plain(503, b"busy", {"Retry-After": "0"})
            return
        if hub.broken_api is not None:
            self._plain(200, hub.broken_api)
            return
        repo = self._repo(name, revision or "main")
        if repo is None:
            return
        found = {
            "id": name,
            "sha": repo.commit,
            "tags": repo.tags,
            "siblings": repo.siblings(),
            "gated": "manual" if repo.gated else False,
        }
        self._plain(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name, revision)
        if repo is None:
            return
        if repo.gated and not self._may_read():
            self._error("GatedRepo")
        elif file not in repo.files:
            self._error("EntryNotFound")
        elif not file.endswith(LARGE):
            self._content(repo, file, {"X-Repo-Commit": repo.commit})
        else:
            digest = hashlib.sha256(repo.files[file]).hexdigest()
            place = f"{self.server.hub.cdn}/{name}/{repo.commit}/{file}"
            faults = repo.faults.get(file, Faults())
            self._plain(
                302,
                b"",
                {
                    "Location": faults.location or f"{place}?X-Amz-Signature={_SIGNATURE}",
                    "X-Repo-Commit": repo.commit,
                    "X-Linked-Etag": f'"{digest}"',
                    "X-Linked-Size": str(len(repo.files[file])),
                    "ETag": f'"{digest}"',
                },
            )

    def _from_cdn(self, path: str) -> None:
        org, model, commit, file = path.split("/", 3)
        repo = self.server.hub.at(f"{org}/{model}", commit)
        signature = parse_qs(urlsplit(self.path).query).get("X-Amz-Signature")
        if repo is None or signature != [_SIGNATURE]:
            self._plain(403, b"not signed")
        else:
            self._content(repo, file, {})

    def _content(self, repo: Repo, file: str, headers: dict[str, str]) -> None:
        faults = repo.faults.get(file, Faults())
        if faults.unavailable > 0:
            faults.unavailable -= 1
            self._plain(503, b"busy", {"Retry-After": "0"})
            return
        content = repo.files[file]
        if faults.flipped is not None:
            flipped = bytearray(content)
            flipped[faults.flipped] ^= 0x10
            content = bytes(flipped)
        begin = self._begin(faults, len(content))
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        if faults.endless:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(content) - begin))
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self._send(file, content[begin:], faults)

    def _begin(self, faults: Faults, size: int) -> int:
        asked = self.headers.get("Range")
        if asked is None or not faults.knows_ranges:
            return 0
        begin = int(asked.removeprefix("bytes=").removesuffix("-"))
        return begin if begin < size else 0

    def _send(self, file: str, content: bytes, faults: Faults) -> None:
        cut = faults.cuts.pop(0) if faults.cuts else None
        for piece in self._pieces(content if cut is None else content[:cut], faults):
            time.sleep(faults.pause_seconds)
            self.wfile.write(piece)
            self.server.hub.count(file, len(piece))
        if cut is not None:
            self.close_connection = True

    def _pieces(self, content: bytes, faults: Faults) -> Iterator[bytes]:
        hold = faults.hold_after
        if hold is not None:
            yield content[:hold]
            self.server.hub.release.wait(60)
            content = content[hold:]
        for start in range(0, len(content), _PIECE):
            yield content[start : start + _PIECE]
        while faults.endless and not self.server.hub.release.is_set():
            yield b"\0" * _PIECE

    def _repo(self, name: str, revision: str) -> Repo | None:
        """None: it was refused, and answered."""
        hub = self.server.hub
        repo = hub.at(name, revision)
        if repo is None:
            self._error("RevisionNotFound" if name in hub.repos else "RepoNotFound")
        elif repo.private and not self._may_read():
            self._plain(401, b'{"error": "Invalid username or password."}')
            return None
        return repo

    def _may_read(self) -> bool:
        token = self.server.hub.token
        return token is not None and self.headers.get("Authorization") == f"Bearer {token}"

    def _error(self, code: str) -> None:
        self._plain(self._ERRORS[code], b"{}", {"X-Error-Code": code, "X-Error-Message": "no"})

    def _plain(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for header, value in (headers or {}).items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
