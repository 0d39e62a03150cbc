"""SHMLOADER_VERIFY: what is not what was written is told to who would read it, and nothing else is."""

from __future__ import annotations

import io
import json
import os
import random
import sys
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import opened, small_options
from support_sets import kill, number, prefetchers_of, ring_files, wait_until, write_numbers
from support_streams import counted, open_stream, stream_of
from torch.utils.data import DataLoader

import shmloader._native as native
from shmloader import ShmMultimodalDataset, ShmMultimodalIterableDataset
from shmloader.checksum import RECORD_AT, SEAL_BYTES, Damage, Sealing, damage, seal
from shmloader.errors import ChecksumError, from_wire, to_wire
from shmloader.guest import REF
from shmloader.prefetch.spill import Spill
from shmloader.prefetch.store import RawStore, batches_of
from shmloader.ring import Refs, Ring
from shmloader.writer import Writer

for name in ("support_streams", __name__):
    cloudpickle.register_pickle_by_value(sys.modules[name])

SCHEMA = pa.schema([("text", pa.string()), ("number", pa.int64())])
ROWS = 50  # of a chunk
NUM_ROWS = 96


@pytest.fixture(scope="module")
def numbers_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_numbers(tmp_path_factory.mktemp("numbers"), NUM_ROWS)


def long(row: dict[str, Any]) -> dict[str, Any]:
    """A `process`: the number, and 5 kB of it."""
    return {"number": row["number"], "data": np.full(5000, row["number"], np.uint8)}


# ---- checksums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 8, 120])
def test_any_bit_that_is_turned_is_found(at: int) -> None:
    data = bytearray(random.Random(at).randbytes(128))
    seal(memoryview(data), at)
    assert damage(memoryview(data), at) is None
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        assert damage(memoryview(data), at) is not None, f"bit {bit}"
        data[bit // 8] ^= 1 << bit % 8
    assert damage(memoryview(data), at) is None


def test_what_was_never_sealed_or_is_cut_off_is_damaged() -> None:
    found = damage(memoryview(bytes(64)), RECORD_AT)
    assert found == Damage(None, found.found)
    assert found.told == "one that is gone"
    assert damage(memoryview(b"1234"), RECORD_AT) is not None


@pytest.mark.parametrize("sizes", [[], [1], [7, 0, 100], [4096, 3]])
def test_what_is_written_piece_by_piece_has_the_same_checksum(sizes: list[int]) -> None:
    parts = [random.Random(size).randbytes(size) for size in sizes]
    file = io.BytesIO()
    sealing = Sealing(file)
    for part in parts:
        sealing.write(part)
    total = -(-(sum(sizes) + SEAL_BYTES) // 64) * 64
    sealing.seal(total)
    expected = bytearray(b"".join(parts).ljust(total, b"\0"))
    seal(memoryview(expected), total - SEAL_BYTES)
    assert file.getvalue() == expected


def test_the_error_crosses_to_another_process_with_its_data() -> None:
    error = ChecksumError("no", source="s", shard=None, row=3, place="ring", expected=None, found=7)
    again = from_wire(json.loads(json.dumps(to_wire(error))))
    assert type(again) is ChecksumError
    assert again.data == error.data


# ---- samples -------------------------------------------------------------------------------------------


def overwrite(dataset: Any, row: int, data: bytes = b"\xff", at: int = -1) -> None:
    """Write to the record of ``row`` as nobody should; ``at``: where, from its beginning or its end."""
    reader = dataset._reader
    offset, num_bytes = reader.attach().get_many([row], 30).place(0)
    os.pwrite(reader.files.ring.ring_fd, data, offset + at % num_bytes)


def test_a_sample_that_was_written_over_is_told_and_no_other(numbers_path: str) -> None:
    with opened(numbers_path, process=long, options=small_options(verify=True)) as dataset:
        assert torch.equal(dataset[5]["data"], torch.full((5000,), 5, dtype=torch.uint8))
        overwrite(dataset, 5, at=3000)
        with pytest.raises(ChecksumError, match=r"row 5 of '.*' .*is damaged.*process=") as caught:
            dataset[5]
        error = caught.value
        assert (error.source, error.row, error.place) == (dataset.name, 5, "ring")
        assert error.shard.endswith(".parquet")
        assert error.expected != error.found
        with pytest.raises(ChecksumError, match="row 5 of"):
            dataset.__getitems__([4, 5, 6])
        assert [int(dataset[row]["number"]) for row in (4, 6)] == [4, 6]


def test_also_the_head_of_a_record_is_verified(numbers_path: str) -> None:
    with opened(numbers_path, process=number, options=small_options(verify=True)) as dataset:
        for row, at in enumerate((0, 4, RECORD_AT, RECORD_AT + 4, 20)):
            assert int(dataset[row]["number"]) == row
            overwrite(dataset, row, b"\xfe", at=at)
            with pytest.raises(ChecksumError):
                dataset[row]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_worker_tells_the_training_process(numbers_path: str, num_workers: int) -> None:
    with opened(numbers_path, process=long, options=small_options(verify=True)) as dataset:
        assert len(list(DataLoader(dataset, 32, num_workers=num_workers))) == 3
        overwrite(dataset, 70, at=3000)
        batches = iter(DataLoader(dataset, 32, num_workers=num_workers))
        with pytest.raises(ChecksumError, match="row 70 of"):
            list(batches)
        # The error keeps the iterator in a cycle, and torch takes 5 s to end a worker that is collected with one.
        getattr(batches, "_shutdown_workers", lambda: None)()


def test_an_iteration_tells_it_when_the_sample_is_reached(numbers_path: str) -> None:
    with opened(numbers_path, ShmMultimodalIterableDataset, process=long, options=small_options(verify=True)) as data:
        assert len(list(data)) == NUM_ROWS
        overwrite(data, 50, at=3000)
        with pytest.raises(ChecksumError, match="row 50 of"):
            list(data)


def test_a_stream_is_sealed_too_and_right() -> None:
    with open_stream(stream_of(counted, num=200), options=small_options(verify=True)) as made:
        assert len(list(made)) == 200  # what is not sealed would be damaged


def test_an_error_that_is_kept_keeps_no_pins(numbers_path: str) -> None:
    options = small_options(verify=True, ring_bytes="256KiB", in_flight=8, ahead=8)
    with opened(numbers_path, process=long, options=options) as dataset:
        ring = dataset._reader.attach()
        errors = []
        for row in range(NUM_ROWS - 8, NUM_ROWS):  # what came first is resident
            refs = ring.get_many([row], 30)
            offset, num_bytes = refs.place(0)
            os.pwrite(dataset._reader.files.ring.ring_fd, b"\xff", offset + num_bytes - 1)
            try:
                dataset[row]
            except ChecksumError as error:
                errors.append(error)
            del refs
        assert errors
        assert ring.segment.pinned_bytes() == 0


def test_copies_that_a_reader_made_are_verified_as_well(numbers_path: str) -> None:
    with opened(numbers_path, process=long, options=small_options(verify=True)) as dataset:
        reader = dataset._reader
        copies = Ring._copied([1, 2], {}, range(2), reader.attach().get_many([1, 2], 30))
        assert reader.damage_of(copies) is None
        memoryview(copies.base.view(*copies.place(1)))[3000] ^= 1
        assert reader.damage_of(copies).row == 2


def test_what_is_not_there_or_ended_is_not_verified() -> None:
    class Plan:
        pass

    from shmloader.reader import Reader

    files = SimpleNamespace(ring=SimpleNamespace(quarantine_fd=-1))
    reader = Reader(files, Plan(), 1.0, verify=True)  # type: ignore[arg-type]
    packed = REF.pack(0, 0, 0, 0, native.END, 0) + REF.pack(0, 0, 0, 0, native.MISSING, 0)
    assert reader.damage_of(Refs([1, 2], packed, None)) is None  # type: ignore[arg-type]


def test_without_the_option_nothing_is_sealed_or_compared(numbers_path: str) -> None:
    with opened(numbers_path, process=long, options=small_options()) as dataset:
        refs = dataset._reader.attach().get_many([5], 30)
        assert bytes(refs.record(0)[8:16]) == bytes(8)
        overwrite(dataset, 5, at=3000)
        assert int(dataset[5]["number"]) == 5


# ---- encoded rows --------------------------------------------------------------------------------------


@contextmanager
def stores(verify: bool = True) -> Iterator[tuple[list[RawStore], int, int]]:
    """Two stores of services of one set in which no chunk stays; the descriptors of its ring and its disk."""
    sizes = {"resident_bytes": 4096, "transit_bytes": 1 << 16, "raw_bytes": 1 << 20, "spill_bytes": 1 << 20}
    with tempfile.TemporaryFile() as file, ring_files(4 * ROWS, ROWS, **sizes) as files:
        file.truncate(1 << 20)
        rings = [Ring(files, native.SERVICE) for _ in range(2)]
        spills = [Spill(ring.segment, file.fileno(), "", "/the/disk") for ring in rings]
        first_rows = list(range(0, 4 * ROWS, ROWS))
        pairs = zip(rings, spills, strict=True)
        made = [RawStore(ring, Writer(ring), SCHEMA, first_rows, spill=spill, verify=verify) for ring, spill in pairs]
        yield made, files.ring_fd, file.fileno()
        assert rings[0].segment.check() is None
        for ring in rings:
            ring.leave()


def batch(chunk: int, text_bytes: int = 10) -> pa.RecordBatch:
    rows = range(chunk * ROWS, (chunk + 1) * ROWS)
    return pa.RecordBatch.from_pydict(
        {"text": [f"{row}".ljust(text_bytes, "x") for row in rows], "number": list(rows)}, schema=SCHEMA
    )


def write(store: RawStore, chunk: int, is_on_disk: bool, **kwargs: int) -> None:
    segment = store._ring.segment
    assert segment.chunk_claim(chunk) == 0
    if is_on_disk:
        assert store.put_on_disk(chunk, [batch(chunk, **kwargs)])
    else:
        store.put(chunk, [batch(chunk, **kwargs)], None, False)
    assert segment.chunk_end(chunk, native.FETCH_OK) == 0


def place_of(store: RawStore, chunk: int, is_on_disk: bool) -> tuple[int, int]:
    """(offset, bytes) in the ring or on disk."""
    if is_on_disk:
        found = store._spill.find(chunk)
        assert found is not None
        return found
    packed, _, _, _ = store._ring.segment.get_many(array("Q", [native.RAW | chunk]), 0, None)
    offset, num_bytes, *_ = REF.unpack(packed)
    return offset, num_bytes


@pytest.mark.parametrize("is_on_disk", [False, True])
@pytest.mark.parametrize("text_bytes", [1, 10, 13, 1000])
def test_encoded_rows_are_read_as_they_were_written(is_on_disk: bool, text_bytes: int) -> None:
    with stores() as ((one, other), _, _):
        write(one, 2, is_on_disk, text_bytes=text_bytes)
        for store in (one, other):
            pinned = store.pin([2])
            ((rows, found),) = batches_of([(2, row) for row in range(100, 150)], pinned)
            assert rows == found.column("number").to_pylist()
            assert pinned.failure(2, 100) is None
            pinned.release()


@pytest.mark.parametrize("is_on_disk", [False, True])
@pytest.mark.parametrize("at", [0, 100, -1, -SEAL_BYTES - 1, -SEAL_BYTES])
def test_of_damaged_encoded_rows_each_says_so_and_where(is_on_disk: bool, at: int) -> None:
    with stores() as ((one, other), ring_fd, disk_fd):
        write(one, 1, is_on_disk)
        write(one, 2, is_on_disk)
        offset, num_bytes = place_of(one, 2, is_on_disk)
        os.pwrite(disk_fd if is_on_disk else ring_fd, b"\xa5", offset + at % num_bytes)
        pinned = other.pin([1, 2])
        assert pinned.holds(1, 50)
        assert pinned.failure(1, 50) is None
        for row in (100, 149):
            assert not pinned.holds(2, row)
            error = pinned.failure(2, row)
            assert type(error) is ChecksumError
            assert error.place == ("/the/disk" if is_on_disk else "ring")
            assert ("the folder /the/disk" in str(error)) == is_on_disk
            assert error.found != error.expected
        assert pinned.failure(2, 99) is None
        pinned.release()


def test_without_the_option_encoded_rows_are_as_small_as_they_were() -> None:
    num_bytes = []
    for verify in (False, True):
        with stores(verify) as ((one, _), _, _):
            num_bytes.append(one.put(0, [batch(0)], None, False))
    assert num_bytes[0] < num_bytes[1] <= num_bytes[0] + 64 + SEAL_BYTES


def test_rows_of_a_damaged_disk_are_errors_and_the_others_are_right(tmp_path: Any, numbers_path: str) -> None:
    options = small_options(
        verify=True, ring_bytes="160KiB", in_flight=4, ahead=4, spill_bytes="8MiB", spill_dir=str(tmp_path)
    )
    with opened(numbers_path, process=long, options=options, cache_size=8) as dataset:  # so that one chunk stays
        rows = random.Random(7).sample(range(NUM_ROWS), NUM_ROWS)
        assert [int(dataset[row]["number"]) for row in rows] == rows
        segment = dataset._reader.attach().segment
        spilled = {chunk: place for chunk in range(NUM_ROWS // 16) if (place := segment.spill_find(chunk)) is not None}
        assert spilled
        for offset, _ in spilled.values():
            os.pwrite(dataset._reader.files.spill_fd, b"\xa5" * 64, offset + 128)
        old = prefetchers_of(dataset)
        kill(*old)  # who has opened a chunk does not compare it again
        assert wait_until(lambda: (now := prefetchers_of(dataset)) and not set(now) & set(old))
        outcomes = [outcome(dataset, row) for row in rows]
        errors = [found for found in outcomes if isinstance(found, ChecksumError)]
        assert errors
        for row, found in zip(rows, outcomes, strict=True):
            if isinstance(found, ChecksumError):
                assert (found.row, found.source, found.place) == (row, dataset.name, str(tmp_path))
                assert row // 16 in spilled
            else:
                assert found == row


def outcome(dataset: ShmMultimodalDataset, row: int) -> int | ChecksumError:
    try:
        return int(dataset[row]["number"])
    except ChecksumError as error:
        return error
