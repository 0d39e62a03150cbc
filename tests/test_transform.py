"""`transform`: private copies, random numbers that depend on (seed, epoch, sample) alone, and the way to workers."""

from __future__ import annotations

import random
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from conftest import NUM_ROWS, opened
from support_rows import EVERY_ROW, make_row, rows_of
from torch.utils.data import ConcatDataset, DataLoader

from shmloader import ShmMultimodalDataset
from shmloader.errors import DecodeError, OptionError, ShmloaderError

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # more workers than cores
]


@pytest.fixture(scope="module")
def dataset(rows_path: str) -> Iterator[ShmMultimodalDataset]:
    with opened(rows_path, process=make_row) as made:
        yield made


def noise(sample: dict[str, Any]) -> dict[str, Any]:
    """One number from each of the global generators."""
    sample["noise"] = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)
    sample["block"].add_(0)  # private, so this is allowed
    return sample


@pytest.fixture(scope="module")
def noisy(rows_path: str) -> Iterator[ShmMultimodalDataset]:
    """For tests that say the epoch themselves, or do not depend on it."""
    with opened(rows_path, process=make_row, transform=noise) as made:
        yield made


@pytest.fixture
def fresh(rows_path: str, make_dataset: Any) -> ShmMultimodalDataset:
    """As `noisy`, for one test alone."""
    made: ShmMultimodalDataset = make_dataset(rows_path, process=make_row, transform=noise)
    return made


def noises(dataset: Any, num_workers: int, **kwargs: Any) -> torch.Tensor:
    """Of one epoch, by row."""
    batches = list(DataLoader(dataset, batch_size=16, num_workers=num_workers, **kwargs))
    assert rows_of(batches) == EVERY_ROW
    return torch.cat([batch["noise"] for batch in batches])


def test_transform_does_not_depend_on_the_number_of_workers(noisy: Any) -> None:
    epochs = []
    for num_workers in (0, 1, 3):
        noisy.set_epoch(4)
        epochs.append(noises(noisy, num_workers))
    assert torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[0], epochs[2])
    assert len(epochs[0].unique()) == 3 * NUM_ROWS


def test_transform_without_set_epoch_is_new_in_each_epoch(rows_path: str, make_dataset: Any) -> None:
    """And the k-th epoch is the same for any number of workers."""
    by_workers = []
    for num_workers in (0, 3):
        dataset = make_dataset(rows_path, process=make_row, transform=noise)
        by_workers.append([noises(dataset, num_workers) for _ in range(2)])
    assert torch.equal(by_workers[0][0], by_workers[1][0])
    assert torch.equal(by_workers[0][1], by_workers[1][1])
    assert not (by_workers[0][0] == by_workers[0][1]).any()


def test_transform_follows_the_seed(fresh: Any) -> None:
    fresh.set_epoch(0)
    first = noises(fresh, 0)
    fresh.seed = 1
    assert not (noises(fresh, 1) == first).any()


def test_set_epoch_reaches_persistent_workers(fresh: Any) -> None:
    """Also when the workers started before it was ever called."""
    loader = DataLoader(fresh, batch_size=16, num_workers=2, persistent_workers=True)
    epochs: list[torch.Tensor] = []
    for epoch in (None, 7, 8, 7):
        if epoch is not None:
            fresh.set_epoch(epoch)
        epochs.append(torch.cat([batch["noise"] for batch in loader]))
    assert torch.equal(epochs[1], epochs[3])
    assert not (epochs[1] == epochs[2]).any()
    assert not (epochs[1] == epochs[0]).any()


def test_epoch_zero_is_an_epoch(noisy: Any) -> None:
    noisy.set_epoch(0)
    first = noises(noisy, 0)
    noisy.set_epoch(0)
    assert torch.equal(noises(noisy, 0), first)


@pytest.mark.parametrize("epoch", [-1, 1 << 64])
def test_epoch_out_of_range_is_an_error(dataset: Any, epoch: int) -> None:
    with pytest.raises(OptionError, match="epoch="):
        dataset.set_epoch(epoch)


def test_transform_leaves_the_generators_of_its_process_alone(noisy: Any) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seed() -> None:
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    seed()
    expected = draw()
    seed()
    noisy[3]
    assert draw() == expected


def test_transform_has_private_copies(noisy: Any) -> None:
    noisy[3]["block"].fill_(-1)
    assert (noisy[3]["block"] == 3).all()


def test_transformed_samples_are_padded_as_the_schema_says(noisy: Any) -> None:
    batch = next(iter(DataLoader(noisy, batch_size=4)))
    assert batch["tail"].tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 1, 2]]


def test_transform_that_returns_no_dict_is_an_error(rows_path: str, make_dataset: Any) -> None:
    dataset = make_dataset(rows_path, process=make_row, transform=lambda sample: None)
    with pytest.raises(OptionError, match=r"transform= must return a dict, but got NoneType \(sample 3 of"):
        dataset[3]


def test_error_of_a_transform_names_the_sample(rows_path: str, make_dataset: Any) -> None:
    dataset = make_dataset(rows_path, process=make_row, transform=lambda sample: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        dataset[3]
    assert "sample 3 of" in caught.value.__notes__[0]


def raising(sample: dict[str, Any]) -> dict[str, Any]:
    raise DecodeError(f"no use for {int(sample['x'])}", source="mine", row=int(sample["x"]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_ours_in_a_transform_keeps_its_attributes(
    rows_path: str, make_dataset: Any, num_workers: int
) -> None:
    dataset = make_dataset(rows_path, process=make_row, transform=raising)
    with pytest.raises(DecodeError, match="no use for 0") as caught:
        list(DataLoader(dataset, 4, num_workers=num_workers))
    assert caught.value.data == {"source": "mine", "row": 0}
    told = "".join(traceback.format_exception(caught.value))
    assert "in transform= for sample 0 of" in told
    assert "shmloader.data" not in told
    del caught


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_transform_that_returns_no_dict_is_told_by_the_attributes_too(
    rows_path: str, make_dataset: Any, num_workers: int
) -> None:
    dataset = make_dataset(rows_path, process=make_row, transform=lambda sample: None)
    with pytest.raises(OptionError) as caught:
        list(DataLoader(dataset, 4, num_workers=num_workers))
    assert (caught.value.name, caught.value.value) == ("transform", "NoneType")
    del caught


def changed(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "odd": 1} if int(sample["x"]) == 2 else sample


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("is_ours", [False, True])
def test_samples_that_are_no_batch_are_told_by_the_attributes_too(
    rows_path: str, make_dataset: Any, num_workers: int, is_ours: bool
) -> None:
    dataset = make_dataset(rows_path, process=make_row, transform=changed)
    collate = dataset.collate if is_ours else None
    with pytest.raises(ShmloaderError, match="sample 2 of the batch differs from sample 0 in odd") as caught:
        list(DataLoader(dataset, 4, num_workers=num_workers, collate_fn=collate))
    assert caught.value.data == {"field": "odd", "row": 2}
    del caught


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_lambdas_travel_to_spawned_workers(rows_path: str, make_dataset: Any, method: str) -> None:
    dataset = make_dataset(
        rows_path, process=lambda row: {"x": row["x"] * 2}, transform=lambda sample: {"y": sample["x"] + 1}
    )
    loader = DataLoader(dataset, batch_size=16, num_workers=2, multiprocessing_context=method)
    assert torch.cat([batch["y"] for batch in loader]).tolist() == [2 * x + 1 for x in EVERY_ROW]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_two_datasets_go_to_one_spawned_worker(rows_path: str, make_dataset: Any, method: str) -> None:
    pair = ConcatDataset([make_dataset(rows_path, process=make_row) for _ in range(2)])
    loader = DataLoader(pair, batch_size=50, num_workers=1, multiprocessing_context=method)
    seen = [int(x) for batch in loader for x in batch["x"]]
    assert seen == [*range(NUM_ROWS), *range(NUM_ROWS)]


def test_a_transform_may_read_another_dataset_that_has_one(rows_path: str, make_dataset: Any) -> None:
    other = make_dataset(rows_path, process=make_row, transform=lambda sample: sample)
    dataset = make_dataset(
        rows_path,
        process=make_row,
        transform=lambda sample: {"x": sample["x"], "pair": other[int(sample["x"]) + 1]["x"]},
    )
    assert int(dataset[3]["pair"]) == 4


def test_another_seed_gives_other_random_numbers(rows_path: str, make_dataset: Any) -> None:
    def draw(sample: dict[str, Any]) -> dict[str, Any]:
        return {"drawn": torch.rand(())}

    values = {
        float(make_dataset(rows_path, process=make_row, transform=draw, seed=seed)[0]["drawn"]) for seed in (0, 0, 1)
    }
    assert len(values) == 2
