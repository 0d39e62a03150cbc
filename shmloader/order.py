"""Which sample comes next: a pure function of (seed, epoch, position), that nobody need be told.

`Order` says it for one source, `Mixture` (mixture.py) which source is next where there are several. Both can be asked
for any position and for any row, in a few microseconds, and give the same answers in every process: a sampler iterates,
a prefetcher looks ahead, and a resumed run begins where it stopped, without a list of rows anywhere.
"""

from __future__ import annotations

import enum
import operator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shmloader.mixture import Mixture
from shmloader.permutation import Permutation, Rows, bad_option, make_keys, runs, whole_number

__all__ = ["DEFAULT_WINDOW_BYTES", "Chunks", "Kind", "Mixture", "Order"]

#: Bytes of a window: large enough for a few chunks of most datasets, small beside a ring (guessed).
DEFAULT_WINDOW_BYTES = 128 << 20
#: Permutations that are kept, of the last windows.
_KEEP = 64


@dataclass(frozen=True, eq=False)
class Chunks:
    """How a source is cut into chunks, one item of each array a chunk: int64 [C].

    first_rows: its first row; the chunks lie one behind the other.
    num_rows: how many it has, perhaps none.
    units: number of the unit that it belongs to: from 0, ascending, without gaps. Chunks of one unit must be read one
        after the other: the pieces of a large row group; a sequential stream is a single unit.
    num_bytes: its encoded bytes, at least roughly.

    Raises:
        OptionError: the arrays are not like that.
    """

    first_rows: Rows
    num_rows: Rows
    units: Rows
    num_bytes: Rows

    def __post_init__(self) -> None:
        for name in ("first_rows", "num_rows", "units", "num_bytes"):
            array = np.ascontiguousarray(getattr(self, name))
            if array.ndim != 1 or (array.dtype.kind not in "iu" and len(array)) or len(array) != len(self.first_rows):
                raise bad_option(name, array, "whole numbers, one for each chunk")
            if len(array) and array.min() < 0:
                raise bad_option(name, array, "whole numbers from 0 up")
            object.__setattr__(self, name, array.astype(np.int64))
        if (self.first_rows[1:] != self.first_rows[:-1] + self.num_rows[:-1]).any():
            raise bad_option("first_rows", self.first_rows, "such that each chunk begins where the one before ends")
        if len(self.units) and (self.units[0] or not np.isin(np.diff(self.units), (0, 1)).all()):
            raise bad_option("units", self.units, "0, then each the one before or the next number")

    def __len__(self) -> int:
        return len(self.first_rows)


class Kind(enum.IntEnum):
    """What is shuffled.

    SEQUENTIAL: nothing; rows come as they lie in the source.
    UNIFORM: all rows among themselves; for data that fits the ring.
    WINDOWED: the units among themselves, then the rows of each window of some chunks; for data that does not fit.
    """

    SEQUENTIAL = 0
    UNIFORM = 1
    WINDOWED = 2


class Order:
    """Which row is at which position, for one rank in one epoch.

    SEQUENTIAL and UNIFORM are what they say. WINDOWED lays the units one behind the other in random sequence, their
    chunks as they come, and cuts that into windows: a chunk belongs to window ⌊encoded bytes laid before it /
    window_bytes⌋, but one that is larger than ``window_bytes`` has a window to itself. So a window has less than
    twice ``window_bytes``, or a single chunk. The rows of each are shuffled among themselves. If all chunks are in
    one window, that is a uniform shuffle of everything.

    Memory and the time to construct are proportional to the number of chunks: a few numbers for each, nothing for a
    row. An order is not changed after construction; any number of threads may ask it.

    Args:
        chunks: of the source.
        kind: what is shuffled.
        seed: any integer; another one gives another order. It has no meaning for SEQUENTIAL.
        epoch: from 0; each has its own order.
        rank, world_size: this order is that of every ``world_size``-th position of the whole, from ``rank`` on. All
            ranks have equally many: without ``drop_last`` the whole is continued from its beginning until it divides,
            as torch's DistributedSampler does, so that up to ``world_size - 1`` rows come twice.
        drop_last: leave out what does not divide, up to ``world_size - 1`` rows, in place of that.
        window_bytes: of WINDOWED.

    Raises:
        OptionError: an argument is no integer or out of its range.
    """

    def __init__(
        self,
        chunks: Chunks,
        kind: Kind,
        *,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        window_bytes: int = DEFAULT_WINDOW_BYTES,
    ) -> None:
        self.chunks = chunks
        self.kind = Kind(kind)
        self.seed = whole_number("seed", seed)
        self.epoch = whole_number("epoch", epoch, 0)
        self.world_size = whole_number("world_size", world_size, 1)
        self.rank = whole_number("rank", rank, 0)
        if self.rank >= self.world_size:
            raise bad_option("rank", rank, f"less than world_size={self.world_size}")
        self.window_bytes = whole_number("window_bytes", window_bytes, 1)
        self.drop_last = bool(drop_last)
        self.num_rows = int(chunks.num_rows.sum())
        self._first_row = int(chunks.first_rows[0]) if len(chunks) else 0
        self._length = (self.num_rows + (0 if self.drop_last else self.world_size - 1)) // self.world_size
        self._permutations: dict[int, Permutation] = {}
        self._lay()

    def _lay(self) -> None:
        """Make the tables: the chunks as they are laid, and the windows that this is cut into."""
        chunks = self.chunks
        if self.kind is Kind.WINDOWED:
            self._laid = _laid_by(self._units(), chunks)
            self._windows = _windows(chunks.num_bytes[self._laid], self.window_bytes)
        else:
            self._laid = np.arange(len(chunks))
            self._windows = self._laid if self.kind is Kind.SEQUENTIAL else np.zeros_like(self._laid)
        num_rows = chunks.num_rows[self._laid]
        # All that follows counts in rows of the whole order, before it is dealt out to ranks.
        self._chunk_ends = np.cumsum(num_rows)
        self._row_shifts = chunks.first_rows[self._laid] - (self._chunk_ends - num_rows)
        last_chunks = np.flatnonzero(np.diff(self._windows, append=len(chunks) + 1))
        self._window_ends = self._chunk_ends[last_chunks]

    def __len__(self) -> int:
        return self._length

    # -- rows at positions, positions of rows ------------------------------------------------------------

    def __getitem__(self, position: int) -> int:
        """The row at ``position``, from 0 to ``len() - 1``."""
        position = operator.index(position)
        if not 0 <= position < self._length:
            raise IndexError(f"position {position} is not in 0 … {self._length - 1}")
        at = (position * self.world_size + self.rank) % self.num_rows
        if self.kind is Kind.SEQUENTIAL:
            return self._first_row + at
        if self.kind is Kind.UNIFORM:
            return self._first_row + self._permutation(0)[at]
        window = int(self._window_ends.searchsorted(at, "right"))
        begin = self._begin(window)
        at = begin + self._permutation(window)[at - begin]
        return at + int(self._row_shifts[self._chunk_ends.searchsorted(at, "right")])

    def rows(self, start: int, stop: int) -> Rows:
        """The rows at positions ``start`` to ``stop - 1``, int64; what lies beyond the end is cut off, as of a list."""
        if start < 0:
            raise IndexError(f"position {start} is not in 0 … {self._length - 1}")
        positions = np.arange(start, min(stop, self._length), dtype=np.int64)
        if not len(positions):
            return positions
        at = (positions * self.world_size + self.rank) % self.num_rows
        if self.kind is Kind.SEQUENTIAL:
            return self._first_row + at
        if self.kind is Kind.UNIFORM:
            return self._first_row + self._permutation(0).take(at)
        windows = self._window_ends.searchsorted(at, "right")
        for first, last in runs(windows):
            window = int(windows[first])
            begin = self._begin(window)
            at[first:last] = self._permutation(window).take(at[first:last] - begin) + begin
        return at + self._row_shifts[self._chunk_ends.searchsorted(at, "right")]

    def position(self, row: int) -> int | None:
        """The first position of this rank that has ``row``; None if only other ranks have it, or if it was dropped.

        Raises:
            IndexError: the source has no such row.
        """
        row = operator.index(row)
        at = row - self._first_row
        if not 0 <= at < self.num_rows:
            raise IndexError(f"row {row} is not in {self._first_row} … {self._first_row + self.num_rows - 1}")
        if self.kind is Kind.UNIFORM:
            at = self._permutation(0).index(at)
        elif self.kind is Kind.WINDOWED:
            slot = int(self._chunks_laid[self.chunks.first_rows.searchsorted(row, "right") - 1])
            window = int(self._windows[slot])
            begin = self._begin(window)
            at = begin + self._permutation(window).index(row - int(self._row_shifts[slot]) - begin)
        # It comes again where the order was continued from its beginning.
        for place in range(at, self._length * self.world_size, self.num_rows):
            if place % self.world_size == self.rank:
                return place // self.world_size
        return None

    @cached_property
    def _chunks_laid(self) -> Rows:
        """For each chunk, its place among the laid ones."""
        places = np.empty_like(self._laid)
        places[self._laid] = np.arange(len(self._laid))
        return places

    def _begin(self, window: int) -> int:
        return int(self._window_ends[window - 1]) if window else 0

    def _permutation(self, window: int) -> Permutation:
        found = self._permutations.get(window)
        if found is None:
            if len(self._permutations) >= _KEEP:
                self._permutations = {}
            keys = make_keys("rows", self.seed, self.epoch, window)
            found = Permutation(int(self._window_ends[window]) - self._begin(window), keys)
            self._permutations[window] = found
        return found

    def _units(self) -> Rows:
        """The units in random sequence."""
        num_units = int(self.chunks.units[-1]) + 1 if len(self.chunks) else 0
        keys = make_keys("units", self.seed, self.epoch)
        return Permutation(num_units, keys).take(np.arange(num_units, dtype=np.int64))

    # -- what must be there when: one item a chunk -------------------------------------------------------

    @cached_property
    def sequence(self) -> Rows:
        """The chunks in the sequence in which they are first needed, int64 [C]; those of a unit together.

        Of UNIFORM, that is exact for the units that this rank needs early (up to four positions a unit, and 1,024);
        the others follow as they lie in the source.
        """
        if self.kind is not Kind.UNIFORM:
            return self._laid
        units = self.chunks.units
        found: dict[int, None] = {}
        num_units = int(units[-1]) + 1 if len(units) else 0
        most = min(self._length, 4 * num_units + 1024)
        for start in range(0, most, 4096):
            rows = self.rows(start, min(start + 4096, most))
            needed = units[self.chunks.first_rows.searchsorted(rows, "right") - 1]
            found.update(dict.fromkeys(needed.tolist()))
            if len(found) == num_units:
                break
        found.update(dict.fromkeys(range(num_units)))
        return _laid_by(np.fromiter(found, np.int64, num_units), self.chunks)

    @cached_property
    def starts(self) -> Rows:
        """For each chunk of `sequence`, this rank's position at which its window begins, int64 [C].

        Of SEQUENTIAL, at which the chunk begins; of UNIFORM, 0.
        """
        return self._dealt(np.concatenate(([0], self._window_ends[:-1])))

    @cached_property
    def ends(self) -> Rows:
        """For each chunk of `sequence`, this rank's position from which no row of it is needed any more, int64 [C].

        That is the end of its window; of SEQUENTIAL, of the chunk; of UNIFORM, ``len()``. One thing it leaves out:
        where the order was continued from its beginning, a rank's last positions need rows of the first windows again.
        """
        if self.kind is Kind.UNIFORM:
            return np.full(len(self.chunks), self._length)
        return self._dealt(self._window_ends)

    def _dealt(self, bounds: Rows) -> Rows:
        """For each chunk, the bound of its window: from places of the whole order to positions of this rank."""
        local = np.clip(-((self.rank - bounds) // self.world_size), 0, self._length)
        dealt: Rows = local[self._windows]
        return dealt


def _laid_by(units: Rows, chunks: Chunks) -> Rows:
    """The chunks of ``units``, unit after unit."""
    begins = np.searchsorted(chunks.units, units)
    counts = np.searchsorted(chunks.units, units, "right") - begins
    shifts = begins - (np.cumsum(counts) - counts)
    laid: Rows = np.arange(len(chunks)) + np.repeat(shifts, counts)
    return laid


def _windows(num_bytes: Rows, window_bytes: int) -> Rows:
    """The window of each chunk, from 0 without gaps, for chunks of ``num_bytes`` in the sequence in which they lie."""
    if len(num_bytes) == 0:
        return num_bytes
    numbers = (np.cumsum(num_bytes) - num_bytes) // window_bytes
    # The chunk after a large one has another number anyway.
    is_first = (np.diff(numbers, prepend=0) > 0) | (num_bytes > window_bytes)
    is_first[0] = False
    return np.cumsum(is_first)
