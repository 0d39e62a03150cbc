"""Starting services: a set's first supervisor, and another when it is gone.

Any client of a set may start its supervisor: whoever takes the starter byte of the lock inode does. The supervisor
holds the supervisor byte for as long as it lives, so there is never more than one that works.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import shmloader._native as native
from shmloader.errors import ServiceError, from_wire
from shmloader.prefetch.plan import SetPlan, read_plan
from shmloader.prefetch.spawn import spawn
from shmloader.ring import STARTER_BYTE, SUPERVISOR_BYTE, RingFiles

#: A fresh interpreter takes 0.1 s to take its byte; on a machine that swaps, much longer (guessed).
START_TIMEOUT_S = 30.0

_starting = threading.Lock()  # POSIX locks do not exclude threads of one process
# Another thread of the parent may have held it when this process was forked.
os.register_at_fork(after_in_child=lambda: globals().update(_starting=threading.Lock()))


@dataclass(frozen=True)
class SetFiles:
    """All open files of a set in this process: what a client needs to read, and to start services."""

    ring: RingFiles
    payload_fd: int
    plan_fd: int

    def fds(self) -> dict[str, int]:
        """Descriptors by name, as a service takes them."""
        ring = self.ring
        return {
            "control": ring.control_fd,
            "ring": ring.ring_fd,
            "lock": ring.lock_fd,
            "payload": self.payload_fd,
            "plan": self.plan_fd,
        }

    def close(self) -> None:
        """Close them all."""
        self.ring.close()
        os.close(self.payload_fd)
        os.close(self.plan_fd)


def start_set(files: SetFiles) -> SetPlan:
    """Start the services of a new set; returns its plan once readers can attach.

    Raises:
        SourceError, OptionError, …: what the planner found; ServiceError: it died without a word.
    """
    reader, writer = os.pipe()
    try:
        _spawn_supervisor(files, writer)
    finally:
        os.close(writer)
    try:
        answer = _read_all(reader)
    finally:
        os.close(reader)
    if not answer:
        raise ServiceError(
            "The supervisor process died while it was starting; what it wrote to stderr may say why. "
            "SHMLOADER_LOG=DEBUG shows more.",
            role="supervisor",
        )
    told = json.loads(answer)
    if "error" in told:
        raise from_wire(told["error"])
    plan = read_plan(files.plan_fd)
    assert plan is not None
    return plan


def ensure_supervisor(files: SetFiles) -> bool:
    """See that a supervisor lives; start one if not. True if this call started one.

    For any attached client, when it has to wait: costs a system call when all is well.
    """
    lock_fd = files.ring.lock_fd
    if native.byte_holder(lock_fd, SUPERVISOR_BYTE) or not _starting.acquire(blocking=False):
        return False
    try:
        with _byte(lock_fd, STARTER_BYTE) as mine:
            if not mine or native.byte_holder(lock_fd, SUPERVISOR_BYTE):
                return False
            _spawn_supervisor(files, None)
            until = time.monotonic() + START_TIMEOUT_S
            while not native.byte_holder(lock_fd, SUPERVISOR_BYTE):
                if time.monotonic() > until:
                    raise ServiceError("A new supervisor process did not come up", role="supervisor")
                select.select([], [], [], 0.01)
            return True
    finally:
        _starting.release()


def _spawn_supervisor(files: SetFiles, status_fd: int | None) -> None:
    fds = files.fds() | ({} if status_fd is None else {"status": status_fd})
    # It forks at once; what we wait for is the launcher, so that no zombie stays with the user's process.
    spawn("supervisor", fds).wait()


def _read_all(fd: int) -> bytes:
    data = b""
    while chunk := os.read(fd, 1 << 16):
        data += chunk
    return data


@contextlib.contextmanager
def _byte(fd: int, offset: int) -> Iterator[bool]:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
    except (BlockingIOError, PermissionError):
        yield False
        return
    try:
        yield True
    finally:
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, offset)
