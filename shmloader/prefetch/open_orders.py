"""The iterations of an open set that live now: orders over a stream whose end nobody knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

import shmloader._native as native
from shmloader.permutation import Rows
from shmloader.prefetch.cut import chunks_of
from shmloader.sizes import CHUNKS_PER_ORDER
from shmloader.writer import Stamp


class OpenOrder:
    """The positions of an iteration below ``length``, as row ids."""

    def __init__(self, first_id: int, length: int) -> None:
        self._first_id, self._length = first_id, length

    def __len__(self) -> int:
        return self._length

    def rows(self, start: int, stop: int) -> Rows:
        """The rows at positions ``start`` to ``stop - 1``, int64; what lies beyond the end is cut off."""
        return np.arange(start, min(stop, self._length), dtype=np.int64) + self._first_id


@dataclass(frozen=True)
class OpenLiving:
    """An iteration that somebody reads in: all positions below ``low_water`` are consumed.

    num_positions: where the stream ends, as far as that is known. rows_per_chunk: of the set.
    """

    segment: native.Segment
    slot: int
    gen: int
    epoch: int
    num_positions: int
    low_water: int
    rows_per_chunk: int

    @property
    def key(self) -> tuple[int, int]:
        """What tells it from all other iterations of the set."""
        return self.slot, self.gen

    @cached_property
    def first_id(self) -> int:
        """The row at position 0."""
        return native.open_id(self.slot, self.gen, 0)

    @property
    def numbers(self) -> range:
        """The chunks that may have a place: from the one that is read on."""
        first = self.low_water // self.rows_per_chunk
        last = -(-self.num_positions // self.rows_per_chunk)
        return range(first, min(last, first + CHUNKS_PER_ORDER))

    @cached_property
    def chunks(self) -> Rows:
        """For each of `numbers` the chunk's index; -1: it has no place yet."""
        numbers = np.arange(self.numbers.start, self.numbers.stop, dtype=np.int64)
        return chunks_of(self.segment, numbers * self.rows_per_chunk + self.first_id)

    @cached_property
    def order(self) -> OpenOrder:
        """The order, as far as its chunks have places: beyond that there is nothing to be decoded."""
        there = np.flatnonzero(self.chunks >= 0)
        end = (self.numbers.start + int(there[-1]) + 1) * self.rows_per_chunk if len(there) else 0
        return OpenOrder(self.first_id, min(self.num_positions, end))

    def stamp(self, until: int) -> Stamp:
        """Keeps a record until the iteration is at position ``until``."""
        return self.slot, self.gen, until


class OpenOrders:
    """The iterations of an open set that live now. May be asked by several threads."""

    def __init__(self, segment: native.Segment, rows_per_chunk: int) -> None:
        self._segment, self._rows_per_chunk = segment, rows_per_chunk

    def now(self) -> Sequence[OpenLiving]:
        """Those of which something is still to be read; one that all readers have come to the end of takes no share."""
        if not self._segment.num_orders():
            return []
        found = []
        for slot, gen, _, epoch, num_positions, *_, low_water in self._segment.orders():
            if low_water >= num_positions:
                continue
            found.append(OpenLiving(self._segment, slot, gen, epoch, num_positions, low_water, self._rows_per_chunk))
        return found
