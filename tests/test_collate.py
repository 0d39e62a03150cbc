"""The collate hook: batches as torch's own would be, gathered where fields are the records', by value elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from conftest import NUM_IMAGES, NUM_TEXTS, SIDE, opened, text_of
from support_collate import WORKERS, assert_same, first_batch, plain, ragged
from torch.utils.data import DataLoader, default_collate

from shmloader import MultimodalConfig, ShmloaderError, ShmMultimodalDataset

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.timeout(60)


DTYPES = ["bool", "uint8", "int16", "int32", "int64", "float16", "float32", "float64"]


@pytest.fixture(scope="module")
def texts(texts_path: str) -> Iterator[ShmMultimodalDataset]:
    with opened(texts_path) as made:
        yield made


@pytest.fixture(scope="module")
def images(images_path: str) -> Iterator[ShmMultimodalDataset]:
    """float32 images and labels."""
    with opened(images_path) as made:
        yield made


@pytest.fixture(scope="module")
def raggeds(rows_path: str) -> Iterator[ShmMultimodalDataset]:
    with opened(rows_path, process=ragged) as made:
        yield made


def every_rank_and_dtype(row: dict[str, Any]) -> dict[str, Any]:
    x = row["x"]
    fields: dict[str, Any] = {}
    for dtype in DTYPES:
        for rank in range(5):
            shape = (2, 3, 1, 2)[:rank]
            values = (np.arange(12)[: int(np.prod(shape))] + x) % 2 if dtype == "bool" else np.arange(12) + x
            fields[f"{dtype}_{rank}"] = values[: int(np.prod(shape))].astype(dtype).reshape(shape)
    return fields


def boxes(row: dict[str, Any]) -> dict[str, Any]:
    """Their second dimension differs: cannot be padded."""
    return {"box": np.zeros((2, row["x"] % 3 + 1))}


# -- as torch's own --------------------------------------------------------------------------------------------


@WORKERS
def test_fixed_shapes_give_what_torch_gives(rows_path: str, make_dataset: Any, num_workers: int) -> None:
    """Fields of rank 0 to 4 and of every dtype."""
    dataset = make_dataset(rows_path, process=every_rank_and_dtype)
    batch = first_batch(dataset, num_workers, batch_size=16)
    assert_same(batch, default_collate(plain([dataset[i] for i in range(16)])))


@WORKERS
def test_float32_images_and_labels_give_what_torch_gives(images: Any, num_workers: int) -> None:
    batch = first_batch(images, num_workers, batch_size=16)
    expected = default_collate(plain([images[i] for i in range(16)]))
    torch.testing.assert_close(batch.pop("image"), expected.pop("image"), rtol=0, atol=1e-6)
    assert batch["labels"].shape == (16,)
    assert_same(batch, expected)


def test_uint8_images_give_what_torch_gives(images_path: str, make_dataset: Any) -> None:
    dataset = make_dataset(images_path, config=MultimodalConfig(vision_dim=SIDE, image_dtype="uint8"))
    batch = first_batch(dataset, 0, batch_size=NUM_IMAGES)
    assert batch["image"].dtype == torch.uint8
    assert_same(batch, default_collate(plain([dataset[i] for i in range(NUM_IMAGES)])))


@WORKERS
def test_texts_are_padded_with_mask_and_ignored_labels(texts: Any, num_workers: int) -> None:
    batch = first_batch(texts, num_workers, batch_size=10)
    rows = [torch.tensor(list(text_of(i).encode())) for i in range(10)]
    longest = max(map(len, rows))
    assert batch["text"].shape == batch["attention_mask"].shape == batch["labels"].shape == (10, longest)
    for i, row in enumerate(rows):
        n = len(row)
        assert torch.equal(batch["text"][i, :n], row)
        assert torch.equal(batch["labels"][i, :n], row)
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (longest - n)
        assert (batch["labels"][i, n:] == -100).all()
        assert (batch["text"][i, n:] == batch["text"][i, n:].flatten()[:1]).all()


@WORKERS
def test_ragged_fields_of_process_are_padded(raggeds: Any, num_workers: int) -> None:
    batch = first_batch(raggeds, num_workers, batch_size=6)
    assert batch["list"].shape == (6, 4)
    assert batch["list"][3].tolist() == [3, 4, 5, 0]
    assert batch["matrix"].shape == (6, 4, 2)
    assert batch["matrix"][5].tolist() == [[0, 0]] * 4
    assert batch["labels"][2].tolist() == [0, 1, -100, -100]
    assert batch["text"][0].tolist() == [0, 0, 0, 0, 0]
    assert batch["attention_mask"][0].tolist() == [1, 0, 0, 0, 0]
    assert batch["word"] == [f"w{i}" for i in range(6)]
    assert batch["task_type"] == ["text"] * 6


@WORKERS
def test_empty_tensors_make_empty_batches(raggeds: Any, num_workers: int) -> None:
    batch = first_batch(raggeds, num_workers)
    assert batch["empty"].shape == (4, 0, 3)
    assert batch["empty"].dtype == torch.uint8


@WORKERS
def test_batch_of_only_empty_lists_is_empty(raggeds: Any, num_workers: int) -> None:
    batch = first_batch(torch.utils.data.Subset(raggeds, [0, 5, 10]), num_workers, batch_size=3)
    assert batch["list"].shape == (3, 0)
    assert batch["matrix"].shape == (3, 0, 2)


@WORKERS
def test_fields_that_cannot_be_padded_are_an_error_that_names_them(
    rows_path: str, make_dataset: Any, num_workers: int
) -> None:
    with pytest.raises(ShmloaderError, match=r"'box'.*\[2, 1\].*\[2, 2\]"):
        first_batch(make_dataset(rows_path, process=boxes), num_workers)


@WORKERS
def test_batch_of_one(images: Any, num_workers: int) -> None:
    batch = first_batch(images, num_workers, batch_size=1)
    assert batch["image"].shape == (1, 3, SIDE, SIDE)


@pytest.mark.parametrize(("drop_last", "last"), [(False, NUM_TEXTS % 16), (True, 16)])
def test_last_batch(texts: Any, drop_last: bool, last: int) -> None:
    batches = list(DataLoader(texts, batch_size=16, num_workers=1, drop_last=drop_last))
    assert len(batches[-1]["text"]) == last


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_plain_dicts(texts: Any, num_workers: int) -> None:
    assert {type(batch) for batch in DataLoader(texts, batch_size=16, num_workers=num_workers)} == {dict}


def test_samples_of_several_look_ups_make_the_same_batch(raggeds: Any) -> None:
    one_by_one, at_once = [raggeds[i] for i in (5, 2, 2, 9)], raggeds.__getitems__([5, 2, 2, 9])
    assert_same(default_collate(one_by_one), default_collate(at_once))


def test_order_of_the_samples_is_kept(raggeds: Any) -> None:
    samples = raggeds.__getitems__([5, 2, 9])
    assert default_collate(samples[::-1])["word"] == ["w9", "w2", "w5"]
    assert default_collate(samples[::-1])["text"][:, 0].tolist() == [9, 2, 5]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_fields_come_in_the_same_order_wherever_a_batch_is_made(
    texts_path: str, make_dataset: Any, num_workers: int
) -> None:
    dataset = make_dataset(texts_path, transform=lambda sample: {**sample, "extra": torch.zeros(2)})
    batch = next(iter(DataLoader(dataset, batch_size=4, num_workers=num_workers)))
    assert list(batch) == ["text", "attention_mask", "labels", "task_type", "source", "extra"]
    plain = make_dataset(texts_path)
    batch = next(iter(DataLoader(plain, batch_size=4, num_workers=num_workers)))
    assert list(batch) == ["text", "attention_mask", "labels", "task_type", "source"]
