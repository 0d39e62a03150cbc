"""Encoded chunks on disk: what is written is read by everybody, a disk that refuses loses nothing, and no chunk of a
set that does not fit its ring is fetched twice where that costs."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SIDE, opened, small_options
from hub import serve
from support_sets import (
    descriptors,
    kill,
    names,
    number,
    prefetchers_of,
    ring_files,
    supervisor_of,
    wait_for_end,
    wait_until,
    write_numbers,
    write_pictures,
)
from torch.utils.data import DataLoader, Dataset, RandomSampler

import shmloader._native as native
from shmloader import ShmMultimodalDataset
from shmloader.prefetch.spill import Spill
from shmloader.prefetch.store import RawStore, batches_of
from shmloader.ring import Ring
from shmloader.writer import Writer

cloudpickle.register_pickle_by_value(sys.modules[__name__])

# ---- the file, without services --------------------------------------------------------------------------------

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


# ---- whole sets ------------------------------------------------------------------------------------------------

NUM_ROWS = 1000
CHUNK_ROWS = 50
EVERY_ROW = list(range(NUM_ROWS))
REFETCH = ".* in an order that the prefetchers do not know:UserWarning"


@pytest.fixture(scope="module")
def pictures_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pictures(tmp_path_factory.mktemp("pictures"), NUM_ROWS, rows_per_chunk=CHUNK_ROWS)


@contextmanager
def opened_small(name: str, **options: Any) -> Iterator[ShmMultimodalDataset]:
    """A set whose ring holds a tenth of the samples, and whose raw region few of its 20 chunks."""
    options = {"ring_bytes": "96KiB", "window_bytes": 4096, "prefetchers": 2, "spill_bytes": "64MiB", **options}
    with opened(name, options=small_options(**options)) as dataset:
        yield dataset
        if not dataset._reader.is_closed:
            assert dataset._reader.attach().segment.check() is None


def labels_of(loader: Any) -> list[int]:
    """The labels of all batches, each of which must hold the pictures that belong to them."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    seen: list[int] = []
    for batch in loader:
        colours = (batch["image"] * std + mean) * 255
        expected = (batch["labels"] % 256).float().view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE)
        assert torch.allclose(colours, expected, atol=0.01)
        seen += batch["labels"].tolist()
    return seen


def foreign(dataset: Any, seed: int, num_workers: int = 0) -> DataLoader[Any]:
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
    return DataLoader(dataset, 4, sampler=sampler, num_workers=num_workers)


def num_fetched(dataset: ShmMultimodalDataset) -> int:
    return dataset._reader.attach().segment.stats()["num_fetched"]


def source_bytes(name: str) -> int:
    """Encoded bytes of all rows, as fetched_bytes counts them."""
    return sum(batch.nbytes for batch in pq.read_table(name).to_batches())


def told(dataset: ShmMultimodalDataset) -> str | None:
    """The warning that chunks are fetched again, shown or not."""
    text = dataset._reader.attach().segment.text_get(native.TEXT_REFETCH)
    return None if text is None else json.loads(text)["message"]


def message_of(dataset: ShmMultimodalDataset) -> str:
    """The same, after as many epochs as it takes."""
    for epoch in range(20):
        assert sorted(labels_of(foreign(dataset, epoch))) == EVERY_ROW
        message = told(dataset)
        if message is not None:
            return message
    raise AssertionError("nothing was told")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_foreign_sampler_fetches_each_chunk_once(pictures_path: str, num_workers: int) -> None:
    with opened_small(pictures_path) as dataset:
        for epoch in range(2):
            assert sorted(labels_of(foreign(dataset, epoch, num_workers))) == EVERY_ROW
        stats = dataset.stats()
        assert num_fetched(dataset) == NUM_ROWS // CHUNK_ROWS
        assert stats.fetched_bytes <= 1.01 * source_bytes(pictures_path)
        assert 0 < stats.spill_used_bytes <= stats.spill_bytes == 64 << 20
        assert told(dataset) is None


@pytest.mark.parametrize("reason", ["off", "no folder"])
@pytest.mark.filterwarnings(f"ignore:{REFETCH}", "ignore:spill_bytes=.* was asked for")
def test_without_the_disk_chunks_are_fetched_again_and_again_and_it_is_told(
    pictures_path: str, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr("shmloader.spill_file._default_folders", lambda: ["/dev/shm"])
    with opened_small(pictures_path, spill_bytes=0 if reason == "off" else "64MiB") as dataset:
        message = message_of(dataset)
        assert dataset.stats().fetched_bytes > 3 * source_bytes(pictures_path)
        assert (dataset.stats().spill_bytes, dataset.stats().spill_used_bytes) == (0, 0)
    why = "SHMLOADER_SPILL_BYTES is 0" if reason == "off" else "/dev/shm is in memory"
    for part in (why, "SHMLOADER_SPILL_DIR", "dataset.sampler()", " for every 64"):
        assert part in message


@pytest.mark.filterwarnings(f"ignore:{REFETCH}")
def test_a_disk_that_is_too_small_holds_the_first_chunk_and_the_others_are_fetched_again(pictures_path: str) -> None:
    with opened_small(pictures_path, spill_bytes="8KiB") as dataset:
        message = message_of(dataset)
        stats, segment = dataset.stats(), dataset._reader.attach().segment
        assert stats.spill_used_bytes == stats.spill_bytes == 8 << 10
        assert stats.fetched_bytes > 3 * source_bytes(pictures_path)
        assert sum(segment.spill_find(i) is not None for i in range(NUM_ROWS // CHUNK_ROWS)) == 1
    assert "Of the 8.0 KiB for them on disk 8.0 KiB are used." in message


def test_in_an_order_that_is_known_local_chunks_are_not_spilled(pictures_path: str) -> None:
    with opened_small(pictures_path) as dataset:
        loader = DataLoader(dataset, 16, sampler=dataset.sampler(seed=3))
        for _ in range(2):
            assert sorted(labels_of(loader)) == EVERY_ROW
        assert dataset.stats().spill_bytes == 64 << 20
        assert dataset.stats().spill_used_bytes == 0


def test_where_all_fits_nothing_is_spilled(pictures_path: str) -> None:
    with opened_small(pictures_path, ring_bytes="32MiB") as dataset:
        assert sorted(labels_of(foreign(dataset, 1))) == EVERY_ROW
        assert (dataset.stats().transit_bytes, dataset.stats().spill_bytes) == (0, 0)
        assert dataset.stats().spill_used_bytes == 0


@pytest.mark.parametrize(
    ("spill_bytes", "line"),
    [
        ("64MiB", "encoded chunks are kept on disk: up to 64.0 MiB, in "),
        (0, "encoded chunks are not kept on disk: that is turned off (SHMLOADER_SPILL_BYTES is 0)"),
    ],
)
def test_the_log_says_where_chunks_are_kept(
    pictures_path: str, capfd: Any, monkeypatch: pytest.MonkeyPatch, spill_bytes: Any, line: str
) -> None:
    monkeypatch.setattr("shmloader.base_dataset._show_log", lambda level: None)  # only that of the services
    with opened_small(pictures_path, spill_bytes=spill_bytes, log="INFO"):
        assert capfd.readouterr().err.count(line) == 1


def test_of_a_hub_every_chunk_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "hub" / "org" / "pictures", NUM_ROWS, rows_per_chunk=CHUNK_ROWS)
    with serve(tmp_path / "hub") as hub:
        for name, value in {"ENDPOINT": hub.endpoint, "HOME": str(tmp_path / "home"), "HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(f"HF_{name}", value)
        with opened_small("org/pictures") as dataset:
            assert dataset.sources[0]["mode"] == "streaming"
            loader = DataLoader(dataset, 16, sampler=dataset.sampler(seed=4))
            assert sorted(labels_of(loader)) == EVERY_ROW
            fetched, sent = num_fetched(dataset), hub.num_bytes
            assert fetched >= NUM_ROWS // CHUNK_ROWS
            for _ in range(2):
                assert sorted(labels_of(loader)) == EVERY_ROW
            assert (num_fetched(dataset), hub.num_bytes) == (fetched, sent)
            assert told(dataset) is None


@pytest.mark.parametrize("by", ["argument", "environment", "default", "off", "ring"])
def test_a_disk_that_was_asked_for_and_cannot_be_had_is_a_warning_where_it_is_missed(
    pictures_path: str, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setattr("shmloader.spill_file._default_folders", lambda: ["/dev/shm"])
    options: dict[str, Any] = {"spill_bytes": {"argument": "1MiB", "ring": "1MiB", "off": 0}.get(by)}
    if by == "environment":
        monkeypatch.setenv("SHMLOADER_SPILL_BYTES", "1MiB")
        del options["spill_bytes"]
    if by == "ring":
        options["ring_bytes"] = "32MiB"
    options = {"ring_bytes": "96KiB", "window_bytes": 4096, **options}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with opened(pictures_path, options=small_options(**options)):
            pass
    if by not in ("argument", "environment"):
        assert caught == []
        return
    (warning,) = caught
    for part in ("spill_bytes='1MiB' was asked for", "/dev/shm is in memory", "SHMLOADER_SPILL_DIR"):
        assert part in str(warning.message)
    assert Path(warning.filename).name == "conftest.py"  # which makes the dataset


def test_a_warning_that_is_an_error_leaves_nothing(pictures_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shmloader.spill_file._default_folders", lambda: ["/dev/shm"])
    before = descriptors()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="was asked for"), opened_small(pictures_path):
            pass
    assert {fd: what for fd, what in descriptors().items() if fd not in before} == {}


def test_datasets_of_one_process_share_what_is_theirs_of_the_disk_by_default(
    tmp_path: Path, pictures_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shmloader.spill_file._default_folders", lambda: [str(tmp_path)])
    fields = list(os.statvfs(tmp_path))
    fields[1], fields[4] = 4096, 1 << 20  # f_frsize, f_bavail: 4 GiB
    monkeypatch.setattr(os, "statvfs", lambda folder: os.statvfs_result(fields))
    whole = int(0.1 * (4 << 30)) // 4096 * 4096
    with opened_small(pictures_path, spill_bytes=None, ring_bytes="32MiB") as fitting:
        assert fitting.stats().spill_bytes == 0
        with opened_small(pictures_path, spill_bytes=None) as one:
            assert one.stats().spill_bytes == whole
            with opened_small(pictures_path, spill_bytes="64MiB") as said:
                assert said.stats().spill_bytes == 64 << 20
                with opened_small(pictures_path, spill_bytes=None) as other:
                    assert other.stats().spill_bytes == whole // 8 // 4096 * 4096
        with opened_small(pictures_path, spill_bytes=None) as next_one:
            assert next_one.stats().spill_bytes == whole


DEAR = ".* are fetched from the source again, where they have been before:UserWarning"


@pytest.mark.parametrize("is_ours", [True, False])
@pytest.mark.filterwarnings(f"ignore:{DEAR}")
def test_of_a_hub_what_the_disk_has_no_room_for_is_told_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_ours: bool
) -> None:
    write_pictures(tmp_path / "hub" / "org" / "pictures", NUM_ROWS, rows_per_chunk=CHUNK_ROWS)
    with serve(tmp_path / "hub") as hub:
        for name, value in {"ENDPOINT": hub.endpoint, "HOME": str(tmp_path / "home"), "HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(f"HF_{name}", value)
        with opened_small("org/pictures", spill_bytes="16KiB") as dataset:
            for epoch in range(20):
                loader = foreign(dataset, epoch)
                if is_ours:
                    loader = DataLoader(dataset, 16, sampler=dataset.sampler(seed=4))
                assert sorted(labels_of(loader)) == EVERY_ROW
                if (message := told(dataset)) is not None:
                    break
            assert message is not None
    for part in ("SHMLOADER_SPILL_BYTES", "SHMLOADER_SPILL_DIR", "SHMLOADER_RING_BYTES", "KiB for every 64 of them"):
        assert part in message
    assert "Of the 16.0 KiB for them on disk" in message


def test_a_stream_is_read_once_and_then_lies_on_disk(tmp_path: Path) -> None:
    lines = [json.dumps({"number": i, "pad": "x" * 200}) for i in range(NUM_ROWS)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    options = small_options(ring_bytes=8192, window_bytes=4096, spill_bytes="16MiB", in_flight=16, ahead=8)
    with opened(str(tmp_path), process=number, options=options) as dataset:
        assert dataset.sources[0]["mode"] == "sequential"
        for epoch in range(2):
            assert sorted(numbers_of(foreign(dataset, epoch))) == EVERY_ROW
        num_chunks, segment = len(dataset._reader.plan.source.chunks), dataset._reader.attach().segment
        spilled = sum(segment.spill_find(i) is not None for i in range(num_chunks))
        # So many were to stay while the size of the samples was not known, and are fetched once more at most.
        to_stay = 8
        assert spilled >= num_chunks - to_stay > 0
        assert num_fetched(dataset) <= num_chunks + to_stay
        assert told(dataset) is None


# ---- a disk that is full ---------------------------------------------------------------------------------------

FULL_DISK = """
import sys, warnings
sys.path[:0] = sys.argv[2:]
from conftest import opened, small_options
from torch.utils.data import DataLoader, RandomSampler
warnings.simplefilter("ignore")

options = small_options(ring_bytes="96KiB", window_bytes=4096, spill_bytes="64MiB", spill_dir="/mnt", prefetchers=2)
with opened(sys.argv[1], options=options) as dataset:
    for _ in range(2):
        labels = [label for batch in DataLoader(dataset, 16, shuffle=True) for label in batch["labels"].tolist()]
        assert sorted(labels) == list(range(len(dataset)))
    stats = dataset._reader.attach().segment.stats()
    print(stats["spill_frozen"], stats["spill_used_bytes"] > 0, dataset._reader.attach().segment.check())
"""


def test_when_the_disk_is_full_all_rows_are_delivered_and_it_is_told(tmp_path: Path, pictures_path: str) -> None:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, timeout=20, check=False).returncode:
        pytest.skip("this process may not make a mount namespace (unshare --mount)")
    (tmp_path / "full.py").write_text(FULL_DISK)
    # The file is as large as the disk, half of which is another's.
    inner = 'mount -t tmpfs -o size=256k tmpfs /mnt && head -c 128k /dev/zero > /mnt/other && exec "$@"'
    tests = Path(__file__).parent
    command = ["unshare", "--mount", "sh", "-c", inner, "sh", sys.executable, str(tmp_path / "full.py"), pictures_path]
    done = subprocess.run(
        [*command, str(tests.parent), str(tests)], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout) == (0, "1 True None\n"), done.stderr
    assert done.stderr.count("the disk takes no more encoded chunks") == 1
    assert "No space left on device" in done.stderr


# ---- kills, descriptors, workers -------------------------------------------------------------------------------


def dying(marker: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A `process`: the number; the first prefetcher that decodes a row dies in the middle of its next write to disk."""

    def process(row: dict[str, Any]) -> dict[str, Any]:
        real = os.pwrite

        def pwrite(fd: int, data: Any, offset: int) -> int:
            if Path(marker).exists():
                return real(fd, data, offset)
            real(fd, data[: len(data) // 2], offset)
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

        if not Path(marker).exists() and os.pwrite.__name__ != "dying":
            pwrite.__name__ = "dying"
            os.pwrite = pwrite
        return {"number": row["number"]}

    return process


def numbers_of(loader: Any) -> list[int]:
    return [number for batch in loader for number in batch["number"].tolist()]


@pytest.mark.filterwarnings(f"ignore:{REFETCH}")
def test_a_chunk_whose_fetcher_is_killed_while_it_writes_is_fetched_again_and_whole(tmp_path: Path) -> None:
    name, marker = write_numbers(tmp_path / "d", NUM_ROWS, CHUNK_ROWS), tmp_path / "dead"
    options = small_options(ring_bytes=8192, window_bytes=4096, spill_bytes="1MiB", in_flight=16, ahead=8)
    with opened(name, process=dying(str(marker)), options=options) as dataset:
        for epoch in range(2):
            assert sorted(numbers_of(foreign(dataset, epoch))) == EVERY_ROW
        assert marker.exists()
        stats, segment = dataset.stats(), dataset._reader.attach().segment
        assert stats.restarts == 1
        assert segment.check() is None
        places = [place for i in range(NUM_ROWS // CHUNK_ROWS) if (place := segment.spill_find(i)) is not None]
        assert len(places) >= 2
        assert stats.spill_used_bytes > sum(-(-num_bytes // 4096) * 4096 for _, num_bytes in places)  # what was lost


def test_of_the_file_nothing_is_left(tmp_path: Path, pictures_path: str) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    before = set(descriptors().values())
    with opened_small(pictures_path, spill_dir=str(folder)) as dataset:
        assert sorted(labels_of(foreign(dataset, 1))) == EVERY_ROW
        spill_fd = dataset._reader.files.spill_fd
        assert spill_fd is not None
        assert os.fstat(spill_fd).st_nlink == 0
        assert os.fstat(spill_fd).st_blocks * 512 >= dataset.stats().spill_used_bytes > 0
        assert names(str(folder)) == set()
        pids = dataset.stats().service_pids
        dataset.close()
        for pid in pids:
            wait_for_end(pid)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(spill_fd)
    assert names(str(folder)) == set()
    assert not {what for what in set(descriptors().values()) - before if str(folder) in what}


def test_an_error_at_construction_leaves_no_file(tmp_path: Path, pictures_path: str) -> None:
    before = descriptors()
    for arguments in ({"spill_dir": str(tmp_path / "missing")}, {"ring_bytes": 4096, "in_flight": 512}):
        with (
            pytest.raises(Exception, match=r"SHMLOADER_(SPILL_DIR|RING_BYTES)"),
            opened_small(pictures_path, **arguments),
        ):
            pass
        assert {fd: what for fd, what in descriptors().items() if fd not in before} == {}


class Spying(Dataset[Any]):
    """The samples, and which file holds the encoded chunks where they are read."""

    def __init__(self, dataset: ShmMultimodalDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        file = os.fstat(self.dataset._reader.files.spill_fd or -1)
        return int(self.dataset[index]["labels"]), file.st_ino, file.st_dev


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_the_file_comes_along_to_a_worker_which_starts_a_supervisor_with_it(pictures_path: str, context: str) -> None:
    with opened_small(pictures_path, ring_bytes="64KiB") as dataset:
        file = os.fstat(dataset._reader.files.spill_fd or -1)
        loader = DataLoader(Spying(dataset), 8, num_workers=1, multiprocessing_context=context, prefetch_factor=1)
        batches = iter(loader)
        seen = [next(batches)]
        victims = [supervisor_of(dataset), *wait_until(lambda: prefetchers_of(dataset))]
        kill(*victims)
        for victim in victims:
            wait_for_end(victim)
        seen += list(batches)
        del batches
        assert sorted(label for labels, _, _ in seen for label in labels.tolist()) == EVERY_ROW
        assert {inode for _, inodes, _ in seen for inode in inodes.tolist()} == {file.st_ino}
        assert {device for _, _, devices in seen for device in devices.tolist()} == {file.st_dev}
        assert dataset.stats().spill_used_bytes > 0
