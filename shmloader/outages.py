"""Chunks that could not be fetched for now, since a server was not reached: so that who waits for one is told.

A chunk that will never be read is *broken*, which its state says. This is for one that is to be tried again: it can be
fetched as before, and who had waited for it meanwhile gets the reason. The notes lie in the deaths file, behind what
that holds (deaths.py): `PER_SLOT` for each client slot, of which a prefetcher writes its own in turn. Readers look
while they wait, and take only what failed after they had begun to. A note is of all chunks that can only be read behind
the one that failed: of a file that is read front to back the next ones are not even tried.

======  =====================================  ==============  ==================================================
part    what                                   who writes      a kill leaves
======  =====================================  ==============  ==================================================
head    the chunks, when it failed, checksum   the prefetcher  the one before, whose body does not fit it any more
body    the error, as `to_json` makes it       before that     a body that fits no head
======  =====================================  ==============  ==================================================

A reader takes a body only if its checksum is the head's, so that no half of one is ever read.
"""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from collections.abc import Collection

import shmloader._native as native
from shmloader.errors import ShmloaderError, from_wire, to_json

#: Notes of one prefetcher: so many chunks can fail before readers, who look every 100 ms, have seen the first.
PER_SLOT = 4
#: First chunk, the one behind the last, monotonic seconds, bytes of the body, CRC-32 of it. Zeros: of no chunk.
_HEAD = struct.Struct("<QQdII")
_BODY_BYTES = 4096
#: Behind the deaths' part of the file, which has 50 KB.
_HEADS_AT = 1 << 20
_NUM = native.MAX_CLIENTS * PER_SLOT
_BODIES_AT = _HEADS_AT + -(-_NUM * _HEAD.size // 4096) * 4096


class Outages:
    """The notes of a set, in any of its processes. fd: the deaths file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._num_written = 0

    def note(self, slot: int, chunks: range, error: BaseException) -> None:
        """None of ``chunks`` can be fetched now. For the prefetcher that is client ``slot``, one thread of it."""
        body = to_json(error, _BODY_BYTES)
        index = slot * PER_SLOT + self._num_written % PER_SLOT
        self._num_written += 1
        os.pwrite(self._fd, body, _BODIES_AT + index * _BODY_BYTES)
        head = _HEAD.pack(chunks.start, chunks.stop, time.monotonic(), len(body), zlib.crc32(body))
        os.pwrite(self._fd, head, _HEADS_AT + index * _HEAD.size)

    def of(self, chunks: Collection[int], since_s: float) -> tuple[int, ShmloaderError] | None:
        """One of ``chunks`` that could not be fetched after ``since_s`` (monotonic), and why; None: none failed."""
        heads = os.pread(self._fd, _NUM * _HEAD.size, _HEADS_AT)
        for index, (first, end, at_s, num_bytes, checksum) in enumerate(
            _HEAD.iter_unpack(heads[: len(heads) // _HEAD.size * _HEAD.size])
        ):
            told = next((chunk for chunk in chunks if first <= chunk < end), None)
            if at_s < since_s or told is None:
                continue
            body = os.pread(self._fd, num_bytes, _BODIES_AT + index * _BODY_BYTES)
            if zlib.crc32(body) == checksum:  # else it is being written
                return told, from_wire(json.loads(body))
        return None
