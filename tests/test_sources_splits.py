"""Slices and sums of splits are the rows that ``datasets`` gives for the same expression, of every kind of source."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset

from shmloader.errors import EmptyDatasetError, OptionError, SourceError, SplitNotFoundError
from shmloader.prefetch.plan import SetPlan
from shmloader.sources import make_plan, open_reader, parquet_plan
from shmloader.sources.base import Chunk, SourcePlan, SourceRequest

ROWS = {"train": 150, "test": 33}
EXPRESSIONS = (
    "train[:95%]",
    "train[95%:]",
    "train[10:20]",
    "train+test",
    "train[-5%:]",
    "test[:-5]+train[33%:66%]",
    "train[:7%](pct1_dropremainder)",
    "train[70:]+train[:70]",
    "test[:1_000]",
    "all",
)


def texts(split: str) -> list[str]:
    return [f"{split} {row}" for row in range(ROWS[split])]


def write_parquet(root: Path) -> str:
    for split in ROWS:
        pq.write_table(pa.table({"text": texts(split)}), root / f"{split}.parquet", row_group_size=40)
    return str(root)


def write_json(root: Path) -> str:
    for split in ROWS:
        (root / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(split)))
    return str(root)


def write_files(root: Path) -> str:
    for split in ROWS:
        (root / split).mkdir(parents=True)
        with (root / split / "metadata.csv").open("w") as file:
            out = csv.writer(file)
            out.writerow(["file_name", "text"])
            for row, text in enumerate(texts(split)):
                (root / split / f"{row:03}.png").write_bytes(text.encode())
                out.writerow([f"{row:03}.png", text])
    return str(root)


def loaded(root: Path) -> Any:
    return DatasetDict({split: Dataset.from_dict({"text": texts(split)}) for split in ROWS})


def saved(root: Path) -> str:
    loaded(root).save_to_disk(str(root / "saved"))
    return str(root / "saved")


def streamed(root: Path) -> Any:
    splits = loaded(root)
    return IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})


KINDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "parquet": (write_parquet, "local"),
    "json": (write_json, "sequential"),
    "files": (write_files, "files"),
    "loaded": (loaded, "loaded"),
    "saved": (saved, "loaded"),
    "streamed": (streamed, "sequential"),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The dataset of a kind, made once."""
    made: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in made:
            made[kind] = KINDS[kind][0](tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """The texts that ``datasets`` gives for an expression."""
    path, cache = write_parquet(tmp_path_factory.mktemp("wanted")), str(tmp_path_factory.mktemp("cache"))
    return functools.cache(lambda split: list(load_dataset(path, split=split, cache_dir=cache)["text"]))


def read(request: SourceRequest, plan: SourcePlan, chunks: Any = None) -> list[str]:
    """The texts of the plan's chunks, which come in the order that is asked for and tell their rows."""
    reader: Any = open_reader(request, plan)
    found: dict[int, str] = {}
    for chunk in plan.chunks if chunks is None else chunks:
        row = chunk.first_row
        for first, batch in reader.read(chunk):
            assert first == row
            found |= dict(enumerate(batch.column("text").to_pylist(), row))
            row += batch.num_rows
        assert row == chunk.first_row + chunk.num_rows
    reader.close()
    return [found[row] for row in sorted(found)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", EXPRESSIONS)
def test_rows_are_those_of_datasets_also_after_a_journey_and_in_any_order(kind, split, given, wanted):
    request = SourceRequest(given(kind), split, columns={"text": "text"})
    made = make_plan(request)
    plan = SourcePlan.from_json(made.to_json(), made.listings())
    assert plan == made
    assert (plan.split, plan.mode, plan.num_rows) == (split, KINDS[kind][1], len(wanted(split)))
    assert read(request, plan) == wanted(split)
    shuffled = np.random.default_rng(1).permutation(len(plan.chunks))
    assert read(request, plan, [plan.chunks[i] for i in shuffled]) == wanted(split)
    for row in range(plan.num_rows or 0):
        leaf, number = plan.origin(row)
        assert f"{leaf.split} {number}" == wanted(split)[row] or kind in ("loaded", "saved", "streamed")


def test_a_slice_begins_in_the_middle_of_a_row_group_that_is_read_front_to_back(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_plan, "KEPT_TABLE_BYTES", 200)
    request = SourceRequest(write_parquet(tmp_path), "train[25:110]")
    plan = make_plan(request)
    assert len(plan.chunks) == 8
    assert len(set(plan.units)) == 3  # of row groups of 40 rows
    assert all(unit <= at for at, unit in enumerate(plan.units))
    assert read(request, plan) == texts("train")[25:110]


def test_what_a_row_is_called_is_its_place_in_the_whole_split(tmp_path):
    request = SourceRequest(write_parquet(tmp_path), "train[95%:]+test")
    plan = SetPlan(make_plan(request), None, 1 << 20)
    told = plan.origin(3)
    assert (told["source"], told["row"], told["index"]) == (str(tmp_path), 145, 3)
    assert told["shard"].endswith("train.parquet")
    assert "row 145" in plan.describe(3)
    assert "split 'train'" in plan.describe(3)
    assert plan.origin(9)["row"] == 1
    assert plan.origin(9)["shard"].endswith("test.parquet")


@pytest.mark.parametrize(
    ("split", "error", "told"),
    [
        ("train[:0]", EmptyDatasetError, "has no rows"),
        ("train[140:130]", EmptyDatasetError, "has no rows"),
        ("trian[:10]", SplitNotFoundError, "no split 'trian'; it has 'train', 'test'"),
        ("train+trian", SplitNotFoundError, "no split 'trian'"),
        ("train[1:2:3]", OptionError, "is not valid"),
        ("train[:x]", OptionError, "is not valid"),
        ("train[:50%", OptionError, "is not valid"),
        ("test[:50%](pct1_dropremainder)", OptionError, "less than 100"),
        ("train[:50%](up)", OptionError, "is not valid"),
    ],
)
def test_an_expression_that_stands_for_nothing_is_an_error_that_says_so(tmp_path, split, error, told):
    with pytest.raises(error, match=told):
        make_plan(SourceRequest(write_parquet(tmp_path), split))


FRONTS = {"train[:70]": slice(70), "train[100:]": slice(100, None), "train[5:9]": slice(5, 9)}


@pytest.mark.parametrize("split", FRONTS)
def test_of_a_stream_without_a_length_a_slice_counts_from_the_front(given, split):
    request = SourceRequest(given("streamed"), split, is_iterable=True)
    plan = make_plan(request)
    assert plan.is_open
    reader: Any = open_reader(request, plan)
    chunk = Chunk(0, 1000, 0, (0, 0, 0))
    batches = [batch for _, batch in reader.read(chunk, lambda row: True)]
    found = [text for batch in batches for text in batch.column("text").to_pylist()]
    reader.close()
    assert found == texts("train")[FRONTS[split]]


@pytest.mark.parametrize("split", ["train[:50%]", "train[-5:]", "train+test"])
def test_of_a_stream_without_a_length_what_needs_one_is_an_error(given, split):
    with pytest.raises(SourceError, match="nobody knows how many rows"):
        make_plan(SourceRequest(given("streamed"), split, is_iterable=True))


def test_a_split_that_is_called_like_an_expression_is_taken_by_its_name():
    splits = {"train[:1]": Dataset.from_dict({"text": ["a", "b"]})}
    assert make_plan(SourceRequest(DatasetDict(splits), "train[:1]")).num_rows == 2


def test_a_loaded_split_is_sliced_as_well():
    request = SourceRequest(Dataset.from_dict({"text": texts("train")}), "train[:10]")
    plan = make_plan(request)
    assert read(request, plan) == texts("train")[:10]
