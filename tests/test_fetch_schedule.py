"""Which chunk a prefetcher fetches next, over a small set without processes."""

from __future__ import annotations

import json
from array import array

import pytest
from support_schedule import CHUNK_BYTES, ROWS, World, world
from support_sets import wait_until

import shmloader._native as native
from shmloader.order import Kind
from shmloader.prefetch.fetch_schedule import FetchSchedule, Pick, Why
from shmloader.prefetch.refetch import TELL_AFTER, Refetches
from shmloader.ring import Ring


def fetch_all(schedule: FetchSchedule, made: World) -> list[tuple[int, Why]]:
    """Everything that is fetched until there is nothing more to do."""
    found: list[tuple[int, Why]] = []
    while (pick := schedule.next()) is not None:
        schedule.read(pick.chunk, True)
        made.put_raw(pick.chunk)
        found.append((pick.chunk, pick.why))
    return found


def take(schedule: FetchSchedule, made: World) -> tuple[int, Why]:
    pick = schedule.next()
    assert pick is not None
    schedule.read(pick.chunk, True)
    made.put_raw(pick.chunk)
    return pick.chunk, pick.why


def test_what_most_rows_are_waited_for_of_comes_first():
    with world() as made:
        made.want([5, 40, 41, 42, 100, 101])
        schedule = made.fetching()
        assert fetch_all(schedule, made) == [(2, Why.WANTED), (6, Why.WANTED), (0, Why.WANTED)]


def test_what_cannot_be_held_is_not_fetched_for_who_waits():
    with world() as made:
        made.want([5])
        schedule = made.fetching()
        assert schedule.next(can_hold=False) is None
        assert schedule.next().chunk == 0


def test_nothing_is_fetched_that_neither_stays_nor_is_wanted():
    with world() as made:
        assert made.fetching().next() is None


def test_fill_goes_through_the_source_as_it_lies_while_there_is_room_to_stay():
    with world(resident_rows=1000) as made:
        made.fetch(1)
        schedule = made.fetching(budget_bytes=100 * CHUNK_BYTES)
        found = fetch_all(schedule, made)
        assert [chunk for chunk, _ in found] == [0, *range(2, len(found) + 1)]
        assert {why for _, why in found} == {Why.FILL}


def test_fill_waits_until_what_was_fetched_is_decoded():
    with world(resident_rows=1000) as made:
        schedule = made.fetching(budget_bytes=2 * CHUNK_BYTES)
        assert fetch_all(schedule, made) == [(0, Why.FILL), (1, Why.FILL)]
        made.decode(made.writer.claim(range(ROWS)))
        assert schedule.wait_s < 1
        pick = wait_until(schedule.next)
        assert (pick.chunk, pick.why) == (2, Why.FILL)


def test_a_chunk_that_would_not_stay_is_given_back_and_ends_the_filling():
    with world(resident_rows=32) as made:
        made.fetch(0, 1)
        made.decode(made.writer.claim(range(32)))
        schedule = made.fetching()
        assert schedule.next() is None
        assert made.segment.stats()["chunks_claimed"] == 0
        word = made.segment.work_word()
        assert schedule.next() is None
        assert made.segment.work_word() == word  # it was not tried again


@pytest.mark.parametrize("kind", list(Kind))
def test_what_an_order_needs_is_fetched_in_its_sequence_within_the_budget(kind):
    with world(window_chunks=2) as made:
        order, _ = made.order(kind)
        schedule = made.fetching(budget_bytes=3 * CHUNK_BYTES)
        found = fetch_all(schedule, made)
        assert [chunk for chunk, _ in found] == order.sequence[:3].tolist()
        assert {why for _, why in found} == {Why.ORDER}


def test_a_window_is_fetched_as_a_whole_even_beyond_the_budget():
    with world(window_chunks=4) as made:
        order, _ = made.order()
        found = fetch_all(made.fetching(budget_bytes=1), made)
        assert [chunk for chunk, _ in found] == order.sequence[:4].tolist()


def test_an_order_is_followed_from_its_low_water_mark_on():
    with world(window_chunks=2) as made:
        order, key = made.order()
        schedule = made.fetching(budget_bytes=3 * CHUNK_BYTES)
        fetch_all(schedule, made)
        begin = 4 * ROWS  # the third window
        made.want(order.rows(begin, begin + 1).tolist(), (*key, begin, begin + 1))
        pick = schedule.next()
        assert (pick.chunk, pick.why) == (order.sequence[4], Why.WANTED)
        made.put_raw(pick.chunk)
        assert [chunk for chunk, _ in fetch_all(schedule, made)] == order.sequence[5:7].tolist()


def test_a_chunk_is_kept_until_the_end_of_its_window():
    with world(window_chunks=2) as made:
        _, key = made.order()
        schedule = made.fetching(budget_bytes=4 * CHUNK_BYTES)
        stamps = []
        while (pick := schedule.next()) is not None:
            stamps.append(pick.stamp)
            made.put_raw(pick.chunk)
        assert stamps == [(*key, end) for end in (32, 32, 64, 64)]


def test_what_somebody_waits_for_is_kept_for_the_order_that_needs_it_later():
    with world(window_chunks=2) as made:
        order, key = made.order()
        made.want([int(order.sequence[6]) * ROWS])
        pick = made.fetching().next()
        assert (pick.why, pick.stamp) == (Why.WANTED, (*key, 8 * ROWS))


def test_chunks_that_were_there_before_an_order_began_are_kept_for_it():
    with world(window_chunks=2) as made:
        made.fetch(*range(12))
        order, _ = made.order()
        made.fetching(budget_bytes=4 * CHUNK_BYTES).next()
        made.pins.clear()  # from now on only the order keeps them
        for record in range(1 << 20, (1 << 20) + 8):
            ticket = made.writer.reserve(native.RAW | record, CHUNK_BYTES)
            made.writer.commit(ticket)
        states = made.segment.chunk_look(array("I", order.sequence[:4].tolist()))
        assert all(state & native.CHUNK_HAS_RAW for state in states)


def test_what_an_order_no_longer_needs_is_of_no_use():
    with world(window_chunks=2) as made:
        order, key = made.order()
        schedule = made.fetching()
        pick = schedule.next()
        assert schedule.is_of_use(pick)
        made.want([int(order[40])], (*key, 40, 41))
        assert not schedule.is_of_use(pick)
        other = schedule.next_wanted() or schedule.next()
        assert schedule.is_of_use(other)
        made.owner.segment.order_end(*key)
        assert not schedule.is_of_use(Pick(other.chunk, Why.ORDER, other.stamp))
        assert schedule.is_of_use(Pick(other.chunk, Why.WANTED, other.stamp))


# ---- units -------------------------------------------------------------------------------------------

STREAM = [0] * 12


def test_on_the_way_to_a_wanted_chunk_of_a_stream_those_before_it_are_fetched_too():
    with world(units=STREAM, resident_rows=1000) as made:
        made.want([50])
        schedule = made.fetching()
        assert [take(schedule, made) for _ in range(4)] == [
            (0, Why.PASSING),
            (1, Why.PASSING),
            (2, Why.PASSING),
            (3, Why.WANTED),
        ]


def test_of_a_stream_what_is_still_to_come_is_fetched_before_it_is_begun_again():
    with world(units=STREAM) as made:
        schedule = made.fetching()
        schedule.read(4, True)
        made.fetch(0, 1, 2, 4, 5, 6, 7, 8, 9, 10)
        made.want([50, 51, 52, 190])  # of chunks 3 and 11
        assert take(schedule, made) == (11, Why.WANTED)
        assert take(schedule, made) == (3, Why.WANTED)


def test_a_chunk_of_a_stream_that_found_no_room_is_left_behind():
    with world(units=STREAM) as made:
        made.want([50])
        schedule = made.fetching()
        pick = schedule.next()
        assert (pick.chunk, pick.why) == (0, Why.PASSING)
        schedule.read(0, True)
        made.segment.chunk_end(0, native.FETCH_GIVEN_UP)
        assert schedule.next().chunk == 1


def test_a_unit_that_another_one_reads_is_left_to_it():
    with world(units=[0, 0, 0, 3, 3, 5, 6, 7, 8, 9, 10, 11], resident_rows=1000) as made:
        other = Ring(made.files, native.SERVICE)
        theirs, ours = made.fetching(100 * CHUNK_BYTES, other), made.fetching(100 * CHUNK_BYTES)
        assert theirs.next().chunk == 0
        assert ours.next().chunk == 3
        assert theirs.next().chunk == 1
        assert theirs.next().chunk == 2
        assert theirs.next().chunk == 5
        made.want([70])  # of chunk 4, whose unit is ours
        assert theirs.next_wanted() is None
        assert ours.next_wanted().chunk == 4
        other.leave()


@pytest.mark.parametrize("kind", [Kind.SEQUENTIAL, Kind.WINDOWED])
def test_an_order_over_a_stream_that_another_one_reads_leaves_it_to_it(kind):
    with world(units=STREAM) as made:
        made.order(kind)
        other = Ring(made.files, native.SERVICE)
        assert made.fetching(ring=other).next().chunk == 0
        assert made.fetching().next() is None
        other.leave()


# ---- what is fetched again ---------------------------------------------------------------------------


class FakeSegment:
    """The counts that `Refetches` looks at, and what it tells."""

    def __init__(self, num_orders: int = 0) -> None:
        self.counts = {"num_commits": 0, "num_fetched": 0, "fetched_bytes": 0}
        self.orders = num_orders
        self.told: list[str] = []

    def stats(self) -> dict[str, int]:
        return dict(self.counts)

    def num_orders(self) -> int:
        return self.orders

    def text_put(self, which: int, text: bytes) -> int:
        assert which == native.TEXT_REFETCH
        self.told.append(json.loads(text)["message"])
        return 0


def refetch(segment: FakeSegment, num_decoded: int, urgent: bool = True) -> list[str]:
    """What is told after a chunk was fetched again and again, and so many rows were decoded each time."""
    refetches = Refetches(segment, "the set", 12 * ROWS, 12, False, lambda: "The disk is full.")
    for _ in range(2 * TELL_AFTER + 1):
        segment.counts["num_fetched"] += 1
        segment.counts["fetched_bytes"] += 1 << 20
        segment.counts["num_commits"] += num_decoded
        refetches.note(0, 1000.0, urgent, True)
    return segment.told


def test_refetching_for_single_rows_is_told_once_with_what_helps():
    (message,) = refetch(FakeSegment(), 1)
    remedies = ("dataset.sampler()", "SHMLOADER_RING_BYTES", "SHMLOADER_SPILL_BYTES", "SHMLOADER_SPILL_DIR")
    for part in ("the set", "64.0 MiB for every 64", "The disk is full.", *remedies):
        assert part in message


def test_refetching_of_what_is_used_as_a_whole_is_no_matter():
    assert refetch(FakeSegment(), ROWS) == []


def test_refetching_in_an_order_that_is_known_is_no_matter():
    assert refetch(FakeSegment(num_orders=1), 1) == []


def test_refetching_that_nobody_waits_for_is_no_matter():
    assert refetch(FakeSegment(), 1, urgent=False) == []


def of_a_dear_source(segment: FakeSegment, urgent: bool = False, is_refused: bool = True) -> list[str]:
    """What is told after each chunk of a Hub was fetched, and then each again, twice."""
    refetches = Refetches(segment, "the set", 12 * ROWS, 12, True, lambda: "The disk is full.")
    for chunk in range(12):
        refetches.note(chunk, 2 << 20, urgent, is_refused)
    assert segment.told == []
    for chunk in (3, 4) * 2:
        refetches.note(chunk, 2 << 20, urgent, is_refused)
    return segment.told


@pytest.mark.parametrize("urgent", [False, True])
def test_a_dear_chunk_that_is_fetched_again_in_a_known_order_is_told_once_with_what_helps(urgent: bool):
    (message,) = of_a_dear_source(FakeSegment(num_orders=1), urgent)
    remedies = ("SHMLOADER_RING_BYTES", "SHMLOADER_SPILL_BYTES", "SHMLOADER_SPILL_DIR")
    for part in ("the set", "before: 128.0 MiB for every 64", "The disk is full.", *remedies):
        assert part in message
    assert "sampler" not in message


def test_a_dear_chunk_that_is_fetched_again_in_an_unknown_order_is_told_at_once_and_the_sampler_helps_too():
    (message,) = of_a_dear_source(FakeSegment())
    for part in ("at least 128.0 MiB for every 64", "The disk is full.", "SHMLOADER_SPILL_BYTES", "dataset.sampler()"):
        assert part in message


def test_a_dear_chunk_that_lies_on_disk_or_will_stay_is_no_matter():
    assert of_a_dear_source(FakeSegment(num_orders=1), is_refused=False) == []
