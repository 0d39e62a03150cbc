"""The Parquet copy that a Hub makes of a dataset."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import Hub, serve
from support_hub import ask, ask_offline, json_rows, write_json


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve(tmp_path / "hub") as running:
        yield running


def write_copy(folder: Path, num: int, columns: tuple[str, ...] = ("text", "label")) -> None:
    """Two Parquet files of the rows of `json_rows`."""
    folder.mkdir(parents=True)
    rows = json_rows(0, num)
    for i, part in enumerate((rows[: num // 2], rows[num // 2 :])):
        pq.write_table(pa.Table.from_pylist(part).select(list(columns)), folder / f"{i:04}.parquet")


def write_lines(hub: Hub, num: int = 100) -> Path:
    """A dataset of lines of JSON, older than whatever copy a test makes of it."""
    path = hub.root / "org" / "lines" / "train.jsonl"
    write_json(path, 0, num)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return path


def write_script(hub: Hub) -> None:
    """A dataset that is a loading script."""
    path = hub.root / "org" / "script" / "script.py"
    path.parent.mkdir(parents=True)
    path.write_text("raise SystemExit('never run')\n")


def test_copy_is_read_where_no_card_tells_the_number_of_rows(hub, tmp_path):
    write_lines(hub)
    write_copy(hub.copy("org/lines") / "default" / "train", 100)
    found = ask(hub, "org/lines", tmp_path)
    commit = hub.commit("org/lines", "refs/convert/parquet")
    assert (found.mode, found.plan["num_rows"], found.plan["revision"]) == ("streaming", 100, commit)
    assert found.rows == json_rows(0, 100)
    assert "refs/convert/parquet" in found.told()
    assert commit in found.told()
    assert hub.num_bytes_of(".jsonl") == 0


def test_card_that_tells_the_number_of_rows_leaves_it_a_stream(hub, tmp_path):
    path = write_lines(hub)
    write_copy(hub.copy("org/lines") / "default" / "train", 100)
    features = "features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype: int64\n"
    splits = "  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: 100\n"
    path.with_name("README.md").write_text(f"---\ndataset_info:\n  {features}{splits}---\n")
    found = ask(hub, "org/lines", tmp_path)
    assert (found.mode, found.plan["num_rows"]) == ("sequential", 100)
    assert found.rows == json_rows(0, 100)


def test_iterable_request_stays_a_stream_of_the_datasets_own_files(hub, tmp_path):
    write_lines(hub)
    write_copy(hub.copy("org/lines") / "default" / "train", 100)
    found = ask(hub, "org/lines", tmp_path, is_iterable=True)
    assert (found.mode, found.plan["num_rows"]) == ("sequential", None)
    assert found.rows == json_rows(0, 100)


@pytest.mark.parametrize(
    "why", ["no Parquet copy", "no (complete)", "lacks the columns", "were changed after", "other rows"]
)
def test_copy_that_is_not_of_the_same_rows_is_not_used_but_the_files_prepared(hub, tmp_path, why):
    path = write_lines(hub)
    copy, load = hub.copy("org/lines"), {}
    if why == "no (complete)":
        write_copy(copy / "default" / "partial-train", 50)
    elif why == "lacks the columns":
        write_copy(copy / "default" / "train", 100, ("text",))
        features = "features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype: int64\n"
        path.with_name("README.md").write_text(f"---\ndataset_info:\n  {features}---\n")
    elif why == "were changed after":
        write_copy(copy / "default" / "train", 50)
        for file in copy.rglob("*.parquet"):
            os.utime(file, (1_600_000_000, 1_600_000_000))
    elif why == "other rows":
        write_copy(copy / "default" / "train", 50)
        load = {"data_files": "train.jsonl"}
    found = ask(hub, "org/lines", tmp_path, load=load)
    assert found.mode == "loaded"
    assert found.rows == json_rows(0, 100)
    assert why in found.told()
    assert "ShmMultimodalIterableDataset" in found.told()


@pytest.mark.parametrize("is_iterable", [False, True])
def test_loading_script_is_replaced_by_the_copy(hub, tmp_path, is_iterable):
    write_script(hub)
    write_copy(hub.copy("org/script") / "plain" / "train", 10)
    found = ask(hub, "org/script", tmp_path, is_iterable=is_iterable)
    assert (found.mode, found.rows) == ("streaming", json_rows(0, 10))
    assert "loading script" in found.told()
    assert found.plan["name"] == "org/script"


def test_copy_of_a_loading_script_that_was_fetched_is_read_offline(hub, tmp_path):
    write_script(hub)
    write_copy(hub.copy("org/script") / "default" / "train", 10)
    write_copy(hub.copy("org/script") / "german" / "train", 4)
    first = ask(hub, "org/script", tmp_path, is_downloaded=True)
    assert (first.mode, first.rows) == ("downloaded", json_rows(0, 10))
    found = ask_offline(hub, "org/script", tmp_path)
    assert (found.rows, found.plan["revision"]) == (first.rows, hub.commit("org/script", "refs/convert/parquet"))


def test_copy_of_which_the_cache_has_a_part_is_an_error_offline_that_names_what_is_missing(hub, tmp_path):
    write_script(hub)
    write_copy(hub.copy("org/script") / "default" / "train", 10)
    assert ask(hub, "org/script", tmp_path, is_downloaded=True).rows == json_rows(0, 10)
    (last,) = tmp_path.rglob("snapshots/*/default/train/0001.parquet")
    last.unlink()
    found = ask_offline(hub, "org/script", tmp_path)
    assert found.rows == []
    assert "default/train/0001.parquet is missing" in found.error["message"]


def test_configuration_of_a_loading_script_must_be_named_if_there_are_several(hub, tmp_path):
    write_script(hub)
    write_copy(hub.copy("org/script") / "german" / "train", 4)
    write_copy(hub.copy("org/script") / "english" / "train", 6)
    assert ask(hub, "org/script", tmp_path).error["data"]["available"] == ["english", "german"]
    assert ask(hub, "org/script", tmp_path, load={"name": "german"}).rows == json_rows(0, 4)


@pytest.mark.parametrize("is_partial", [False, True])
def test_loading_script_without_a_whole_copy_is_an_error_that_says_so(hub, tmp_path, is_partial):
    write_script(hub)
    if is_partial:
        write_copy(hub.copy("org/script") / "default" / "partial-train", 10)
    found = ask(hub, "org/script", tmp_path)
    assert found.error["type"] == "SourceError"
    assert "loading script" in found.message
    assert ("not complete" if is_partial else "no Parquet copy") in found.message
