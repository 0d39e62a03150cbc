"""``use_streaming=False``: what is on a Hub is fetched first, and prepared where it has no random access."""

from __future__ import annotations

import csv
import errno
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Hub, serve
from support_hub import ask, ask_offline, json_rows, write_json
from support_parquet import jpeg, write_texts

from shmloader.errors import SourceError
from shmloader.sources import download as downloads
from shmloader.sources import make_plan, open_reader, patience
from shmloader.sources.base import SourceRequest
from shmloader.sources.download import Progress, disk_needed, is_full

FULL = """
import errno, huggingface_hub
def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")
huggingface_hub.hf_hub_download = full
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve(tmp_path / "hub") as running:
        yield running


def test_parquet_is_fetched_once_then_read_locally_and_offline(hub, tmp_path):
    folder = hub.root / "org" / "texts"
    for i in range(6):
        write_texts(folder, [f"{i}"], name=f"train-{i}.parquet")
    write_texts(folder, ["other"], name="test-0.parquet")
    first = ask(hub, "org/texts", tmp_path, is_downloaded=True)
    assert (first.mode, first.plan["revision"]) == ("downloaded", hub.commit("org/texts"))
    assert [row["text"] for row in first.rows] == list("012345")
    fetched = sorted(path.rsplit("/", 1)[1] for _, path, sent in hub.requests if sent and path.endswith(".parquet"))
    assert fetched == [f"train-{i}.parquet" for i in range(6)]  # once each, and no other split's
    hub.reset()
    assert ask(hub, "org/texts", tmp_path, is_downloaded=True).rows == first.rows
    assert hub.num_bytes_of(".parquet") == 0
    assert ask_offline(hub, "org/texts", tmp_path).rows == first.rows
    assert "data/test-0.parquet" in ask_offline(hub, "org/texts", tmp_path, split="test").message


def test_lines_of_json_are_fetched_and_prepared_once(hub, tmp_path):
    write_json(hub.root / "org" / "lines" / "train-0.jsonl", 0, 100)
    write_json(hub.root / "org" / "lines" / "train-1.jsonl", 100, 50)
    first = ask(hub, "org/lines", tmp_path, is_downloaded=True, is_iterable=True)
    assert (first.mode, first.plan["num_rows"], first.plan["revision"]) == ("loaded", 150, hub.commit("org/lines"))
    assert first.rows == json_rows(0, 150)
    assert "prepared as Arrow in" in first.told()
    hub.reset()
    assert ask(hub, "org/lines", tmp_path, is_downloaded=True).rows == first.rows
    assert hub.num_bytes_of(".jsonl") == 0
    assert ask_offline(hub, "org/lines", tmp_path).mode == "loaded"


def test_folder_of_images_is_fetched_once_then_read_locally_and_offline(hub, tmp_path):
    for i in range(6):
        path = hub.root / "org" / "loose" / "train" / ("cat" if i % 2 else "dog") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    first = ask(hub, "org/loose", tmp_path, is_downloaded=True)
    assert (first.mode, first.plan["revision"]) == ("files", hub.commit("org/loose"))
    assert {row["image"]["bytes"]: row["label"] for row in first.rows} == {jpeg(i): (i + 1) % 2 for i in range(6)}
    assert len([1 for _, path, sent in hub.requests if sent and path.endswith(".jpg")]) == 6
    hub.reset()
    assert ask(hub, "org/loose", tmp_path, is_downloaded=True).rows == first.rows
    assert hub.num_bytes == 0
    assert ask_offline(hub, "org/loose", tmp_path).rows == first.rows


def test_local_csv_is_prepared_and_has_random_access(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    (tmp_path / "rows").mkdir()
    with (tmp_path / "rows" / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *((f"text {i}", i) for i in range(150))])
    request = SourceRequest(str(tmp_path / "rows"), "train", is_downloaded=True)
    plan = make_plan(request)
    assert plan.mode == "loaded"
    assert any(str(tmp_path / "prepared") in notice for notice in plan.notices)
    ((first, batch),) = open_reader(request, plan).read(plan.chunks[2])
    assert (first, batch.to_pylist()) == (128, json_rows(128, 22))


def test_card_that_contradicts_what_is_prepared_is_an_error_and_leaves_nothing(hub, tmp_path):
    write_json(hub.root / "org" / "lines" / "train.jsonl", 0, 10)
    (hub.root / "org" / "lines" / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype: int64\n"
        "  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: 11\n---\n"
    )
    found = ask(hub, "org/lines", tmp_path, is_downloaded=True)
    assert found.error["type"] == "SourceError"
    assert "11" in found.message
    assert not list((tmp_path / "home" / "datasets").rglob("*.arrow"))


def test_disk_that_gets_full_is_an_error_with_the_folder_and_what_is_needed(hub, tmp_path):
    folder = write_texts(hub.root / "org" / "texts", ["a"] * 1000)
    num_bytes = (folder / "data" / "train-00000.parquet").stat().st_size
    found = ask(hub, "org/texts", tmp_path, is_downloaded=True, before=FULL)
    assert found.error["type"] == "SourceError"
    assert found.error["data"]["folder"] == str(tmp_path / "home" / "hub")
    assert found.error["data"]["needed_bytes"] == num_bytes
    assert "HF_HOME" in found.message


def test_what_cannot_fit_the_disk_is_not_begun(tmp_path):
    request = SourceRequest("org/texts", "train")
    needed = shutil.disk_usage(tmp_path).total * 2
    with pytest.raises(SourceError, match="are needed") as caught, disk_needed(request, tmp_path, needed, "HF_HOME"):
        raise AssertionError("begun")
    assert caught.value.needed_bytes == needed
    assert caught.value.have_bytes < needed


def test_only_a_full_disk_is_told_as_one():
    assert is_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert is_full(OSError("write failed: No space left on device"))
    assert not is_full(OSError(errno.EIO, "I/O error"))
    assert not is_full(ValueError("No space left on device"))


def test_progress_is_told_with_each_tenth(caplog, monkeypatch):
    from shmloader.sources import download

    monkeypatch.setattr(download, "_LOOK_S", 0.001)
    there = iter([3, 3, 40, 99])
    ended: list[int] = []

    def written() -> int:
        ended.append(next(there, 100))
        return ended[-1]

    with caplog.at_level("INFO", "shmloader.sources"), Progress("it", 100, written):
        while not ended or ended[-1] < 100:
            pass
    assert [record.message for record in caplog.records][:2] == [
        "it: 40 bytes of 100 bytes",
        "it: 99 bytes of 100 bytes",
    ]


def test_folder_of_the_cache_is_not_looked_at_with_each_file(monkeypatch):
    monkeypatch.setattr(downloads, "_LOOK_S", 60.0)
    looks: list[int] = []
    done: list[int] = []

    def written() -> int:
        looks.append(len(done))
        return len(done)

    downloads._at_once([lambda i=i: done.append(i) for i in range(200)], written, 30.0)
    assert sorted(done) == list(range(200))
    assert len(looks) <= 1


class _Files:
    """Of a Hub that tells sizes, and gives no file."""

    def __init__(self, request: SourceRequest) -> None:
        pass

    def size(self, path: str) -> int:
        return 10


def test_listing_that_is_remembered_is_given_up_as_a_download_is(monkeypatch):
    released = threading.Event()

    def stalls(*_: object) -> None:
        assert released.wait(10), "it is waited for"

    monkeypatch.setattr(downloads, "_LOOK_S", 0.01)
    monkeypatch.setattr(downloads, "STALL_S", 0.1)
    monkeypatch.setattr(downloads, "HubFiles", _Files)
    monkeypatch.setattr(downloads, "remember_files", stalls)
    request = SourceRequest("org/texts", "train", source_timeout_s=0.1)
    try:
        with pytest.raises(SourceError, match="the download was given up: nothing came") as caught:
            downloads.download(request, [f"hf://datasets/org/texts@{'0' * 40}/data/train.parquet"])
        assert "endpoint" in caught.value.data
    finally:
        released.set()


def test_download_goes_on_while_something_comes_though_no_file_grows(monkeypatch):
    ended = threading.Event()
    looks: list[float] = []

    def last_came() -> float:
        looks.append(time.monotonic())
        if len(looks) == 40:  # for longer than the watch would wait for nothing
            ended.set()
        return looks[-1]

    monkeypatch.setattr(downloads, "_LOOK_S", 0.01)
    monkeypatch.setattr(downloads, "STALL_S", 0.1)
    monkeypatch.setattr(downloads, "last_came", last_came)
    downloads._at_once([lambda: ended.wait(60) and None], lambda: 0, 0.1)
    assert len(looks) >= 40


def test_what_comes_to_the_client_is_noted():
    found = patience.Patience(30.0, clock=lambda: 7.0)
    assert found.came_at == float("-inf")
    found.attempts("hub", "GET /it").came(1, is_kept=False)
    assert found.came_at == 7.0


def test_malformed_file_that_is_prepared_is_an_error_that_names_it(hub, tmp_path):
    write_json(hub.root / "org" / "lines" / "train-0.jsonl", 0, 10)
    path = hub.root / "org" / "lines" / "train-1.jsonl"
    path.write_text(json.dumps({"text": "x", "label": 1}) + '\n{"text": \n')
    found = ask(hub, "org/lines", tmp_path, is_downloaded=True)
    assert found.error["type"] == "ReadError"
    assert "train-1.jsonl" in found.message
