"""A small open set and its services' parts, for tests of what is fetched and decoded of streams."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa

import shmloader._native as native
from shmloader.files import RingFiles, format_set
from shmloader.order import Kind
from shmloader.prefetch.fetch_schedule import Pick, Why
from shmloader.prefetch.open_orders import OpenLiving, OpenOrders
from shmloader.prefetch.plan import LAST_POSITION
from shmloader.prefetch.stream_schedule import StreamSchedule
from shmloader.ring import Ring
from shmloader.sizes import Sizes
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
