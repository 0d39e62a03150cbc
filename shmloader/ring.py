"""The Python face of the shared-memory core: make, attach, put, get_many.

A *set* is what the processes around one dataset share: three memfds (control, ring, lock). `RingFiles` is what
travels between processes; `Ring` is one process's attachment. Nothing here knows where rows come from or
what torch is.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import threading
import time
import uuid as uuid_module
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import shmloader._native as native
from shmloader.errors import (
    MemoryLimitError,
    PoisonedError,
    RecordTooLargeError,
    RingError,
    ServiceError,
    ShmloaderError,
    WaitTimeoutError,
    from_wire,
    ring_full,
    to_json,
)

PAGE = 4096
#: Records begin and end at multiples of it: SHML_ALIGN in native/layout.h.
ALIGNMENT = 64
#: Bytes of the lock inode beyond the clients': who holds them is the supervisor, is starting one, or made the set.
SUPERVISOR_BYTE = 1 << 20
STARTER_BYTE = SUPERVISOR_BYTE + 1
CREATOR_BYTE = SUPERVISOR_BYTE + 2

# Only the exit of the interpreter ends all users of a mapping; no deallocation may unmap before that.
atexit.register(native.set_exiting)


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

    @classmethod
    def create(cls, ring_bytes: int) -> RingFiles:
        """Make the memfds of a new set, the control still empty (see `format_control`)."""
        name = str(uuid_module.uuid4())
        fds: list[int] = []
        try:
            for part in ("control", "ring", "lock"):
                fds.append(_memfd(f"shmloader-{part}-{name[:8]}"))
            os.ftruncate(fds[1], _round_up(ring_bytes, PAGE))
            fcntl.fcntl(fds[1], fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return cls(name, *fds)

    @property
    def ring_bytes(self) -> int:
        """Size of the ring in bytes."""
        return os.fstat(self.ring_fd).st_size

    @property
    def fds(self) -> tuple[int, int, int]:
        """All descriptors, for a child process to inherit."""
        return (self.control_fd, self.ring_fd, self.lock_fd)

    def close(self) -> None:
        """Close the descriptors. Locks that this process holds on the lock inode are gone with it."""
        for fd in self.fds:
            os.close(fd)


def format_control(files: RingFiles, num_rows: int, chunks: Sequence[tuple[int, int]], is_sequential: bool) -> None:
    """Lay out the control memory for ``num_rows`` samples in ``chunks`` of (first row, number of rows).

    Once per set, in the supervisor, before anybody attaches.
    """
    num_bytes = native.control_bytes(files.ring_bytes, num_rows, len(chunks))
    os.ftruncate(files.control_fd, num_bytes)
    fcntl.fcntl(files.control_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    native.format_control(
        native.Mapping(files.control_fd, num_bytes, True, "control"),
        ring_bytes=files.ring_bytes,
        resident_bytes=files.ring_bytes,
        num_records=num_rows,
        is_sequential=is_sequential,
        first_rows=array("Q", [first for first, _ in chunks]),
        num_rows=array("I", [rows for _, rows in chunks]),
        uuid=uuid_module.UUID(files.uuid).bytes,
        boot_id=boot_id(),
        pid_namespace=pid_namespace(),
    )


@dataclass(frozen=True)
class Refs:
    """Where the records of some ids lie, in the ids' order; packed as the core gives and takes them."""

    ids: Sequence[int]
    packed: bytes

    def __len__(self) -> int:
        return len(self.ids)

    def one(self, i: int) -> bytes:
        """The packed reference of the i-th id."""
        return self.packed[i * native.REF_BYTES : (i + 1) * native.REF_BYTES]

    def place(self, i: int) -> tuple[int, int]:
        """Offset in the ring and size in bytes of the i-th record."""
        words = memoryview(self.packed)[i * native.REF_BYTES : i * native.REF_BYTES + 16].cast("Q")
        return words[0], words[1]

    def statuses(self) -> list[tuple[int, int]]:
        """(status, chunk) of each."""
        words = memoryview(self.packed).cast("I").tolist()
        step = native.REF_BYTES // 4
        return list(zip(words[6::step], words[7::step], strict=True))


class Ring:
    """This process's attachment to a set: a client with a role, a mapping of the control and one of the ring.

    Services map the ring read-write, all others read-only. Not to be used in a forked child: attach again there
    (`is_home` tells).
    """

    def __init__(self, files: RingFiles, role: int, owner: tuple[int, int] | None = None) -> None:
        self.files = files
        self.role = role
        writable = role == native.SERVICE
        control_bytes = os.fstat(files.control_fd).st_size
        self._control = native.Mapping(files.control_fd, control_bytes, True, "control")
        # A read-only *open file*: not even mprotect can make a reader's mapping writable.
        fd = files.ring_fd if writable else os.open(f"/proc/self/fd/{files.ring_fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.mapping = native.Mapping(fd, files.ring_bytes, writable, "ring")
        finally:
            if not writable:
                os.close(fd)
        self.segment = native.Segment(self._control, self.mapping, files.lock_fd, boot_id(), pid_namespace())
        slot, gen = owner if owner is not None else (-1, 0)
        self.slot, self.gen = self.segment.register(role, slot, gen)
        self._lock = threading.Lock()  # one want-list per client: one thread of it waits at a time
        self._backed_bytes = 0  # as far as this process has seen

    @property
    def is_home(self) -> bool:
        """False in a child that was forked after this attachment was made."""
        return bool(self._control.is_home)

    def leave(self) -> None:
        """Give the client slot back. Views stay valid; nothing else may be called any more."""
        self.segment.unregister()

    # -- reading ---------------------------------------------------------------------------------------

    def get_many(
        self,
        ids: Sequence[int],
        timeout_s: float,
        on_tick: Callable[[], None] | None = None,
        describe: Callable[[int], str] = str,
    ) -> Refs:
        """Where the records of ``ids`` lie, once all are there; waits for them.

        on_tick: called at least every 100 ms while waiting (to see that the services live).
        describe: source, shard and row of an id, for the message of an error.

        Raises:
            SampleError, DecodeError, ProcessError: a sample cannot be had; as its prefetcher told it.
            SourceError, RingFullError, ServiceError: its chunk cannot be read.
            WaitTimeoutError: nothing at all moved for ``timeout_s``.
            ServiceError: this is a worker, and its training process is gone.
        """
        packed_ids = array("Q", ids)
        refs, missing = self.segment.get_many(packed_ids, False)
        if missing or self._has_bad(refs):
            with self._lock:
                try:
                    refs = self._wait_for(ids, packed_ids, timeout_s, on_tick, describe)
                except BaseException:
                    with contextlib.suppress(ShmloaderError):  # closed meanwhile: they are gone with the client
                        self.segment.get_many(array("Q"), True)  # withdraw the wants
                    raise
        return Refs(ids, refs)

    def _wait_for(
        self,
        ids: Sequence[int],
        packed_ids: array[int],
        timeout_s: float,
        on_tick: Callable[[], None] | None,
        describe: Callable[[int], str],
    ) -> bytes:
        progress, since = -1, time.monotonic()
        while True:
            seen = self.segment.wake_word()
            refs, missing = self.segment.get_many(packed_ids, True)
            result = Refs(ids, refs)
            self._raise_bad(result, describe)
            if not missing:
                return bytes(refs)
            self._raise_fatal()
            now = time.monotonic()
            if (moved := self.segment.progress()) != progress:
                progress, since = moved, now
            elif now - since > timeout_s:
                raise self._timed_out(result, now - since, describe)
            self.segment.reap(False)
            if self.role == native.WORKER and not self.segment.count(native.OWNER):
                raise ServiceError(
                    "The training process that this worker reads for is gone, or has closed the dataset", role="owner"
                )
            if on_tick is not None:
                on_tick()
            self.segment.wait(seen, native.TICK_MS)

    @staticmethod
    def _has_bad(packed: bytes) -> bool:
        return any(memoryview(packed).cast("I")[6 :: native.REF_BYTES // 4].tolist())

    def _raise_bad(self, refs: Refs, describe: Callable[[int], str]) -> None:
        for i, (status, chunk) in enumerate(refs.statuses()):
            if status == native.ERROR:
                raise self._read_error(*refs.place(i))
            if status == native.BROKEN:
                self._raise_fatal()
                raise self._chunk_error(refs.ids[i], chunk, describe)

    def _read_error(self, offset: int, num_bytes: int) -> ShmloaderError:
        raw = bytes(memoryview(self.mapping.view(offset, num_bytes)))
        return from_wire(json.loads(raw.rstrip(b"\0")))

    def _chunk_error(self, row: int, chunk: int, describe: Callable[[int], str]) -> ShmloaderError:
        packed, missing = self.segment.get_many(array("Q", [native.CHUNK_ERROR | chunk]), False)
        if not missing:
            return self._read_error(*Refs([0], packed).place(0))
        return ServiceError(
            f"{describe(row)} cannot be read: each of the {native.MAX_ATTEMPTS} prefetch processes that tried its "
            "chunk died without an error (killed, out of memory, or crashed in a decoder). Their output on stderr or "
            "the kernel's log may say why; `process=` can replace the decoder.",
            role="prefetcher",
            row=row,
            chunk=chunk,
        )

    def _raise_fatal(self) -> None:
        text = self.segment.text_get(native.TEXT_FATAL)
        if text is not None:
            raise from_wire(json.loads(text))

    def _timed_out(self, refs: Refs, waited_s: float, describe: Callable[[int], str]) -> WaitTimeoutError:
        missing = [row for row, (status, _) in zip(refs.ids, refs.statuses(), strict=True) if status == native.MISSING]
        services = [pid for _, pid, role in self.segment.clients() if role == native.SERVICE]
        return WaitTimeoutError(
            f"{describe(missing[0])} did not arrive: for {waited_s:.1f} s no prefetch process made any progress "
            f"(processes of the set: {services or 'none'}; {len(missing)} of {len(refs)} samples are missing). "
            "SHMLOADER_TIMEOUT_S sets how long to wait, SHMLOADER_LOG=DEBUG shows what they do.",
            row=missing[0],
            waited_s=waited_s,
        )

    # -- writing (services only) -----------------------------------------------------------------------

    def reserve(self, row: int, num_bytes: int) -> tuple[int, int, int, int] | None:
        """Room for the record of ``row``: a ticket for `record_of` and `commit`; None if it is there already.

        Raises:
            RingFullError, RecordTooLargeError, MemoryLimitError: with the bytes needed and what to set.
        """
        while True:
            ticket = self.segment.reserve(row, num_bytes)
            if isinstance(ticket, tuple):
                return ticket
            if ticket == native.EXISTS:
                return None
            if ticket != native.EXTEND:
                raise self._no_room(ticket, num_bytes)
            self._extend(num_bytes)

    def _extend(self, num_bytes: int) -> None:
        stats = self.segment.stats()
        if stats["backed_bytes"] > self._backed_bytes:
            self._backed_bytes = stats["backed_bytes"]  # another process has extended it: look there first
            return
        end = min(stats["head_bytes"] + _round_up(num_bytes, ALIGNMENT), self.files.ring_bytes)
        status, available, limited_by = self.segment.back(self.files.ring_fd, end)
        if status == native.MEMORY:
            raise self._no_memory(num_bytes, available, limited_by)

    def _no_memory(self, num_bytes: int, available: int, limited_by: str) -> MemoryLimitError:
        stats = self.segment.stats()
        needed = self._estimate(stats, num_bytes)
        return MemoryLimitError(
            f"There is not enough memory for the ring: about {needed:,} bytes are needed, it has "
            f"{stats['backed_bytes']:,} and cannot grow, since only {available:,} are available ({limited_by}; a spare "
            "is left). Give the job more memory, or load a part of the dataset.",
            needed_bytes=needed,
            have_bytes=stats["backed_bytes"],
            limit=limited_by,
        )

    def _no_room(self, status: int, num_bytes: int) -> RingError:
        stats = self.segment.stats()
        if status == native.TOOBIG:
            return RecordTooLargeError(
                f"One sample takes {num_bytes:,} bytes, the whole ring has {stats['ring_bytes']:,}: "
                "set SHMLOADER_RING_BYTES (or Options.ring_bytes) higher.",
                needed_bytes=num_bytes,
                have_bytes=stats["ring_bytes"],
                variable="SHMLOADER_RING_BYTES",
            )
        if status == native.MEMORY:
            return self._no_memory(num_bytes, *memory_limits()[1:])
        needed = self._estimate(stats, num_bytes)
        return ring_full(needed, stats["ring_bytes"], stats["num_ready"])

    @staticmethod
    def _estimate(stats: dict[str, int], num_bytes: int) -> int:
        mean = stats["used_bytes"] / stats["num_ready"] if stats["num_ready"] else num_bytes
        return int(mean * stats["num_records"])

    def record_of(self, ticket: tuple[int, int, int, int]) -> memoryview:
        """The reserved bytes, writable until `commit`."""
        return memoryview(self.mapping.view(ticket[0], ticket[1]))

    def commit(self, ticket: tuple[int, int, int, int], is_error: bool = False) -> None:
        """Publish a record that is written completely."""
        if self.segment.commit(ticket, native.ERROR if is_error else native.READY) != 0:
            raise PoisonedError("a reservation of this living process was taken away", reason="stale ticket")

    def abort(self, ticket: tuple[int, int, int, int]) -> None:
        """Give a reservation back."""
        self.segment.abort(ticket)

    def put_error(self, row: int, error: BaseException) -> None:
        """Publish why ``row`` has no sample; readers that ask for it raise it."""
        text = to_json(error, native.TEXT_BYTES)
        ticket = self.reserve(row, len(text))
        if ticket is not None:
            record = self.record_of(ticket)
            record[: len(text)] = text
            record[len(text) :] = bytes(len(record) - len(text))
            self.commit(ticket, is_error=True)

    def put_fatal(self, error: BaseException) -> None:
        """Tell all readers that nothing more will come; the first error wins."""
        self.segment.text_put(native.TEXT_FATAL, to_json(error, native.TEXT_BYTES))


def memory_limits() -> tuple[int, int, str]:
    """(smallest limit, available, what limits) in bytes, of this process: the machine's memory or a memory cgroup's."""
    total, available, limited_by = native.memory()
    return int(total), int(available), str(limited_by)


def _memfd(name: str) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    if fd > 2:
        return fd
    try:  # it took the place of a standard stream that is closed
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
