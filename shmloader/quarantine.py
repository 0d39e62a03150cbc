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

Two that add the same row at the same time leave it there twice, which readers take for one.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
from dataclasses import dataclass

from shmloader.errors import ShmloaderError

#: Id of the first row, number of rows, whether a reader has met it, bytes of the text.
_HEAD = struct.Struct("<QIHH")
#: A divisor of the page, so that no entry lies across two.
ENTRY_BYTES = 1024
#: Most entries: 32 MiB. What comes later is not listed.
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


class Quarantine:
    """The list, in one process. Any number of threads: what two of them read twice is the same."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._found: dict[tuple[int, int], BadRow] = {}
        self._end = 0

    @staticmethod
    def prepare(fd: int) -> None:
        """Make the empty file ``fd`` a list; once, by who made it: its descriptors in all processes share this."""
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)

    def add(self, first: int, num_rows: int, error: ShmloaderError, is_met: bool) -> bool:
        """Add rows ``first`` to ``first + num_rows - 1``; False: they are there, or there is no room."""
        known = self._read().get((first, num_rows))
        if (known is not None and (known.is_met or not is_met)) or self.is_full:
            return False
        os.write(self._fd, _entry(first, num_rows, error, is_met))
        self._read()
        return True

    @property
    def is_full(self) -> bool:
        """Whether there is no room for more."""
        return self._end >= MOST * ENTRY_BYTES

    def rows(self) -> list[BadRow]:
        """All that are known, by their ids."""
        return [bad for _, bad in sorted(self._read().items())]

    def num_met(self) -> int:
        """How many rows are bad that some reader has met; a chunk that cannot be read is met with all of its rows."""
        return sum(bad.num_rows for bad in self._read().values() if bad.is_met)

    def _read(self) -> dict[tuple[int, int], BadRow]:
        """What is there, with what has come since the last look."""
        end = os.fstat(self._fd).st_size // ENTRY_BYTES * ENTRY_BYTES
        if end > self._end:
            data = os.pread(self._fd, end - self._end, self._end)
            for at in range(0, len(data), ENTRY_BYTES):
                bad = _parsed(data[at : at + ENTRY_BYTES])
                known = self._found.get((bad.id, bad.num_rows))
                if known is None or not known.is_met:
                    self._found[bad.id, bad.num_rows] = bad
            self._end = end
        return self._found


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
