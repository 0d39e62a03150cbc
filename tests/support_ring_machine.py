"""A ring and its model (support_ring_model.py), and the rules by which services write.

test_ring_model.py has those by which others read.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support_ring_model import Order, Record, RingModel
from support_sets import ring_files

import shmloader._native as native
from shmloader.errors import DecodeError, PoisonedError, to_json
from shmloader.ring import Refs, Ring
from shmloader.writer import NoRoom, Stamp, Ticket, Writer

NUM_ROWS = 40
EVERY_ROW = array("Q", range(NUM_ROWS))
RESIDENT_BYTES, TRANSIT_BYTES = 4096, 4096
NUM_SERVICES = 2

ROWS = st.integers(0, NUM_ROWS - 1)
BATCHES = st.lists(ROWS, min_size=1, max_size=6)
MANY = st.lists(ROWS, min_size=4, max_size=12)
SIZES = st.integers(1, 1400)
CHOICES = st.integers(0, 1 << 16)
#: (which order, how far ahead of its low-water mark), or nothing.
AHEAD = st.none() | st.tuples(CHOICES, st.integers(0, 8))

#: What happened, in all examples: they are worth their time only if all of it did, and often.
happened: Counter[str] = Counter()


class Services(RuleBasedStateMachine):
    """Two services, an owner and up to three workers."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.files = self.stack.enter_context(
            ring_files(NUM_ROWS, 4, resident_bytes=RESIDENT_BYTES, transit_bytes=TRANSIT_BYTES, raw_bytes=4096)
        )
        self.model = RingModel(RESIDENT_BYTES, TRANSIT_BYTES)
        self.watcher = Ring(self.files, native.SERVICE)  # calls nothing that changes anything
        self.writers = [Writer(Ring(self.files, native.SERVICE)) for _ in range(NUM_SERVICES)]
        self.readers = [Ring(self.files, native.OWNER)]
        self.model.num_readers = 1
        self.a_worker_comes()
        self.a_worker_comes()
        self.version = 0

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:  # else that is what is to be told
                self.all_can_be_had_in_the_end()
        finally:
            self.stack.close()

    def all_can_be_had_in_the_end(self) -> None:
        """When nobody needs anything any more."""
        self.model.holders.clear()
        for client in (*self.readers, *(writer.ring for writer in self.writers)):
            client.leave()
            self.model.left(client.slot)
        assert self.model.longest_run(urgent=False) == TRANSIT_BYTES
        row = next((row for row in EVERY_ROW if row not in self.model.records), None)
        if row is not None:
            assert Writer(self.watcher).reserve(row, TRANSIT_BYTES) is not None
        assert self.watcher.segment.check() is None
        self.watcher.leave()

    @precondition(lambda self: len(self.readers) < 4)
    @rule()
    def a_worker_comes(self) -> None:
        owner = self.readers[0]
        self.readers.append(Ring(self.files, native.WORKER, (owner.slot, owner.gen)))
        self.model.num_readers += 1

    # ---- writing -----------------------------------------------------------------------------------------

    @initialize(sizes=st.lists(SIZES, min_size=NUM_ROWS, max_size=NUM_ROWS))
    def fill_the_ring(self, sizes: list[int]) -> None:
        for row, num_bytes in enumerate(sizes):
            assert self.reserve(self.writers[0], row, num_bytes, None, False)
            self.commit(self.writers[0], row)

    def writer(self, choice: int) -> Writer:
        return self.writers[choice % NUM_SERVICES]

    def order(self, choice: int) -> tuple[tuple[int, int], Order]:
        return list(self.model.orders.items())[choice % len(self.model.orders)]

    def stamp(self, ahead: tuple[int, int] | None) -> Stamp | None:
        if ahead is None or not self.model.orders:
            return None
        key, order = self.order(ahead[0])
        return (*key, order.low_water + ahead[1])

    def fill(self, writer: Writer, row: int, ticket: Ticket, stamp: Stamp | None, urgent: bool) -> None:
        """The model of a reservation, and bytes that no other record has."""
        self.version += 1
        data = (f"{row}.{self.version}:".encode() * ticket[1])[: ticket[1]]
        happened["evicted"] += len(self.model.reserved(row, Record(ticket, data, stamp, writer.ring.slot), urgent))
        writer.record_of(ticket)[:] = data

    def reserve(self, writer: Writer, row: int, num_bytes: int, stamp: Stamp | None, urgent: bool) -> bool:
        """Whether room was had."""
        try:
            ticket = writer.reserve(row, num_bytes, stamp, urgent)
        except NoRoom:
            assert self.model.may_reserve(row, writer.ring.slot)
            self.model.no_room(num_bytes, urgent)
            happened["no room"] += 1
            return False
        assert (ticket is not None) == self.model.may_reserve(row, writer.ring.slot)
        if ticket is not None:
            self.fill(writer, row, ticket, stamp, urgent)
        return ticket is not None

    def commit(self, writer: Writer, row: int) -> None:
        writer.commit(self.model.records[row].ticket)
        self.model.committed(row)

    @rule(who=CHOICES, rows=BATCHES)
    def claim(self, who: int, rows: list[int]) -> None:
        writer = self.writer(who)
        free = [row for row in dict.fromkeys(rows) if self.model.look(row) == native.ROW_MISSING]
        assert writer.claim(rows) == free
        self.model.claims.update(dict.fromkeys(free, writer.ring.slot))

    @rule(who=CHOICES, rows=BATCHES)
    def unclaim(self, who: int, rows: list[int]) -> None:
        writer = self.writer(who)
        writer.unclaim(rows)
        for row in rows:
            if self.model.claims.get(row) == writer.ring.slot:
                del self.model.claims[row]

    @rule(who=CHOICES, row=ROWS, num_bytes=SIZES, ahead=AHEAD, urgent=st.booleans())
    def reserve_only(self, who: int, row: int, num_bytes: int, ahead: Any, urgent: bool) -> None:
        self.reserve(self.writer(who), row, num_bytes, self.stamp(ahead), urgent)

    @rule(who=CHOICES, rows=MANY, num_bytes=SIZES, ahead=AHEAD, urgent=st.booleans())
    def write(self, who: int, rows: list[int], num_bytes: int, ahead: Any, urgent: bool) -> None:
        for row in rows:
            if self.reserve(self.writer(who), row, num_bytes, self.stamp(ahead), urgent):
                self.commit(self.writer(who), row)

    @rule(who=CHOICES, row=ROWS, ahead=AHEAD, urgent=st.booleans())
    def put_error(self, who: int, row: int, ahead: Any, urgent: bool) -> None:
        writer, stamp = self.writer(who), self.stamp(ahead)
        error = DecodeError(f"no picture in {row}", row=row)
        may = self.model.may_reserve(row, writer.ring.slot)
        text = to_json(error, native.TEXT_BYTES)
        try:
            writer.put_error(row, error, stamp, urgent)
        except NoRoom:
            self.model.no_room(len(text), urgent)
            return
        if not may:
            return
        refs = Refs([row], self.watcher.segment.get_many(array("Q", [row]), 0, None)[0], self.watcher.mapping)
        place = refs.place(0)
        record = Record((*place, 0, 0), text.ljust(place[1], b"\0"), stamp, writer.ring.slot, is_error=True)
        self.model.reserved(row, record, urgent)
        self.model.committed(row)
        happened["error"] += 1

    def reservation(self, choice: int) -> tuple[int, Record, Writer]:
        reserved = [(row, record) for row, record in self.model.records.items() if not record.is_there]
        row, record = reserved[choice % len(reserved)]
        return row, record, next(writer for writer in self.writers if writer.ring.slot == record.owner)

    def has_reservation(self) -> bool:
        return not all(record.is_there for record in self.model.records.values())

    @precondition(has_reservation)
    @rule(which=CHOICES, is_commit=st.booleans())
    def end_reservation(self, which: int, is_commit: bool) -> None:
        row, record, writer = self.reservation(which)
        if is_commit:
            self.commit(writer, row)
        else:
            writer.abort(record.ticket)
            del self.model.records[row]

    @precondition(has_reservation)
    @rule(which=CHOICES)
    def commit_another_s_reservation(self, which: int) -> None:
        _, record, writer = self.reservation(which)
        for other in self.writers:
            if other is not writer:
                with pytest.raises(PoisonedError):
                    other.commit(record.ticket)
