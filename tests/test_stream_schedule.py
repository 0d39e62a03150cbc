"""What a prefetcher fetches in an open set, over one without processes; and what it lends meanwhile."""

from __future__ import annotations

from support_open_world import CHUNK_BYTES, RECORD, ROWS, OpenWorld, fetch, open_world, rows_of

import shmloader._native as native
from shmloader.prefetch.cut import OpenCut
from shmloader.prefetch.fetch_schedule import Pick, Why
from shmloader.prefetch.lent import Lent
from shmloader.prefetch.plan import LAST_POSITION
from shmloader.prefetch.schedule import DecodeSchedule
from shmloader.prefetch.stream_schedule import StreamSchedule
from shmloader.ring import Ring
from shmloader.sizes import CHUNKS_PER_ORDER
from shmloader.writer import Writer

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
