"""Which order a batch is of: a reader has only row numbers, and finds the positions by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shmloader.live_orders import MOST_STRIDE, NEAR, LivingOrders
from shmloader.order import Chunks, Kind, Order

NUM_ROWS = 20_000
CHUNKS = Chunks(
    np.arange(0, NUM_ROWS, 100, dtype=np.int64),
    np.full(NUM_ROWS // 100, 100, np.int64),
    np.arange(NUM_ROWS // 100, dtype=np.int64),
    np.full(NUM_ROWS // 100, 1000, np.int64),
)
WINDOW_BYTES = 10_000


def order(seed: int) -> Order:
    return Order(CHUNKS, Kind.WINDOWED, seed=seed, window_bytes=WINDOW_BYTES)


def place_of(rows: Any, *seeds: int, low_water: int = 0) -> Any:
    """The place of ``rows`` where orders with these seeds live, in slots 0, 1, … with generations 10, 11, …"""
    told = [(i, 10 + i, seed, 0, NUM_ROWS, int(Kind.WINDOWED), 0, 1, 0, low_water) for i, seed in enumerate(seeds)]
    plan = SimpleNamespace(chunks=lambda: CHUNKS, window_bytes=WINDOW_BYTES)
    ring = SimpleNamespace(segment=SimpleNamespace(orders=lambda: told))
    return LivingOrders(plan).place_of(ring, rows)  # type: ignore[arg-type]


def test_a_batch_of_an_order_is_at_its_positions() -> None:
    assert place_of(order(1).rows(640, 704).tolist(), 1) == (0, 10, 640, 704)


def test_a_batch_is_of_the_order_that_it_follows() -> None:
    assert place_of(order(2).rows(64, 128).tolist(), 1, 2, 3) == (1, 11, 64, 128)


@pytest.mark.parametrize("stride", [2, 8, MOST_STRIDE])
def test_a_batch_that_has_every_nth_position_is_of_the_order(stride: int) -> None:
    """Wrappers that share an order out among ranks give such batches."""
    rows = order(1).rows(0, NUM_ROWS)[3 : 3 + 16 * stride : stride].tolist()
    assert place_of(rows, 1) == (0, 10, 3, 3 + 16 * stride)


def test_a_batch_with_wider_gaps_than_wrappers_leave_is_of_no_order() -> None:
    rows = order(1).rows(0, NUM_ROWS)[:: MOST_STRIDE + 1].tolist()
    assert len(rows) > 2
    assert place_of(rows, 1) is None


def test_a_batch_that_goes_backwards_is_of_no_order() -> None:
    assert place_of(order(1).rows(640, 704)[::-1].tolist(), 1) is None


def test_a_batch_of_which_only_two_rows_follow_the_order_is_of_no_order() -> None:
    rows = [*order(1).rows(0, 2).tolist(), *order(1).rows(500, 562).tolist()]
    assert place_of(rows, 1) is None


def test_a_batch_of_a_foreign_sampler_is_of_no_order() -> None:
    rows = np.random.default_rng(0).permutation(NUM_ROWS)[:64].tolist()
    assert place_of(rows, 1, 2) is None


def test_a_batch_that_was_sorted_is_of_no_order() -> None:
    assert place_of(sorted(order(1).rows(0, 64).tolist()), 1) is None


def test_a_row_alone_is_of_an_order_that_is_being_read_there() -> None:
    assert place_of([order(1)[700]], 1, low_water=690) == (0, 10, 700, 701)


@pytest.mark.parametrize("low_water", [0, 10_001])
def test_a_row_alone_elsewhere_moves_no_mark(low_water: int) -> None:
    """``dataset[i]`` beside a loader: its row is somewhere in every order, behind what is read or far ahead of it."""
    assert 10_000 - low_water >= NEAR or low_water > 10_000
    assert place_of([order(1)[10_000]], 1, low_water=low_water) is None


def test_without_orders_there_is_no_place() -> None:
    assert place_of([1, 2, 3]) is None
