"""Sets that keep encoded chunks on local disk, for tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow.parquet as pq
import torch
from conftest import SIDE, opened, small_options
from torch.utils.data import DataLoader, RandomSampler

import shmloader._native as native
from shmloader import ShmMultimodalDataset

NUM_ROWS = 1000
CHUNK_ROWS = 50
EVERY_ROW = list(range(NUM_ROWS))
REFETCH = ".* in an order that the prefetchers do not know:UserWarning"


@contextmanager
def opened_small(name: str, **options: Any) -> Iterator[ShmMultimodalDataset]:
    """A set whose ring holds a tenth of the samples, and whose raw region few of its 20 chunks."""
    options = {"ring_bytes": "96KiB", "window_bytes": 4096, "prefetchers": 2, "spill_bytes": "64MiB", **options}
    with opened(name, options=small_options(**options)) as dataset:
        yield dataset
        if not dataset._reader.is_closed:
            assert dataset._reader.attach().segment.check() is None


def labels_of(loader: Any) -> list[int]:
    """The labels of all batches, each of which must hold the pictures that belong to them."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    seen: list[int] = []
    for batch in loader:
        colours = (batch["image"] * std + mean) * 255
        expected = (batch["labels"] % 256).float().view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE)
        assert torch.allclose(colours, expected, atol=0.01)
        seen += batch["labels"].tolist()
    return seen


def foreign(dataset: Any, seed: int, num_workers: int = 0) -> DataLoader[Any]:
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
    return DataLoader(dataset, 4, sampler=sampler, num_workers=num_workers)


def num_fetched(dataset: ShmMultimodalDataset) -> int:
    return dataset._reader.attach().segment.stats()["num_fetched"]


def source_bytes(name: str) -> int:
    """Encoded bytes of all rows, as fetched_bytes counts them."""
    return sum(batch.nbytes for batch in pq.read_table(name).to_batches())


def told(dataset: ShmMultimodalDataset) -> str | None:
    """The warning that chunks are fetched again, shown or not."""
    text = dataset._reader.attach().segment.text_get(native.TEXT_REFETCH)
    return None if text is None else json.loads(text)["message"]


def message_of(dataset: ShmMultimodalDataset) -> str:
    """The same, after as many epochs as it takes."""
    for epoch in range(20):
        assert sorted(labels_of(foreign(dataset, epoch))) == EVERY_ROW
        message = told(dataset)
        if message is not None:
            return message
    raise AssertionError("nothing was told")
