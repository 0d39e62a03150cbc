"""Which chunk a prefetcher fetches next: from the source into the ring's raw region.

Most urgent first:

1. chunks of which readers wait for rows,
2. chunks that the living orders need, in their sequence, as far ahead as the budget of the raw region goes,
3. fill: the others as they lie, while there is room in the ring for rows that stay.

The chunks of one unit are read front to back. So on the way to a chunk that somebody waits for, those before it are
fetched as well, if they are of use and there is room.
"""

from __future__ import annotations

import enum
import time
from array import array
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

import shmloader._native as native
from shmloader.order import Chunks, Kind
from shmloader.permutation import Rows
from shmloader.prefetch.lookahead import Pace, is_fillable
from shmloader.prefetch.orders import FollowedOrders, Living
from shmloader.sources.base import Chunk
from shmloader.writer import Stamp

#: Wanted chunks that are looked at.
MOST_WANTED = 64
#: Chunks that are looked at in one go.
BLOCK = 256
#: What is fetched to fill with and not decoded yet is at most so much, of all prefetchers together: it is in the way of
#: what somebody waits for, but must keep the decoders busy (guessed). In any case one chunk.
FILL_BYTES = 64 << 20
#: A chunk whose server was not reached is left alone for so long (guessed).
REST_S = 5.0


class Why(enum.Enum):
    """What a chunk is fetched for."""

    WANTED = 1
    PASSING = 2
    """It lies on the way to one that is wanted."""
    ORDER = 3
    FILL = 4


@dataclass(frozen=True)
class Pick:
    """A chunk that this process has claimed. stamp: until when its raw record is kept.

    rows: of an open set, what is to be read; None: the plan's chunk.
    """

    chunk: int
    why: Why
    stamp: Stamp | None = None
    stays: bool = False
    rows: Chunk | None = None

    @property
    def urgent(self) -> bool:
        """Somebody waits for it."""
        return self.why is Why.WANTED


class Schedule(Protocol):
    """What a fetcher asks: of the plan's chunks (`FetchSchedule`), or of streams (`StreamSchedule`)."""

    wait_s: float

    def next(self, can_hold: bool = True) -> Pick | None:
        """The most urgent chunk that can be had, claimed."""
        ...

    def next_wanted(self) -> Pick | None:
        """As `next`, only for what somebody waits for."""
        ...

    def read(self, chunk: int, is_whole: bool) -> bool:
        """The reader has read ``chunk``; whether it is news that it could not be read as a whole."""
        ...

    def rest(self, chunk: int) -> range:
        """Leave ``chunk`` alone for a while, and what can only be read behind it: these; none: it never comes again."""
        ...

    def waited_for(self) -> set[int]:
        """The chunks of which somebody waits for rows."""
        ...

    def is_of_use(self, pick: Pick) -> bool:
        """Whether what ``pick`` is fetched for still holds."""
        ...


class FetchSchedule:
    """Decides for one prefetcher, and claims. For one thread.

    budget_bytes: encoded bytes of chunks that are fetched ahead of an order.
    """

    def __init__(
        self, segment: native.Segment, chunks: Chunks, units: Rows, orders: FollowedOrders, budget_bytes: int
    ) -> None:
        self._segment, self._chunks, self._units, self._orders = segment, chunks, units, orders
        self._budget_bytes = budget_bytes
        self._at: int | None = None  # the chunk that the reader has come to
        self._cursors: dict[tuple[int, int], tuple[int, int]] = {}
        self._cursor_pace, self._fill_pace = Pace(), Pace()
        self._fill_cursor = 0
        self._filling_bytes = 0
        self.wait_s = float("inf")
        """Seconds after which `next` may find something although the work word did not move."""
        self._full_at: int | None = None
        self._resting: dict[range, float] = {}

    # -- for the fetcher -----------------------------------------------------------------------------------

    def next(self, can_hold: bool = True) -> Pick | None:
        """The most urgent chunk that can be had, claimed; None: none before `wait_s`, or the work word moves.

        can_hold: what nobody is known to need but who waits for it now can be held; else there is no use in it.
        """
        self.wait_s = float("inf")
        return (self.next_wanted() if can_hold else None) or self._next_ordered() or self._next_fill()

    def next_wanted(self) -> Pick | None:
        """As `next`, only for what somebody waits for."""
        wanted = sorted(self._segment.chunks_wanted(MOST_WANTED), key=lambda item: -item[1])
        others: set[int] = set()  # units that others read
        for chunk in self._in_passing_order([chunk for chunk, _ in wanted]):
            unit = int(self._units[chunk])
            if unit in others:
                continue
            pick, is_others = self._claim_on_the_way(chunk)
            if pick is not None:
                return pick
            if is_others:
                others.add(unit)
        return None

    def read(self, chunk: int, is_whole: bool) -> bool:
        """The reader has read ``chunk``, as a whole or not; whether the latter is news, as it is of each chunk."""
        self._at = chunk + 1 if is_whole else None
        return not is_whole

    def rest(self, chunk: int) -> range:
        """Leave ``chunk``, and what of its unit comes behind it, alone for `REST_S`.

        All of them, since each try may take as long as a server is given: one after the other, those that lie between
        ``chunk`` and one that somebody waits for would be tried again before its turn came.
        """
        chunks = range(chunk, int(self._units.searchsorted(self._units[chunk], "right")))
        self._resting[chunks] = time.monotonic() + REST_S
        return chunks

    def waited_for(self) -> set[int]:
        """The chunks of which somebody waits for rows that nobody decodes yet, fetched or not."""
        rows = np.array(self._segment.wanted(4096), np.int64)
        return set((self._chunks.first_rows.searchsorted(rows, "right") - 1).tolist())

    def is_of_use(self, pick: Pick) -> bool:
        """Whether what ``pick`` is fetched for still holds."""
        if pick.why is not Why.ORDER or pick.stays or pick.stamp is None:
            return True
        slot, gen, until = pick.stamp
        return any(order.key == (slot, gen) and order.low_water < until for order in self._orders.now())

    # -- the three kinds -----------------------------------------------------------------------------------

    def _in_passing_order(self, chunks: list[int]) -> list[int]:
        """Of a unit that is being read first the chunks that are still to come, as they come."""
        if self._at is None or self._at >= len(self._units):
            return chunks
        at, unit = self._at, int(self._units[self._at])
        coming = sorted(chunk for chunk in chunks if chunk >= at and self._units[chunk] == unit)
        # The most wanted is first nonetheless where it does not lie on this way.
        first = chunks[:1] if chunks and self._units[chunks[0]] != unit else []
        return first + coming + [chunk for chunk in chunks if chunk not in coming and chunk not in first]

    def _claim_on_the_way(self, target: int) -> tuple[Pick | None, bool]:
        """As `_claim`: ``target``, or what is of use and comes before it where the reader must pass."""
        begin = int(self._units[target])
        at = self._at
        if at is not None and begin <= at <= target:
            begin = at
        way = np.arange(begin, target + 1)
        for chunk in way[_is_to_do(self._look(way))].tolist():
            why = Why.WANTED if chunk == target else Why.PASSING
            pick, is_others = self._claim(chunk, why)
            if pick is not None or is_others:
                return pick, is_others
        return None, False

    def _next_ordered(self) -> Pick | None:
        living = self._orders.now()
        self._cursors = {order.key: self._cursors[order.key] for order in living if order.key in self._cursors}
        for order in living:
            pick = self._claim_ahead(order)
            if pick is not None:
                return pick
        return None

    def _claim_ahead(self, living: Living) -> Pick | None:
        """The first chunk that the order needs, lacks, and may have."""
        order = living.order
        first = int(order.ends.searchsorted(living.low_water, "right"))
        last = self._last_ahead(living, first)
        seen, cursor = self._cursors.get(living.key, (-1, 0))
        if seen != first or self._cursor_pace.wait_s() == 0:
            cursor = first  # urgent ones may have driven out what was there
        cursor = max(cursor, first)
        is_clear = True
        with self._cursor_pace:
            for start in range(cursor, last, BLOCK):
                block = order.sequence[start : min(start + BLOCK, last)]
                states = self._look(block)
                self._keep(living, start, block, states)
                to_do = block[_is_to_do(states)]
                if len(to_do) and is_clear:
                    cursor, is_clear = int(living.known.places[to_do[0]]), False
                while len(to_do):
                    chunk = int(to_do[0])
                    pick, is_others = self._claim(chunk, Why.ORDER)
                    if pick is not None:
                        self._cursors[living.key] = first, cursor
                        return replace(pick, stamp=living.chunk_stamp(chunk))
                    to_do = to_do[self._units[to_do] != self._units[chunk]] if is_others else to_do[1:]
                    if is_others and self._units[order.sequence[last - 1]] == self._units[chunk]:
                        return None  # all that is left is of that unit
        self._cursors[living.key] = first, last if is_clear else cursor
        return None

    def _keep(self, living: Living, start: int, block: Rows, states: npt.NDArray[np.uint8]) -> None:
        """Of ``block``, the chunks of the order's sequence from ``start`` on: those that are there, it needs."""
        at = np.flatnonzero(states & native.CHUNK_HAS_RAW)
        ends = living.order.ends[start + at]
        for end in np.unique(ends).tolist():
            ids = array("Q", [native.RAW | chunk for chunk in block[at[ends == end]].tolist()])
            self._segment.look(ids, living.stamp(end))

    def _last_ahead(self, living: Living, first: int) -> int:
        """The end of what may be fetched ahead of an order that is in the window of chunk ``first`` of its sequence."""
        order, before = living.order, living.known.bytes_before
        if first >= len(order.sequence):
            return first
        last = int(before.searchsorted(before[first] + self._budget_bytes, "right")) - 1
        window = 0
        if order.kind is not Kind.UNIFORM:  # a window is needed as a whole
            window = int(order.starts.searchsorted(living.low_water, "right"))
        return max(last, window, first + 1)

    def _next_fill(self) -> Pick | None:
        if not self._may_fill():
            return None
        while self._fill_cursor < len(self._units):
            block = np.arange(self._fill_cursor, min(self._fill_cursor + BLOCK, len(self._units)))
            to_do = block[_is_to_do(self._look(block))]
            self._fill_cursor = int(block[-1]) + 1
            for chunk in to_do.tolist():
                self._fill_cursor = chunk
                pick, is_others = self._claim(chunk, Why.FILL)
                if is_others:  # go on behind that unit
                    self._fill_cursor = int(self._units.searchsorted(self._units[chunk], "right"))
                    break
                if pick is not None and pick.stays:
                    self._filling_bytes += int(self._chunks.num_bytes[chunk])
                    return pick
                if pick is not None:
                    self._segment.chunk_end(chunk, native.FETCH_GIVEN_UP)
                    self._full_at = self._segment.stats()["chunks_done"]
                    return None
        return None

    def _may_fill(self) -> bool:
        """Whether there may be room for rows that stay, and the decoders have use of more."""
        if self._full_at is not None and self._full_at == self._segment.stats()["chunks_done"]:
            return False
        self._full_at = None
        if self._fill_pace.wait_s() == 0:
            with self._fill_pace:
                states = self._look(np.arange(len(self._units)))
            self._filling_bytes = int(self._chunks.num_bytes[is_fillable(states)].sum())
            if self._fill_cursor >= len(self._units):  # once more from the front: for what others gave up
                self._fill_cursor = int(np.append(np.flatnonzero(_is_to_do(states)), len(self._units))[0])
        elif self._filling_bytes:
            self.wait_s = self._fill_pace.wait_s()
        return self._filling_bytes < min(FILL_BYTES, self._budget_bytes)

    # -- parts ---------------------------------------------------------------------------------------------

    def _claim(self, chunk: int, why: Why) -> tuple[Pick | None, bool]:
        """The chunk, if it can be had; whether it cannot because another one reads its unit."""
        status = self._segment.chunk_claim(chunk)
        if status != 0:
            return None, status == native.STALE
        stays = bool(self._look(np.array([chunk]))[0] & native.CHUNK_STAYS)
        return Pick(chunk, why, self._stamp(chunk), stays), False

    def _stamp(self, chunk: int) -> Stamp | None:
        """The first order that still needs ``chunk``."""
        return next((stamp for order in self._orders.now() if (stamp := order.chunk_stamp(chunk)) is not None), None)

    def _look(self, chunks: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        ids = chunks.astype(np.uint32)
        parts = [self._segment.chunk_look(ids[at : at + 4096].data) for at in range(0, len(ids), 4096)]
        states = np.frombuffer(b"".join(parts), np.uint8)
        if not self._resting:
            return states
        now = time.monotonic()
        self._resting = {rest: until for rest, until in self._resting.items() if until > now}
        is_to_rest = np.zeros(len(chunks), bool)
        for rest in self._resting:
            is_to_rest |= (chunks >= rest.start) & (chunks < rest.stop)
        return np.where(is_to_rest & _is_to_do(states), native.CHUNK_BROKEN, states).astype(np.uint8)


def _is_to_do(states: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Of chunks: they can be claimed."""
    flags: npt.NDArray[np.bool_] = (states & 0xF == native.CHUNK_TODO) & (states & native.CHUNK_HAS_RAW == 0)
    return flags
