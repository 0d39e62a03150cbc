"""The files of a set: memfds that its processes share, and how the control memory is laid out.

A *set* is what the processes around one dataset share. `RingFiles` is what travels between processes; `Ring`
(ring.py) is one process's attachment to them.
"""

from __future__ import annotations

import fcntl
import os
import uuid as uuid_module
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import shmloader._native as native
from shmloader.quarantine import Quarantine
from shmloader.sizes import CHUNKS_PER_ORDER, Sizes

#: Bytes of the lock inode beyond the clients': who holds them is the supervisor, is starting one, or made the
#: set.
SUPERVISOR_BYTE = 1 << 20
STARTER_BYTE = SUPERVISOR_BYTE + 1
CREATOR_BYTE = SUPERVISOR_BYTE + 2

#: The files of a set, in the order of `RingFiles`.
_PARTS = ("control", "ring", "lock", "deaths", "quarantine")


def boot_id() -> bytes:
    """The 16 bytes that name this boot of the machine (proc(5), /proc/sys/kernel/random/boot_id)."""
    return uuid_module.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes


def pid_namespace() -> int:
    """The inode that names this process's PID namespace (namespaces(7))."""
    return Path("/proc/self/ns/pid").stat().st_ino


@dataclass(frozen=True)
class RingFiles:
    """The open files of a set, valid in this process; closed by whoever made them (`close`)."""

    uuid: str
    control_fd: int
    ring_fd: int
    lock_fd: int
    deaths_fd: int
    quarantine_fd: int

    @classmethod
    def create(cls) -> RingFiles:
        """Make the memfds of a new set, all of them empty (see `format_set`)."""
        name = str(uuid_module.uuid4())
        fds: list[int] = []
        try:
            for part in _PARTS:
                fds.append(_memfd(f"shmloader-{part}-{name[:8]}"))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        Quarantine.prepare(fds[-1])
        return cls(name, *fds)

    @classmethod
    def inherited(cls, name: str, fds: Mapping[str, int]) -> RingFiles:
        """The files of the set ``name``, as a service has them: part → descriptor."""
        return cls(name, *(fds[part] for part in _PARTS))

    @property
    def file_bytes(self) -> int:
        """Size of the ring's file in bytes: all of its regions."""
        return os.fstat(self.ring_fd).st_size

    @property
    def fds(self) -> tuple[int, int, int, int, int]:
        """All descriptors, for a child process to inherit."""
        return (self.control_fd, self.ring_fd, self.lock_fd, self.deaths_fd, self.quarantine_fd)

    def close(self) -> None:
        """Close the descriptors. Locks that this process holds on the lock inode are gone with it."""
        for fd in self.fds:
            os.close(fd)


def format_set(
    files: RingFiles,
    sizes: Sizes,
    num_rows: int,
    chunks: Sequence[tuple[int, int]],
    units: Sequence[int],
    record_bytes: int | None = None,
    spill_bytes: int = 0,
    rows_per_chunk: int = 0,
) -> None:
    """Size the ring and lay out the control memory, for ``num_rows`` samples.

    Once per set, in the supervisor, before anybody attaches.

    chunks: (first row, number of rows) of each. units: for each the index of its unit's first chunk.
    record_bytes: of every sample, if that is known. spill_bytes: of the file for encoded chunks on disk, 0: none.
    rows_per_chunk: of an open set, which has no chunks of its own; then ``num_rows`` is how many samples it has
    descriptors for.
    """
    num_chunks = native.MAX_ORDERS * CHUNKS_PER_ORDER if rows_per_chunk else len(chunks)
    num_bytes = native.control_bytes(sizes.resident_bytes, sizes.transit_bytes, sizes.raw_bytes, num_rows, num_chunks)
    for fd, size in ((files.ring_fd, sizes.file_bytes), (files.control_fd, num_bytes)):
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    native.format_control(
        native.Mapping(files.control_fd, num_bytes, True, "control"),
        resident_bytes=sizes.resident_bytes,
        transit_bytes=sizes.transit_bytes,
        raw_bytes=sizes.raw_bytes,
        num_records=num_rows,
        first_rows=array("Q", [first for first, _ in chunks]),
        num_rows=array("I", [rows for _, rows in chunks]),
        units=array("I", units),
        uuid=uuid_module.UUID(files.uuid).bytes,
        boot_id=boot_id(),
        pid_namespace=pid_namespace(),
        record_bytes=record_bytes or 0,
        raw_budget_bytes=sizes.raw_budget_bytes,
        spill_bytes=spill_bytes,
        rows_per_chunk=rows_per_chunk,
        most_resident=sizes.most_resident,
        most_transit=sizes.most_transit,
        num_chunks=num_chunks if rows_per_chunk else 0,
    )


def _memfd(name: str) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    if fd > 2:
        return fd
    try:  # it took the place of a standard stream that is closed
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


def memory_limits() -> tuple[int, int, str]:
    """(smallest limit, available, what limits) in bytes, of this process: the machine's memory or a memory cgroup's."""
    total, available, limited_by = native.memory()
    return int(total), int(available), str(limited_by)
