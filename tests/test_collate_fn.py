"""The collate hook under the user's own `collate_fn`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import pytest
import torch
from conftest import SIDE, opened
from support_collate import Wrapper, first_batch
from torch.utils.data import DataLoader, default_collate

from shmloader import ShmMultimodalDataset

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def images(images_path: str) -> Iterator[ShmMultimodalDataset]:
    """float32 images and labels."""
    with opened(images_path) as made:
        yield made


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
