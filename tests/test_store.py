"""Encoded chunks in the raw region: what is written is read in place, and nothing idle holds its room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pytest
from support_sets import ring_files

import shmloader._native as native
from shmloader.errors import RecordTooLargeError
from shmloader.prefetch.held import Held
from shmloader.prefetch.store import BATCH_ROWS, LARGE_ROW_BYTES, RawStore, batches_of
from shmloader.ring import Ring
from shmloader.writer import NoRoom, Writer

SCHEMA = pa.schema([("text", pa.string()), ("number", pa.int64())])
ROWS = 200  # of a chunk


@contextmanager
def stores(raw_bytes: int = 1 << 20, num_stores: int = 1, num_chunks: int = 16) -> Iterator[list[RawStore]]:
    """Stores of services of one set, whose resident region is so small that no chunk stays."""
    sizes = {"resident_bytes": 4096, "transit_bytes": 1 << 16, "raw_bytes": raw_bytes}
    with ring_files(num_chunks * ROWS, ROWS, **sizes) as files:
        rings = [Ring(files, native.SERVICE) for _ in range(num_stores)]
        first_rows = list(range(0, num_chunks * ROWS, ROWS))
        yield [RawStore(ring, Writer(ring), SCHEMA, first_rows) for ring in rings]
        for ring in rings:
            ring.leave()


def batch(first: int, num: int, text_bytes: int = 10) -> pa.RecordBatch:
    texts = [f"{i}".ljust(text_bytes, "x") for i in range(first, first + num)]
    return pa.RecordBatch.from_pydict({"text": texts, "number": list(range(first, first + num))}, schema=SCHEMA)


def chunk(index: int, text_bytes: int = 10, step: int = ROWS) -> list[pa.RecordBatch]:
    return [batch(index * ROWS + at, step, text_bytes) for at in range(0, ROWS, step)]


def read(store: RawStore, rows: list[int]) -> list[tuple[list[int], list[int]]]:
    """(rows, the numbers that their batch holds) of each batch."""
    pinned = store.pin(sorted({row // ROWS for row in rows}))
    try:
        found = batches_of([(row // ROWS, row) for row in sorted(rows)], pinned)
        return [(of, batch.column("number").to_pylist()) for of, batch in found]
    finally:
        pinned.release()


@pytest.mark.parametrize("step", [ROWS, 50, 8])
def test_rows_are_those_that_were_written(step):
    with stores() as (store,):
        store.put(3, chunk(3, step=step), None, False)
        for rows in ([600], [799], list(range(600, 800)), [601, 603, 649, 650, 651, 700]):
            parts = read(store, rows)
            assert [row for of, _ in parts for row in of] == rows
            assert all(of == numbers for of, numbers in parts)
            assert max(len(of) for of, _ in parts) <= BATCH_ROWS


def test_small_rows_of_several_chunks_are_one_batch():
    with stores() as (store,):
        for index in (1, 2, 5):
            store.put(index, chunk(index), None, False)
        rows = [200, 201, 299, 400, 1000, 1010]
        assert read(store, rows) == [(rows, rows)]


def test_large_rows_are_taken_in_place():
    with stores(raw_bytes=8 << 20) as (store,):
        store.put(0, chunk(0, LARGE_ROW_BYTES), None, False)
        assert [of for of, _ in read(store, [3, 4, 9])] == [[3, 4], [9]]
        pinned = store.pin([0])
        ((_, rows),) = batches_of([(0, 3), (0, 4)], pinned)
        whole = pinned.chunks[0].batches[0].column("text").buffers()[2]
        assert rows.column("text").buffers()[2].address == whole.address
        pinned.release()


def test_another_process_reads_what_one_wrote():
    with stores(num_stores=2) as (one, other):
        one.put(7, chunk(7), None, False)
        assert read(other, [1400, 1401]) == [([1400, 1401], [1400, 1401])]


def test_chunks_that_are_not_there_are_left_out():
    with stores() as (store,):
        store.put(1, chunk(1), None, False)
        pinned = store.pin([0, 1, 2])
        assert list(pinned.chunks) == [1]


def test_a_chunk_that_is_there_is_not_written_again():
    with stores() as (store,):
        store.put(1, chunk(1), None, False)
        store.put(1, chunk(2), None, False)
        assert read(store, [200]) == [([200], [200])]


def test_what_is_open_but_not_pinned_is_in_nobodys_way_and_is_not_taken_for_what_came_after_it():
    with stores(raw_bytes=3 * 8192) as (store,):
        for index in range(16):  # a few have room at a time
            store.put(index, chunk(index), None, False)
            first = index * ROWS
            assert read(store, [first, first + 77]) == [([first, first + 77],) * 2]
        assert len(store.pin(range(16)).chunks) < 16
        store.put(0, chunk(0), None, False)
        assert read(store, [5]) == [([5], [5])]


def test_what_is_pinned_stays_until_it_is_released():
    with stores(raw_bytes=8192) as (store,):
        store.put(0, chunk(0), None, False)
        pinned = store.pin([0])
        with pytest.raises(NoRoom):
            store.put(1, chunk(1), None, True)
        pinned.release()
        store.put(1, chunk(1), None, False)
        assert list(store.pin([0, 1]).chunks) == [1]


def test_a_chunk_beyond_the_region_is_an_error_with_both_sizes():
    with stores(raw_bytes=8192) as (store,), pytest.raises(RecordTooLargeError) as caught:
        store.put(0, chunk(0, 1000), None, False)
    assert caught.value.needed_bytes > 200_000
    assert caught.value.have_bytes == 8192


def test_a_chunk_that_cannot_be_written_leaves_its_room():
    bad = pa.RecordBatch.from_pydict({"other": [1]})
    with stores(raw_bytes=8192) as (store,):
        with pytest.raises(pa.ArrowInvalid):
            store.put(0, [bad], None, False)
        store.put(0, chunk(0), None, False)
        assert read(store, [0]) == [([0], [0])]


def held_chunks(wanted: list[int]) -> list[int]:
    """Which of chunks 0 to 3 are still there when these were waited for, and many others were written."""
    with stores(raw_bytes=40960, num_chunks=40) as (store,):  # some eight have room at a time
        held = Held(store._ring.segment, 12_000)
        for index in range(4):
            held.add(index, store.put(index, chunk(index), None, False))
        held.keep(wanted)
        assert (len(held), held.is_full) == (len(wanted), len(wanted) > 2)
        for index in range(10, 40):
            store.put(index, chunk(index), None, False)
        return list(store.pin(range(4)).chunks)


@pytest.mark.parametrize("wanted", [[], [1], [0, 1], [0, 1, 2, 3]])
def test_what_is_waited_for_is_held_and_nothing_else(wanted):
    assert held_chunks(wanted) == wanted
