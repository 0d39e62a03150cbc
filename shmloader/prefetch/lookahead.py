"""What one order needs next: the rows at its positions from the low-water mark on, and what there is of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

import numpy as np
import numpy.typing as npt

import shmloader._native as native
from shmloader.permutation import Rows
from shmloader.prefetch.orders import Followed

#: Ids of one look: the core holds its mutex for so many look-ups in the index.
LOOK_ROWS = 1024
#: The window is made larger when so little of it is left: asking the order costs 0.1 ms, however few the rows.
LOW = 0.75
#: Positions that are looked at in one go, so that somebody who waits is noticed soon.
MOST_LOOKED = 16 * LOOK_ROWS

States = npt.NDArray[np.uint8]
ChunkStates = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]
IS_TO_DO = np.zeros(256, bool)
"""By what `Segment.look` says of a row: it can be claimed."""
IS_TO_DO[[native.ROW_MISSING, native.ROW_SUSPECT]] = True


class Pace:
    """Keeps what is done again and again in vain to 2 % of the time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._due = 0.0

    def wait_s(self) -> float:
        """Seconds until it may be done again."""
        return max(self._due - self._clock(), 0.0)

    def __enter__(self) -> None:
        self._began = self._clock()

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        now = self._clock()
        self._due = now + 50 * (now - self._began)


def look(segment: native.Segment, rows: Rows) -> States:
    """What there is of each of ``rows``, in blocks."""
    parts = [segment.look(rows[at : at + LOOK_ROWS].data, None) for at in range(0, len(rows), LOOK_ROWS)]
    return np.frombuffer(b"".join(parts), np.uint8).copy()


def is_fillable(states: ChunkStates) -> Flags:
    """Of chunks: their rows are decoded once and for all, and can be now."""
    flags: Flags = (states & 0xF != native.CHUNK_DONE) & (states & 0xF != native.CHUNK_BROKEN)
    for flag in (native.CHUNK_STAYS, native.CHUNK_HAS_RAW):
        flags &= states & flag != 0
    return flags


class Lookahead:
    """A window of positions of one order, from its low-water mark on, of which at most so many rows are not final.

    ``states`` is what was last seen of each row; a claim that was tried changes it, `refresh` looks again.
    """

    def __init__(self, segment: native.Segment) -> None:
        self._segment = segment
        self.begin = 0
        self.rows: Rows = np.zeros(0, np.int64)
        self.states: States = np.zeros(0, np.uint8)

    @property
    def end(self) -> int:
        """The first position that was not looked at yet."""
        return self.begin + len(self.rows)

    def move(self, living: Followed, most: int) -> bool:
        """Go on to where the order is now; True if there is more to look at, in another call."""
        passed = living.low_water - self.begin
        if passed < 0 or passed > len(self.rows):
            self.begin, passed = living.low_water, len(self.rows)
        else:
            self.begin += passed
        self.rows, self.states = self.rows[passed:], self.states[passed:]
        rows, states = [self.rows], [self.states]
        end, num_open = self.end, int(np.count_nonzero(self.states != native.ROW_FINAL))
        if num_open > most * LOW and len(self.rows):
            return False  # not for every few rows
        last = min(len(living.order), end + MOST_LOOKED)
        while num_open < most and end < last:
            block = living.order.rows(end, min(end + most - num_open, end + LOOK_ROWS, last))
            seen = self._segment.look(block.data, living.stamp(end + 1))
            rows.append(block)
            states.append(np.frombuffer(seen, np.uint8))
            num_open += len(seen) - seen.count(native.ROW_FINAL)
            end += len(block)
        if len(rows) > 1:
            self.rows, self.states = np.concatenate(rows), np.concatenate(states)
        return num_open < most and end < len(living.order)

    def refresh(self, living: Followed, start: int = 0, end: int | None = None) -> None:
        """Look again at the window's rows [start, end): what was read meanwhile is final, though it is evicted."""
        end = len(self.rows) if end is None else end
        for at in range(start, end, LOOK_ROWS):
            rows = self.rows[at : min(at + LOOK_ROWS, end)]
            seen = self._segment.look(rows.data, living.stamp(self.begin + at + 1))
            self.states[at : at + len(rows)] = np.frombuffer(seen, np.uint8)

    def to_do(self) -> npt.NDArray[np.int64]:
        """Where in the window there are rows that can be claimed, in the order's sequence."""
        return np.flatnonzero(IS_TO_DO[self.states])
