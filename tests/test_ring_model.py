"""A ring under random calls of several clients does what its model (support_ring_model.py) says, through the binding.

native_tests/test_model.c does so with the core alone, and with deaths. Here are what Python makes of it: look-ups
that wait and copy out, views and pins that outlive their look-up and their client, the writer's two steps.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test
from support_ring_machine import AHEAD, BATCHES, CHOICES, EVERY_ROW, NUM_SERVICES, SIZES, Services, happened
from support_ring_model import Holder, Order

import shmloader._native as native
from shmloader.errors import DecodeError
from shmloader.ring import Place, Refs, Ring
from shmloader.writer import Writer

FLAGS = st.sampled_from([0, native.GET_TAKE, native.GET_POST, native.GET_POST | native.GET_TAKE])


class GivenUp(Exception):
    """What a reader waits for cannot be made: others keep all of the room."""


class RingMachine(Services):
    # ---- reading -----------------------------------------------------------------------------------------

    def reader(self, choice: int) -> Ring:
        return self.readers[choice % len(self.readers)]

    def often_there(self, rows: list[int]) -> list[int]:
        """Of each second row the next that is there."""
        there = sorted(row for row in self.model.records if self.model.is_there(row))
        return [there[bisect_left(there, row) % len(there)] if i % 2 and there else row for i, row in enumerate(rows)]

    def place(self, ahead: tuple[int, int] | None, num: int) -> Place | None:
        stamp = self.stamp(ahead)
        return None if stamp is None else (*stamp, stamp[2] + num)

    def hold(self, reader: Ring, refs: Refs, indices: Iterable[int], kept: object, rows: Iterable[int]) -> None:
        """Bytes that must stay as they are while `kept` lives, by which ``rows`` are pinned."""
        views = [(refs.record(i), self.model.records[refs.ids[i]].data) for i in indices]
        self.model.holders.append(Holder(reader.slot, frozenset(rows), kept, views))

    @rule(who=CHOICES, rows=BATCHES, flags=FLAGS, ahead=AHEAD, is_kept=st.booleans())
    def look_up(self, who: int, rows: list[int], flags: int, ahead: Any, is_kept: bool) -> None:
        rows = self.often_there(rows)
        reader, place = self.reader(who), self.place(ahead, len(rows))
        packed, num_missing, pins, is_over = reader.segment.get_many(array("Q", rows), flags, place)
        missing = self.model.looked_up(reader.slot, rows, flags, place)
        assert num_missing == len(missing)
        refs = Refs(rows, packed, reader.mapping, pins)
        pinned: set[int] = set()
        for i, (row, (status, is_pinned)) in enumerate(zip(rows, refs.statuses(), strict=True)):
            if row in missing:
                assert status == native.MISSING
                continue
            record = self.model.records[row]
            assert status == (native.ERROR if record.is_error else native.READY)
            assert refs.place(i) == record.ticket[:2]
            assert bytes(refs.record(i)) == record.data
            assert is_pinned == (self.model.in_transit(row) and (not missing or flags & native.GET_TAKE != 0))
            if is_pinned:
                pinned.add(row)
        assert (pins is not None) == bool(pinned)
        if pinned:
            self.hold(reader, refs, [i for i, row in enumerate(rows) if row in pinned], pins, pinned)
            assert is_over == (self.model.pinned_bytes(reader.slot) > self.model.quota)
            if not is_kept:
                self.model.holders.pop()

    @rule(who=CHOICES, rows=BATCHES, num_bytes=SIZES, ahead=AHEAD)
    def read(self, who: int, rows: list[int], num_bytes: int, ahead: Any) -> None:
        """What is missing is made while the reader waits; it gives up if that cannot be."""
        rows = self.often_there(rows)
        reader, place = self.reader(who), self.place(ahead, len(rows))
        missing = self.model.looked_up(reader.slot, rows, 0, place)
        errors = [row for row in rows if self.model.is_there(row) and self.model.records[row].is_error]
        if errors or missing:
            self.model.looked_up(reader.slot, rows, native.GET_POST, place)
        serve = Server(self, reader, rows, num_bytes, place)
        try:
            refs = reader.get_many(rows, 30, serve, str, place)
        except DecodeError as error:
            told = error.row
            assert told == errors[0]
            self.model.end_look_up(reader.slot)
            happened["error read"] += 1
            return
        except GivenUp:
            self.model.end_look_up(reader.slot)
            happened["given up"] += 1
            return
        assert not errors
        if missing:
            left = [row for i, row in enumerate(rows) if i not in serve.copied]
            self.model.looked_up(reader.slot, left, native.GET_POST, place)
            happened["waited"] += 1
        in_transit = {row for row in rows if self.model.is_there(row) and self.model.in_transit(row)}
        old = self.model.pinned_bytes(reader.slot)
        is_in_place = refs.base is reader.mapping
        if serve.copied:
            assert not is_in_place
        else:
            assert self._is_over(reader, in_transit) != is_in_place
        happened["copied"] += not is_in_place
        expected = [serve.copied.get(i) or self.model.records[row].data for i, row in enumerate(rows)]
        views = [(refs.record(i), data) for i, data in enumerate(expected)]
        pinned = frozenset(in_transit if is_in_place else ())
        assert (refs.pins is not None) == bool(pinned)
        self.model.holders.append(Holder(reader.slot, pinned, refs, views))
        assert is_in_place or reader.segment.pinned_bytes() == old

    def _is_over(self, reader: Ring, rows: set[int]) -> bool:
        """Would it have more than its share with these pinned, too?"""
        held = {row for holder in self.model.holders if holder.client == reader.slot for row in holder.rows}
        return bool(rows) and self.model.bytes_of(held | rows) > self.model.quota

    @rule(who=CHOICES)
    def give_up(self, who: int) -> None:
        self.reader(who).segment.get_many(array("Q"), native.GET_POST, None)
        self.model.end_look_up(self.reader(who).slot)

    def has_refs(self) -> bool:
        return any(isinstance(holder.kept, Refs) and holder.client >= 0 for holder in self.model.holders)

    @precondition(has_refs)
    @rule(which=CHOICES, index=CHOICES)
    def pin_one_more(self, which: int, index: int) -> None:
        held = [holder for holder in self.model.holders if isinstance(holder.kept, Refs)]
        holder = held[which % len(held)]
        assert isinstance(holder.kept, Refs)
        index %= len(holder.kept)
        row, pin = holder.kept.ids[index], holder.kept.pin(index)
        assert (pin is not None) == (row in holder.rows)
        if pin is not None:
            data = memoryview(holder.kept.base.view(*holder.kept.place(index), pin))
            self.model.holders.append(Holder(holder.client, frozenset([row]), pin, [(data, holder.views[index][1])]))

    @precondition(lambda self: self.model.holders)
    @rule(which=CHOICES, is_view_kept=st.booleans())
    def let_go(self, which: int, is_view_kept: bool) -> None:
        holder = self.model.holders.pop(which % len(self.model.holders))
        if is_view_kept:  # a view keeps all that its look-up pinned
            self.model.holders.append(Holder(holder.client, holder.rows, None, holder.views[:1]))

    # ---- orders ------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.model.orders) < 3)
    @rule(who=CHOICES)
    def begin_order(self, who: int) -> None:
        reader = self.reader(who)
        begun = reader.segment.order_begin(1, 2, 100, 0, 0, 1, False)
        assert isinstance(begun, tuple)
        self.model.orders[begun] = Order(reader.slot)

    @precondition(lambda self: self.model.orders)
    @rule(which=CHOICES, who=CHOICES)
    def end_order(self, which: int, who: int) -> None:
        key, _ = self.order(which)
        segment = self.reader(who).segment
        assert (segment.order_end(*key), segment.order_end(*key)) == (0, native.STALE)
        del self.model.orders[key]

    @precondition(lambda self: self.model.orders)
    @rule(who=CHOICES, rows=BATCHES, which=CHOICES, ahead=st.integers(1, 8))
    def look_ahead(self, who: int, rows: list[int], which: int, ahead: int) -> None:
        key, order = self.order(which)
        stamp = (*key, order.low_water + ahead)
        states = self.writer(who).ring.segment.look(array("Q", rows), stamp)
        assert list(states) == list(self.model.looked_ahead(rows, stamp))

    # ---- coming and going --------------------------------------------------------------------------------

    @precondition(lambda self: len(self.readers) > 1)
    @rule(which=CHOICES)
    def a_worker_leaves(self, which: int) -> None:
        reader = self.readers.pop(1 + which % (len(self.readers) - 1))
        reader.leave()
        self.model.left(reader.slot)
        self.model.num_readers -= 1
        happened["left with pins"] += self.model.pinned_bytes(reader.slot) > 0

    @rule(which=CHOICES)
    def a_service_is_replaced(self, which: int) -> None:
        left = self.writers.pop(which % NUM_SERVICES).ring
        left.leave()
        self.model.left(left.slot)
        self.writers.append(Writer(Ring(self.files, native.SERVICE)))

    # ---- always ------------------------------------------------------------------------------------------

    @invariant()
    def the_segment_is_whole(self) -> None:
        assert self.watcher.segment.check() is None

    @invariant()
    def what_is_there_is_what_the_model_says(self) -> None:
        assert list(self.watcher.segment.look(EVERY_ROW, None)) == [self.model.look(row) for row in EVERY_ROW]
        assert set(self.watcher.segment.wanted(1000)) == self.model.wanted()
        records = self.model.records.values()
        stats = self.watcher.segment.stats()
        found = [stats[f"num_{name}"] for name in ("ready", "errors", "reserved", "claimed", "commits", "evicted")]
        assert found == [
            sum(record.is_there and not record.is_error for record in records),
            sum(record.is_error for record in records),
            sum(not record.is_there for record in records),
            len(self.model.claims),
            self.model.num_commits,
            self.model.num_evicted,
        ]
        used = [stats["resident_used_bytes"], stats["transit_used_bytes"]]
        assert used == [self.model.used_bytes(in_transit) for in_transit in (False, True)]

    @invariant()
    def what_is_held_has_its_bytes(self) -> None:
        for holder in self.model.holders:
            for view, data in holder.views:
                assert bytes(view) == data

    @invariant()
    def pins_are_those_that_are_held(self) -> None:
        for reader in self.readers:
            assert reader.segment.pinned_bytes() == self.model.pinned_bytes(reader.slot)

    @invariant()
    def low_water_is_the_least_mark(self) -> None:
        told = {(slot, gen): low_water for slot, gen, *_, low_water in self.watcher.segment.orders()}
        assert told == {key: order.low_water for key, order in self.model.orders.items()}


class Server:
    """Makes what a reader waits for, whenever that looks around; and does in the model what the reader does meanwhile.

    copied: the records that it has copied out so far, by their index among its rows.
    """

    def __init__(self, machine: RingMachine, reader: Ring, rows: Sequence[int], num_bytes: int, place: Any) -> None:
        self.machine, self.reader, self.rows = machine, reader, rows
        self.num_bytes, self.place = num_bytes, place
        self.copied: dict[int, bytes] = {}
        self._starved = reader.segment.starved()
        self._takes = False
        self._is_stuck = False

    def __call__(self) -> None:
        model = self.machine.model
        left = [i for i in range(len(self.rows)) if i not in self.copied]
        flags = native.GET_POST | (native.GET_TAKE if self._takes else 0)
        model.looked_up(self.reader.slot, [self.rows[i] for i in left], flags, self.place)
        if self._takes:
            self.copied |= {
                i: model.records[self.rows[i]].data
                for i in left
                if model.is_there(self.rows[i]) and model.in_transit(self.rows[i])
            }
        self._takes = self.reader.segment.starved() != self._starved
        num_made = sum(self._make(row) for row in sorted(model.wanted()))
        is_another_s = any(model.look(self.rows[i]) == native.ROW_WORK for i in left)
        if is_another_s or (num_made == 0 and self._is_stuck):
            raise GivenUp
        self._is_stuck = num_made == 0

    def _make(self, row: int) -> bool:
        writer = self.machine.writers[0]
        if not self.machine.reserve(writer, row, self.num_bytes, None, True):
            return False
        self.machine.commit(writer, row)
        return True


def test_a_ring_does_what_its_model_says() -> None:
    happened.clear()
    run_state_machine_as_test(
        RingMachine,
        settings=settings(
            max_examples=300,
            stateful_step_count=60,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],  # add Phase.shrink to look into a failure: it takes minutes
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    least = {"evicted", "no room", "error read", "given up", "waited", "copied", "left with pins"}
    assert {name for name in least if happened[name] < 10} == set()
