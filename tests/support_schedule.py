"""A small set without processes, for tests of what is decoded and fetched next."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from support_sets import ring_files

import shmloader._native as native
from shmloader.order import Chunks, Kind, Order
from shmloader.prefetch.cut import ClosedCut
from shmloader.prefetch.fetch_schedule import FetchSchedule
from shmloader.prefetch.orders import FollowedOrders
from shmloader.prefetch.schedule import DecodeSchedule
from shmloader.ring import Ring
from shmloader.writer import Writer

ROWS = 16  # of a chunk
RECORD = 256  # bytes of a sample
CHUNK_BYTES = 1000


@dataclass
class World:
    """Rings of one set: of a reader and of a prefetcher, and what that prefetcher needs for its schedules."""

    files: Any
    chunks: Chunks
    units: np.ndarray
    owner: Ring
    service: Ring
    window_bytes: int

    def __post_init__(self) -> None:
        self.writer = Writer(self.service)
        self.segment = self.service.segment
        self.pins: list[Any] = []  # or each would take the place of the one before

    def decoding(
        self, num_prefetchers: int = 1, ring: Ring | None = None, record_bytes: int = RECORD
    ) -> DecodeSchedule:
        ring = ring or self.service
        orders = FollowedOrders(ring.segment, self.chunks, self.window_bytes)
        cut = ClosedCut(ring.segment, self.chunks)
        return DecodeSchedule(ring.segment, Writer(ring), cut, orders, num_prefetchers, record_bytes)

    def fetching(self, budget_bytes: int = 3 * CHUNK_BYTES, ring: Ring | None = None) -> FetchSchedule:
        segment = (ring or self.service).segment
        orders = FollowedOrders(segment, self.chunks, self.window_bytes)
        return FetchSchedule(segment, self.chunks, self.units, orders, budget_bytes)

    def want(self, rows: Sequence[int], place: tuple[int, int, int, int] | None = None) -> None:
        """A reader waits for ``rows``, and for nothing else."""
        self.owner.segment.get_many(array("Q", rows), native.GET_POST, place)

    def fetch(self, *chunks: int) -> None:
        """The chunks are in the raw region."""
        for chunk in chunks:
            assert self.segment.chunk_claim(chunk) == 0
            self.put_raw(chunk)

    def put_raw(self, chunk: int) -> None:
        ticket = self.writer.reserve(native.RAW | chunk, CHUNK_BYTES)
        assert ticket is not None
        self.writer.commit(ticket)
        self.pins.append(self.segment.get_many(array("Q", [native.RAW | chunk]), 0, None)[2])
        assert self.segment.chunk_end(chunk, native.FETCH_OK) == 0

    def decode(self, rows: Sequence[int]) -> None:
        """Claimed rows are samples."""
        for row in rows:
            ticket = self.writer.reserve(row, RECORD)
            assert ticket is not None
            self.writer.commit(ticket)

    def order(self, kind: Kind = Kind.WINDOWED, seed: int = 1, **kwargs: Any) -> tuple[Order, tuple[int, int]]:
        """An order that begins to live, and its slot and generation."""
        order = Order(self.chunks, kind, seed=seed, window_bytes=self.window_bytes, **kwargs)
        told = (order.rank, order.world_size, order.drop_last)
        begun = self.owner.segment.order_begin(seed, order.epoch, len(order), int(kind), *told)
        assert isinstance(begun, tuple)
        return order, begun


@contextmanager
def world(
    num_chunks: int = 12,
    resident_rows: int = 0,
    transit_rows: int = 64,
    units: Sequence[int] | None = None,
    window_chunks: int = 4,
) -> Iterator[World]:
    """A set of chunks of 16 rows. resident_rows: about so many are kept; transit_rows: room for others."""
    num_rows = num_chunks * ROWS
    with ring_files(
        num_rows,
        ROWS,
        resident_bytes=-(-resident_rows * RECORD // 4096) * 4096,
        transit_bytes=-(-transit_rows * RECORD // 4096) * 4096,
        raw_bytes=1 << 20,
        units=units,
    ) as files:
        first_of = list(units) if units is not None else list(range(num_chunks))
        numbers = np.unique(np.array(first_of), return_inverse=True)[1]
        starts = np.arange(num_chunks) * ROWS
        chunks = Chunks(starts, np.full(num_chunks, ROWS), numbers, np.full(num_chunks, CHUNK_BYTES))
        owner, service = Ring(files, native.OWNER), Ring(files, native.SERVICE)
        made = World(files, chunks, np.array(first_of, np.int64), owner, service, window_chunks * CHUNK_BYTES)
        yield made
        service.leave()
        owner.leave()
