"""Which rows a prefetcher decodes next, over a small set without processes."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from support_schedule import RECORD, ROWS, World, world
from support_sets import in_child, join, wait_until

import shmloader._native as native
from shmloader.order import Kind
from shmloader.prefetch.lookahead import Lookahead, Pace
from shmloader.prefetch.orders import FollowedOrders
from shmloader.prefetch.schedule import DecodeSchedule, Task
from shmloader.ring import Ring


def rows_of(task: Task | None) -> list[int]:
    assert task is not None
    assert all(row // ROWS == chunk for chunk, row in task.rows)
    return [row for _, row in task.rows]


def all_rows(schedule: DecodeSchedule, made: World, most: int = 8) -> list[int]:
    """Everything that is decoded until there is nothing more to do."""
    found: list[int] = []
    while (task := schedule.next(most)) is not None:
        made.decode(rows_of(task))
        found += rows_of(task)
    return found


def test_nothing_is_to_be_decoded_of_chunks_that_are_not_there():
    with world(resident_rows=1000) as made:
        made.want([1, 2, 3])
        made.order()
        assert made.decoding().next(8) is None


def test_rows_that_are_waited_for_come_first_and_are_urgent():
    with world(resident_rows=1000) as made:
        made.fetch(0, 1, 2)
        made.want([37, 20, 100])
        task = made.decoding().next(8)
        assert rows_of(task) == [20, 37]  # 100 is not fetched
        assert task.urgent


def test_the_other_prefetchers_get_their_part_of_what_is_waited_for():
    with world() as made:
        other = Ring(made.files, native.SERVICE)
        made.fetch(0, 1)
        made.want(range(0, 20, 2))
        one, two = made.decoding(4), made.decoding(4, other)
        tasks = [rows_of(schedule.next(64)) for schedule in (one, two, one, two)]
        assert [len(rows) for rows in tasks] == [3, 2, 2, 2]
        assert rows_of(one.next(64)) == [18]
        assert sorted(row for rows in tasks for row in rows) == list(range(0, 18, 2))
        other.leave()


def test_fill_is_every_row_of_chunks_that_stay_and_then_nothing():
    with world(resident_rows=1000) as made:
        made.fetch(0, 5)
        assert all_rows(made.decoding(), made) == [*range(16), *range(80, 96)]
        assert made.segment.stats()["chunks_done"] == 2


def test_rows_of_chunks_that_do_not_stay_are_not_decoded_for_nobody():
    with world() as made:
        made.fetch(0, 5)
        assert made.decoding().next(8) is None


def test_two_prefetchers_fill_without_getting_in_each_others_way():
    with world(resident_rows=1000) as made:
        other = Ring(made.files, native.SERVICE)
        made.fetch(0, 1)
        one, two = made.decoding(2), made.decoding(2, other)
        tasks = [schedule.next(5) for schedule in (one, two) * 4]
        found = [row for task in tasks if task is not None for _, row in task.rows]
        assert sorted(found) == list(range(32))
        other.leave()


def test_what_an_order_needs_is_decoded_in_its_sequence_and_kept_for_it():
    with world() as made:
        order, key = made.order()
        made.fetch(*range(12))
        schedule = made.decoding(num_prefetchers=2)
        ahead = 64 * RECORD // 2 // RECORD
        found: list[int] = []
        while (task := schedule.next(4)) is not None:
            assert task.stamps == {row: (*key, order.position(row) + 1) for row in rows_of(task)}
            made.decode(rows_of(task))
            found += rows_of(task)
        assert len(found) <= ahead
        assert sorted(found) == sorted(order.rows(0, len(found)).tolist())


def test_an_order_goes_on_as_it_is_read():
    with world() as made:
        order, key = made.order()
        made.fetch(*range(12))
        schedule = made.decoding()
        found = all_rows(schedule, made)
        for begin in range(0, 192, 16):
            rows = order.rows(begin, begin + 16).tolist()
            if not set(rows) <= set(found):
                made.decode(made.writer.claim([row for row in rows if row not in found]))
            made.owner.segment.get_many(np.array(rows).data, native.GET_POST, (*key, begin, begin + 16))
            found += all_rows(schedule, made)
        assert sorted(set(found)) == list(range(192))


def test_several_orders_share_what_is_decoded_ahead():
    with world(transit_rows=128) as made:
        orders = [made.order(Kind.SEQUENTIAL, rank=rank, world_size=2)[0] for rank in range(2)]
        made.fetch(*range(12))
        found = all_rows(made.decoding(), made)
        for order in orders:
            mine = {row for row in found if order.position(row) is not None}
            assert 16 <= len(mine) <= 32
            assert mine == set(order.rows(0, len(mine)).tolist())


def test_rows_that_are_given_back_are_had_again():
    with world(resident_rows=1000) as made:
        made.fetch(0)
        schedule = made.decoding()
        task = schedule.next(8)
        assert rows_of(task) == list(range(8))
        made.decode([0, 1])
        schedule.give_back(task, range(2, 8))
        assert all_rows(schedule, made) == list(range(2, 16))


def test_ordered_rows_that_are_given_back_are_had_again():
    with world() as made:
        order, _ = made.order(Kind.SEQUENTIAL)
        made.fetch(0)
        schedule = made.decoding()
        task = schedule.next(8)
        schedule.give_back(task, rows_of(task))
        assert rows_of(schedule.next(4)) == order.rows(0, 4).tolist()


def test_somebody_who_begins_to_wait_is_noticed_once():
    with world(resident_rows=1000) as made:
        made.fetch(0, 1)
        schedule = made.decoding()
        assert rows_of(schedule.next(4)) == [0, 1, 2, 3]
        assert not schedule.has_wanted()
        made.want([20, 100])
        assert schedule.has_wanted()
        assert not schedule.has_wanted()


def test_who_waits_for_rows_that_cannot_be_decoded_yet_is_not_in_the_way():
    with world(resident_rows=1000) as made:
        made.fetch(0)
        schedule = made.decoding()
        schedule.next(4)
        made.want([100])
        assert not schedule.has_wanted()


def test_without_room_only_what_is_waited_for_is_tried_until_something_moves():
    with world(resident_rows=1000) as made:
        made.fetch(0)
        schedule = made.decoding()
        schedule.give_back(task := schedule.next(4), rows_of(task))
        schedule.block()
        assert schedule.next(4) is None
        made.segment.work_tell()
        assert rows_of(schedule.next(4)) == [0, 1, 2, 3]
        schedule.block()
        made.want([9])
        task = schedule.next(4)
        assert (rows_of(task), task.urgent) == ([9], True)


def test_a_row_over_which_a_prefetcher_died_is_had_alone():
    with world(resident_rows=1000) as made:
        made.fetch(0)

        def die() -> None:
            Ring(made.files, native.SERVICE).segment.claim_rows(np.array([3, 5]).data)
            os.kill(os.getpid(), signal.SIGKILL)

        assert join(in_child(die)) == -signal.SIGKILL
        wait_until(lambda: made.segment.reap(True) >= 0 and made.segment.stats()["num_suspect"] == 2)
        schedule = made.decoding()
        tasks: list[list[int]] = []
        while (task := schedule.next(16)) is not None:
            tasks.append(rows_of(task))
            made.decode(tasks[-1])
        assert sorted(row for rows in tasks for row in rows) == list(range(16))
        assert [3] in tasks
        assert [5] in tasks


def test_rows_of_a_living_order_that_were_driven_out_are_decoded_again():
    with world(transit_rows=32) as made:
        _, key = made.order(Kind.SEQUENTIAL)
        made.fetch(*range(12))
        schedule = made.decoding()
        found = all_rows(schedule, made)
        others = [row for row in range(100, 140) if row not in found]
        # More than is free, so in the place of what the order needs.
        tickets = [made.writer.reserve(row, RECORD, urgent=True) for row in made.writer.claim(others)[:24]]
        for ticket in tickets:
            made.writer.abort(ticket)
        lost = [row for row in found if made.segment.look(np.array([row]).data, None)[0] == native.ROW_MISSING]
        assert lost
        again = wait_until(lambda: schedule.next(4))
        assert rows_of(again)[0] in lost
        assert key == (again.stamps[rows_of(again)[0]][0], again.stamps[rows_of(again)[0]][1])


def test_lookahead_begins_anew_where_a_late_reader_is_behind():
    with world(transit_rows=128) as made:
        _, key = made.order(Kind.SEQUENTIAL)
        orders = FollowedOrders(made.segment, made.chunks, made.window_bytes)
        ahead = Lookahead(made.segment)
        ahead.move(orders.now()[0], 10)
        assert ahead.rows.tolist() == list(range(10))
        made.want([40], (*key, 40, 41))
        ahead.move(orders.now()[0], 10)
        assert (ahead.begin, ahead.rows.tolist()) == (40, list(range(40, 50)))
        made.want([5], (*key, 5, 6))
        ahead.move(orders.now()[0], 10)
        assert (ahead.begin, ahead.rows.tolist()) == (5, list(range(5, 15)))


def test_lookahead_passes_over_rows_that_are_final():
    with world(resident_rows=64, transit_rows=64) as made:
        made.order(Kind.SEQUENTIAL)
        made.fetch(0)
        made.decode(made.writer.claim(range(16)))
        orders = FollowedOrders(made.segment, made.chunks, made.window_bytes)
        ahead = Lookahead(made.segment)
        assert not ahead.move(orders.now()[0], 10)
        assert ahead.rows[ahead.to_do()].tolist() == list(range(16, 26))


def test_orders_that_have_ended_are_forgotten():
    with world() as made:
        _, key = made.order()
        made.order(seed=5)
        orders = FollowedOrders(made.segment, made.chunks, made.window_bytes)
        assert [living.order.seed for living in orders.now()] == [1, 5]
        made.owner.segment.order_end(*key)
        assert [living.order.seed for living in orders.now()] == [5]
        assert len(orders._known) == 1


@pytest.mark.parametrize("seconds", [0.001, 0.5])
def test_pace_keeps_what_is_done_in_vain_to_a_fiftieth_of_the_time(seconds):
    now = 10.0
    pace = Pace(lambda: now)
    assert pace.wait_s() == 0
    with pace:
        now += seconds
    assert pace.wait_s() == pytest.approx(50 * seconds)
    now += 50 * seconds
    assert pace.wait_s() == pytest.approx(0, abs=1e-9)
