"""Which rows of a set are bad, and why: a list that all of its processes share, and add to.

It is a file of entries of equal size. Prefetchers add a row when they find that it cannot become a sample, readers when
they meet one: then it counts against ``max_bad``. What lies in the ring (error records, rows that were set aside)
may be evicted, or is not there at all for a chunk that cannot be read; this stays as long as the set.

===========  ================================  ===========================  ====================================
part         who writes                        who reads                    a kill leaves
===========  ================================  ===========================  ====================================
an entry     prefetchers, readers; at the end  readers, for the list and    the entry whole or not at all: it
             of the file (O_APPEND: the        the count; everybody, not    lies within a page, and is written by
             kernel finds the place)           to add one a second time     one `write`; else it is added by who
                                                                            meets the row next
===========  ================================  ===========================  ====================================

Two that add the same row at the same time leave it there twice, which readers take for one. What prefetchers find may
fill half of the list: the rest is for what readers meet, since that is counted.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from shmloader.errors import ShmloaderError

#: Id of the first row, number of rows, whether a reader has met it, bytes of the text.
_HEAD = struct.Struct("<QIHH")
#: A divisor of the page, so that no entry lies across two.
ENTRY_BYTES = 1024
#: Most entries: 32 MiB. What comes later is not listed. Half of them may be of rows that no reader has met.
MOST = 1 << 15


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be had, or several that follow one another (of a chunk that cannot be read).

    id: of the first. error: name of its class.
    """

    id: int
    num_rows: int
    error: str
    message: str
    field: str | None
    is_met: bool


_reading = threading.Lock()
# Another thread of the parent may have held it when this process was forked.
os.register_at_fork(after_in_child=lambda: globals().update(_reading=threading.Lock()))


class Quarantine:
    """The list, in one process. Any number of threads.

    Only what has come since the last look is looked at, and no text is read before it is asked for: the count is
    needed for every batch that has a bad row.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._forget()

    @staticmethod
    def prepare(fd: int) -> None:
        """Make the empty file ``fd`` a list; once, by who made it: its descriptors in all processes share this."""
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)

    def add(self, first: int, num_rows: int, error: ShmloaderError, is_met: bool) -> bool:
        """Add rows ``first`` to ``first + num_rows - 1``; False: they are there, or there is no room."""
        with _reading:
            self._look()
            known = self._is_met.get((first, num_rows))
            most = MOST if is_met else MOST // 2
            if (known is not None and (known or not is_met)) or self._end >= most * ENTRY_BYTES:
                return False
            os.write(self._fd, _entry(first, num_rows, error, is_met))
            self._look()
        return True

    @property
    def is_full(self) -> bool:
        """Whether there is no room for more that readers meet."""
        return self._end >= MOST * ENTRY_BYTES

    def rows(self) -> list[BadRow]:
        """All that are known, by their ids."""
        found: dict[tuple[int, int], BadRow] = {}
        for entry in _entries(self._fd, 0, _whole(self._fd)):
            bad = _parsed(entry)
            known = found.get((bad.id, bad.num_rows))
            if known is None or not known.is_met:
                found[bad.id, bad.num_rows] = bad
        return [bad for _, bad in sorted(found.items())]

    def num_met(self) -> int:
        """How many rows are bad that some reader has met; a chunk that cannot be read is met with all of its rows."""
        with _reading:
            self._look()
            return self._num_met

    def _forget(self) -> None:
        self._is_met: dict[tuple[int, int], bool] = {}  # by id and number of rows
        self._num_met = self._end = 0
        self._pid = os.getpid()

    def _look(self) -> None:
        """Take up what has come since the last look. With the lock."""
        if self._pid != os.getpid():  # another thread may have been at it when this process was forked
            self._forget()
        end = _whole(self._fd)
        for entry in _entries(self._fd, self._end, end):
            first, num_rows, is_met, _ = _HEAD.unpack_from(entry)
            if not self._is_met.get((first, num_rows)):
                self._is_met[first, num_rows] = bool(is_met)
                self._num_met += num_rows if is_met else 0
        self._end = end


def _whole(fd: int) -> int:
    """Bytes of the entries that are there."""
    return os.fstat(fd).st_size // ENTRY_BYTES * ENTRY_BYTES


def _entries(fd: int, begin: int, end: int) -> Iterator[bytes]:
    data = os.pread(fd, end - begin, begin) if end > begin else b""
    for at in range(0, len(data), ENTRY_BYTES):
        yield data[at : at + ENTRY_BYTES]


def _entry(first: int, num_rows: int, error: ShmloaderError, is_met: bool) -> bytes:
    field = error.data.get("field")
    told = {"error": type(error).__name__, "field": field if isinstance(field, str) else None}
    room, keep = ENTRY_BYTES - _HEAD.size, len(str(error))
    while len(text := json.dumps({**told, "message": _cut(str(error), keep)}).encode()) > room:
        if keep == 0:  # the name of the field is longer than all there is room for
            told["field"] = None
        keep = keep * 3 // 4
    return (_HEAD.pack(first, num_rows, is_met, len(text)) + text).ljust(ENTRY_BYTES, b"\0")


def _cut(text: str, keep: int) -> str:
    return text if len(text) <= keep else f"{text[:keep]} […]"


def _parsed(entry: bytes) -> BadRow:
    first, num_rows, is_met, num_bytes = _HEAD.unpack_from(entry)
    told = json.loads(entry[_HEAD.size : _HEAD.size + num_bytes])
    return BadRow(first, num_rows, told["error"], told["message"], told["field"], bool(is_met))
