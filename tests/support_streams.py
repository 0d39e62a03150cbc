"""Streams of numbers for tests of iterable datasets, and what is to be seen of their iterations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from conftest import opened
from datasets import Features, IterableDataset, Value
from support_sets import number, wait_at, wait_until
from torch.utils.data import get_worker_info

from shmloader import ShmMultimodalIterableDataset

FEATURES = Features(number=Value("int64"))


def counted(num: int | None) -> Iterator[dict[str, int]]:
    """0, 1, … below ``num``; None: without end."""
    at = 0
    while num is None or at < num:
        yield {"number": at}
        at += 1


def gated(num: int, gates: dict[int, str]) -> Iterator[dict[str, int]]:
    """0, 1, … below ``num``; each of the numbers in ``gates`` (of `Gate`) only once its gate is open."""
    for at in range(num):
        if at in gates:
            wait_at(gates[at])
        yield {"number": at}


def failing(num: int, at: int) -> Iterator[dict[str, int]]:
    """0, 1, … below ``num``, but an error in the place of ``at``."""
    for i in range(num):
        if i == at:
            raise ValueError(f"no number {i}")
        yield {"number": i}


def deadly(num: int, at: int, mark: str) -> Iterator[dict[str, int]]:
    """0, 1, … below ``num``; the first process that comes to ``at`` dies of it. mark: where that is noted."""
    for i in range(num):
        if i == at:
            try:
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), 9)
        yield {"number": i}


def always_deadly(num: int, at: int) -> Iterator[dict[str, int]]:
    """As `deadly`, for each process."""
    for i in range(num):
        if i == at:
            os.kill(os.getpid(), 9)
        yield {"number": i}


def stream_of(generator: Any, **arguments: Any) -> IterableDataset:
    """A stream of one shard that tells no length."""
    return IterableDataset.from_generator(generator, features=FEATURES, gen_kwargs=arguments)


def open_stream(stream: Any, **arguments: Any) -> AbstractContextManager[ShmMultimodalIterableDataset]:
    """A dataset of ``stream``'s numbers (`opened`)."""
    return opened(stream, kind=ShmMultimodalIterableDataset, **{"process": number, **arguments})


def with_worker(sample: dict[str, Any]) -> tuple[int, int]:
    """A `collate_fn` for single samples: (the worker that it is of, -1 without; its number)."""
    worker = get_worker_info()
    return (-1 if worker is None else worker.id), int(sample["number"])


def numbers(samples: Any) -> list[int]:
    """The numbers of samples or batches, in their sequence."""
    return [int(i) for sample in samples for i in sample["number"].reshape(-1)]


def num_iterations(dataset: ShmMultimodalIterableDataset) -> int:
    """How many live in the dataset's set."""
    return int(dataset._reader.attach().segment.num_orders())


def ends(dataset: ShmMultimodalIterableDataset) -> bool:
    """Return once no iteration lives."""
    return bool(wait_until(lambda: num_iterations(dataset) == 0))
