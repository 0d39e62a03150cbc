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
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shmloader import _native as native
from shmloader.errors import ServiceError, from_wire
from shmloader.prefetch.plan import SetPlan, read_plan
from shmloader.ring import STARTER_BYTE, SUPERVISOR_BYTE, RingFiles

#: A fresh interpreter takes 0.1 s to take its byte; on a machine that swaps, much longer (guessed).
START_TIMEOUT_S = 30.0

_BOOT = str(Path(__file__).with_name("boot.py"))
# What a service must not do: load torch, use more threads than its share, draw progress bars.
_ENVIRONMENT = {
    "USE_TORCH": "0",
    "USE_TF": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # A decoder's temporaries are some 750 kB each. By default glibc gives them back to the kernel after every image
    # (568 page faults an image: 2.8-3.6 ms instead of 1.2-1.7, measured); with both set it keeps them. mallopt(3)
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}
_starting = threading.Lock()  # POSIX locks do not exclude threads of one process


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


def spawn(role: str, fds: dict[str, int]) -> subprocess.Popen[bytes]:
    """Start a service that inherits ``fds`` and nothing else but stderr."""
    return subprocess.Popen(
        [sys.executable, _BOOT, role, json.dumps(fds)],
        pass_fds=tuple(fds.values()),
        stdin=subprocess.DEVNULL,
        stdout=2 if _is_open(2) else subprocess.DEVNULL,
        env={**os.environ, **_ENVIRONMENT},
        start_new_session=True,
    )


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


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
