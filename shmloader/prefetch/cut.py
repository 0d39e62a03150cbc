"""How the rows of a set are cut into chunks, as a prefetcher asks for it.

In a closed set each chunk has its rows for good. In an *open* one (a stream whose end nobody knows) a row is a position
of one iteration, and each iteration has a number of places for the chunks that it needs now: which chunk a row is of
tells the core, and it may change with every call.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

import shmloader._native as native
from shmloader.order import Chunks
from shmloader.permutation import Rows
from shmloader.prefetch.lent import Lent
from shmloader.prefetch.lookahead import LOOK_ROWS, ChunkStates, Flags

_NO_CHUNK = 0xFFFFFFFF  # as the core tells it


class Cut(Protocol):
    """Which chunk a row is of, and whether it can be decoded now."""

    is_open: bool
    """Readers all read streams front to back."""
    chunks: Chunks
    """Those whose rows may stay."""

    def chunk_of(self, rows: Rows) -> Rows:
        """The chunk of each row; -1: none."""
        ...

    def has_encoded(self, rows: Rows) -> Flags:
        """Of each row, whether its encoded form is at hand."""
        ...

    def wait_s(self) -> float:
        """Seconds after which more may be at hand although the work word did not move."""
        ...


class ClosedCut:
    """The cut of a source whose rows are known."""

    is_open = False

    def __init__(self, segment: native.Segment, chunks: Chunks) -> None:
        self._segment, self.chunks = segment, chunks

    def chunk_of(self, rows: Rows) -> Rows:
        """The chunk of each row."""
        return self.chunks.first_rows.searchsorted(rows, "right") - 1

    def has_encoded(self, rows: Rows) -> Flags:
        """Of each row, whether its chunk is in the raw region."""
        flags: Flags = look_at_chunks(self._segment, self.chunk_of(rows)) & native.CHUNK_HAS_RAW != 0
        return flags

    def wait_s(self) -> float:
        """The work word moves with all that comes."""
        return float("inf")


class OpenCut:
    """The cut of an open set.

    lent: what this process has read of a chunk that is not complete, which it can decode as well.
    """

    is_open = True
    #: How often lent rows are looked at while more may come (guessed: a reader does not notice it, and it costs 1 %).
    LENT_S = 0.01

    def __init__(self, segment: native.Segment, lent: Lent) -> None:
        self._segment, self._lent = segment, lent
        none = np.zeros(0, np.int64)
        self.chunks = Chunks(none, none, none, none)

    def chunk_of(self, rows: Rows) -> Rows:
        """The chunk of each row; -1: it has none yet, or no longer."""
        return chunks_of(self._segment, rows)

    def has_encoded(self, rows: Rows) -> Flags:
        """Of each row, whether its chunk is in the raw region, or this very row was read already."""
        chunks = self.chunk_of(rows)
        lent = self._lent.rows
        flags: Flags = (chunks >= 0) & (rows >= lent.start) & (rows < lent.stop)
        asked = (chunks >= 0) & ~flags
        flags[asked] = look_at_chunks(self._segment, chunks[asked]) & native.CHUNK_HAS_RAW != 0
        return flags

    def wait_s(self) -> float:
        """What is lent moves no word."""
        return self.LENT_S if self._lent.is_growing else float("inf")


class PlaceRows:
    """The first row of the chunk that has a place of an open set now; -1: none has. `RawStore` asks for pinned ones."""

    def __init__(self, segment: native.Segment) -> None:
        self._segment = segment

    def __getitem__(self, chunk: int) -> int:
        first = self._segment.chunk_first(chunk)
        return -1 if first is None else first


def chunks_of(segment: native.Segment, rows: Rows) -> Rows:
    """The chunks of an open set's rows, as it is now; -1: none."""
    ids = np.ascontiguousarray(rows)
    parts = [segment.row_chunks(ids[at : at + LOOK_ROWS].data) for at in range(0, len(ids), LOOK_ROWS)]
    chunks = np.frombuffer(b"".join(parts), np.uint32).astype(np.int64)
    chunks[chunks == _NO_CHUNK] = -1
    return chunks


def look_at_chunks(segment: native.Segment, chunks: npt.NDArray[np.int64]) -> ChunkStates:
    """What `Segment.chunk_look` says of each, in blocks."""
    ids, step = chunks.astype(np.uint32), 4 * LOOK_ROWS
    parts = [segment.chunk_look(ids[at : at + step].data) for at in range(0, len(ids), step)]
    return np.frombuffer(b"".join(parts), np.uint8)
