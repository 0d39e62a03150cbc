"""Orders that live in a set: begun by a sampler, followed by prefetchers, recognised by readers.

A sampler gives a reader plain row numbers. Since an order can be asked at which position a row is, the reader finds out
by itself which order its batch is of, and how far: that is what keeps the samples ahead of it from being evicted,
and has prefetchers go on.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

from shmloader.errors import ShmloaderError
from shmloader.order import Chunks, Order
from shmloader.prefetch.orders import order_of
from shmloader.prefetch.plan import SetPlan
from shmloader.ring import Place, Ring

log = logging.getLogger("shmloader")


#: A single row is taken for one of an order only if it is less than this ahead of those that are read (guessed).
NEAR = 4096
#: Most positions between the rows of a batch: wrappers that share an order out take every n-th.
MOST_STRIDE = 1024


def _stride(order: Order, rows: Sequence[int], begin: int) -> int:
    """How many positions lie from each of ``rows`` to the next; 0: they do not follow the order."""
    if len(rows) == 1:
        return 1
    second = order.position(rows[1])
    stride = 0 if second is None else second - begin
    if not 1 <= stride <= MOST_STRIDE:
        return 0
    return stride if len(rows) == 2 or order.position(rows[2]) == begin + 2 * stride else 0


class LivingOrders:
    """The orders of a set that somebody follows now, as one process that reads it sees them."""

    def __init__(self, plan: SetPlan) -> None:
        self._plan = plan
        self._chunks: Chunks | None = None
        self._orders: dict[tuple[int, int], Order] = {}
        self._last: tuple[int, int] | None = None

    def place_of(self, ring: Ring, rows: Sequence[int]) -> Place | None:
        """The positions that ``rows`` are in one of them; None if they follow none (a foreign sampler)."""
        found = {(slot, gen): rest for slot, gen, *rest in ring.segment.orders()}
        self._orders = {key: order for key, order in list(self._orders.items()) if key in found}
        for key in sorted(found, key=lambda key: key != self._last):  # most likely the one of the last batch
            order = self._orders.get(key)
            if order is None:
                order = self._orders[key] = self._order(found[key])
            begin = order.position(rows[0])
            stride = _stride(order, rows, begin) if begin is not None else 0
            low_water = found[key][-1]
            # A row alone is at some position of every order: it must be where that order is being read.
            if begin is None or not stride or (len(rows) == 1 and not 0 <= begin - low_water < NEAR):
                continue
            self._last = key
            return *key, begin, begin + stride * len(rows)
        return None

    def _order(self, told: Sequence[int]) -> Order:
        if self._chunks is None:
            self._chunks = self._plan.chunks()
        return order_of(told, self._chunks, self._plan.window_bytes)


class LiveOrder:
    """An order that prefetchers follow until `end`, or until this process leaves the set."""

    def __init__(self, ring: Ring, slot: int, gen: int) -> None:
        self._ring, self._slot, self._gen = ring, slot, gen

    @classmethod
    def begin(cls, ring: Ring, order: Order, epoch: int) -> LiveOrder | None:
        """Have the prefetchers of ``ring``'s set follow ``order``; None: they follow as many as they can."""
        told = (order.seed, epoch, len(order), int(order.kind), order.rank, order.world_size, order.drop_last)
        begun = ring.segment.order_begin(*told)
        if isinstance(begun, int):
            log.warning("more orders live than prefetchers can follow; this one is read on demand")
            return None
        return cls(ring, *begun)

    def end(self) -> None:
        """They need not follow it any longer."""
        if self._ring.is_home:
            with contextlib.suppress(ShmloaderError):  # the set was closed, and the order is gone with this client
                self._ring.segment.order_end(self._slot, self._gen)
