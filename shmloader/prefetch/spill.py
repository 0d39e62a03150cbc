"""Encoded chunks in the file on local disk, as one prefetcher writes and reads them.

First come stay: nothing is ever removed, and a chunk that is there never changes, so it is read in place without a pin.
It is written with pwrite and read through a mapping, both of the page cache. Blocks of the disk are taken before they
are written to, so that a full disk is an error here and never a fault of who reads.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from typing import IO, Any

import shmloader._native as native
from shmloader.options import size_text

log = logging.getLogger("shmloader.prefetcher")

#: The parts of an Arrow stream are collected to writes of so much (guessed: far more than a system call costs).
_BUFFER_BYTES = 1 << 20


class Spill:
    """The file of one set. One thread may write, another one read.

    fd: of the file; None: there is none. why_not: in words, where there is none. folder: where it is, for messages.
    """

    def __init__(self, segment: native.Segment, fd: int | None, why_not: str = "", folder: str = "") -> None:
        self._segment, self._why_not, self.folder = segment, why_not, folder
        self._num_bytes = segment.stats()["spill_bytes"]
        if self._num_bytes and fd is None:
            raise ValueError("a set that spills must come with the file")
        self._fd = -1 if fd is None else fd
        self._mapping: native.Mapping | None = None

    def put(self, chunk: int, num_bytes: int, write: Callable[[IO[bytes]], None]) -> bool:
        """Have ``write`` write the ``num_bytes`` of ``chunk``, which this process has claimed; False: there is no room.

        When the disk refuses, no process of the set spills any more. True without a write: the claim has ended, since
        nobody needs the chunk any more.
        """
        offset = self._segment.spill_reserve(chunk, num_bytes) if self._num_bytes else native.FULL
        if offset < 0:
            return offset == native.STALE
        try:
            self._write(chunk, offset, num_bytes, write)
        except BaseException as error:
            self._give_back(offset, num_bytes)
            if not isinstance(error, OSError):
                raise
            if self._segment.spill_freeze():
                log.warning("the disk takes no more encoded chunks, which will be fetched again when needed: %s", error)
            return False
        self._segment.spill_commit(chunk, offset, num_bytes)
        return True

    def _write(self, chunk: int, offset: int, num_bytes: int, write: Callable[[IO[bytes]], None]) -> None:
        os.posix_fallocate(self._fd, offset, num_bytes)
        with io.BufferedWriter(_Part(self._fd, offset, num_bytes), _BUFFER_BYTES) as file:
            write(file)
            file.flush()
            written = file.tell()
        if written != num_bytes:
            raise ValueError(f"chunk {chunk} took {written} bytes of {num_bytes}")

    def _give_back(self, offset: int, num_bytes: int) -> None:
        """What the disk took of a chunk that is not written: others need it more than a hole in our file."""
        try:
            self._segment.spill_give_back(self._fd, offset, num_bytes)
        except OSError as error:  # some file systems cannot; it comes back when the file ends
            log.info("the disk keeps up to %s that nobody uses: %s", size_text(num_bytes), error)

    def find(self, chunk: int) -> tuple[int, int] | None:
        """(offset, bytes) of a spilled chunk, for good; the bytes are followed by up to 63 zeros. None: it is not."""
        return self._segment.spill_find(chunk) if self._num_bytes else None

    def view(self, offset: int, num_bytes: int, guard: object = None, readonly: bool = True) -> native.View:
        """These bytes of the file, in place, as `Mapping.view`. Raises an OSError: it cannot be mapped."""
        if self._mapping is None:
            self._mapping = native.Mapping(self._fd, self._num_bytes, False, "spill")
        return self._mapping.view(offset, num_bytes, guard, readonly)

    def describe(self) -> str:
        """Why chunks are fetched again although they could be kept on disk; empty if there is no such reason."""
        stats = self._segment.stats()
        if not self._num_bytes:
            return f"They are not kept on disk: {self._why_not}."
        if stats["spill_frozen"]:
            return f"The disk took {size_text(self._there_bytes(stats))} of them and refused more."
        return f"Of the {size_text(self._num_bytes)} for them on disk {size_text(stats['spill_used_bytes'])} are used."

    def _there_bytes(self, stats: dict[str, int]) -> int:
        """Of all chunks that are there, without what was given out in vain."""
        num_chunks = sum(stats[f"chunks_{state}"] for state in ("todo", "claimed", "done", "broken"))
        places = (self._segment.spill_find(chunk) for chunk in range(num_chunks))
        return sum(num_bytes for _, num_bytes in filter(None, places))


class _Part(io.RawIOBase):
    """``num_bytes`` of a file from ``offset`` on, to be written once, front to back.

    By pwrite: other processes share the descriptor's file, and so its position.
    """

    def __init__(self, fd: int, offset: int, num_bytes: int) -> None:
        self._fd, self._begin, self._end = fd, offset, offset + num_bytes
        self._at = offset

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        return self._at - self._begin

    def write(self, data: Any) -> int:
        """As many bytes as one call writes: at most 2 GiB; the buffer around it goes on with the rest."""
        part = memoryview(data).cast("B")
        if len(part) > self._end - self._at:
            raise ValueError("more is written than was said")
        num = os.pwrite(self._fd, part, self._at)
        self._at += num
        return num
