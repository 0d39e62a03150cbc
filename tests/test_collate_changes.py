"""The collate hook: what the user did to samples is in the batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from conftest import NUM_IMAGES, NUM_TEXTS, opened, text_of, write_rows
from support_collate import WORKERS, Wrapper, assert_same, first_batch, plain, ragged
from torch.utils.data import ConcatDataset, DataLoader, default_collate

from shmloader import ShmloaderError, ShmMultimodalDataset
from shmloader.views import Sample

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.timeout(60)


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


# -- what a wrapper did to samples -----------------------------------------------------------------------------


def set_image(sample: Any, i: int) -> None:
    sample["image"] = torch.full((2,), float(i))


def add_field(sample: Any, i: int) -> None:
    sample["index"] = i


def remove_image(sample: Any, i: int) -> None:
    del sample["image"]


def remove_labels(sample: Any, i: int) -> None:
    del sample["labels"]


def copy_labels(sample: Any, i: int) -> None:
    sample["labels"] = sample["labels"].clone().add_(100)


def flip_in_place(sample: Any, i: int) -> None:
    """A float32 image is private, so may be written to."""
    sample["image"].mul_(0).add_(i)


def only_odd_ones(sample: Any, i: int) -> None:
    if i % 2:
        sample["image"].fill_(i)


def replace_odd_ones(sample: Any, i: int) -> None:
    if i % 2:
        sample["labels"] = torch.tensor(50 + i)


def look(sample: Any, i: int) -> None:
    assert sample["labels"] == i % 5


def set_source(sample: Any, i: int) -> None:
    sample["source"] = f"file {i}"


def remove_source(sample: Any, i: int) -> None:
    del sample["source"]


def as_dict(sample: Any, i: int) -> Any:
    return {"image": sample["image"], "labels": sample["labels"]}


def reordered(sample: Any, i: int) -> None:
    if i % 2:
        sample["image"] = sample.pop("image")


CHANGES = [set_image, add_field, remove_image, remove_labels, copy_labels, flip_in_place, only_odd_ones]
CHANGES += [replace_odd_ones, look, set_source, remove_source, as_dict, reordered]


@WORKERS
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_a_wrapper_did_is_in_the_batch(images: Any, change: Callable[[Any, int], Any], num_workers: int) -> None:
    wrapped = Wrapper(images, change)
    batch = first_batch(wrapped, num_workers)
    expected = default_collate(plain([wrapped[i] for i in range(4)]))
    if "image" in expected:
        torch.testing.assert_close(batch.pop("image"), expected.pop("image"), rtol=0, atol=1e-6)
    assert_same(batch, expected)


def own_mask(sample: Any, i: int) -> None:
    sample["attention_mask"] = torch.full((3,), i)


def own_mask_and_text(sample: Any, i: int) -> None:
    own_mask(sample, i)
    sample["text"] = sample["text"] + 1


@WORKERS
@pytest.mark.parametrize("change", [own_mask, own_mask_and_text])
def test_mask_of_the_user_is_not_replaced(texts: Any, change: Any, num_workers: int) -> None:
    batch = first_batch(Wrapper(texts, change), num_workers)
    assert batch["attention_mask"].tolist() == [[i] * 3 for i in range(4)]


def longer(sample: Any, i: int) -> None:
    sample["text"] = torch.cat([sample["text"], torch.tensor([7] * i, dtype=torch.int64)])


@WORKERS
def test_changed_texts_are_padded_and_masked_anew(texts: Any, num_workers: int) -> None:
    batch = first_batch(Wrapper(texts, longer), num_workers)
    lengths = [len(text_of(i)) + i for i in range(4)]
    assert batch["text"].shape == (4, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["labels"].shape[1] == max(len(text_of(i)) for i in range(4))


def as_array(sample: Any, i: int) -> None:
    sample["text"] = np.arange(i + 1)


@WORKERS
def test_changed_texts_may_be_numpy_arrays(texts: Any, num_workers: int) -> None:
    batch = first_batch(Wrapper(texts, as_array), num_workers)
    assert batch["text"].shape == (4, 4)
    assert batch["attention_mask"].sum(1).tolist() == [1, 2, 3, 4]


def add_ragged(sample: Any, i: int) -> None:
    sample["box"] = torch.zeros(i)


def of_other_rank(sample: Any, i: int) -> None:
    """Would be broadcast into the others' place."""
    sample["matrix"] = torch.ones(2, 2 if i % 2 else 1)


@WORKERS
@pytest.mark.parametrize(("change", "name"), [(add_ragged, "box"), (of_other_rank, "matrix")])
def test_shapes_that_do_not_fit_are_an_error(raggeds: Any, change: Any, name: str, num_workers: int) -> None:
    with pytest.raises(ShmloaderError, match=f"Field '{name}' cannot be made a batch"):
        first_batch(Wrapper(raggeds, change), num_workers)


def drop_some(sample: Any, i: int) -> None:
    if i % 2:
        del sample["labels"]


def add_some(sample: Any, i: int) -> None:
    if i % 2:
        sample["extra"] = 1


@WORKERS
@pytest.mark.parametrize(("change", "name"), [(drop_some, "labels"), (add_some, "extra")])
def test_different_fields_in_one_batch_are_an_error(images: Any, change: Any, name: str, num_workers: int) -> None:
    with pytest.raises(ShmloaderError, match=f"different fields: sample 1 of the batch differs .* in {name}"):
        first_batch(Wrapper(images, change), num_workers)


def test_samples_and_other_dicts_in_one_batch(images: Any) -> None:
    batch = default_collate([images[0], dict(images[1]), Sample(images[2])])
    assert batch["labels"].tolist() == [0, 1, 2]


# -- several datasets in one batch -----------------------------------------------------------------------------


@WORKERS
def test_two_datasets_of_one_schema_share_a_batch(
    texts: Any, tmp_path: Any, make_dataset: Any, num_workers: int
) -> None:
    other = make_dataset(write_rows(tmp_path, text=["other", "texts"]))
    batch = first_batch(ConcatDataset([torch.utils.data.Subset(texts, [3, 4]), other]), num_workers)
    assert batch["attention_mask"].sum(1).tolist() == [len(text_of(3)), len(text_of(4)), 5, 5]
    assert bytes(batch["text"][2, :5].tolist()) == b"other"
    assert batch["source"] == [texts.name] * 2 + [other.name] * 2


@WORKERS
def test_two_datasets_that_mean_different_things_by_a_name_cannot_share_a_batch(
    texts: Any, images: Any, num_workers: int
) -> None:
    """Labels that are tokens, and classes."""
    both = ConcatDataset([torch.utils.data.Subset(texts, [0]), images])
    with pytest.raises(ShmloaderError, match=r"Field 'labels' cannot be made a batch.* another name: keys="):
        first_batch(both, num_workers)


def test_two_datasets_of_different_schemas_share_a_loader(texts: Any, images: Any) -> None:
    """As long as no batch has samples of both."""
    both = ConcatDataset([texts, images])
    assert NUM_TEXTS % 20 == 0
    batches = list(DataLoader(both, batch_size=20, num_workers=2))
    assert sum(len(batch["source"]) for batch in batches) == NUM_TEXTS + NUM_IMAGES
    assert ["image" in batch for batch in batches] == [False] * 5 + [True] * 3


@pytest.mark.parametrize("change", [flip_in_place, look])
def test_batches_of_changed_samples_come_in_slots(images: Any, change: Any) -> None:
    before = images.stats()
    for _ in DataLoader(Wrapper(images, change), batch_size=20, num_workers=1):
        pass
    after = images.stats()
    assert after.batches_inline == before.batches_inline
    assert after.batches_in_slots + after.batches_copied - before.batches_in_slots - before.batches_copied == 3


def _without_files(samples: Any) -> Any:
    """The batch, which must not have been made in one of torch's files in /dev/shm."""
    batch = default_collate(samples)
    assert "/torch_" not in Path("/proc/self/maps").read_text()
    return batch


def test_changed_samples_need_no_files_in_dev_shm(images: Any) -> None:
    """torch's own collate makes one for each tensor, in a worker: a container has 64 MB of them."""
    batches = list(DataLoader(Wrapper(images, flip_in_place), batch_size=20, num_workers=1, collate_fn=_without_files))
    assert len(batches) == 3
