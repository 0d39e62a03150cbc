"""Several datasets in one set: its rows, batches, errors and names, through whole sets."""

from __future__ import annotations

import os
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import opened
from datasets import Dataset
from support_sets import png, wait_until, write_pictures
from support_several import (
    CONFIG,
    MEDIA,
    bytes_of,
    check_batch,
    check_sample,
    write_classes,
    write_clips,
    write_rows,
    write_stories,
)
from torch.utils.data import DataLoader

from shmloader import Options, ShmMultimodalIterableDataset
from shmloader.errors import DecodeError, SourceError
from shmloader.sources import make_plan
from shmloader.sources.base import SourceRequest

NUM = {"classes": 20, "stories": 50, "clips": 30}
TOTAL = sum(NUM.values())


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three datasets, in the order of `NUM`."""
    root = tmp_path_factory.mktemp("several")
    writers = {"classes": write_classes, "stories": write_stories, "clips": write_clips}
    return {kind: writers[kind](root / kind, num) for kind, num in NUM.items()}


def place(index: int, paths: dict[str, str]) -> tuple[str, int, str]:
    """(kind, row, source) of a sample of the whole."""
    for kind, num in NUM.items():
        if index < num:
            return kind, index, paths[kind]
        index -= num
    raise IndexError


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_sample_comes_once_with_exactly_what_its_own_dataset_has(paths, num_workers):
    with opened(list(paths.values()), config=CONFIG) as dataset:
        assert len(dataset) == TOTAL
        for index in (0, 19, 20, 69, 70, 99, -1):
            check_sample(dataset[index], *place(index % TOTAL, paths))
        seen = []
        loader = DataLoader(dataset, batch_size=9, num_workers=num_workers, sampler=dataset.sampler(seed=3))
        order = loader.sampler.order(0).rows(0, TOTAL).tolist()
        for batch in loader:
            indices = order[len(seen) : len(seen) + len(batch["source"])]
            check_batch(batch, [place(index, paths) for index in indices])
            seen += indices
        assert sorted(seen) == list(range(TOTAL))


def test_what_was_opened_is_told_of_each(paths):
    with opened(list(paths.values()), config=CONFIG) as dataset:
        assert dataset.name == " + ".join(paths.values())
        assert [source["name"] for source in dataset.sources] == list(paths.values())
        assert [source["rows"] for source in dataset.sources] == list(NUM.values())
        assert {source["mode"] for source in dataset.sources} == {"local"}
        assert [source["why"] for source in dataset.sources] == [None] * 3
        assert dataset.columns[paths["clips"]] == {"text": "text", "audio": "audio"}
        assert f"rows={TOTAL}" in repr(dataset)


def test_a_prefetcher_that_dies_leaves_no_gap_in_a_mixed_set(paths):
    options = Options(ring_bytes="96KiB", in_flight=16, ahead=16, prefetchers=2)
    with opened(list(paths.values()), config=CONFIG, options=options) as dataset:
        loader = DataLoader(dataset, batch_size=10, num_workers=2, sampler=dataset.sampler(seed=5))
        order = loader.sampler.order(0).rows(0, TOTAL).tolist()
        for number, batch in enumerate(loader):
            check_batch(batch, [place(index, paths) for index in order[10 * number : 10 * number + 10]])
            if number in (1, 4):
                restarts = dataset.stats().restarts
                os.kill(dataset.stats().service_pids[-1], signal.SIGKILL)
                wait_until(lambda before=restarts: dataset.stats().restarts > before)


def test_a_row_that_cannot_be_read_is_told_by_its_place_in_its_own_dataset(paths, tmp_path):
    bad = write_pictures(tmp_path / "bad", 30, bad=[17])
    with opened([paths["stories"], bad], config=CONFIG) as dataset:
        check_sample(dataset[NUM["stories"] + 16], "classes", 16, bad)
        with pytest.raises(DecodeError, match=f"row 17 of '{bad}'") as caught:
            dataset[NUM["stories"] + 17]
        told = caught.value.data
        assert (told["source"], told["row"], told["index"]) == (bad, 17, NUM["stories"] + 17)


def test_datasets_of_one_name_are_told_apart_and_a_process_takes_the_rows_of_each():
    texts = [Dataset.from_dict({"text": [f"{name}{row}" for row in range(5)]}) for name in "ab"]
    with opened(texts) as dataset:
        assert [sample["source"] for sample in dataset] == ["Dataset"] * 5 + ["Dataset (2)"] * 5
        assert bytes_of(dataset[7]["text"]) == "b2"
    with opened(texts, process=lambda row: {"length": len(row["text"]), "word": row["text"]}) as dataset:
        batch = next(iter(DataLoader(dataset, batch_size=10)))
        assert batch["word"] == [f"{name}{row}" for name in "ab" for row in range(5)]
        assert batch["source"] == ["Dataset"] * 5 + ["Dataset (2)"] * 5


@pytest.mark.parametrize("how", ["as they are", "transformed", "copied"])
def test_samples_without_a_class_have_none_in_a_batch_however_it_is_made(tmp_path, how):
    """-100, which losses leave out: 0 would be a class."""
    labelled = write_classes(tmp_path / "labelled", 6)
    pictures = pa.array([{"bytes": png(row), "path": None} for row in range(6)], MEDIA)
    bare = write_rows(tmp_path / "bare", {"image": pictures}, {"image": {"_type": "Image"}})
    transform = (lambda sample: sample) if how == "transformed" else None
    with opened([labelled, bare], config=CONFIG, transform=transform) as dataset:
        samples = [dataset[index] for index in (5, 6, 11, 0)]
        if how == "copied":
            samples = [{**sample} for sample in samples]
        batch = dataset.collate(samples)
        assert batch["labels"].tolist() == [5, -100, -100, 0]
        assert batch["labels_mask"].tolist() == [True, False, False, True]
        assert dataset.collate(samples[1:3])["labels"].tolist() == [-100, -100]


def test_splits_whose_columns_are_of_other_types_are_read_side_by_side(tmp_path):
    for split, kind in (("train", pa.int64()), ("test", pa.int32())):
        columns = {"text": [f"{split} {row}" for row in range(60)], "label": pa.array(range(60), kind)}
        pq.write_table(pa.table(columns), tmp_path / f"{split}-00000-of-00001.parquet", row_group_size=16)
    with opened(str(tmp_path), split="train+test", columns={"text": "text", "labels": "label"}) as dataset:
        rows = list(range(0, 120, 7))
        assert [int(sample["labels"]) for sample in dataset.__getitems__(rows)] == [row % 60 for row in rows]


def test_plain_dicts_of_a_mixed_set_are_batched_as_its_samples_are(paths):
    with opened(list(paths.values()), config=CONFIG) as dataset:
        indices = [3, 25, 80, 66]
        batch = dataset.collate([{**dataset[index]} for index in indices])
        check_batch(batch, [place(index, paths) for index in indices])
        changed = dataset.collate([{**dataset[index], "weight": 0.5} for index in indices])
        assert changed.pop("weight").tolist() == [0.5] * 4
        check_batch(changed, [place(index, paths) for index in indices])


def test_an_iterable_of_several_has_the_rows_of_each_one_after_the_other(paths):
    with ShmMultimodalIterableDataset(
        config=CONFIG, dataset_name=list(paths.values()), max_samples=40, options=Options(prefetchers=2)
    ) as dataset:
        for index, sample in enumerate(dataset):
            check_sample(sample, *place(index, paths))
        assert index == 39
        assert [source["rows"] for source in dataset.sources] == [20, 20, 0]


def test_a_stream_without_a_length_beside_others_is_an_error_that_says_what_to_do(paths):
    stream = Dataset.from_dict({"text": ["a"]}).to_iterable_dataset().filter(lambda row: True)
    requests = [SourceRequest(name, "train", is_iterable=True) for name in (paths["stories"], stream)]
    with pytest.raises(SourceError, match="iterate over it alone"):
        make_plan(*requests)
