"""Bad rows of streams without a length, where there may be no row behind one to take its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import opened
from support_bad_rows import fails_at, options
from support_sets import number
from torch.utils.data import DataLoader

from shmloader import ShmMultimodalIterableDataset
from shmloader.errors import ShmloaderError, TooManyBadRowsError

# The warning of the first bad row has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:.* has a bad row, in whose place")


def stream(rows: int) -> Any:
    import datasets

    def generate() -> Iterator[dict[str, int]]:
        for i in range(rows):
            yield {"number": i}

    return datasets.IterableDataset.from_generator(generate)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_leaves_bad_rows_out(workers):
    bad = (0, 7, 8, 9, 63, 64, 199)
    arguments = {"process": fails_at(*bad), "on_error": "skip", "max_bad": 0.1, "options": options()}
    with opened(stream(200), ShmMultimodalIterableDataset, **arguments) as dataset:
        found = [value for batch in DataLoader(dataset, num_workers=workers, batch_size=4) for value in batch["number"]]
        assert sorted(int(value) for value in found) == [i for i in range(200) if i not in bad]
        assert {entry["row"] for entry in dataset.quarantine} == set(bad)


def test_a_stream_has_made_up_samples_in_the_place_of_bad_rows():
    bad = (0, 7, 8, 9, 99)
    arguments = {"process": fails_at(*bad), "on_error": "synthetic", "max_bad": 0.1, "options": options()}
    with opened(stream(100), ShmMultimodalIterableDataset, **arguments) as dataset:
        sources = [sample["source"] for sample in dataset]
        made = [i for i, source in enumerate(sources) if source.endswith(" (synthetic)")]
        assert made == [0, 7, 8, 9]  # behind the last row there is none to be like
        assert len(sources) == 99


def test_a_row_that_kills_is_left_out_of_a_stream():
    def process(row: dict[str, Any]) -> dict[str, Any]:
        import os

        if row["number"] == 30:
            os._exit(3)
        return {"number": row["number"]}

    arguments = {"process": process, "on_error": "skip", "options": options()}
    with opened(stream(60), ShmMultimodalIterableDataset, **arguments) as dataset:
        found = [int(sample["number"]) for sample in dataset]
        assert found == [i for i in range(60) if i != 30]
        assert [(bad["row"], bad["error"]) for bad in dataset.quarantine] == [(30, "ServiceError")]


@pytest.mark.parametrize("on_error", ["skip", "synthetic"])
def test_a_stream_of_bad_rows_alone_is_an_error_that_says_so(on_error):
    arguments = {"process": fails_at(*range(20_000)), "on_error": on_error, "options": options()}
    with (
        opened(stream(20_000), ShmMultimodalIterableDataset, **arguments) as dataset,
        pytest.raises(TooManyBadRowsError, match="11 of the 11 rows"),
    ):
        list(dataset)


def test_a_stream_with_too_many_bad_rows_is_an_error():
    arguments = {"process": fails_at(*range(5, 40)), "on_error": "skip", "options": options()}
    with opened(stream(200), ShmMultimodalIterableDataset, **arguments) as dataset:
        with pytest.raises(TooManyBadRowsError, match="11 of the 16 rows") as caught:
            list(dataset)
        assert caught.value.num_rows is None


def test_a_stream_that_fails_is_an_error_whatever_the_policy():
    import datasets

    def generate() -> Iterator[dict[str, int]]:
        for i in range(100):
            if i == 70:
                raise OSError("the stream broke")
            yield {"number": i}

    source = datasets.IterableDataset.from_generator(generate)
    arguments = {"process": number, "on_error": "skip", "max_bad": 1.0, "options": options()}
    with opened(source, ShmMultimodalIterableDataset, **arguments) as dataset:
        found = []
        with pytest.raises(ShmloaderError, match="the stream broke"):
            found.extend(sample["number"].item() for sample in dataset)
