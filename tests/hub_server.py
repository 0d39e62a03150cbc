"""The endpoints of the loopback Hub of hub.py, and what its faults make of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import select
import socket
import struct
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_faults import Fault

if TYPE_CHECKING:
    from hub import Hub

#: The branch with the Parquet copy.
COPY = "refs/convert/parquet"


def files_of(folder: Path) -> list[Path]:
    """The files below ``folder``."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


class Server(ThreadingHTTPServer):
    """Answers for a Hub, in threads of its own, until `end`."""

    daemon_threads = True

    def __init__(self, hub: Hub, port: int) -> None:
        super().__init__(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": hub}))
        self.sockets: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Close the listening socket and all connections."""
        self.shutdown()
        self._thread.join(10)
        self.server_close()
        for connection in list(self.sockets):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """What clients do to connections is no news."""


class _Broken(Exception):
    """The connection is to be closed: that was the fault."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    hub: Hub
    fault: Fault | None = None
    num_written = 0
    is_counted = False

    def setup(self) -> None:
        super().setup()
        self.server.sockets.add(self.connection)  # type: ignore[attr-defined]

    def finish(self) -> None:
        self.server.sockets.discard(self.connection)  # type: ignore[attr-defined]
        super().finish()

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
        self.fault = self.hub.faults.of(self.command, path)
        self.num_written, self.is_counted = 0, False
        try:
            if self.fault is not None and self.fault.status is not None:
                self._send(self.fault.status, b'{"error": "injected"}', self.fault.headers)
            else:
                if self.fault is not None and self.fault.after is None:
                    self._break()
                self._route(path, parts, form)
        except (BrokenPipeError, ConnectionResetError, _Broken):
            self.close_connection = True
        self._count()

    def end_headers(self) -> None:
        """Before they are sent: an answer without a body is whole with them."""
        if self.command == "HEAD":
            self._count()
        super().end_headers()

    def _count(self) -> None:
        """Note the request, once. Before the end of its body is sent: who has that may ask what was counted."""
        if not self.is_counted:
            self.is_counted = True
            path = unquote(urlsplit(self.path).path)
            is_file = "/resolve/" in path or path.startswith("/cdn/")
            with self.hub.lock:
                self.hub.requests.append((self.command, path, self.num_written if is_file else 0))

    def _route(self, path: str, parts: list[str], form: dict[str, list[str]]) -> None:
        told = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        names = parts[2:4] if parts[:1] == ["api"] else parts[1:3]
        readers = self.hub.gated.get("/".join(names))
        if self.hub.token and told != self.hub.token:
            self._error(401, "RepoNotFound", "Invalid username or password.")
        elif readers is not None and told not in readers and not self._is_public(parts):
            what = "Your request to access it awaits a review" if told else "You must be authenticated to access it"
            self._error(
                403 if told else 401, "GatedRepo", f"Access to dataset {'/'.join(names)} is restricted. {what}."
            )
        elif parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            self._api("/".join(parts[2:4]), parts[4:], form)
        elif parts[:1] == ["datasets"] and len(parts) > 5 and parts[3] == "resolve":
            self._file("/".join(parts[1:3]), parts[4], "/".join(parts[5:]), self.hub.is_signed)
        elif parts[:1] == ["cdn"]:
            if parse_qs(urlsplit(self.path).query).get("signature") != [str(self.hub.signature)]:
                self._send(403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>", {})
            else:
                self._file("/".join(parts[1:3]), parts[3], "/".join(parts[4:]))
        else:
            self._error(404, "RepoNotFound", "Not found")

    def _is_public(self, parts: list[str]) -> bool:
        """Of a gated repository: what it is, and which files it has, but not these."""
        return parts[:1] == ["api"]

    def _write(self, data: bytes, is_file: bool = False) -> None:
        """Send the body, or what the fault lets through. is_file: a file's contents, which are counted."""
        fault = self.fault
        is_broken = fault is not None and fault.after is not None and fault.after < len(data)
        if fault is not None and fault.after is not None:
            data = data[: fault.after]
        self.num_written = len(data) if is_file else 0
        self._count()
        self.wfile.write(data)
        if is_broken:
            self._break()

    def _break(self) -> None:
        """What happens instead of the rest of the answer."""
        assert self.fault is not None
        self.wfile.flush()
        if self.fault.end == "stall":
            while not self.hub.faults.released.wait(0.02):
                if select.select([self.connection], [], [], 0)[0]:  # the client has had enough
                    break
        if self.fault.end == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        raise _Broken

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

    def _file(self, repo: str, revision: str, name: str, is_elsewhere: bool = False) -> None:
        if not (self.hub.root / repo).is_dir():
            return self._error(404, "RepoNotFound", "Repository not found")
        base = self.hub.base(repo, revision)
        if base is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        path = base / name
        if not path.is_file():
            return self._error(404, "EntryNotFound", "Entry not found")
        size = path.stat().st_size
        etag = f'"{hashlib.sha1(f"{path} {size}".encode()).hexdigest()}"'
        if is_elsewhere:
            place = f"{self.hub.endpoint}/cdn/{repo}/{revision}/{quote(name)}?signature={self.hub.signature}"
            linked = {"X-Repo-Commit": self._commit(repo, base), "X-Linked-ETag": etag, "X-Linked-Size": str(size)}
            return self._send(302, b"", linked | {"Location": place})
        start, stop, status = 0, size, 200
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(size - int(last), 0)
            stop = min(int(last) + 1, size) if first and last else size
            status = 206
        self.send_response(status)
        self.send_header("X-Repo-Commit", self._commit(repo, base))
        self.send_header("ETag", etag)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        with path.open("rb") as file:
            file.seek(start)
            self._write(file.read(stop - start), is_file=True)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {})

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if not body:
            self._count()
        self.end_headers()
        if self.command != "HEAD":
            self._write(body)
