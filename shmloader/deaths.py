"""How prefetchers died, and over what: so that who reads what killed them can be told.

The file of a set has two parts. Each prefetcher writes down what it is at before it begins, each thread its own word
of the place that its client slot has (*note*). The supervisor, which alone learns how a process ended, copies the note
of a dead one beside that (*entry*). Readers look when a row or a chunk was set aside, and at no other time.

====================  ==========================  ===============================  ==========================
part                  who writes                  who reads                        a kill leaves
====================  ==========================  ===============================  ==========================
note, one a slot      the prefetcher of the slot  the supervisor, when it is dead  what it was at, as is wanted
entry, `MOST` of them the supervisor              readers, for a message           no entry: the message is shorter
====================  ==========================  ===============================  ==========================

Every write is one `pwrite` of a few bytes. Nothing but messages hangs on what is read here.
"""

from __future__ import annotations

import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import shmloader._native as native
from shmloader.errors import ServiceError

#: pid, row + 1 that is decoded alone, chunk + 1 that is fetched, whether memory ran out.
_NOTE = struct.Struct("<QQQQ")
_PID, _ROW, _CHUNK, _MEMORY = (8 * i for i in range(4))
#: Exit status, what is known of the cause, and the note.
_ENTRY = struct.Struct("<iI32s")
_ENTRIES_AT = native.MAX_CLIENTS * _NOTE.size
#: Entries that are kept: the oldest make way.
MOST = 1024
#: How long a reader waits to be told of a death that it has seen the trace of (guessed: the supervisor is awake).
PATIENCE_S = 0.5

#: What is known of a cause.
_NOTHING, _OOM_KILLER = 0, 1


@dataclass(frozen=True)
class Death:
    """One prefetcher's end. row, chunk: what it was at, None: neither alone. status: negative: the signal."""

    pid: int
    status: int
    row: int | None = None
    chunk: int | None = None
    ran_out: bool = False
    """It ended itself, since Python had no memory."""
    is_oom_kill: bool = False
    """The kernel's OOM killer ended some process of this container at about that time."""

    @property
    def is_of_memory(self) -> bool:
        """Memory was the cause, for all that is known."""
        return self.ran_out or self.is_oom_kill

    def __str__(self) -> str:
        return f"process {self.pid} {how_it_ended(self.status, self.ran_out, self.is_oom_kill)}"


class Deaths:
    """The file, in any process of the set."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    # -- a prefetcher --------------------------------------------------------------------------------------

    def begin(self, slot: int) -> None:
        """This process, a prefetcher, is client ``slot``."""
        os.pwrite(self._fd, _NOTE.pack(os.getpid(), 0, 0, 0), slot * _NOTE.size)

    def note_row(self, slot: int, row: int | None) -> None:
        """It begins to decode ``row`` alone; None: several, which are blamed together."""
        self._note(slot, _ROW, 0 if row is None else row + 1)

    def note_chunk(self, slot: int, chunk: int | None) -> None:
        """It begins to fetch ``chunk``; None: it has."""
        self._note(slot, _CHUNK, 0 if chunk is None else chunk + 1)

    def note_memory(self, slot: int) -> None:
        """It is about to end itself, since there is no memory."""
        self._note(slot, _MEMORY, 1)

    def _note(self, slot: int, at: int, value: int) -> None:
        os.pwrite(self._fd, value.to_bytes(8, "little"), slot * _NOTE.size + at)

    # -- the supervisor ------------------------------------------------------------------------------------

    def bury(self, pid: int, status: int, is_oom_kill: bool) -> Death:
        """Keep that the prefetcher ``pid`` ended; returns all that is known."""
        notes = os.pread(self._fd, _ENTRIES_AT, 0)
        note = next(
            (n for n in _NOTE.iter_unpack(notes[: len(notes) // _NOTE.size * _NOTE.size]) if n[0] == pid),
            (pid, 0, 0, 0),
        )
        size = os.fstat(self._fd).st_size
        count = int.from_bytes(os.pread(self._fd, 8, _ENTRIES_AT), "little") if size > _ENTRIES_AT else 0
        entry = _ENTRY.pack(status, _OOM_KILLER if is_oom_kill else _NOTHING, _NOTE.pack(*note))
        os.pwrite(self._fd, entry, _ENTRIES_AT + 8 + count % MOST * _ENTRY.size)
        os.pwrite(self._fd, (count + 1).to_bytes(8, "little"), _ENTRIES_AT)
        return _death(status, is_oom_kill, note)

    # -- a reader ------------------------------------------------------------------------------------------

    def of_row(self, row: int) -> list[Death]:
        """Those that ended while they decoded ``row`` alone, the last ones last."""
        return self._wait_for(lambda death: death.row == row, native.MAX_ATTEMPTS - 1)  # the first had others with it

    def of_chunk(self, chunk: int) -> list[Death]:
        """Those that ended while they fetched ``chunk``."""
        return self._wait_for(lambda death: death.chunk == chunk, native.MAX_ATTEMPTS)

    def _wait_for(self, is_asked: Callable[[Death], bool], num: int) -> list[Death]:
        """The last ``num`` at most. The supervisor may be about to write the last of them."""
        until, pause = time.monotonic() + PATIENCE_S, threading.Event()
        while len(found := self._where(is_asked)) < num and time.monotonic() < until:
            pause.wait(0.01)
        return found[-num:]

    def _where(self, is_asked: Callable[[Death], bool]) -> list[Death]:
        data = os.pread(self._fd, 8 + MOST * _ENTRY.size, _ENTRIES_AT)
        count, entries = int.from_bytes(data[:8], "little"), data[8:]
        found = []
        for i in range(max(0, count - MOST), count):
            part = entries[i % MOST * _ENTRY.size :][: _ENTRY.size]
            if len(part) == _ENTRY.size:
                status, cause, note = _ENTRY.unpack(part)
                found.append(_death(status, cause == _OOM_KILLER, _NOTE.unpack(note)))
        return [death for death in found if is_asked(death)]


def _death(status: int, is_oom_kill: bool, note: tuple[int, ...]) -> Death:
    pid, row, chunk, memory = note
    return Death(pid, status, row - 1 if row else None, chunk - 1 if chunk else None, bool(memory), is_oom_kill)


def how_it_ended(status: int, ran_out: bool = False, is_oom_kill: bool = False) -> str:
    """In words, what became of a process with this exit status (negative: the signal)."""
    if ran_out:
        return "ended itself since there was no memory (MemoryError; its log says where)"
    if status >= 0:
        return f"ended with exit status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else "unknown"
    told = f"was killed by signal {-status} ({name})"
    if is_oom_kill:
        told += ", by the kernel's OOM killer, probably: the memory limit of this container or machine was reached"
    return told


def killed_by_row(deaths: Deaths, row: int, describe: Callable[[int], str]) -> ServiceError:
    """Why ``row`` was set aside."""
    found = deaths.of_row(row)
    remedy = (
        "Give the job more memory, use fewer prefetchers (SHMLOADER_PREFETCHERS), or make less of the row (process=)."
        if any(death.is_of_memory for death in found)
        else "`process=` can replace the decoder."
    )
    return ServiceError(
        f"{describe(row)} cannot be processed: each of the {native.MAX_ATTEMPTS} prefetch processes that tried died"
        f"{_told(found)}. {remedy}",
        role="prefetcher",
        row=row,
        of_memory=any(death.is_of_memory for death in found),
        deaths=[str(death) for death in found],
    )


def killed_by_chunk(deaths: Deaths, row: int, chunk: int, describe: Callable[[int], str]) -> ServiceError:
    """Why nothing of ``chunk``, in which ``row`` is, can be had."""
    found = deaths.of_chunk(chunk)
    remedy = (
        "Give the job more memory, use fewer prefetchers (SHMLOADER_PREFETCHERS), or write the file with smaller row "
        "groups."
        if any(death.is_of_memory for death in found)
        else "Check that the shard is whole: other programs may not be able to read it either."
    )
    return ServiceError(
        f"{describe(row)} cannot be read: each of the {native.MAX_ATTEMPTS} prefetch processes that tried to fetch its "
        f"chunk died{_told(found)}. {remedy}",
        role="prefetcher",
        row=row,
        chunk=chunk,
        of_memory=any(death.is_of_memory for death in found),
        deaths=[str(death) for death in found],
    )


def _told(found: Sequence[Death]) -> str:
    if not found:
        return " (of what is not known; their output on stderr or the kernel's log may say)"
    return f": {'; '.join(map(str, found))}. What a crash prints is on stderr"


class OomKills:
    """Tells whether the OOM killer was at work since the last look."""

    def __init__(self, root: str = "") -> None:
        self._root = root
        self._seen = self._count()

    def rose(self) -> bool:
        """Whether it has killed a process of this machine or memory cgroup meanwhile."""
        before, self._seen = self._seen, self._count()
        return self._seen > before

    def _count(self) -> int:
        """Kills of this cgroup, and of all the machine (cgroup-v2, memory.events; proc(5), /proc/vmstat)."""
        files = [Path(f"{self._root}/proc/vmstat")]
        for line in _lines(Path(f"{self._root}/proc/self/cgroup")):
            _, kinds, path = line.split(":", 2)
            if not kinds:
                files.append(Path(f"{self._root}/sys/fs/cgroup{path}/memory.events"))
            elif "memory" in kinds.split(","):
                files.append(Path(f"{self._root}/sys/fs/cgroup/memory{path}/memory.oom_control"))
        found = [line.split() for file in files for line in _lines(file)]
        return sum(int(words[1]) for words in found if len(words) == 2 and words[0] == "oom_kill")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # not of this kernel, or not to be seen from this container: then nothing is said of it
        return []
