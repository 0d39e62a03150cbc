"""What may stand in brackets behind a dataset: one index, or several, which give their batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NUM_ROWS, opened
from support_rows import EVERY_ROW, make_row, rows_of
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, Subset

from shmloader import ShmMultimodalDataset

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def dataset(rows_path: str) -> Iterator[ShmMultimodalDataset]:
    with opened(rows_path, process=make_row) as made:
        yield made


@pytest.mark.parametrize("index", [-1, -NUM_ROWS, 0, np.int64(3), np.uint8(3), torch.tensor(3), True])
def test_index_as_of_a_list(dataset: Any, index: Any) -> None:
    assert dataset[index]["x"] == EVERY_ROW[index]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, EVERY_ROW)], ids=["itself", "subset"])
def test_a_batch_sampler_may_be_the_sampler(dataset: Any, wrap: Any, num_workers: int) -> None:
    sampler = BatchSampler(SequentialSampler(dataset), 16, drop_last=False)
    batches = list(DataLoader(wrap(dataset), sampler=sampler, batch_size=None, num_workers=num_workers))
    assert len(batches) == len(sampler)
    assert rows_of(batches) == EVERY_ROW


@pytest.mark.parametrize(
    "index",
    [[0, 1, -1], (0, 1, -1), np.array([0, 1, -1]), torch.tensor([0, 1, -1]), [torch.tensor(0), np.int64(1), -1]],
)
def test_several_indices_give_their_batch(dataset: Any, index: Any) -> None:
    assert rows_of([dataset[index]]) == [0, 1, NUM_ROWS - 1]


def test_a_slice_gives_its_batch(dataset: Any) -> None:
    assert rows_of([dataset[3:6]]) == [3, 4, 5]
    assert rows_of([dataset[-1:-NUM_ROWS:-2]]) == EVERY_ROW[:0:-2]
    assert rows_of([dataset[torch.tensor([3])]]) == [3]


@pytest.mark.parametrize("index", [slice(5, 5), [], np.array([], np.int64)])
def test_no_indices_make_no_batch(dataset: Any, index: Any) -> None:
    with pytest.raises(IndexError, match="which makes no batch"):
        dataset[index]


@pytest.mark.parametrize("index", [NUM_ROWS, -NUM_ROWS - 1, 10**30, -(10**30)])
def test_index_out_of_range(dataset: Any, index: int) -> None:
    with pytest.raises(IndexError, match=rf"index {index} is out of range: .* has {NUM_ROWS} samples"):
        dataset[index]


def test_one_index_out_of_range_among_many(dataset: Any) -> None:
    with pytest.raises(IndexError, match=rf"index {NUM_ROWS} "):
        dataset.__getitems__([0, -1, NUM_ROWS])


@pytest.mark.parametrize("index", [slice(0, 3.5), 1.0, "1", None, [1, 2.0], [True, False], np.array([True])])
def test_index_of_a_wrong_type(dataset: Any, index: Any) -> None:
    with pytest.raises(TypeError, match=r"index must be a whole number|integer|slice indices"):
        dataset[index]


def test_no_indices_give_no_samples(dataset: Any) -> None:
    assert dataset.__getitems__([]) == []
