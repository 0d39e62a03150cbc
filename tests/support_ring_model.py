"""What a ring must do, as dicts: which records are there, what keeps each of them, how far the orders are.

It does not foresee where a record goes. It takes the place that was found, and says what of it could be had.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import shmloader._native as native
from shmloader.ring import ALIGNMENT, Place
from shmloader.writer import Stamp, Ticket

#: So many clients that wait can have one record kept for them.
MOST_STAMPS = 2


@dataclass
class Record:
    """A row that has bytes in the ring: reserved, or there."""

    ticket: Ticket
    data: bytes
    stamp: Stamp | None
    owner: int
    is_there: bool = False
    is_error: bool = False
    wanted_by: list[int] = field(default_factory=list)

    @property
    def begin(self) -> int:
        return self.ticket[0]

    @property
    def end(self) -> int:
        return self.ticket[0] + self.ticket[1]


@dataclass
class Order:
    """A living order: the marks of its readers, and what was read above the lowest of them."""

    owner: int
    marks: dict[int, int] = field(default_factory=dict)
    low_water: int = 0
    read: set[int] = field(default_factory=set)

    def settle(self) -> None:
        """While nobody reads it the low-water mark stays where it was."""
        self.low_water = min(self.marks.values(), default=self.low_water)
        self.read = {position for position in self.read if position >= self.low_water}


@dataclass
class Holder:
    """What keeps rows pinned as long as it lives, and what must be read through it."""

    client: int
    rows: frozenset[int]
    kept: object
    views: list[tuple[memoryview, bytes]]


@dataclass
class RingModel:
    """Clients are known by their slots."""

    resident_bytes: int
    transit_bytes: int
    claims: dict[int, int] = field(default_factory=dict)
    records: dict[int, Record] = field(default_factory=dict)
    orders: dict[tuple[int, int], Order] = field(default_factory=dict)
    wants: dict[int, set[int]] = field(default_factory=dict)
    holders: list[Holder] = field(default_factory=list)
    num_readers: int = 0
    num_commits: int = 0
    num_evicted: int = 0

    # ---- what is there -----------------------------------------------------------------------------------

    def is_there(self, row: int) -> bool:
        return row in self.records and self.records[row].is_there

    def in_transit(self, row: int) -> bool:
        return self.records[row].begin >= self.resident_bytes

    def look(self, row: int) -> int:
        """What `Segment.look` must say of it, without a stamp."""
        if self.is_there(row):
            return native.ROW_TRANSIT if self.in_transit(row) else native.ROW_FINAL
        return native.ROW_WORK if row in self.records or row in self.claims else native.ROW_MISSING

    def wanted(self) -> set[int]:
        """Rows that somebody waits for and nobody makes."""
        return {row for rows in self.wants.values() for row in rows if self.look(row) == native.ROW_MISSING}

    def pinned_bytes(self, client: int) -> int:
        """Each record once, however often it is pinned."""
        return self.bytes_of({row for holder in self.holders if holder.client == client for row in holder.rows})

    def bytes_of(self, rows: Iterable[int]) -> int:
        return sum(self.records[row].ticket[1] for row in rows)

    def used_bytes(self, in_transit: bool) -> int:
        return self.bytes_of(row for row in self.records if self.in_transit(row) == in_transit)

    @property
    def quota(self) -> int:
        return self.transit_bytes // 2 // max(self.num_readers, 1)

    # ---- what keeps it -----------------------------------------------------------------------------------

    def is_ordered(self, row: int) -> bool:
        stamp = self.records[row].stamp
        order = self.orders.get(stamp[:2]) if stamp is not None else None
        return order is not None and stamp is not None and order.low_water < stamp[2]

    def is_pinned(self, row: int) -> bool:
        return any(row in holder.rows for holder in self.holders)

    def is_kept(self, row: int, urgent: bool) -> bool:
        """It must not be evicted for another record."""
        record = self.records[row]
        is_in_use = not record.is_there or bool(record.wanted_by) or self.is_pinned(row)
        return not self.in_transit(row) or is_in_use or (not urgent and self.is_ordered(row))

    def longest_run(self, urgent: bool) -> int:
        """Bytes of transit in a row that are free or can be evicted."""
        kept = sorted(
            (record.begin, record.end)
            for row, record in self.records.items()
            if self.in_transit(row) and self.is_kept(row, urgent)
        )
        edges = [(0, self.resident_bytes), *kept, (self.resident_bytes + self.transit_bytes, 0)]
        return max(edges[i + 1][0] - edges[i][1] for i in range(len(edges) - 1))

    # ---- writing -----------------------------------------------------------------------------------------

    def may_reserve(self, row: int, client: int) -> bool:
        return row not in self.records and self.claims.get(row, client) == client

    def reserved(self, row: int, record: Record, urgent: bool) -> set[int]:
        """Put it where room was found; returns the rows that made way, each of which was to be had."""
        had_room = self.longest_run(urgent=False) >= record.ticket[1]
        gone = {at for at, other in self.records.items() if other.begin < record.end and record.begin < other.end}
        for at in gone:
            assert not self.is_kept(at, urgent), f"row {at} was kept, and made way for row {row}"
            assert not (had_room and self.is_ordered(at)), f"row {at} is of use, and there was other room for {row}"
            del self.records[at]
        self.num_evicted += len(gone)
        self.claims.pop(row, None)
        self.records[row] = record
        return gone

    def no_room(self, num_bytes: int, urgent: bool) -> None:
        aligned = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        assert self.longest_run(urgent) < aligned, f"{num_bytes} bytes were to be had"

    def committed(self, row: int) -> None:
        record = self.records[row]
        record.is_there = True
        self.num_commits += 1
        for client in sorted(self.wants):
            if row in self.wants[client]:
                if self.in_transit(row) and len(record.wanted_by) < MOST_STAMPS:
                    record.wanted_by.append(client)
                self.wants[client].discard(row)

    # ---- reading -----------------------------------------------------------------------------------------

    def end_look_up(self, client: int) -> None:
        """What it waited for it waits for no more."""
        self.wants.pop(client, None)
        for record in self.records.values():
            if client in record.wanted_by:
                record.wanted_by.remove(client)

    def looked_up(self, client: int, rows: Sequence[int], flags: int, place: Place | None) -> list[int]:
        """A look-up: returns the rows that are missing."""
        missing = [row for row in rows if not self.is_there(row)]
        if flags & native.GET_POST:
            self.end_look_up(client)
            if missing:
                self.wants[client] = set(missing)
            if missing and not flags & native.GET_TAKE:
                for row in rows:
                    self._want(client, row)
        order = self.orders.get(place[:2]) if place is not None else None
        if place is not None and order is not None and (not missing or flags & native.GET_POST):
            if not missing and place[2] >= order.low_water:
                order.read.update(range(place[2], place[3]))
            order.marks[client] = place[2] if missing else place[3]
            order.settle()
        return missing

    def _want(self, client: int, row: int) -> None:
        if self.is_there(row) and self.in_transit(row):
            wanted_by = self.records[row].wanted_by
            if client not in wanted_by and len(wanted_by) < MOST_STAMPS:
                wanted_by.append(client)

    def looked_ahead(self, rows: Sequence[int], stamp: Stamp) -> Iterator[int]:
        """What `Segment.look` must say of the rows at stamp[2] - 1, … of an order; it stamps what nobody needs."""
        order = self.orders.get(stamp[:2])
        for until, row in enumerate(rows, stamp[2]):
            state = self.look(row)
            is_read = order is not None and until - 1 in order.read
            if state != native.ROW_FINAL and is_read:
                yield native.ROW_FINAL
                continue
            if state == native.ROW_TRANSIT and not self.is_ordered(row):
                self.records[row].stamp = (*stamp[:2], until)
            yield state

    # ---- coming and going --------------------------------------------------------------------------------

    def left(self, client: int) -> None:
        """Its pins stay until nobody has views."""
        self.end_look_up(client)
        self.claims = {row: owner for row, owner in self.claims.items() if owner != client}
        self.records = {
            row: record for row, record in self.records.items() if record.is_there or record.owner != client
        }
        self.orders = {key: order for key, order in self.orders.items() if order.owner != client}
        for order in self.orders.values():
            if order.marks.pop(client, None) is not None:
                order.settle()
