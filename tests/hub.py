"""A small Hugging Face Hub on the loopback, for tests: the endpoints that the unmodified clients call.

Serves ``root/<org>/<name>/…`` as dataset repositories with one commit, and ``root/.parquet/<org>/<name>/…`` as the
branch with their Parquet copy. Counts requests and the bytes of files that it sent. Plain HTTP, no authentication
unless a ``token`` is given. Does wrong what its ``faults`` say (hub_faults.py), dies and comes back when it is told.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hub_faults import Faults
from hub_server import COPY, Server, files_of


@dataclass
class Hub:
    """A running Hub. ``requests`` are (method, path, bytes of file content sent), in the order of their end.

    gated: repositories that are given only to those tokens. is_signed: files lie elsewhere, at addresses that expire
    (`expire`), and to which a redirect leads.
    """

    root: Path
    token: str | None = None
    gated: dict[str, set[str]] = field(default_factory=dict)
    is_signed: bool = False
    signature: int = 0
    faults: Faults = field(default_factory=Faults)
    server: Server | None = None
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

    def expire(self) -> None:
        """The addresses that were given out until now lead nowhere."""
        self.signature += 1

    def die(self) -> None:
        """No connection is accepted any more, and those that there are end."""
        if self.server is not None:
            self.server.end()
            self.server = None

    def live(self) -> None:
        """Be there, at the address that it had before."""
        port = int(self.endpoint.rpartition(":")[2]) if self.endpoint else 0
        self.server = Server(self, port)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

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


@contextmanager
def serve(root: Path, token: str | None = None) -> Iterator[Hub]:
    """A Hub over ``root`` for the time of the block."""
    hub = Hub(root, token)
    hub.live()
    try:
        yield hub
    finally:
        hub.faults.clear()
        hub.die()
