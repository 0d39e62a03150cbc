"""What a prefetcher fetches in an open set: of each iteration's stream the chunks that come next.

A stream is read front to back, so there is little to choose: which iteration next (in turn; those that a reader waits
for first), and how far ahead. What was fetched is kept until all its readers are past it: a chunk that was evicted
before would have to be read again from the stream's front.

One prefetcher reads the stream of an iteration, for as long as it lives. One that takes over reads from the front and
skips what others have put into the ring.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator

import numpy as np
import pyarrow as pa

import shmloader._native as native
from shmloader.errors import ReadError
from shmloader.prefetch.cut import chunks_of, look_at_chunks
from shmloader.prefetch.fetch_schedule import Pick, Why
from shmloader.prefetch.lent import Lent
from shmloader.prefetch.lookahead import IS_TO_DO
from shmloader.prefetch.open_orders import OpenLiving, OpenOrders
from shmloader.prefetch.plan import LAST_POSITION
from shmloader.prefetch.schedule import MOST_WANTED
from shmloader.prefetch.store import with_failure
from shmloader.sizes import OPEN_AHEAD_CHUNKS
from shmloader.sources.base import Chunk, OpenReader

log = logging.getLogger("shmloader.prefetcher")


#: How often it is asked, between two rows, whether they are still needed (guessed: soon for who begins the next
#: iteration, and it costs 0.1 %).
ASK_S = 0.01


class StreamSchedule:
    """Decides for one prefetcher, and claims. For one thread. See `fetch_schedule.Schedule`.

    budget_bytes: encoded bytes that are fetched ahead of all iterations together. chunk_bytes: of a chunk, as long as
    none was fetched. keep: told which iterations live, before anything is claimed.
    """

    def __init__(
        self,
        segment: native.Segment,
        orders: OpenOrders,
        budget_bytes: int,
        chunk_bytes: int,
        rows_per_chunk: int,
        keep: Callable[[Collection[tuple[int, int]]], None],
    ) -> None:
        self._segment, self._orders, self._keep = segment, orders, keep
        self._budget_bytes, self._chunk_bytes, self._rows_per_chunk = budget_bytes, chunk_bytes, rows_per_chunk
        self._turn = 0
        self._failed: dict[tuple[int, int], int] = {}  # the chunk from which on nothing more can be read
        self.wait_s = float("inf")
        """The work word moves with all that there is to do."""

    def next(self, can_hold: bool = True) -> Pick | None:
        """The most urgent chunk that can be had, claimed; None: none, before the work word moves."""
        living = list(self._orders.now())
        keys = {order.key for order in living}
        self._keep(keys)
        self._failed = {key: number for key, number in self._failed.items() if key in keys}
        if not living:
            return None
        self._turn = (self._turn + 1) % len(living)
        living = living[self._turn :] + living[: self._turn]
        return self._next_wanted(living) or self._next_ahead(living)

    def next_wanted(self) -> Pick | None:
        """As `next`, only for what somebody waits for."""
        return self._next_wanted(list(self._orders.now()))

    def read(self, chunk: int, is_whole: bool) -> bool:
        """The streams know themselves how far they are. Beyond where one failed is read only for who waits for that.

        Returns whether it is news that it failed: the first time in an iteration that lives.
        """
        first_id = self._segment.chunk_first(chunk)
        if is_whole or first_id is None:
            return False
        number = (first_id & LAST_POSITION) // self._rows_per_chunk
        for order in self._orders.now():
            if order.first_id == first_id & ~LAST_POSITION:
                was = self._failed.get(order.key)
                self._failed[order.key] = number if was is None else min(was, number)
                return was is None
        return False

    def rest(self, chunk: int) -> range:
        """None: what comes behind it in its iteration could not be had either, and its rows not in their order."""
        return range(0)

    def waited_for(self) -> set[int]:
        """The chunks of which somebody waits for rows that nobody decodes yet, fetched or not."""
        rows = np.array(self._segment.wanted(MOST_WANTED), np.int64)
        return set(chunks_of(self._segment, rows).tolist()) - {-1}

    def is_of_use(self, pick: Pick) -> bool:
        """Whether what ``pick`` is fetched for still holds."""
        assert pick.rows is not None
        return self.needs(pick.rows)

    def needs(self, chunk: Chunk) -> bool:
        """Whether the iteration that ``chunk`` is of lives, and has not passed it."""
        key, end = chunk.piece[:2], chunk.first_row + chunk.num_rows
        return any(order.key == key and order.low_water < end for order in self._orders.now())

    # -- parts ---------------------------------------------------------------------------------------------

    def _next_wanted(self, living: list[OpenLiving]) -> Pick | None:
        """A chunk that somebody waits for, or one on the way to it: all of them are needed."""
        wanted = np.array(self._segment.wanted(MOST_WANTED), np.int64)
        for order in living if len(wanted) else ():
            of_order = wanted[wanted & ~LAST_POSITION == order.first_id] & LAST_POSITION
            if len(of_order):
                last = int(of_order.max()) // self._rows_per_chunk
                pick = self._claim(order, last + 1, Why.WANTED)
                if pick is not None:
                    return pick
        return None

    def _next_ahead(self, living: list[OpenLiving]) -> Pick | None:
        num_ahead = self._budget_bytes // len(living) // self._mean_bytes()
        num_ahead = min(max(num_ahead, 1), OPEN_AHEAD_CHUNKS)
        for order in living:
            end = order.numbers.start + num_ahead
            pick = self._claim(order, min(end, self._failed.get(order.key, end)), Why.ORDER)
            if pick is not None:
                return pick
        return None

    def _mean_bytes(self) -> int:
        stats = self._segment.stats()
        if not stats["num_fetched"]:
            return self._chunk_bytes
        return max(stats["fetched_bytes"] // stats["num_fetched"], 1)

    def _claim(self, order: OpenLiving, end: int, why: Why) -> Pick | None:
        """The first chunk below number ``end`` that is needed and neither there nor read by somebody now."""
        numbers = np.arange(order.numbers.start, min(order.numbers.stop, end))
        chunks = order.chunks[: len(numbers)]
        is_to_do = chunks < 0
        states = look_at_chunks(self._segment, chunks[~is_to_do])
        is_to_do[~is_to_do] = (states & 0xF == native.CHUNK_TODO) & (states & native.CHUNK_HAS_RAW == 0)
        for number in numbers[is_to_do].tolist():
            rows = self._rows(order, number)
            if not self._is_needed(order, rows):
                continue
            chunk, status = self._segment.chunk_claim_open(order.slot, order.gen, number)
            if status == 0:
                piece = (order.slot, order.gen, order.epoch, chunk)
                until = order.stamp(rows.stop)
                return Pick(chunk, why, until, rows=Chunk(rows.start, len(rows), 0, piece))
            if status in (native.STALE, native.FULL):  # another one reads the stream, or its places are in use
                return None
        return None

    def _rows(self, order: OpenLiving, number: int) -> range:
        """The positions of chunk ``number``."""
        first = number * self._rows_per_chunk
        return range(first, min(first + self._rows_per_chunk, order.num_positions))

    def _is_needed(self, order: OpenLiving, rows: range) -> bool:
        """Whether rows of it are still to be made: it may have made way although all of them were."""
        ids = np.arange(rows.start, rows.stop, dtype=np.int64) + order.first_id
        seen = np.frombuffer(self._segment.look(ids.data, order.stamp(rows.start + 1)), np.uint8)
        return bool(IS_TO_DO[seen].any())


class LendingReader:
    """Reads streams' chunks, lends what has come of one meanwhile, and tells where a stream ends. See `Reader`."""

    def __init__(
        self, segment: native.Segment, reader: OpenReader, lent: Lent, schedule: StreamSchedule, ask_s: float = ASK_S
    ) -> None:
        self._segment, self._reader, self._lent, self._schedule = segment, reader, lent, schedule
        self._ask_s, self._ask_at = ask_s, 0.0

    def read(self, chunk: Chunk) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows of ``chunk`` in one batch; none if the stream ends before it, or its iteration does meanwhile.

        Raises:
            ReadError: the stream failed before; if it did after some rows, these come, with the reason.
        """
        slot, gen, _, index = chunk.piece
        self._lent.begin(index, native.open_id(slot, gen, chunk.first_row), self._reader.plain)
        batch: pa.RecordBatch | None = None
        failure: ReadError | None = None
        try:
            for _, found in self._reader.read(chunk, lambda row: self._lend(row, chunk)):
                batch = found
        except ReadError as error:
            failure = error
        finally:
            self._lent.end()
        if not self._schedule.needs(chunk):  # whatever became of it
            return
        if failure is not None and batch is None:
            raise failure
        if failure is not None and self._schedule.read(index, False):
            log.error("chunk %d: %s", index, failure)
        num_rows = 0 if batch is None else batch.num_rows
        if failure is None and num_rows < chunk.num_rows:
            # Before its rows are in the ring: nobody takes one beyond them for missing.
            self._segment.order_finish(slot, gen, chunk.first_row + num_rows)
        if batch is not None:
            yield chunk.first_row, batch if failure is None else with_failure(batch, chunk.num_rows, failure)

    def _lend(self, row: pa.Table | None, chunk: Chunk) -> bool:
        """Lend ``row``; whether more are needed. A slow stream is not read on for an iteration that was left."""
        if row is not None:
            self._lent.add(row)
            if self._lent.num_rows == 1:
                self._segment.work_tell()  # from now on the decoding thread looks by itself
        now = time.monotonic()
        if now < self._ask_at:
            return True
        self._ask_at = now + self._ask_s
        return self._schedule.needs(chunk)

    def close(self) -> None:
        """Close the streams."""
        self._reader.close()
