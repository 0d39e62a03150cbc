"""The collate hook: batches as torch's own would be, gathered where fields are the records', by value elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from conftest import NUM_IMAGES, NUM_TEXTS, SIDE, opened, text_of, write_rows
from torch.utils.data import ConcatDataset, DataLoader, Dataset, default_collate

from shmloader import MultimodalConfig, ShmloaderError, ShmMultimodalDataset
from shmloader.views import Sample

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.timeout(60)

DTYPES = ["bool", "uint8", "int16", "int32", "int64", "float16", "float32", "float64"]


def every_rank_and_dtype(row: dict[str, Any]) -> dict[str, Any]:
    x = row["x"]
    fields: dict[str, Any] = {}
    for dtype in DTYPES:
        for rank in range(5):
            shape = (2, 3, 1, 2)[:rank]
            values = (np.arange(12)[: int(np.prod(shape))] + x) % 2 if dtype == "bool" else np.arange(12) + x
            fields[f"{dtype}_{rank}"] = values[: int(np.prod(shape))].astype(dtype).reshape(shape)
    return fields


def ragged(row: dict[str, Any]) -> dict[str, Any]:
    """``list`` [n], ``matrix`` [n, 2], ``labels`` [n], ``text`` [n], a string, and ``empty`` [0, 3]."""
    x = row["x"]
    n = x % 5
    return {
        "list": np.arange(n, dtype=np.float32) + x,
        "matrix": np.full((n, 2), x, np.int16),
        "labels": np.arange(n),
        "text": np.arange(n + 1) + x,
        "word": row["word"],
        "empty": np.zeros((0, 3), np.uint8),
    }


def boxes(row: dict[str, Any]) -> dict[str, Any]:
    """Their second dimension differs: cannot be padded."""
    return {"box": np.zeros((2, row["x"] % 3 + 1))}


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


def plain(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples as dicts that torch knows nothing special about."""
    return [{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in sample.items()} for sample in samples]


def assert_same(left: Any, right: Any) -> None:
    assert set(left) == set(right)
    for name, value in right.items():
        if isinstance(value, torch.Tensor):
            assert left[name].dtype == value.dtype, name
            assert torch.equal(left[name], value), name
        else:
            assert left[name] == value, name


class Wrapper(Dataset[Any]):
    """Applies ``change(sample, i)`` to each sample; None: the sample was changed in place."""

    def __init__(self, dataset: Any, change: Callable[[Any, int], Any]) -> None:
        self.dataset = dataset
        self.change = change

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        sample = self.dataset[i]
        changed = self.change(sample, i)
        return sample if changed is None else changed


WORKERS = pytest.mark.parametrize("num_workers", [0, 1], ids=["main", "worker"])


def first_batch(dataset: Any, num_workers: int, batch_size: int = 4, **kwargs: Any) -> Any:
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, **kwargs)
    iterator = iter(loader)
    try:
        return next(iterator)
    finally:
        if num_workers:
            iterator._shutdown_workers()  # an error would keep it until the garbage is collected


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
def test_two_datasets_of_different_schemas_cannot_share_a_batch(texts: Any, images: Any, num_workers: int) -> None:
    both = ConcatDataset([torch.utils.data.Subset(texts, [0]), images])
    with pytest.raises(ShmloaderError, match=r"different fields.* in image, text"):
        first_batch(both, num_workers)


def test_two_datasets_of_different_schemas_share_a_loader(texts: Any, images: Any) -> None:
    """As long as no batch has samples of both."""
    both = ConcatDataset([texts, images])
    assert NUM_TEXTS % 20 == 0
    batches = list(DataLoader(both, batch_size=20, num_workers=2))
    assert sum(len(batch["source"]) for batch in batches) == NUM_TEXTS + NUM_IMAGES
    assert ["image" in batch for batch in batches] == [False] * 5 + [True] * 3


# -- a collate function of the user's --------------------------------------------------------------------------


def edited(samples: Any) -> Any:
    batch = default_collate(samples)
    batch["labels"].add_(10)
    return batch


def extended(samples: Any) -> Any:
    batch = default_collate(samples)
    batch["twice"] = batch["labels"] * 2
    batch["n"] = len(samples)
    return batch


def replaced(samples: Any) -> Any:
    batch = default_collate(samples)
    batch["labels"] = batch["labels"] + 10
    batch["image"] = batch["image"][:, :1]
    return batch


def aliased(samples: Any) -> Any:
    batch = default_collate(samples)
    batch["y"] = batch["labels"]
    return batch


def reduced(samples: Any) -> Any:
    batch = default_collate(samples)
    del batch["image"]
    return batch


def as_tuple(samples: Any) -> Any:
    batch = default_collate(samples)
    return batch["image"], batch["labels"]


def as_list(samples: Any) -> Any:
    batch = default_collate(samples)
    return [batch["labels"]]


def nested(samples: Any) -> Any:
    batch = default_collate(samples)
    return {"input": {"pixels": batch["image"]}, "target": (batch["labels"], "x")}


def wrapped(samples: Any) -> Any:
    return {"batch": default_collate(samples), "n": len(samples)}


def twice(samples: Any) -> Any:
    batch = default_collate(samples)
    return batch, batch


def two_batches(samples: Any) -> Any:
    return default_collate(samples[:2]), default_collate(samples[2:])


def plain_dict(samples: Any) -> Any:
    return dict(default_collate(samples))


def nothing_of_it(samples: Any) -> Any:
    return torch.stack([sample["labels"] for sample in samples])


def flat(value: Any) -> list[Any]:
    """All tensors and other things of a nested structure, in order."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in flat(value[key])]
    if isinstance(value, tuple | list) and not all(isinstance(v, str) for v in value):
        return [leaf for item in value for leaf in flat(item)]
    return [value]


COLLATES = [edited, extended, replaced, aliased, reduced, as_tuple, as_list, nested, wrapped, twice, two_batches]
COLLATES += [plain_dict, nothing_of_it]


@pytest.mark.parametrize("collate_fn", COLLATES, ids=lambda function: function.__name__)
def test_result_of_a_collate_fn_arrives(images: Any, collate_fn: Callable[[Any], Any]) -> None:
    """From a worker as from the main process, every batch of an epoch."""
    here = [flat(value) for value in DataLoader(images, batch_size=12, collate_fn=collate_fn)]
    there = [flat(value) for value in DataLoader(images, batch_size=12, collate_fn=collate_fn, num_workers=2)]
    assert len(here) == len(there) == 5
    for left, right in zip(here, there, strict=True):
        assert len(left) == len(right)
        for mine, theirs in zip(left, right, strict=True):
            assert type(mine) is type(theirs)
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def bag(sample: Any, i: int) -> Any:
    """A batch as a sample."""
    return default_collate([sample, sample])


def test_batches_of_batches(images: Any) -> None:
    for batch in DataLoader(Wrapper(images, bag), batch_size=10, num_workers=1):
        assert batch["image"].shape == (10, 2, 3, SIDE, SIDE)
        assert torch.equal(batch["labels"][:, 0], batch["labels"][:, 1])


def keep_grad(samples: Any) -> Any:
    batch = default_collate(samples)
    batch["weight"] = torch.ones(3, requires_grad=True)
    batch["conjugate"] = torch.tensor([1 + 2j]).conj()
    return batch


def test_tensors_that_are_more_than_bytes_keep_what_they_are(images: Any) -> None:
    batch = first_batch(images, 1, collate_fn=keep_grad)
    assert batch["weight"].requires_grad
    assert batch["conjugate"].tolist() == [1 - 2j]


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
