"""The order: which row is where, for whom, and what must be there when."""

from __future__ import annotations

import collections
import itertools
import math
import pickle
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmloader.errors import OptionError
from shmloader.order import DEFAULT_WINDOW_BYTES, Chunks, Kind, Order

KINDS = list(Kind)
SHUFFLES = [Kind.UNIFORM, Kind.WINDOWED]
WINDOW = 1000


def chunks_of(
    num_rows: list[int], units: list[int] | None = None, num_bytes: list[int] | None = None, first_row: int = 0
) -> Chunks:
    """Chunks of so many rows, each a unit, a byte for ten rows."""
    ends = first_row + np.cumsum(num_rows, dtype=np.int64)
    return Chunks(
        ends - np.array(num_rows, np.int64),
        np.array(num_rows, np.int64),
        np.arange(len(num_rows)) if units is None else np.array(units, np.int64),
        np.array(num_rows, np.int64) * 10 if num_bytes is None else np.array(num_bytes, np.int64),
    )


#: 26 chunks of different sizes, an empty one among them, in 17 units; 733 rows from row 50 on.
UNEVEN_ROWS = [31, 7, 1, 90, 12, 12, 12, 60, 0, 44, 3, 3, 70, 25, 25, 25, 25, 5, 8, 81, 19, 20, 33, 40, 2, 80]
UNEVEN_UNITS = [0, 1, 2, 3, 4, 4, 4, 5, 5, 6, 7, 8, 9, 10, 10, 10, 10, 11, 12, 12, 12, 13, 14, 15, 15, 16]


def uneven() -> Chunks:
    return chunks_of(UNEVEN_ROWS, UNEVEN_UNITS, first_row=50)


def every_row(chunks: Chunks) -> list[int]:
    first = int(chunks.first_rows[0]) if len(chunks) else 0
    return list(range(first, first + int(chunks.num_rows.sum())))


def whole(order: Order) -> list[int]:
    return [int(row) for row in order.rows(0, len(order))]


def rows_of(chunks: Chunks, chunk: int) -> set[int]:
    first = int(chunks.first_rows[chunk])
    return set(range(first, first + int(chunks.num_rows[chunk])))


def windows_of(order: Order) -> list[tuple[int, int, list[int]]]:
    """(start, end, chunks) of each window of an order of one rank, by `starts` and `ends`."""
    found: dict[tuple[int, int], list[int]] = {}
    for chunk, start, end in zip(order.sequence.tolist(), order.starts.tolist(), order.ends.tolist(), strict=True):
        found.setdefault((start, end), []).append(chunk)
    return [(*bounds, chunks) for bounds, chunks in found.items()]


# -- rows and positions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window_bytes", [1, 300, WINDOW, 3 * WINDOW, 10**9])
def test_every_row_comes_once(kind: Kind, window_bytes: int) -> None:
    """Whatever the kind and the window, an epoch is all rows; a position gives the row that the slice has there."""
    order = Order(uneven(), kind, seed=3, window_bytes=window_bytes)
    rows = whole(order)
    assert len(order) == len(rows) == 733
    assert sorted(rows) == every_row(uneven())
    assert [order[position] for position in range(len(order))] == rows
    assert [order.position(row) for row in rows] == list(range(len(rows)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_is_cut_off_at_the_end(kind: Kind) -> None:
    """Slices join to the whole, beyond the end there is nothing, and before the beginning it is an error."""
    order = Order(uneven(), kind, window_bytes=WINDOW)
    parts = [order.rows(start, start + 100) for start in range(0, 900, 100)]
    assert np.concatenate(parts).tolist() == whole(order)
    assert all(part.dtype == np.int64 for part in parts)
    assert [len(part) for part in parts[-2:]] == [33, 0]
    assert len(order.rows(5, 5)) == len(order.rows(9, 4)) == 0
    with pytest.raises(IndexError):
        order.rows(-1, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_position_or_row_that_is_not_there_is_an_index_error(kind: Kind) -> None:
    """Rows begin at 50 here and end at 783."""
    order = Order(uneven(), kind, window_bytes=WINDOW)
    for position in (-1, 733):
        with pytest.raises(IndexError):
            order[position]
    for row in (-1, 0, 49, 783, 10**9):
        with pytest.raises(IndexError):
            order.position(row)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_without_rows_has_an_order_of_none(kind: Kind) -> None:
    """No chunks, or empty ones."""
    for chunks in (chunks_of([]), chunks_of([0]), chunks_of([0, 0], first_row=7)):
        for world_size in (1, 3):
            order = Order(chunks, kind, world_size=world_size)
            assert len(order) == len(order.rows(0, 10)) == 0
            assert sorted(order.sequence.tolist()) == list(range(len(chunks)))
            assert order.starts.tolist() == order.ends.tolist() == [0] * len(chunks)
            with pytest.raises(IndexError):
                order.position(0)


def test_sequential_is_the_source_as_it_lies() -> None:
    """Rows and chunks ascend, whatever the seed."""
    order = Order(uneven(), Kind.SEQUENTIAL, seed=9, epoch=4)
    assert whole(order) == every_row(uneven())
    assert order.sequence.tolist() == list(range(26))
    assert order.ends.tolist() == np.cumsum(UNEVEN_ROWS).tolist()
    assert order.starts.tolist() == (np.cumsum(UNEVEN_ROWS) - UNEVEN_ROWS).tolist()


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    num_rows=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    steps=st.lists(st.booleans(), min_size=11, max_size=11),
    kind=st.sampled_from(KINDS),
    window_bytes=st.integers(1, 3000),
    world_size=st.integers(1, 7),
    drop_last=st.booleans(),
    seed=st.integers(),
    epoch=st.integers(0, 1 << 70),
)
def test_ranks_share_out_the_whole(
    num_rows: list[int],
    steps: list[bool],
    kind: Kind,
    window_bytes: int,
    world_size: int,
    drop_last: bool,
    seed: int,
    epoch: int,
) -> None:
    """Rank r has every world_size-th position of the whole order, continued from its beginning or cut off."""
    units = [0, *np.cumsum(steps)[: len(num_rows) - 1].tolist()]
    chunks = chunks_of(num_rows, units, first_row=5)
    settings_of_all = {"seed": seed, "epoch": epoch, "window_bytes": window_bytes}
    all_rows = whole(Order(chunks, kind, **settings_of_all))
    assert sorted(all_rows) == every_row(chunks)
    length = len(all_rows) // world_size if drop_last else -(-len(all_rows) // world_size)
    longer = all_rows * (world_size + 1)
    for rank in range(world_size):
        order = Order(chunks, kind, rank=rank, world_size=world_size, drop_last=drop_last, **settings_of_all)
        rows = whole(order)
        assert len(order) == length
        assert rows == longer[rank : length * world_size : world_size]
        assert [order[position] for position in range(length)] == rows
        for row in all_rows:
            assert order.position(row) == (rows.index(row) if row in rows else None)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_together_have_every_row_equally_often(kind: Kind) -> None:
    """733 rows over 8 ranks: 92 each, of which 3 come twice; or 91 each, and 5 rows are left out."""
    for drop_last, length, counts in ((False, 92, {1: 730, 2: 3}), (True, 91, {1: 728})):
        orders = [
            Order(uneven(), kind, rank=rank, world_size=8, drop_last=drop_last, window_bytes=WINDOW)
            for rank in range(8)
        ]
        assert [len(order) for order in orders] == [length] * 8
        times = collections.Counter(row for order in orders for row in whole(order))
        assert collections.Counter(times.values()) == counts


def test_ranks_of_a_source_that_is_smaller_than_they_are_many_have_one_row_each() -> None:
    """Three rows for eight ranks go round; with drop_last nobody has any."""
    chunks = chunks_of([3])
    assert [whole(Order(chunks, Kind.SEQUENTIAL, rank=rank, world_size=8)) for rank in range(8)] == [
        [0], [1], [2], [0], [1], [2], [0], [1],
    ]  # fmt: skip
    assert len(Order(chunks, Kind.UNIFORM, rank=2, world_size=8, drop_last=True)) == 0


# -- windows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_bytes", [1, 250, WINDOW, 2500, 10**9])
@pytest.mark.parametrize("seed", range(5))
def test_a_window_has_exactly_the_rows_of_its_chunks(window_bytes: int, seed: int) -> None:
    """Positions from `starts` to `ends` hold the rows of those chunks and no others; windows follow one another."""
    chunks = uneven()
    order = Order(chunks, Kind.WINDOWED, seed=seed, window_bytes=window_bytes)
    rows, at = whole(order), 0
    for start, end, members in windows_of(order):
        assert start == at
        assert set(rows[start:end]) == set().union(*(rows_of(chunks, chunk) for chunk in members))
        at = end
    assert at == len(rows)


@pytest.mark.parametrize("window_bytes", [1, 250, WINDOW, 2500])
@pytest.mark.parametrize("seed", range(5))
def test_a_window_begins_with_the_chunk_that_passes_a_multiple_of_its_bytes(window_bytes: int, seed: int) -> None:
    """Chunks are in one window if as many whole windows' bytes are laid before each; a larger chunk is alone."""
    chunks = uneven()
    order = Order(chunks, Kind.WINDOWED, seed=seed, window_bytes=window_bytes)
    expected: list[list[int]] = []
    laid_bytes, last_number, is_closed = 0, 0, True
    for chunk in order.sequence.tolist():
        size = int(chunks.num_bytes[chunk])
        number = laid_bytes // window_bytes
        if is_closed or size > window_bytes or number != last_number:
            expected.append([])
        expected[-1].append(chunk)
        laid_bytes, last_number, is_closed = laid_bytes + size, number, size > window_bytes
    found = [members for _, _, members in windows_of(order)]
    assert found == expected
    assert all(len(members) == 1 or chunks.num_bytes[members].sum() < 2 * window_bytes for members in found)


@pytest.mark.parametrize("window_bytes", [100, WINDOW, 10**9])
def test_chunks_of_a_unit_stay_together_and_in_their_sequence(window_bytes: int) -> None:
    """In every order's `sequence`, whatever is shuffled."""
    chunks = uneven()
    for kind, seed in itertools.product(KINDS, range(10)):
        order = Order(chunks, kind, seed=seed, window_bytes=window_bytes, rank=1, world_size=2)
        sequence = order.sequence.tolist()
        assert sorted(sequence) == list(range(len(chunks)))
        units = [(unit, list(group)) for unit, group in itertools.groupby(sequence, lambda c: UNEVEN_UNITS[c])]
        assert len(units) == 17
        assert all(members == sorted(members) for _, members in units)


def test_a_stream_is_shuffled_within_its_windows_only() -> None:
    """A source of one unit: the windows lie as in the source, their rows do not."""
    chunks = chunks_of([100] * 10, units=[0] * 10)
    order = Order(chunks, Kind.WINDOWED, window_bytes=2000)
    assert order.sequence.tolist() == list(range(10))
    rows = whole(order)
    for start in range(0, 1000, 200):
        assert sorted(rows[start : start + 200]) == list(range(start, start + 200))
        assert rows[start : start + 200] != list(range(start, start + 200))


def test_one_window_shuffles_all_rows_among_themselves() -> None:
    """Over 4,000 seeds, the row of any of 40 comes first, and last, equally often."""
    chunks = chunks_of([10, 10, 10, 10])
    found = [whole(Order(chunks, Kind.WINDOWED, seed=seed)) for seed in range(4000)]
    for place in (0, 17, 39):
        counts = np.bincount([rows[place] for rows in found], minlength=40)
        assert (((counts - 100) ** 2) / 100).sum() < 39 + 4 * math.sqrt(2 * 39)


def test_windows_are_shuffled_differently() -> None:
    """Two windows of equally many rows have permutations of their own."""
    order = Order(chunks_of([100] * 4), Kind.WINDOWED, window_bytes=1000)
    shuffles = {tuple(order.rows(start, start + 100) % 100) for start in range(0, 400, 100)}
    assert len(shuffles) == 4


@pytest.mark.parametrize("kind", [Kind.SEQUENTIAL, Kind.WINDOWED])
@pytest.mark.parametrize(("world_size", "drop_last"), [(1, False), (2, False), (5, True), (7, False)])
def test_a_rank_needs_a_chunk_within_its_bounds_only(kind: Kind, world_size: int, drop_last: bool) -> None:
    """From `starts` to `ends`, which are as tight as the window is; continued positions are not counted."""
    chunks = uneven()
    for rank in range(world_size):
        order = Order(chunks, kind, rank=rank, world_size=world_size, drop_last=drop_last, window_bytes=WINDOW)
        rows = whole(order)
        own = rows[: -(-(733 - rank) // world_size)]  # the last may be one of the beginning again
        one = Order(chunks, kind, window_bytes=WINDOW)
        bounds = zip(order.sequence, order.starts, order.ends, one.starts, one.ends, strict=True)
        for chunk, start, end, whole_start, whole_end in bounds:
            needed = [position for position, row in enumerate(own) if row in rows_of(chunks, int(chunk))]
            assert all(start <= position < end for position in needed)
            places = [p for p in range(len(own)) if whole_start <= p * world_size + rank < whole_end]
            assert list(range(start, end)) == places


def test_uniform_needs_every_chunk_from_the_first_position_to_the_last() -> None:
    """For every rank, continued positions included."""
    for rank in range(4):
        order = Order(uneven(), Kind.UNIFORM, rank=rank, world_size=4)
        assert order.starts.tolist() == [0] * 26
        assert order.ends.tolist() == [len(order)] * 26 == [184] * 26


def test_uniform_lists_the_chunks_as_it_needs_them() -> None:
    """By the first position of this rank that has a row of their unit."""
    chunks = uneven()
    units = np.array(UNEVEN_UNITS)
    for seed, (rank, world_size) in itertools.product(range(5), [(0, 1), (2, 3)]):
        order = Order(chunks, Kind.UNIFORM, seed=seed, rank=rank, world_size=world_size)
        needed = units[np.searchsorted(chunks.first_rows, order.rows(0, len(order)), "right") - 1]
        first = list(dict.fromkeys(needed.tolist()))
        assert list(dict.fromkeys(units[order.sequence].tolist()))[: len(first)] == first


# -- seeds and epochs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHUFFLES)
def test_seeds_and_epochs_give_orders_of_their_own(kind: Kind) -> None:
    """Negative and large seeds too; (1, 2) is not (2, 1)."""
    seeds = [0, 1, 2, -1, -2, 1 << 64, (1 << 64) + 1, -(1 << 100), 10**40]
    made = {
        tuple(whole(Order(uneven(), kind, seed=seed, epoch=epoch, window_bytes=WINDOW)))
        for seed, epoch in itertools.product(seeds, (0, 1, 2, 1 << 80))
    }
    assert len(made) == len(seeds) * 4


@pytest.mark.parametrize("kind", SHUFFLES)
def test_the_same_seed_and_epoch_give_the_same_order(kind: Kind) -> None:
    """Made anew, with numpy's integers, or out of a pickle."""
    order = Order(uneven(), kind, seed=5, epoch=6, window_bytes=WINDOW)
    again = Order(uneven(), kind, seed=np.int64(5), epoch=np.uint8(6), window_bytes=np.int32(WINDOW))
    assert whole(order) == whole(again) == whole(pickle.loads(pickle.dumps(order)))


GOLDEN_ROWS: dict[Kind, list[int]] = {
    Kind.UNIFORM: [608, 715, 216, 189, 96, 308, 577, 440, 268, 523],
    Kind.WINDOWED: [127, 764, 723, 731, 763, 777, 758, 106, 713, 113],
}


@pytest.mark.parametrize("kind", SHUFFLES)
def test_orders_are_those_of_every_version(kind: Kind) -> None:
    """Literal values: whoever changes them changes what users' runs are trained on."""
    order = Order(uneven(), kind, seed=-7, epoch=3, rank=1, world_size=2, window_bytes=WINDOW)
    assert order.rows(100, 110).tolist() == GOLDEN_ROWS[kind]


def test_an_order_needs_no_torch() -> None:
    """Prefetchers use it, which never import torch."""
    code = "import sys, shmloader.order; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_is_that_of_the_chunks_not_of_the_rows(kind: Kind) -> None:
    """10**12 rows in 1,000 chunks: some numbers a chunk."""
    chunks = chunks_of([10**9] * 1000, num_bytes=[DEFAULT_WINDOW_BYTES // 3] * 1000)
    tracemalloc.start()
    try:
        order = Order(chunks, kind, seed=1, rank=3, world_size=8)
        assert len(order) == 125 * 10**9
        for start in (0, 10**11, len(order) - 1000):
            rows = order.rows(start, start + 1000)
            assert [order.position(int(row)) for row in rows[:20]] == list(range(start, start + 20))
            assert [order[start + i] for i in range(20)] == rows[:20].tolist()
        assert len(order.sequence) == len(order.starts) == len(order.ends) == 1000
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_many_windows_are_not_all_kept() -> None:
    """An epoch over 2,000 windows leaves the permutations of some."""
    order = Order(chunks_of([30] * 2000), Kind.WINDOWED, window_bytes=1)
    assert sorted(whole(order)) == list(range(60_000))
    assert len(order._permutations) <= 64


# -- arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", -1),
        ("rank", 2),
        ("rank", 0.0),
        ("rank", True),
        ("rank", None),
        ("world_size", 0),
        ("world_size", -2),
        ("world_size", 1.5),
        ("epoch", -1),
        ("epoch", "1"),
        ("epoch", 1.0),
        ("seed", 0.5),
        ("seed", None),
        ("window_bytes", 0),
    ],
)
def test_a_bad_argument_is_an_error_that_names_it(name: str, value: Any) -> None:
    """Ranks outside the world, negative epochs, and what is no whole number."""
    arguments = {"rank": 0, "world_size": 2} | {name: value}
    with pytest.raises(OptionError, match=f"^{name}=") as caught:
        Order(uneven(), Kind.UNIFORM, **arguments)
    assert caught.value.name == name


@pytest.mark.parametrize(
    "arrays",
    [
        ([0, 5], [5, 5], [0, 1], [1]),
        ([0, 6], [5, 5], [0, 1], [1, 1]),
        ([0, 5], [5, -5], [0, 1], [1, 1]),
        ([0, 5], [5, 5], [1, 2], [1, 1]),
        ([0, 5], [5, 5], [0, 2], [1, 1]),
        ([0, 5, 6], [5, 1, 1], [0, 1, 0], [1, 1, 1]),
        ([0, 5], [5, 5], [0, 1], [1, -1]),
        ([0.0, 5.0], [5, 5], [0, 1], [1, 1]),
        ([[0, 5]], [5, 5], [0, 1], [1, 1]),
    ],
)
def test_chunks_that_do_not_fit_together_are_an_error(arrays: tuple[list[Any], ...]) -> None:
    """Lengths, gaps between chunks, units out of sequence, negative numbers, other dtypes."""
    with pytest.raises(OptionError):
        Chunks(*map(np.array, arrays))
