"""Encoded chunks on disk: what is written is read by everybody, a disk that refuses loses nothing, and no chunk of a
set that does not fit its ring is fetched twice where that costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from conftest import opened, small_options
from hub import serve
from support_sets import (
    descriptors,
    kill,
    names,
    number,
    prefetchers_of,
    supervisor_of,
    wait_for_end,
    wait_until,
    write_numbers,
    write_pictures,
)
from support_spill import (
    CHUNK_ROWS,
    EVERY_ROW,
    NUM_ROWS,
    REFETCH,
    foreign,
    labels_of,
    message_of,
    num_fetched,
    opened_small,
    source_bytes,
    told,
)
from torch.utils.data import DataLoader, Dataset

from shmloader import ShmMultimodalDataset

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def pictures_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pictures(tmp_path_factory.mktemp("pictures"), NUM_ROWS, rows_per_chunk=CHUNK_ROWS)


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
    pictures_path: str, caplog: pytest.LogCaptureFixture, spill_bytes: Any, line: str
) -> None:
    with caplog.at_level("INFO", "shmloader"), opened_small(pictures_path, spill_bytes=spill_bytes, log="INFO"):
        assert caplog.text.count(line) == 1


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
            is_other = os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")  # noqa: PTH115  of the deaths, not of chunks
            if is_other or Path(marker).exists():
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
