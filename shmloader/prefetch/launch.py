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
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import shmloader._native as native
from shmloader.errors import ServiceError, from_wire
from shmloader.files import CREATOR_BYTE, STARTER_BYTE, SUPERVISOR_BYTE, RingFiles
from shmloader.log_pipe import LogPipe
from shmloader.prefetch.plan import SetPlan, read_plan
from shmloader.prefetch.spawn import spawn

#: A fresh interpreter takes 0.1 s to take its byte; on a machine that swaps, much longer (guessed).
START_TIMEOUT_S = 30.0
#: A supervisor that is killed while it starts says nothing against the next one; this many in a row do (guessed).
START_ATTEMPTS = 3

_starting = threading.Lock()  # POSIX locks do not exclude threads of one process
# Another thread of the parent may have held it when this process was forked.
os.register_at_fork(after_in_child=lambda: globals().update(_starting=threading.Lock()))


@dataclass(frozen=True)
class SetFiles:
    """All open files of a set in this process: what a client needs to read, and to start services."""

    ring: RingFiles
    payload_fd: int
    plan_fd: int
    spill_fd: int | None = None
    """Of the file for encoded chunks on disk (spill_file.py); None: there is none."""
    log: LogPipe | None = None
    """What the services log; None: they write it to stderr."""

    def fds(self) -> dict[str, int]:
        """Descriptors by name, as a service takes them."""
        ring = self.ring
        fds = {
            "control": ring.control_fd,
            "ring": ring.ring_fd,
            "lock": ring.lock_fd,
            "deaths": ring.deaths_fd,
            "quarantine": ring.quarantine_fd,
            "payload": self.payload_fd,
            "plan": self.plan_fd,
        }
        if self.spill_fd is not None:
            fds["spill"] = self.spill_fd
        if self.log is not None:
            fds["log"] = self.log.write_fd
        return fds

    def close(self) -> None:
        """Close them all."""
        self.ring.close()
        os.close(self.payload_fd)
        os.close(self.plan_fd)
        if self.spill_fd is not None:
            os.close(self.spill_fd)
        if self.log is not None:
            self.log.close()


def start_set(files: SetFiles) -> SetPlan:
    """Start the services of a new set; returns its plan once readers can attach.

    Raises:
        SourceError, OptionError, …: what the planner found; ServiceError: it died without a word.
    """
    # Until this process is a client, this says that it lives. Given up by closing the files, or by dying.
    fcntl.lockf(files.ring.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, CREATOR_BYTE)
    with _supervisor(files, "status") as reader:
        answer = _read_line(reader, files.log)
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

    Raises:
        ServiceError: none comes up.
    """
    lock_fd = files.ring.lock_fd
    if native.byte_holder(lock_fd, SUPERVISOR_BYTE) or not _starting.acquire(blocking=False):
        return False
    try:
        with _byte(lock_fd, STARTER_BYTE) as mine:
            if not mine or native.byte_holder(lock_fd, SUPERVISOR_BYTE):
                return False
            for _ in range(START_ATTEMPTS):
                with _supervisor(files, "up") as reader:
                    if _is_readable(reader, START_TIMEOUT_S) and os.read(reader, 1):
                        return True
                if native.byte_holder(lock_fd, SUPERVISOR_BYTE):
                    return False
            raise ServiceError(
                f"The set's supervisor process is gone, and {START_ATTEMPTS} new ones did not come up; what they wrote "
                "to stderr may say why (memory, or the limit on processes?).",
                role="supervisor",
            )
    finally:
        _starting.release()


@contextlib.contextmanager
def _supervisor(files: SetFiles, answer: str) -> Iterator[int]:
    """Start a supervisor; gives the end of a pipe from which to read its ``answer`` ("status": plans first; "up")."""
    reader, writer = os.pipe()
    try:
        try:
            # It forks at once; what we wait for is the launcher, so that no zombie stays with the user's process.
            spawn("supervisor", files.fds() | {answer: writer}).wait()
        except OSError as error:
            raise ServiceError(
                f"The set's supervisor process cannot be started: {error}. It is run by {sys.executable!r}: see that "
                "this is a Python interpreter (sys.executable), and that memory and processes are not used up (ulimit "
                "-u).",
                role="supervisor",
            ) from error
        finally:
            os.close(writer)
        yield reader
    finally:
        os.close(reader)


def _is_readable(fd: int, timeout_s: float) -> bool:
    poll = select.poll()  # not select(): it takes no descriptor above 1023
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _read_line(fd: int, log: LogPipe | None) -> bytes:
    """What comes until the end of a line, or of the pipe: a process forked meanwhile may hold that open.

    Meanwhile what the services log is shown: a plan may take long.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if log is not None:
        poll.register(log.read_fd, select.POLLIN)
    data = b""
    while not data.endswith(b"\n"):
        ready = dict(poll.poll())
        if log is not None and not log.show():  # somebody else does: not to be woken for it again and again
            poll.unregister(log.read_fd)
            log = None
        if fd in ready:
            if not (chunk := os.read(fd, 1 << 16)):
                break
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
