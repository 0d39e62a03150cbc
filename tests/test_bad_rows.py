"""Bad rows: what stands in for them, and that nothing but the data decides it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import opened
from support_bad_rows import RINGS, fails_at, options
from support_sets import kill, number, png, prefetchers_of, wait_until, write_numbers, write_pictures, write_table
from torch.utils.data import DataLoader

from shmloader import MultimodalConfig, Options, ShmMultimodalDataset, ShmMultimodalIterableDataset, reader
from shmloader.errors import DecodeError, OptionError, ReadError, TooManyBadRowsError

ROWS = 96
#: Of `ROWS` rows: alone, side by side, the last one.
BAD = (5, 20, 21, 22, 50, 95)
PICTURES = MultimodalConfig(vision_dim=32, image_dtype="uint8")


def instead_of(row: int, bad: Any = BAD, rows: int = ROWS) -> int:
    """The row that stands in for ``row``: itself if it is good."""
    while row in bad:
        row = (row + 1) % rows
    return row


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "d", ROWS, bad=BAD)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_numbers(tmp_path_factory.mktemp("numbers") / "d", ROWS)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The warning of the first bad row has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* has a bad row, in whose place")
        yield


def labels_of(loader: Any) -> list[int]:
    return [label for batch in loader for label in batch["labels"].tolist()]


# ---- skip ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_good_row_takes_the_place_of_a_bad_one(pictures, ring, workers):
    expected = [instead_of(row) for row in range(ROWS)]
    with opened(pictures, config=PICTURES, on_error="skip", max_bad=0.1, options=options(ring)) as dataset:
        assert (dataset.stats().transit_bytes > 0) == (ring != "fits")
        assert len(dataset) == ROWS
        loader = DataLoader(dataset, batch_size=8, num_workers=workers)
        for _ in range(2):
            assert labels_of(loader) == expected
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3)).tolist()
        shuffled = DataLoader(dataset, batch_size=8, num_workers=workers, sampler=order)
        assert labels_of(shuffled) == [expected[row] for row in order]
        sampler = dataset.sampler(seed=1)
        rows = list(sampler)
        known = DataLoader(dataset, batch_size=8, num_workers=workers, sampler=rows)
        assert labels_of(known) == [expected[row] for row in rows]
        assert dataset[5]["image"].equal(dataset[6]["image"])


def test_a_stand_in_is_gathered_as_any_other_sample_is(pictures):
    with opened(pictures, config=PICTURES, on_error="skip", max_bad=0.1, options=options()) as dataset:
        samples = dataset.__getitems__(list(range(16)))
        assert all(sample.is_untouched() for sample in samples)
        batch = dataset.collate(samples)
        assert batch["labels"].tolist() == [instead_of(row) for row in range(16)]
        assert batch["source"] == [dataset.name] * 16


def test_which_row_stands_in_depends_on_the_data_alone(numbers):
    bad = sorted(random.Random(7).sample(range(ROWS), 30))
    found = set()
    for ring, prefetchers, order in (("fits", 1, 1), ("fits", 3, -1), ("does not fit", 2, -1)):
        arguments = {"process": fails_at(*bad), "options": options(ring, prefetchers=prefetchers)}
        with opened(numbers, on_error="skip", max_bad=1.0, **arguments) as dataset:
            rows = list(range(ROWS))[::order]
            values = {row: dataset[row]["number"].item() for row in rows}
            found.add(tuple(values[row] for row in range(ROWS)))
    assert found == {tuple(instead_of(row, bad) for row in range(ROWS))}


def test_a_text_that_is_null_is_a_bad_row(tmp_path):
    column = ["a", None, "c", None]
    name = write_table(tmp_path / "d", {"text": column * 4})
    bad = [row for row in range(16) if column[row % 4] is None]
    with opened(name, on_error="skip", max_bad=1.0, options=options()) as dataset:
        texts = [bytes(dataset[row]["text"].tolist()).decode() for row in range(16)]
    assert texts == [column[instead_of(row, bad, 16) % 4] for row in range(16)]


def tear(name: str, row_group: int) -> None:
    """Overwrite the pages of a row group with noise."""
    path = Path(name) / "train-00000-of-00001.parquet"
    column = pq.ParquetFile(path).metadata.row_group(row_group).column(0)
    begin = column.dictionary_page_offset or column.data_page_offset
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(b"\xff" * column.total_compressed_size)


@pytest.mark.parametrize("ring", RINGS)
def test_a_row_group_that_cannot_be_read_is_stepped_over(tmp_path, ring):
    name = write_numbers(tmp_path / "d", ROWS)
    tear(name, 1)
    arguments = {"process": number, "options": options(ring), "max_bad": 0.2}
    with opened(name, on_error="skip", **arguments) as dataset:
        values = [value for batch in DataLoader(dataset, batch_size=8) for value in batch["number"].tolist()]
        assert values == [*range(16), *range(32, 48), *range(32, ROWS)]
        (bad,) = dataset.quarantine
        assert (bad["row"], bad["num_rows"], bad["error"]) == (16, 16, "ReadError")
        assert bad["shard"].endswith(".parquet")


@pytest.mark.parametrize(("ring", "on_error"), [("fits", "synthetic"), ("does not fit", "skip")])
def test_an_iterable_dataset_of_known_length_yields_the_same(pictures, ring, on_error):
    expected = [instead_of(row) for row in range(ROWS)]
    arguments = {"config": PICTURES, "on_error": on_error, "max_bad": 0.1, "options": options(ring)}
    with opened(pictures, ShmMultimodalIterableDataset, **arguments) as dataset:
        loader = DataLoader(dataset, batch_size=4, num_workers=2)
        assert sorted(labels_of(loader)) == sorted(expected)
        samples = list(dataset)
        assert [sample["labels"].item() for sample in samples] == expected
        made = [i for i, sample in enumerate(samples) if sample["source"] != dataset.name]
        assert made == ([] if on_error == "skip" else list(BAD))


def test_a_kill_of_the_prefetchers_changes_nothing(numbers, tmp_path):
    bad = (3, 40, 41, 80)
    arguments = {"process": fails_at(*bad), "options": options("does not fit")}
    with opened(numbers, on_error="skip", max_bad=0.1, **arguments) as dataset:
        values = []
        for row in range(ROWS):
            values.append(dataset[row]["number"].item())
            if row in (4, 40, 60):
                kill(*prefetchers_of(dataset))
        assert values == [instead_of(row, bad) for row in range(ROWS)]
        assert [entry["row"] for entry in dataset.quarantine] == list(bad)


# ---- synthetic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_made_up_sample_takes_the_place_of_a_bad_one_and_says_so(pictures, workers):
    arguments = {"config": MultimodalConfig(vision_dim=8), "on_error": "synthetic", "max_bad": 0.1}
    with opened(pictures, **arguments, options=options()) as dataset:
        batches = list(DataLoader(dataset, batch_size=8, num_workers=workers))
        for first, batch in zip(range(0, ROWS, 8), batches, strict=True):
            rows = range(first, first + 8)
            names = [f"{dataset.name} (synthetic)" if row in BAD else dataset.name for row in rows]
            assert batch["source"] == names
            assert (batch["image"].dtype, batch["image"].shape) == (torch.float32, (8, 3, 8, 8))
            assert batch["labels"].dtype == torch.int64
            for label, row in zip(batch["labels"].tolist(), rows, strict=True):
                assert label == instead_of(row)  # of no known class, so that of the sample that it is like
        again = dataset[5]
        assert again["source"] == f"{dataset.name} (synthetic)"
        assert again["image"].equal(batches[0]["image"][5])


def test_a_made_up_text_has_ids_of_the_vocabulary_and_labels_that_are_its_tokens(tmp_path):
    name = write_table(tmp_path / "d", {"text": ["abc def", None, "the text behind it", "x"] * 4})
    with opened(name, on_error="synthetic", max_bad=1.0, options=options()) as dataset:
        sample = dataset[1]
        assert sorted(sample["text"].tolist()) == sorted(b"the text behind it")
        assert sample["labels"].equal(sample["text"])
        assert not sample["text"].equal(dataset[2]["text"])
        batch = dataset[[0, 1, 2, 3]]
        assert batch["text"].shape == (4, 18)
        assert batch["labels"][0].tolist() == [*b"abc def", *[-100] * 11]
        assert batch["attention_mask"].sum(1).tolist() == [7, 18, 18, 1]


def test_a_made_up_class_is_one_of_those_there_are(tmp_path):
    import datasets

    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list("abc")))
    images = [{"bytes": b"no" if i % 2 else png(i), "path": None} for i in range(40)]
    made = datasets.Dataset.from_dict({"image": images, "label": [0] * 40}, features=features)
    (tmp_path / "a").mkdir()
    made.to_parquet(tmp_path / "a" / "train.parquet")
    text = write_table(tmp_path / "b", {"text": ["of tokens"] * 4})
    one = str(tmp_path / "a")
    for name, keys, labels in ((one, {}, "labels"), (one, {"labels": "y"}, "y"), ([one, text], {}, "labels")):
        arguments = {"config": PICTURES, "keys": keys, "on_error": "synthetic", "max_bad": 1.0}
        with opened(name, **arguments, options=options()) as dataset:
            found = [int(sample[labels]) for sample in dataset.__getitems__(list(range(40)))]
        assert found[::2] == [0] * 20
        assert set(found[1::2]) == {0, 1, 2}


def test_transform_gets_a_made_up_sample_as_any_other(pictures):
    seen = []

    def transform(sample: dict[str, Any]) -> dict[str, Any]:
        seen.append(sample["source"])
        return {"x": sample["image"].float().mean()}

    arguments = {"config": PICTURES, "on_error": "synthetic", "max_bad": 0.1, "transform": transform}
    with opened(pictures, **arguments, options=options()) as dataset:
        assert dataset[[4, 5]]["x"].shape == (2,)
        assert seen == [dataset.name, f"{dataset.name} (synthetic)"]


# ---- raise, and what is no bad row ------------------------------------------------------------------------------


def test_by_default_a_bad_row_raises_and_is_listed(pictures):
    with opened(pictures, config=PICTURES, options=options()) as dataset:
        with pytest.raises(DecodeError, match="row 20 of"):
            dataset[[19, 20]]
        assert 20 in [entry["row"] for entry in dataset.quarantine]


@pytest.mark.parametrize("on_error", ["skip", "synthetic"])
def test_what_transform_raises_is_raised(numbers, on_error):
    def transform(sample: dict[str, Any]) -> dict[str, Any]:
        raise KeyError("mine")

    arguments = {"process": number, "transform": transform, "options": options()}
    with opened(numbers, on_error=on_error, **arguments) as dataset:
        with pytest.raises(KeyError, match="mine"):
            dataset[0]
        assert dataset.quarantine == []


def test_a_row_that_kills_is_a_bad_row(numbers):
    def process(row: dict[str, Any]) -> dict[str, Any]:
        import os

        if row["number"] == 30:
            os._exit(3)
        return {"number": row["number"]}

    with opened(numbers, process=process, on_error="skip", options=options()) as dataset:
        assert dataset[[29, 30, 31]]["number"].tolist() == [29, 31, 31]
        (bad,) = dataset.quarantine
        assert (bad["row"], bad["error"]) == (30, "ServiceError")


@pytest.mark.parametrize("kind", [ShmMultimodalDataset, ShmMultimodalIterableDataset])
def test_a_row_that_makes_more_than_the_ring_holds_is_a_bad_row(numbers, kind):
    def process(row: dict[str, Any]) -> dict[str, Any]:
        return {"number": row["number"], "room": np.zeros((9 << 20) if row["number"] == 30 else 4, np.uint8)}

    small = Options(ring_bytes="8MiB", prefetchers=1, timeout_s=30)
    with opened(numbers, kind, process=process, on_error="skip", options=small) as dataset:
        values = [int(sample["number"]) for sample in dataset]
        assert values == [instead_of(row, [30]) for row in range(ROWS)]
        (bad,) = dataset.quarantine
        assert (bad["row"], bad["num_rows"], bad["error"]) == (30, 1, "RecordTooLargeError")


# ---- the list -------------------------------------------------------------------------------------------------


def test_quarantine_lists_source_shard_row_field_and_error(pictures):
    with opened(pictures, config=PICTURES, on_error="skip", max_bad=0.1, options=options()) as dataset:
        dataset[list(range(ROWS))]
        found = dataset.quarantine
        assert [entry["row"] for entry in found] == list(BAD)
        first = found[0]
        assert (first["source"], first["num_rows"], first["field"], first["error"]) == (
            dataset.name, 1, "image", "DecodeError",
        )  # fmt: skip
        assert first["shard"].endswith("train-00000-of-00001.parquet")
        assert "row 5 of" in first["message"]


def test_quarantine_has_what_prefetchers_find_though_nobody_asked_for_it(pictures):
    with opened(pictures, config=PICTURES, on_error="skip", max_bad=0.0, options=options()) as dataset:
        assert wait_until(lambda: len(dataset.quarantine) == len(BAD))
        assert dataset[0]["labels"].item() == 0  # no reader has met one, so there are not too many


def test_workers_and_the_process_that_made_the_set_have_one_list(pictures):
    arguments = {"config": PICTURES, "on_error": "skip", "max_bad": 0.1}
    with opened(pictures, **arguments, options=options("does not fit")) as dataset:
        dataset[5]  # the warning is this process's
        loader = DataLoader(dataset, batch_size=8, num_workers=2, multiprocessing_context="spawn")
        assert labels_of(loader) == [instead_of(row) for row in range(ROWS)]
        assert [entry["row"] for entry in dataset.quarantine] == list(BAD)


def test_the_first_bad_row_of_a_set_is_a_warning_the_others_are_counted_in_the_log(pictures, caplog, monkeypatch):
    with opened(pictures, config=PICTURES, on_error="skip", max_bad=0.1, options=options()) as dataset:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dataset[[5]]
            dataset[[20]]
        assert len([w for w in caught if "dataset.quarantine" in str(w.message)]) == 1
        told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("a bad row")]
        assert len(told) == 1
        assert "row 5 of" in told[0]
        monkeypatch.setattr(reader, "TELL_S", 0.0)
        dataset[[50]]
        told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("a bad row")]
        assert told[1].startswith("a bad row (4 since the last such line): row 50 of")  # 20 to 22 as well


# ---- the budget -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "on_error"), [(0, "skip"), (2, "synthetic")])
def test_more_bad_rows_than_the_budget_are_an_error_that_shows_some(pictures, workers, on_error):
    with opened(pictures, config=PICTURES, on_error=on_error, options=options()) as dataset:
        with pytest.raises(TooManyBadRowsError, match=r"(?s)row \d+ of.*dataset\.quarantine.*max_bad=") as caught:
            labels_of(DataLoader(dataset, batch_size=8, num_workers=workers))
        error = caught.value
        assert (error.source, error.num_rows, error.max_bad) == (dataset.name, ROWS, 0.01)
        assert error.num_bad > 1
        for row in BAD[1:]:
            with pytest.raises(TooManyBadRowsError):
                dataset[row]
        assert dataset[0]["labels"].item() == 0


def test_a_chunk_that_cannot_be_read_counts_with_all_of_its_rows(tmp_path):
    name = write_numbers(tmp_path / "d", ROWS)
    tear(name, 2)
    with opened(name, process=number, on_error="skip", max_bad=0.1, options=options()) as dataset:
        with pytest.raises(TooManyBadRowsError) as caught:
            dataset[40]
        assert caught.value.num_bad == 16
        assert isinstance(caught.value.__cause__, ReadError)


# ---- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("on_error", "ignore"),
        ("on_error", None),
        *[("max_bad", v) for v in (-0.1, 1.1, "1%", True, None, float("nan"))],
    ],
)
def test_a_bad_value_is_an_option_error(numbers, name, value):
    with pytest.raises(OptionError) as caught:
        ShmMultimodalDataset(dataset_name=numbers, process=number, **{name: value})
    assert caught.value.name == name


# ---- a server that cannot be reached ----------------------------------------------------------------------------


def test_what_is_at_hand_is_in_the_ring_or_fetched(pictures):
    with opened(pictures, config=PICTURES, on_error="skip", max_bad=0.1, options=options()) as dataset:
        dataset[list(range(ROWS))]
        found = dataset._reader.attach().are_at_hand(range(ROWS))
        assert [row for row, is_there in enumerate(found) if not is_there] == list(BAD)


# ---- several sources --------------------------------------------------------------------------------------------


def test_a_neighbour_is_of_the_same_source(pictures, tmp_path):
    others = write_pictures(tmp_path / "d", 8, bad=[0, 7])
    arguments = {"config": PICTURES, "on_error": "skip", "max_bad": 0.1, "options": options()}
    with opened([pictures, others], **arguments) as dataset:
        batch = dataset[[94, 95, 96, 97, 103]]
        assert batch["labels"].tolist() == [94, 0, 1, 1, 1]
        assert batch["source"] == [pictures] * 2 + [others] * 3
        dataset[list(range(len(dataset)))]
        found = [(entry["source"], entry["row"]) for entry in dataset.quarantine]
        assert found == [*((pictures, row) for row in BAD), (others, 0), (others, 7)]


def test_of_several_sources_a_made_up_sample_says_which_it_stands_in_for(pictures, tmp_path):
    others = write_pictures(tmp_path / "d", 8, bad=[0, 7])
    arguments = {"config": PICTURES, "on_error": "synthetic", "max_bad": 0.1, "options": options()}
    with opened([pictures, others], **arguments) as dataset:
        batch = dataset[[94, 95, 96, 97]]
        assert batch["source"] == [pictures, f"{pictures} (synthetic)", f"{others} (synthetic)", others]
        assert (batch["image"].dtype, batch["image"].shape) == (torch.uint8, (4, 3, 32, 32))
