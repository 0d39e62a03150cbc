"""Samples of ragged fields, and batches of them, beside those that torch makes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

cloudpickle.register_pickle_by_value(sys.modules[__name__])


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
