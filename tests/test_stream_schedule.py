"""What a prefetcher fetches in an open set, over one without processes; and what it lends meanwhile."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import shmloader._native as native
from shmloader.errors import ReadError
from shmloader.files import RingFiles, format_set
from shmloader.order import Kind
from shmloader.prefetch.cut import OpenCut, PlaceRows
from shmloader.prefetch.fetch_schedule import Pick, Why
from shmloader.prefetch.lent import LEND_S, Lent
from shmloader.prefetch.open_orders import OpenLiving, OpenOrders
from shmloader.prefetch.plan import LAST_POSITION
from shmloader.prefetch.schedule import DecodeSchedule
from shmloader.prefetch.store import RawStore
from shmloader.prefetch.stream_schedule import LendingReader, StreamSchedule
from shmloader.ring import Ring
from shmloader.sizes import CHUNKS_PER_ORDER, Sizes
from shmloader.sources.base import Chunk, OnRow
from shmloader.sources.rows import one_batch
from shmloader.writer import Writer

ROWS = 16
RECORD = 256
CHUNK_BYTES = 1000
SCHEMA = pa.schema([("number", pa.int64())])


@dataclass
class OpenWorld:
    """An open set without processes: a reader, a prefetcher, and whatever else attaches."""

    files: RingFiles
    owner: Ring
    service: Ring
    kept: list[set[tuple[int, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.segment = self.service.segment
        self.writer = Writer(self.service)
        self.orders = OpenOrders(self.segment, ROWS)

    def join(self, key: int = 1, reader: int = 0, num_readers: int = 1, most: int = LAST_POSITION) -> tuple[int, int]:
        """The owner is a reader of an iteration: its slot and generation."""
        begun = self.owner.segment.order_join(
            key, reader, num_readers, self.owner.slot, self.owner.gen, 0, 0, most, int(Kind.SEQUENTIAL)
        )
        assert isinstance(begun, tuple)
        return begun[:2]

    def schedule(self, budget_chunks: int = 3, ring: Ring | None = None) -> StreamSchedule:
        segment = (ring or self.service).segment
        orders = OpenOrders(segment, ROWS)
        return StreamSchedule(
            segment, orders, budget_chunks * CHUNK_BYTES, CHUNK_BYTES, ROWS, lambda keys: self.kept.append(set(keys))
        )

    def ids(self, order: tuple[int, int], positions: Sequence[int]) -> list[int]:
        return [native.open_id(*order, position) for position in positions]

    def want(self, order: tuple[int, int], positions: Sequence[int]) -> None:
        """The reader waits for these, and for nothing else."""
        self.owner.segment.get_many(array("Q", self.ids(order, positions)), native.GET_POST, None)

    def put_raw(self, pick: Pick) -> None:
        """What was picked is in the ring."""
        ticket = self.writer.reserve(native.RAW | pick.chunk, CHUNK_BYTES, pick.stamp)
        assert ticket is not None
        self.writer.commit(ticket)
        self.segment.count_fetched(CHUNK_BYTES)
        assert self.segment.chunk_end(pick.chunk, native.FETCH_OK) == 0

    def decode(self, order: tuple[int, int], positions: Sequence[int]) -> None:
        for position, row in zip(positions, self.ids(order, positions), strict=True):
            ticket = self.writer.reserve(row, RECORD, (*order, position + 1))
            assert ticket is not None
            self.writer.commit(ticket)

    def read_to(self, order: tuple[int, int], position: int) -> None:
        """The reader has read all positions before."""
        begin = self.living(order).low_water
        ids = array("Q", self.ids(order, range(begin, position)))
        _, missing, _, _ = self.owner.segment.get_many(ids, 0, (*order, begin, position))
        assert missing == 0

    def living(self, order: tuple[int, int]) -> OpenLiving:
        return next(living for living in self.orders.now() if living.key == order)


@contextmanager
def open_world(transit_rows: int = 512) -> Iterator[OpenWorld]:
    files = RingFiles.create()
    try:
        transit_bytes = -(-transit_rows * RECORD // 4096) * 4096
        format_set(files, Sizes(0, transit_bytes, 1 << 20, 1 << 20), 4096, [], [], rows_per_chunk=ROWS)
        made = OpenWorld(files, Ring(files, native.OWNER), Ring(files, native.SERVICE))
        yield made
        assert made.segment.check() is None
        made.service.leave()
        made.owner.leave()
    finally:
        files.close()


def rows_of(pick: Pick | None) -> tuple[int, int, Why]:
    """First position, number of rows and reason of a pick."""
    assert pick is not None
    assert pick.rows is not None
    return pick.rows.first_row, pick.rows.num_rows, pick.why


def fetch(made: OpenWorld, schedule: StreamSchedule) -> list[int]:
    """The numbers of all chunks that are fetched until there is nothing more to do."""
    found = []
    while (pick := schedule.next()) is not None:
        made.put_raw(pick)
        found.append(rows_of(pick)[0] // ROWS)
    return found


# ---- what comes next ----------------------------------------------------------------------------------


def test_nothing_is_fetched_that_nobody_reads():
    with open_world() as made:
        assert made.schedule().next() is None
        assert made.kept == [set()]


def test_chunks_come_in_sequence_as_far_ahead_as_the_budget_goes():
    with open_world() as made:
        order = made.join()
        schedule = made.schedule(budget_chunks=3)
        pick = schedule.next()
        assert rows_of(pick) == (0, ROWS, Why.ORDER)
        assert pick.rows.piece == (*order, 0, pick.chunk)
        made.put_raw(pick)
        assert fetch(made, schedule) == [1, 2]


def test_what_all_readers_have_passed_makes_way_for_what_comes():
    with open_world() as made:
        order, schedule = made.join(), made.schedule(budget_chunks=2)
        assert fetch(made, schedule) == [0, 1]
        made.decode(order, range(ROWS + 4))
        made.read_to(order, ROWS - 1)
        assert fetch(made, schedule) == []
        made.read_to(order, ROWS)
        assert fetch(made, schedule) == [2]


def test_the_way_to_what_a_reader_waits_for_is_fetched_whatever_the_budget():
    with open_world() as made:
        order, schedule = made.join(), made.schedule(budget_chunks=1)
        made.want(order, [5 * ROWS + 3])
        assert [rows_of(pick) for pick in iter(lambda: next_put(made, schedule), None)] == [
            (number * ROWS, ROWS, Why.WANTED) for number in range(6)
        ]
        assert schedule.waited_for() == set(made.living(order).chunks[5:6].tolist())


def next_put(made: OpenWorld, schedule: StreamSchedule) -> Pick | None:
    pick = schedule.next()
    if pick is not None:
        made.put_raw(pick)
    return pick


def test_no_further_than_there_are_places():
    with open_world() as made:
        order, schedule = made.join(), made.schedule(budget_chunks=1)
        made.want(order, [2 * CHUNKS_PER_ORDER * ROWS])
        assert fetch(made, schedule) == list(range(CHUNKS_PER_ORDER))


def test_another_client_does_not_read_the_same_stream():
    with open_world() as made:
        made.join()
        other = Ring(made.files, native.SERVICE)
        assert made.schedule().next() is not None
        assert made.schedule(ring=other).next() is None
        made.join(key=2)
        assert rows_of(made.schedule(ring=other).next()) == (0, ROWS, Why.ORDER)
        other.leave()


def test_whoever_takes_over_goes_on_where_the_other_was():
    with open_world() as made:
        made.join()
        other = Ring(made.files, native.SERVICE)
        schedule = made.schedule(ring=other)
        pick = schedule.next()
        other_writer = Writer(other)
        ticket = other_writer.reserve(native.RAW | pick.chunk, CHUNK_BYTES, pick.stamp)
        other_writer.commit(ticket)
        other.segment.count_fetched(CHUNK_BYTES)
        assert other.segment.chunk_end(pick.chunk, native.FETCH_OK) == 0
        assert schedule.next() is not None  # and dies over it
        other.leave()
        assert fetch(made, made.schedule()) == [1, 2]


def test_iterations_take_turns():
    with open_world() as made:
        first, second = made.join(1), made.join(2)
        schedule = made.schedule(budget_chunks=4)
        picks = [next_put(made, schedule) for _ in range(4)]
        assert {pick.rows.piece[:2] for pick in picks[:2]} == {first, second}
        assert sorted(pick.rows.first_row for pick in picks) == [0, 0, ROWS, ROWS]
        assert schedule.next() is None  # each has its half of the budget
        assert made.kept[-1] == {first, second}
        made.owner.segment.order_leave(*first)
        assert fetch(made, schedule) == [2, 3]
        assert made.kept[-1] == {second}


def test_the_last_chunk_is_as_long_as_the_iteration():
    with open_world() as made:
        made.join(most=ROWS + 3)
        schedule = made.schedule()
        assert rows_of(next_put(made, schedule)) == (0, ROWS, Why.ORDER)
        assert rows_of(next_put(made, schedule)) == (ROWS, 3, Why.ORDER)
        assert schedule.next() is None


def test_nothing_is_fetched_beyond_the_end_of_the_stream():
    with open_world() as made:
        order, schedule = made.join(), made.schedule()
        next_put(made, schedule)
        pick = schedule.next()
        made.segment.order_finish(*order, ROWS)
        made.segment.chunk_end(pick.chunk, native.FETCH_GIVEN_UP)
        assert schedule.next() is None
        assert len(made.living(order).order) == ROWS


def test_what_was_made_of_a_chunk_is_not_fetched_again():
    """Its encoded rows made way, which only what somebody waits for can bring about."""
    with open_world() as made:
        order, schedule = made.join(), made.schedule(budget_chunks=1)
        pick = schedule.next()
        made.decode(order, range(ROWS))
        made.segment.chunk_end(pick.chunk, native.FETCH_GIVEN_UP)
        assert schedule.next() is None
        made.read_to(order, ROWS)
        assert fetch(made, schedule) == [1]


def test_what_is_fetched_is_of_use_until_its_iteration_is_past_it_or_gone():
    with open_world() as made:
        order, schedule = made.join(), made.schedule()
        pick = schedule.next()
        made.decode(order, range(ROWS))
        assert schedule.is_of_use(pick)
        made.read_to(order, ROWS)
        assert not schedule.is_of_use(pick)
        made.segment.chunk_end(pick.chunk, native.FETCH_GIVEN_UP)
        other = made.join(2)
        pick = next(p for p in iter(schedule.next, None) if p.rows.piece[:2] == other)
        assert schedule.is_of_use(pick)
        made.owner.segment.order_leave(*other)
        assert not schedule.is_of_use(pick)


def test_a_stream_that_failed_is_only_tried_again_for_who_waits():
    """Else all that could be fetched ahead would fail, one chunk after the other."""
    with open_world() as made:
        first, second = made.join(1), made.join(2)
        schedule = made.schedule()
        pick = next(p for p in iter(schedule.next, None) if p.rows.piece[:2] == first)
        assert schedule.read(pick.chunk, False)
        made.segment.chunk_end(pick.chunk, native.FETCH_BROKEN)
        assert {p.rows.piece[:2] for p in iter(schedule.next, None)} <= {second}
        made.want(first, [ROWS])
        pick = schedule.next()
        assert rows_of(pick) == (ROWS, ROWS, Why.WANTED)
        assert not schedule.read(pick.chunk, False)  # that is no news


def test_what_lies_before_a_failure_is_read_and_nothing_behind():
    with open_world() as made:
        made.join()
        schedule = made.schedule(budget_chunks=6)
        picks = [schedule.next() for _ in range(3)]
        assert schedule.read(picks[2].chunk, False)
        for pick in picks:
            made.segment.chunk_end(pick.chunk, native.FETCH_GIVEN_UP)
        assert fetch(made, schedule) == [0, 1]


def test_an_iteration_whose_readers_are_all_at_its_end_takes_no_share():
    with open_world() as made:
        first, second = made.join(1), made.join(2)
        schedule = made.schedule(budget_chunks=4)
        made.segment.order_finish(*first, 0)
        assert [order.key for order in made.orders.now()] == [second]
        assert fetch(made, schedule) == [0, 1, 2, 3]


# ---- what is decoded ----------------------------------------------------------------------------------


def test_rows_are_decoded_in_the_streams_sequence_as_far_as_they_are_there():
    with open_world() as made:
        order, schedule = made.join(), made.schedule(budget_chunks=2)
        fetch(made, schedule)
        decoding = DecodeSchedule(made.segment, made.writer, OpenCut(made.segment, Lent()), made.orders, 1, RECORD)
        task = decoding.next(40)
        assert [row & LAST_POSITION for _, row in task.rows] == list(range(2 * ROWS))
        assert not task.urgent
        assert task.stamps[native.open_id(*order, 5)] == (*order, 6)


def test_who_waits_for_one_row_gets_the_next_ones_with_it():
    with open_world() as made:
        order, schedule = made.join(), made.schedule(budget_chunks=1)
        fetch(made, schedule)
        made.want(order, [0])
        decoding = DecodeSchedule(made.segment, made.writer, OpenCut(made.segment, Lent()), made.orders, 1, RECORD)
        task = decoding.next(4)
        assert [row & LAST_POSITION for _, row in task.rows] == [0, 1, 2, 3]
        assert task.urgent
        assert set(task.stamps) == set(made.ids(order, [1, 2, 3]))  # these give way


# ---- rows that are lent -------------------------------------------------------------------------------


def batch(*numbers: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"number": list(numbers)}, schema=SCHEMA)


class Source:
    """Gives these rows, and calls `before` before each. As an `OpenReader`."""

    def __init__(self, rows: Sequence[int], before: Callable[[int], Any] = lambda row: None) -> None:
        self.rows, self.before = rows, before

    def read(self, chunk: Chunk, on_row: OnRow) -> Iterator[tuple[int, pa.RecordBatch]]:
        came: list[int] = []
        failure = None
        try:
            for row in range(chunk.first_row, chunk.first_row + chunk.num_rows):
                self.before(row)
                if row >= len(self.rows):
                    break
                came.append(self.rows[row])
                if not on_row(pa.Table.from_batches([batch(self.rows[row])])):
                    return
        except ReadError as error:
            failure = error
        if came:
            yield chunk.first_row, batch(*came)
        if failure is not None:
            raise failure

    def plain(self, rows: Sequence[pa.Table]) -> tuple[pa.RecordBatch | None, Exception | None]:
        return one_batch(pa.concat_tables(rows)), None

    def keep(self, keys: Collection[tuple[int, int]]) -> None:
        pass

    def close(self) -> None:
        pass


def test_rows_can_be_decoded_while_others_of_their_chunk_are_still_to_come():
    with open_world() as made:
        now = [0.0]
        order, lent = made.join(), Lent(lambda: now[0])
        cut, seen = OpenCut(made.segment, lent), []
        store = RawStore(made.service, made.writer, SCHEMA, PlaceRows(made.segment), lent=lent)
        ids = np.array(made.ids(order, range(ROWS)))

        def look(row: int) -> None:
            now[0] += LEND_S / 3
            seen.append(int(cut.has_encoded(ids).sum()))
            pinned = store.pin(sorted({int(c) for c in cut.chunk_of(ids)}))
            assert [row for row in ids.tolist() if pinned.holds(chunk, row)] == ids[: seen[-1]].tolist()
            assert cut.wait_s() < 1
            pinned.release()

        schedule = made.schedule()
        pick = schedule.next()
        chunk = pick.chunk
        ((first, whole),) = LendingReader(made.segment, Source(range(ROWS), look), lent, schedule).read(pick.rows)
        assert seen == [0, 0, *range(2, ROWS)]  # of a chunk that comes fast nothing is lent
        assert (first, whole.num_rows) == (0, ROWS)
        assert cut.wait_s() == float("inf")


def test_nothing_is_lent_from_a_row_on_that_is_not_what_was_promised():
    """The fetching thread tells why."""

    def plain(rows: Sequence[pa.Table]) -> tuple[pa.RecordBatch | None, Exception | None]:
        good = [row.column(0)[0].as_py() for row in rows]
        good = good[: good.index(3)] if 3 in good else good
        return (batch(*good) if good else None), (ValueError("3") if len(good) < len(rows) else None)

    now = iter(range(100))
    lent, seen = Lent(lambda: float(next(now))), []
    lent.begin(7, 1000, plain)
    for number in range(5):
        lent.add(pa.Table.from_batches([batch(number)]))
        seen.append(lent.rows)
    lent.end()
    assert [*seen, lent.rows] == [range(1000, 1000 + n) for n in (1, 2, 3, 3, 3, 3)]
    assert lent.chunks([7])[7].end == 1003
    assert lent.chunks([8]) == {}
    lent.begin(8, 2000, plain)
    assert (list(lent.rows), lent.chunks([7, 8])) == ([], {})


@pytest.mark.parametrize("num_rows", [0, 5, ROWS])
def test_the_end_of_a_stream_is_told_before_its_last_rows_are_in_the_ring(num_rows: int):
    with open_world() as made:
        made.join()
        schedule = made.schedule()
        pick = schedule.next()
        batches = list(LendingReader(made.segment, Source(range(num_rows)), Lent(), schedule).read(pick.rows))
        assert [found.num_rows for _, found in batches] == ([num_rows] if num_rows else [])
        expected = num_rows if num_rows < ROWS else LAST_POSITION
        assert made.segment.orders()[0][4] == expected
        assert made.orders.now() == [] or num_rows


@pytest.mark.parametrize("how", ["left", "passed"])
def test_a_chunk_that_nobody_needs_any_more_is_not_read_on(how: str):
    """Nor is the stream taken to end there."""
    with open_world() as made:
        order, schedule, read = made.join(), made.schedule(), []

        def leave(row: int) -> None:
            read.append(row)
            if row == 5 and how == "left":
                made.owner.segment.order_leave(*order)
            if row == 5 and how == "passed":
                made.decode(order, range(ROWS))
                made.read_to(order, ROWS)

        pick = schedule.next()
        lending = LendingReader(made.segment, Source(range(ROWS), leave), Lent(), schedule, ask_s=0.0)
        assert list(lending.read(pick.rows)) == []
        assert read == list(range(6))
        assert [living.num_positions for living in made.orders.now()] == ([LAST_POSITION] if how == "passed" else [])
        assert made.segment.chunk_end(pick.chunk, native.FETCH_GIVEN_UP) == 0


def failing_at(at: int) -> Source:
    def fail(row: int) -> None:
        if row == at:
            raise ReadError("it fails")

    return Source(range(ROWS), fail)


def test_a_read_that_fails_lends_no_more():
    with open_world() as made:
        order, lent = made.join(), Lent()
        schedule = made.schedule()
        pick = schedule.next()
        with pytest.raises(ReadError):
            list(LendingReader(made.segment, failing_at(0), lent, schedule).read(pick.rows))
        assert not lent.is_growing
        assert made.living(order).num_positions == LAST_POSITION


def test_rows_before_a_failure_are_there_and_those_behind_have_the_reason():
    with open_world() as made:
        order = made.join()
        store = RawStore(made.service, made.writer, SCHEMA, PlaceRows(made.segment))
        schedule = made.schedule()
        pick = schedule.next()
        ((_, found),) = LendingReader(made.segment, failing_at(5), Lent(), schedule).read(pick.rows)
        store.put(pick.chunk, [found], pick.stamp, False)
        assert made.segment.chunk_end(pick.chunk, native.FETCH_OK) == 0
        pinned = store.pin([pick.chunk])
        ids = made.ids(order, range(ROWS + 1))
        assert [pinned.holds(pick.chunk, row) for row in ids] == [True] * 5 + [False] * (ROWS - 4)
        failures = [pinned.failure(pick.chunk, row) for row in ids]
        assert [str(failure) for failure in failures[5:ROWS]] == ["it fails"] * (ROWS - 5)
        assert failures[:5] + failures[ROWS:] == [None] * 6
        assert made.living(order).num_positions == LAST_POSITION
        pinned.release()


def test_a_place_that_was_given_away_holds_no_rows_of_the_chunk_before():
    """Between a look at a row's chunk and the pin the place may be another chunk's."""
    with open_world() as made:
        order, schedule = made.join(), made.schedule(budget_chunks=CHUNKS_PER_ORDER)
        store = RawStore(made.service, made.writer, SCHEMA, PlaceRows(made.segment))
        pick = schedule.next()
        store.put(pick.chunk, [batch(*range(ROWS))], pick.stamp, False)
        made.segment.chunk_end(pick.chunk, native.FETCH_OK)
        old = native.open_id(*order, 3)
        pinned = store.pin([pick.chunk])
        assert pinned.holds(pick.chunk, old)
        pinned.release()
        made.owner.segment.order_leave(*order)
        second = made.join(2)
        assert second[0] == order[0]  # the same places
        again = made.schedule().next()
        assert again.chunk == pick.chunk
        store.put(again.chunk, [batch(*range(ROWS))], again.stamp, False)
        pinned = store.pin([again.chunk])
        assert not pinned.holds(again.chunk, old)
        assert pinned.holds(again.chunk, native.open_id(*second, 3))
        pinned.release()
        made.segment.chunk_end(again.chunk, native.FETCH_OK)
