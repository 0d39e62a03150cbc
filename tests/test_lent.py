"""Rows of a chunk that is still being read, which are lent to the thread that decodes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support_open_world import ROWS, SCHEMA, open_world

import shmloader._native as native
from shmloader.errors import ReadError
from shmloader.prefetch.cut import OpenCut, PlaceRows
from shmloader.prefetch.lent import LEND_S, Lent
from shmloader.prefetch.plan import LAST_POSITION
from shmloader.prefetch.store import RawStore
from shmloader.prefetch.stream_schedule import LendingReader
from shmloader.sizes import CHUNKS_PER_ORDER
from shmloader.sources.base import Chunk, OnRow
from shmloader.sources.rows import one_batch


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
