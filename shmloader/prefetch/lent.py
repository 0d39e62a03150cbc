"""What has come of the chunk of a stream that is being read, so that a slow stream's first rows need not wait.

The fetching thread adds each row as it comes, as the stream gave it; nothing more, since it shares the interpreter with
the decoding thread. That one looks, and makes plain what it finds, only once the chunk has taken a while: the chunks of
a fast stream are there as a whole before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from shmloader.prefetch.store import RawChunk, raw_chunk

#: So long nothing of a chunk is lent (guessed: little beside what a stream takes of which one waits for single rows).
LEND_S = 0.01

#: See `OpenReader.plain`.
Plain = Callable[[Sequence[pa.Table]], tuple[pa.RecordBatch | None, Exception | None]]


@dataclass
class _Reading:
    """A chunk that is being read. came: by the fetching thread; all else by the decoding one."""

    chunk: int
    first_row: int
    plain: Plain
    since: float
    came: list[pa.Table] = field(default_factory=list)
    batches: list[pa.RecordBatch] = field(default_factory=list)
    num_seen: int = 0
    is_unfit: bool = False  # the next row cannot be made plain, as the fetching thread will find, too


class Lent:
    """In the memory of one process: its own decoding thread takes the rows, others what is in the ring.

    The fetching thread calls `begin`, `add`, `num_rows` and `end`; the decoding one the others.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reading: _Reading | None = None
        self.is_growing = False
        """More rows of it may come, at any time."""

    def begin(self, chunk: int, first_row: int, plain: Plain) -> None:
        """``chunk`` is being read; nothing of it is there yet. first_row: its id."""
        self._reading, self.is_growing = _Reading(chunk, first_row, plain, self._clock()), True

    def add(self, row: pa.Table) -> None:
        """Its next row."""
        assert self._reading is not None
        self._reading.came.append(row)

    @property
    def num_rows(self) -> int:
        """How many have come."""
        return 0 if self._reading is None else len(self._reading.came)

    def end(self) -> None:
        """It was read; what is lent stays so until the next begins."""
        self.is_growing = False

    @property
    def rows(self) -> range:
        """The ids of the rows that are lent."""
        reading = self._reading
        if reading is None:
            return range(0)
        if not self.is_growing or self._clock() - reading.since >= LEND_S:
            self._look(reading)
        return range(reading.first_row, reading.first_row + sum(batch.num_rows for batch in reading.batches))

    def chunks(self, chunks: Sequence[int]) -> dict[int, RawChunk]:
        """The one that is lent, if it is among ``chunks``; as `rows` last found it."""
        reading = self._reading
        if reading is None or reading.chunk not in chunks or not reading.batches:
            return {}
        batches = list(reading.batches)
        num_bytes = sum(batch.nbytes for batch in batches)
        return {reading.chunk: raw_chunk((-1, 0), reading.first_row, batches, num_bytes)}

    @staticmethod
    def _look(reading: _Reading) -> None:
        new = [] if reading.is_unfit else reading.came[reading.num_seen :]
        if not new:
            return
        reading.num_seen += len(new)
        batch, unfit = reading.plain(new)
        reading.is_unfit = unfit is not None
        if batch is not None:
            reading.batches.append(batch)
