"""The file of encoded chunks on local disk, without services: what is written is read, and a disk may refuse."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pytest
from support_sets import (
    ring_files,
)

import shmloader._native as native
from shmloader.prefetch.spill import Spill
from shmloader.prefetch.store import RawStore, batches_of
from shmloader.ring import Ring
from shmloader.writer import Writer

SCHEMA = pa.schema([("text", pa.string()), ("number", pa.int64())])
ROWS = 200  # of a chunk
NUM_CHUNKS = 16


@contextmanager
def stores(num_stores: int = 1, spill_bytes: int = 1 << 20) -> Iterator[list[RawStore]]:
    """Stores of services of one set in which no chunk stays."""
    sizes = {"resident_bytes": 4096, "transit_bytes": 1 << 16, "raw_bytes": 1 << 20, "spill_bytes": spill_bytes}
    with tempfile.TemporaryFile() as file, ring_files(NUM_CHUNKS * ROWS, ROWS, **sizes) as files:
        file.truncate(spill_bytes)
        rings = [Ring(files, native.SERVICE) for _ in range(num_stores)]
        first_rows = list(range(0, NUM_CHUNKS * ROWS, ROWS))
        spills = [Spill(ring.segment, file.fileno()) for ring in rings]
        yield [
            RawStore(ring, Writer(ring), SCHEMA, first_rows, spill=spill)
            for ring, spill in zip(rings, spills, strict=True)
        ]
        assert rings[0].segment.check() is None
        for ring in rings:
            ring.leave()


def segment_of(store: RawStore) -> native.Segment:
    return store._ring.segment


def batches(chunk: int, step: int = 50, text_bytes: int = 10) -> list[pa.RecordBatch]:
    parts = []
    for first in range(chunk * ROWS, (chunk + 1) * ROWS, step):
        rows = range(first, first + step)
        columns = {"text": [f"{i}".ljust(text_bytes, "x") for i in rows], "number": list(rows)}
        parts.append(pa.RecordBatch.from_pydict(columns, schema=SCHEMA))
    return parts


def spill(store: RawStore, chunk: int, **arguments: int) -> bool:
    """Fetch ``chunk`` to disk; whether there was room."""
    assert segment_of(store).chunk_claim(chunk) == 0
    has_room = store.put_on_disk(chunk, batches(chunk, **arguments))
    assert segment_of(store).chunk_end(chunk, native.FETCH_OK if has_room else native.FETCH_GIVEN_UP) == 0
    return has_room


def read(store: RawStore, rows: list[int]) -> list[int]:
    """The numbers of ``rows``."""
    pinned = store.pin(sorted({row // ROWS for row in rows}))
    found = batches_of([(row // ROWS, row) for row in sorted(rows)], pinned)
    numbers = [number for _, batch in found for number in batch.column("number").to_pylist()]
    pinned.release()
    return numbers


@pytest.mark.parametrize("step", [ROWS, 50, 8])
def test_rows_on_disk_are_those_that_were_written(step: int) -> None:
    with stores(num_stores=2) as (one, other):
        assert spill(one, 3, step=step)
        assert spill(other, 1, step=step)
        for store in (one, other):
            for rows in ([600], list(range(600, 800)), [200, 399, 601, 650, 799]):
                assert read(store, rows) == rows


def test_chunks_on_disk_and_in_the_ring_are_read_together_and_none_is_in_both() -> None:
    with stores() as (store,):
        assert spill(store, 3)
        store.put(5, batches(5), None, False)
        rows = [600, 601, 1000, 1199]
        assert read(store, rows) == rows
        ids = native.RAW | 3
        assert segment_of(store).look(memoryview(ids.to_bytes(8, "little")).cast("Q"), None)[0] == native.ROW_MISSING
        assert list(store.pin([2, 3, 4, 5]).chunks) == [3, 5]


def test_what_is_on_disk_needs_no_pin_and_stays() -> None:
    with stores() as (store,):
        assert spill(store, 0)
        pinned = store.pin([0])
        assert segment_of(store).pinned_bytes() == 0
        for chunk in range(1, NUM_CHUNKS):
            store.put(chunk, batches(chunk, text_bytes=1000), None, True)
        rows = list(range(ROWS))
        found = [row for of, _ in batches_of([(0, row) for row in rows], pinned) for row in of]
        assert found == rows
        assert read(store, [5]) == [5]


def test_what_finds_no_room_on_disk_is_told_and_what_is_smaller_may() -> None:
    with stores(spill_bytes=3 << 19) as (store,):
        assert not spill(store, 0, text_bytes=10_000)
        assert spill(store, 1, text_bytes=5000)
        assert not spill(store, 2, text_bytes=5000)
        assert spill(store, 2)
        assert store.describe_disk() == "Of the 1.5 MiB for them on disk 988.0 KiB are used."
        assert segment_of(store).spill_find(0) is None


def test_a_chunk_whose_claim_has_ended_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("it wrote"))
    with stores() as (store,):
        assert store.put_on_disk(4, batches(4))
        assert segment_of(store).spill_find(4) is None


def test_writes_that_the_kernel_cuts_short_are_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    real, rng = os.pwrite, random.Random(391)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[: rng.randint(1, 1000)], at))
    with stores() as (store,):
        assert spill(store, 7, text_bytes=300)
        assert read(store, [1400, 1599]) == [1400, 1599]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EFBIG])
def test_a_disk_that_refuses_is_told_once_and_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str, code: int
) -> None:
    calls = []

    def refuse(*_: Any) -> None:
        calls.append(1)
        raise OSError(code, os.strerror(code))

    with stores(num_stores=2) as (one, other), caplog.at_level(logging.WARNING, "shmloader"):
        assert spill(one, 0)
        monkeypatch.setattr(os, call, refuse)
        assert not spill(one, 1)
        num_calls = len(calls)
        assert not spill(one, 2)
        assert not spill(other, 3)
        assert len(calls) == num_calls
        (record,) = caplog.records
        assert os.strerror(code) in record.getMessage()
        assert "refused more" in one.describe_disk()
        assert one.put(1, batches(1), None, False) > 0
        assert read(other, [0, 199, 200]) == [0, 199, 200]


def taken_bytes(store: RawStore) -> int:
    """What the file takes of the disk."""
    return os.fstat(store._spill._fd).st_blocks * 512


@pytest.mark.parametrize("error", [OSError(errno.EIO, "the disk is on fire"), ZeroDivisionError("a bug")])
def test_what_is_not_written_takes_no_room_of_the_disk(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real = os.pwrite

    def write_half(fd: int, data: memoryview, offset: int) -> int:
        real(fd, data[: len(data) // 2], offset)
        raise error

    with stores() as (store,):
        assert spill(store, 0)
        before = taken_bytes(store)
        monkeypatch.setattr(os, "pwrite", write_half)
        with contextlib.suppress(ZeroDivisionError):
            assert not spill(store, 1, text_bytes=1000)
        assert taken_bytes(store) == before > 0
        assert read(store, [0, 199]) == [0, 199]


def test_a_disk_that_cannot_give_back_what_it_took_refuses_as_any_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Stubborn:
        """The segment, whose file has no holes."""

        def __init__(self, segment: native.Segment) -> None:
            self.segment = segment

        def __getattr__(self, name: str) -> Any:
            return getattr(self.segment, name)

        def spill_give_back(self, *_: int) -> None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def refuse(*_: Any) -> int:
        raise OSError(errno.EIO, "the disk is on fire")

    with stores() as (store,), caplog.at_level(logging.INFO, "shmloader"):
        store._spill._segment = Stubborn(segment_of(store))  # type: ignore[assignment]
        monkeypatch.setattr(os, "pwrite", refuse)
        assert not spill(store, 1)
        kept, refused = (record.getMessage() for record in caplog.records)
        assert "the disk keeps up to" in kept
        assert "the disk is on fire" in refused


def test_what_a_refusing_disk_holds_is_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, offset, num_bytes: None if offset == 0 else os.fstat(-1))
    with stores() as (store,):
        assert spill(store, 0, text_bytes=1000)
        assert not spill(store, 1, text_bytes=1000)
        assert segment_of(store).stats()["spill_used_bytes"] > 400_000
        assert re.fullmatch(r"The disk took 198\.\d KiB of them and refused more\.", store.describe_disk())


def test_a_chunk_that_cannot_be_written_is_not_there_and_the_disk_goes_on() -> None:
    bad = pa.RecordBatch.from_pydict({"other": [1]})
    with stores() as (store,):
        assert segment_of(store).chunk_claim(0) == 0
        with pytest.raises(pa.ArrowInvalid):
            store.put_on_disk(0, [bad])
        assert segment_of(store).chunk_end(0, native.FETCH_GIVEN_UP) == 0
        assert spill(store, 0)
        assert read(store, [3]) == [3]


def test_a_set_that_spills_without_its_file_is_refused() -> None:
    with ring_files(spill_bytes=4096) as files:
        ring = Ring(files, native.SERVICE)
        with pytest.raises(ValueError, match="must come with the file"):
            Spill(ring.segment, None)
        ring.leave()
