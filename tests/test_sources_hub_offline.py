"""Datasets of a Hub that cannot be asked: from its local cache, or from what ``datasets`` prepared."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import Hub, serve
from support_hub import IMPATIENT, ask, ask_offline, fill_cache, json_rows, write_json
from support_parquet import run, write_card, write_texts


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve(tmp_path / "hub") as running:
        yield running


def test_snapshot_in_the_cache_is_read_with_the_datasets_name_and_commit(hub, tmp_path):
    write_texts(hub.root / "org" / "texts", ["a", "b"])
    fill_cache(hub, "org/texts", tmp_path)
    found = ask_offline(hub, "org/texts", tmp_path)
    assert [row["text"] for row in found.rows] == ["a", "b"]
    assert (found.mode, found.plan["name"], found.plan["revision"]) == ("local", "org/texts", hub.commit("org/texts"))
    assert "HF_HUB_OFFLINE" in found.told()
    assert hub.commit("org/texts") in found.told()
    assert found.plan["warnings"] == []


@pytest.mark.parametrize("is_iterable", [False, True])
def test_lines_of_json_in_the_cache_are_read_by_a_reader_that_finds_them_there(hub, tmp_path, is_iterable):
    write_json(hub.root / "org" / "lines" / "train.jsonl", 0, 100)
    fill_cache(hub, "org/lines", tmp_path)
    found = ask_offline(hub, "org/lines", tmp_path, is_iterable=is_iterable)
    assert found.mode == "sequential"
    assert found.rows == json_rows(0, 100)
    assert found.plan["revision"] == hub.commit("org/lines")


def test_split_whose_files_the_cache_lacks_is_an_error_that_names_them(hub, tmp_path):
    folder = hub.root / "org" / "texts"
    write_texts(folder, ["a", "b"], name="train-0.parquet")
    write_texts(folder, ["c"], name="train-1.parquet")
    write_texts(folder, ["d"], name="test-0.parquet")
    fill_cache(hub, "org/texts", tmp_path, allow_patterns=["data/train-0.parquet", "data/test-0.parquet"])
    assert [row["text"] for row in ask_offline(hub, "org/texts", tmp_path, split="test").rows] == ["d"]
    found = ask_offline(hub, "org/texts", tmp_path)
    assert found.error["type"] == "SourceError"
    assert found.error["data"]["missing"] == ["data/train-1.parquet"]
    assert "hf download org/texts --repo-type dataset" in found.message


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_split_is_read_though_the_card_names_files_of_others_that_the_cache_lacks(hub, tmp_path, ending):
    folder = hub.root / "org" / "rows"
    for split, first in (("train", 0), ("test", 100)):
        write_json(folder / f"{split}.jsonl", first, 5)
        pq.write_table(pa.Table.from_pylist(json_rows(first, 5)), folder / f"{split}.parquet")
    splits = "".join(f"  - split: {split}\n    path: {split}.{ending}\n" for split in ("train", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n")
    fill_cache(hub, "org/rows", tmp_path, allow_patterns=["README.md", f"train.{ending}"])
    found = ask_offline(hub, "org/rows", tmp_path)
    assert found.rows == json_rows(0, 5)
    lacking = ask_offline(hub, "org/rows", tmp_path, split="test")
    assert lacking.error["data"]["missing"] == [f"test.{ending}"]
    assert ask_offline(hub, "org/rows", tmp_path, split="other").error["data"]["available"] == ["train", "test"]


def test_without_a_listing_a_gap_in_numbered_files_is_an_error(hub, tmp_path):
    folder = hub.root / "org" / "texts"
    for i in range(3):
        write_texts(folder, [f"{i}"], name=f"train-0000{i}-of-00003.parquet")
    fill_cache(hub, "org/texts", tmp_path, allow_patterns=["data/train-0000[02]*"])
    (tree,) = tmp_path.rglob("trees/*.json")
    tree.unlink()
    found = ask_offline(hub, "org/texts", tmp_path)
    assert found.error["data"]["missing"] == ["data/train-00001-of-00003.parquet"]


def test_fewer_rows_in_the_cache_than_the_card_tells_are_an_error(hub, tmp_path):
    folder = hub.root / "org" / "texts"
    write_card(write_texts(folder, ["a", "b"], name="train-0.parquet"), 3)
    write_texts(folder, ["c"], name="train-1.parquet")
    fill_cache(hub, "org/texts", tmp_path, allow_patterns=["README.md", "data/train-0.parquet"])
    (tree,) = tmp_path.rglob("trees/*.json")
    tree.unlink()
    found = ask_offline(hub, "org/texts", tmp_path)
    assert found.error["type"] == "SourceError"
    assert (found.error["data"]["expected_rows"], found.error["data"]["num_rows"]) == (3, 2)


def test_split_of_which_the_cache_has_nothing_says_what_there_is(hub, tmp_path):
    write_texts(hub.root / "org" / "texts", ["a"], name="train-0.parquet")
    write_texts(hub.root / "org" / "texts", ["b"], name="test-0.parquet")
    fill_cache(hub, "org/texts", tmp_path, allow_patterns=["data/train-0.parquet"])
    (tree,) = tmp_path.rglob("trees/*.json")
    tree.unlink()
    found = ask_offline(hub, "org/texts", tmp_path, split="test")
    assert (found.error["type"], found.error["data"]["available"]) == ("SplitNotFoundError", ["train"])
    assert "hf download" in found.message


def test_what_datasets_prepared_of_another_commit_is_taken_only_if_none_is_asked_for(hub, tmp_path):
    write_texts(hub.root / "org" / "texts", ["a", "b"])
    run("import datasets; datasets.load_dataset('org/texts')", [], tmp_path, HF_ENDPOINT=hub.endpoint)
    prepared = hub.commit("org/texts")
    found = ask_offline(hub, "org/texts", tmp_path)
    assert (found.mode, found.plan["revision"]) == ("loaded", prepared)
    assert [row["text"] for row in found.rows] == ["a", "b"]
    asked = ask_offline(hub, "org/texts", tmp_path, load={"revision": "0" * 40})
    assert asked.error["type"] == "SourceError"
    assert "0" * 40 in asked.message


def test_offline_with_empty_caches_says_where_it_looked_and_how_to_fill_them(hub, tmp_path):
    write_texts(hub.root / "org" / "texts", ["a"])
    found = ask_offline(hub, "org/texts", tmp_path)
    assert found.error["type"] == "SourceError"
    for part in ("HF_HUB_OFFLINE", str(tmp_path / "home" / "hub"), "hf download org/texts", "use_streaming=False"):
        assert part in found.message


@pytest.mark.parametrize("has_card", [False, True])
def test_hub_that_cannot_be_reached_is_replaced_by_its_cache_with_a_warning(tmp_path, has_card):
    with serve(tmp_path / "hub") as hub:
        folder = write_texts(hub.root / "org" / "texts", ["a", "b"])
        if has_card:
            write_card(folder, 2)
        fill_cache(hub, "org/texts", tmp_path)
    found = ask(hub, "org/texts", tmp_path, before=IMPATIENT)
    assert [row["text"] for row in found.rows] == ["a", "b"]
    assert "cannot be reached" in found.told("warnings")
    assert hub.commit("org/texts") in found.told("warnings")


def test_dataset_that_the_hub_no_longer_gives_is_what_datasets_prepared_with_a_warning(hub, tmp_path):
    folder = write_texts(hub.root / "org" / "texts", ["a", "b"])
    commit = hub.commit("org/texts")
    run("import datasets; datasets.load_dataset('org/texts')", [], tmp_path, HF_ENDPOINT=hub.endpoint)
    shutil.rmtree(folder)
    found = ask(hub, "org/texts", tmp_path)
    assert [row["text"] for row in found.rows] == ["a", "b"]
    assert (found.mode, found.plan["revision"]) == ("loaded", commit)
    assert "did not give it" in found.told("warnings")


def test_format_of_datasets_with_local_files_needs_no_hub(hub, tmp_path):
    write_json(tmp_path / "rows.jsonl", 0, 10)
    found = ask_offline(hub, "json", tmp_path, load={"data_files": str(tmp_path / "rows.jsonl")})
    assert found.rows == json_rows(0, 10)
    assert found.plan["revision"] is None
