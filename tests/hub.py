"""A small Hugging Face Hub on the loopback, for tests: the endpoints that the unmodified clients call.

Serves ``root/<org>/<name>/…`` as dataset repositories with one commit, and ``root/.parquet/<org>/<name>/…`` as the
branch with their Parquet copy. Counts requests and the bytes of files that it sent. Plain HTTP, no authentication
unless a ``token`` is given.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

#: The branch with the Parquet copy.
COPY = "refs/convert/parquet"


@dataclass
class Hub:
    """A running Hub. ``requests`` are (method, path, bytes of file content sent), in the order of their end."""

    root: Path
    token: str | None = None
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    endpoint: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def num_bytes(self) -> int:
        """Bytes of file content sent."""
        with self.lock:
            return sum(sent for _, _, sent in self.requests)

    def num_bytes_of(self, ending: str) -> int:
        """Bytes of content sent of files whose path ends so."""
        with self.lock:
            return sum(sent for _, path, sent in self.requests if path.endswith(ending))

    def reset(self) -> None:
        """Forget what was counted."""
        with self.lock:
            self.requests.clear()

    def copy(self, repo: str) -> Path:
        """The folder of the Parquet copy of a repository; a test makes it, if there is to be one."""
        return self.root / ".parquet" / repo

    def commit(self, repo: str, branch: str = "main") -> str:
        """The commit of a repository: it changes with the names and sizes of its files."""
        folder = self.copy(repo) if branch == COPY else self.root / repo
        digest = hashlib.sha1(f"{repo} {branch}".encode())
        for path in files_of(folder):
            digest.update(f"{path.relative_to(self.root)} {path.stat().st_size}\n".encode())
        return digest.hexdigest()

    def base(self, repo: str, revision: str) -> Path | None:
        """The folder with the files of a revision: a branch, or its commit; None: there is no such revision."""
        if (self.root / repo).is_dir() and revision in ("main", self.commit(repo)):
            return self.root / repo
        if self.copy(repo).is_dir() and revision in (COPY, self.commit(repo, COPY)):
            return self.copy(repo)
        return None


def files_of(folder: Path) -> list[Path]:
    """The files below ``folder``."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def serve(root: Path, token: str | None = None) -> Iterator[Hub]:
    """A Hub over ``root`` for the time of the block."""
    hub = Hub(root, token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        form = parse_qs(self.rfile.read(length).decode()) if length else {}
        path = unquote(urlsplit(self.path).path)
        parts = [unquote(part) for part in urlsplit(self.path).path.split("/") if part]
        sent = 0
        try:
            if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
                self._error(401, "RepoNotFound", "Invalid username or password.")
            elif parts[:2] == ["api", "datasets"] and len(parts) >= 4:
                self._api("/".join(parts[2:4]), parts[4:], form)
            elif parts[:1] == ["datasets"] and len(parts) > 5 and parts[3] == "resolve":
                sent = self._file("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
            else:
                self._error(404, "RepoNotFound", "Not found")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        with self.hub.lock:
            self.hub.requests.append((self.command, path, sent))

    def _api(self, repo: str, rest: list[str], form: dict[str, list[str]]) -> None:
        if not (self.hub.root / repo).is_dir():
            return self._error(404, "RepoNotFound", "Repository not found")
        revision = rest[1] if len(rest) >= 2 else "main"
        base = self.hub.base(repo, revision)
        if base is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": path.relative_to(base).as_posix()} for path in files_of(base)]
            info = {"id": repo, "sha": self._commit(repo, base), "private": False, "gated": False, "tags": []}
            return self._json(info | {"siblings": siblings, "disabled": False, "downloads": 0, "likes": 0})
        if rest[0] == "tree":
            folder = base / "/".join(rest[2:])
            if not folder.is_dir():
                return self._error(404, "EntryNotFound", "Entry not found")
            is_recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() == "true"
            found = folder.rglob("*") if is_recursive else folder.iterdir()
            return self._json([self._entry(base, path) for path in sorted(found)])
        if rest[0] == "paths-info":
            paths = [base / name for name in form.get("paths", [])]
            expand = form.get("expand", [""])[0].lower() == "true"
            return self._json([self._entry(base, path, expand) for path in paths if path.exists()])
        return self._error(404, "EntryNotFound", "Unknown endpoint")

    def _entry(self, base: Path, path: Path, expand: bool = False) -> dict[str, object]:
        name = path.relative_to(base).as_posix()
        oid = hashlib.sha1(name.encode()).hexdigest()
        if path.is_dir():
            return {"type": "directory", "oid": oid, "size": 0, "path": name}
        status = path.stat()
        entry: dict[str, object] = {"type": "file", "oid": oid, "size": status.st_size, "path": name}
        if expand:
            date = datetime.fromtimestamp(status.st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
            entry["lastCommit"] = {"id": oid, "title": "a commit", "date": date}
        return entry

    def _commit(self, repo: str, base: Path) -> str:
        return self.hub.commit(repo, COPY) if base == self.hub.copy(repo) else self.hub.commit(repo)

    def _file(self, repo: str, revision: str, name: str) -> int:
        if not (self.hub.root / repo).is_dir():
            return self._error(404, "RepoNotFound", "Repository not found")
        base = self.hub.base(repo, revision)
        if base is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        path = base / name
        if not path.is_file():
            return self._error(404, "EntryNotFound", "Entry not found")
        size = path.stat().st_size
        start, stop, status = 0, size, 200
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(size - int(last), 0)
            stop = min(int(last) + 1, size) if first and last else size
            status = 206
        self.send_response(status)
        self.send_header("X-Repo-Commit", self._commit(repo, base))
        self.send_header("ETag", f'"{hashlib.sha1(f"{path} {size}".encode()).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return 0
        with path.open("rb") as file:
            file.seek(start)
            self.wfile.write(file.read(stop - start))
        return stop - start

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {})

    def _error(self, status: int, code: str, message: str) -> int:
        self._send(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})
        return 0

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
