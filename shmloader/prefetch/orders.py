"""The orders in which readers read, as far as they have told: a prefetcher computes from them what comes next."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

import shmloader._native as native
from shmloader.order import Chunks, Kind, Order
from shmloader.permutation import Rows
from shmloader.writer import Stamp


def order_of(told: Sequence[int], chunks: Chunks, window_bytes: int) -> Order:
    """The order that `Segment.orders` told: what it gives beside slot and generation."""
    seed, epoch, _, kind, rank, world_size, drop_last, *_ = told
    return Order(
        chunks,
        Kind(kind),
        seed=seed,
        epoch=epoch,
        rank=rank,
        world_size=world_size,
        drop_last=bool(drop_last),
        window_bytes=window_bytes,
    )


class Positions(Protocol):
    """Which row is at which position."""

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> Rows:
        """The rows at positions ``start`` to ``stop - 1``; what lies beyond the end is cut off."""
        ...


class Followed(Protocol):
    """An order that somebody reads in, of a closed set (`Living`) or of an open one (`OpenLiving`)."""

    @property
    def low_water(self) -> int:
        """All positions below are consumed."""
        ...

    @property
    def key(self) -> tuple[int, int]:
        """What tells it from all other orders of the set."""
        ...

    @property
    def order(self) -> Positions:
        """The order itself."""
        ...

    def stamp(self, until: int) -> Stamp:
        """Keeps a record until the order is at position ``until``."""
        ...


class Follows(Protocol):
    """The orders of a set that live now."""

    def now(self) -> Sequence[Followed]:
        """Those that live."""
        ...


class Known:
    """An order, and what the prefetchers ask it again and again."""

    def __init__(self, order: Order) -> None:
        self.order = order

    @cached_property
    def places(self) -> Rows:
        """For each chunk its place in `Order.sequence`."""
        places = np.empty(len(self.order.chunks), np.int64)
        places[self.order.sequence] = np.arange(len(places))
        return places

    @cached_property
    def bytes_before(self) -> Rows:
        """Encoded bytes of the chunks of `Order.sequence` before each, and of all: one item more than chunks."""
        return np.concatenate(([0], np.cumsum(self.order.chunks.num_bytes[self.order.sequence])))


@dataclass(frozen=True)
class Living:
    """An order that somebody reads in: all positions below ``low_water`` are consumed."""

    slot: int
    gen: int
    low_water: int
    known: Known

    @property
    def key(self) -> tuple[int, int]:
        """What tells it from all other orders of the set."""
        return self.slot, self.gen

    @property
    def order(self) -> Order:
        """The order itself."""
        return self.known.order

    def stamp(self, until: int) -> Stamp:
        """Keeps a record until the order is at position ``until``."""
        return self.slot, self.gen, until

    def chunk_stamp(self, chunk: int) -> Stamp | None:
        """Keeps ``chunk`` until its window is consumed; None if it is."""
        end = int(self.order.ends[self.known.places[chunk]])
        return self.stamp(end) if end > self.low_water else None


class FollowedOrders:
    """The orders of a set that live now. May be asked by several threads."""

    def __init__(self, segment: native.Segment, chunks: Chunks, window_bytes: int) -> None:
        self._segment, self._chunks, self._window_bytes = segment, chunks, window_bytes
        self._known: dict[tuple[int, int], Known] = {}
        self._lock = threading.Lock()

    def now(self) -> list[Living]:
        """Those that live; each is built once."""
        if not self._segment.num_orders() and not self._known:
            return []
        with self._lock:
            found = []
            for slot, gen, *told in self._segment.orders():
                known = self._known.get((slot, gen))
                if known is None:
                    known = self._known[slot, gen] = Known(order_of(told, self._chunks, self._window_bytes))
                found.append(Living(slot, gen, told[-1], known))
            living = {order.key for order in found}
            self._known = {key: known for key, known in self._known.items() if key in living}
        return found
