"""Datasets in processes of every start method, in other datasets, and in several threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NUM_ROWS, opened
from support_sets import in_child, join, run_script, write_numbers
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from shmloader import ShmMultimodalDataset, ShmMultimodalIterableDataset

ROWS = list(range(NUM_ROWS))


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_numbers(tmp_path_factory.mktemp("numbers") / "d", NUM_ROWS, 32)


def plain(row: dict[str, Any]) -> dict[str, Any]:
    return {"number": row["number"]}


def negative(row: dict[str, Any]) -> dict[str, Any]:
    return {"number": -row["number"]}


@pytest.fixture(scope="module")
def dataset(name: str) -> Iterator[ShmMultimodalDataset]:
    with opened(name, process=plain) as dataset:
        yield dataset


@pytest.fixture(scope="module")
def other(name: str) -> Iterator[ShmMultimodalDataset]:
    with opened(name, process=negative) as dataset:
        yield dataset


@pytest.fixture(scope="module")
def stream(name: str) -> Iterator[ShmMultimodalIterableDataset]:
    with opened(name, kind=ShmMultimodalIterableDataset, process=plain) as dataset:
        yield dataset


def numbers(batches: Any) -> list[int]:
    return [number for batch in batches for number in batch["number"].reshape(-1).tolist()]


# ---- the process's start method ------------------------------------------------------------------------------

SCRIPT = """
import multiprocessing, pickle, sys
from concurrent.futures import ProcessPoolExecutor
from torch.utils.data import DataLoader
from shmloader import Options, ShmMultimodalDataset, ShmMultimodalIterableDataset

def count(dataset, answers=None):
    found = sorted(int(sample["number"]) for sample in dataset)
    if answers is not None:
        answers.put(found)
    return found

def keep(dataset):
    global kept
    kept = dataset

def read(rows):
    return [int(sample["number"]) for sample in kept.__getitems__(rows)]

def halves(rows):
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]

def main(method, name, ways):
    multiprocessing.set_start_method(method)
    arguments = {"dataset_name": name, "process": lambda row: {"number": row["number"]},
                 "options": Options(ring_bytes="1MiB", prefetchers=1, timeout_s=40)}
    with ShmMultimodalDataset(**arguments) as dataset, ShmMultimodalIterableDataset(**arguments) as stream:
        rows = list(range(len(dataset)))
        if "loader" in ways:
            for each in (dataset, stream):
                loader = DataLoader(each, 8, num_workers=2, persistent_workers=True)
                for _ in range(2):
                    assert sorted(n for batch in loader for n in batch["number"].tolist()) == rows
                del loader
        if "process" in ways:
            for each in (dataset, stream):
                answers = multiprocessing.SimpleQueue()
                process = multiprocessing.Process(target=count, args=(each, answers), daemon=each is stream)
                process.start()
                assert answers.get() == rows
                process.join()
                assert process.exitcode == 0
                process.close()
                answers.close()
        if "pool" in ways:
            with multiprocessing.Pool(2, keep, (dataset,)) as pool:
                assert sum(pool.map(read, halves(rows), 1), []) == rows
                pool.close()
                pool.join()
        if "executor" in ways:
            with ProcessPoolExecutor(2, initializer=keep, initargs=(dataset,)) as pool:
                assert sum(pool.map(read, halves(rows)), []) == rows
        assert count(dataset) == rows
        assert dataset.stats().commits == len(rows)
    print("done")

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("method", "ways"),
    [
        ("fork", "loader process pool executor"),
        ("spawn", "loader pool"),
        ("forkserver", "loader process executor"),
    ],
)
def test_a_program_with_this_start_method_reads_each_sample_once_and_ends_silently(
    tmp_path: Path, name: str, method: str, ways: str
) -> None:
    status, out, err = run_script(tmp_path, SCRIPT, method, name, ways, seconds=110)
    assert (status, out, err) == (0, "done\n", "")


# ---- several at once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_order", [True, False])
def test_two_datasets_zipped(dataset: Any, other: Any, stream: Any, in_order: bool) -> None:
    loaders = [DataLoader(each, 8, num_workers=2, in_order=in_order) for each in (dataset, other, stream)]
    found: list[list[int]] = [[], [], []]
    for batches in zip_longest(*loaders):  # two workers of a stream end in batches of their own
        for batch, kept in zip(batches, found, strict=True):
            kept += [] if batch is None else batch["number"].tolist()
    assert sorted(found[0]) == ROWS
    assert sorted(found[1]) == sorted(-row for row in ROWS)
    assert sorted(found[2]) == ROWS
    if in_order:
        assert found[0] == [-number for number in found[1]] == ROWS


def test_a_loader_within_the_loop_of_another(dataset: Any, other: Any) -> None:
    outer = DataLoader(dataset, 50, num_workers=1)
    inner = DataLoader(other, 100, num_workers=1)
    for i, batch in enumerate(outer):
        assert numbers(inner) == [-row for row in ROWS]
        assert batch["number"].tolist() == ROWS[50 * i : 50 * (i + 1)]


class Pairs(Dataset[Any]):
    """Samples of one dataset, each with that of another from the other end."""

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, i: int) -> Any:
        return {"a": self.first[i]["number"], "b": self.second[len(self) - 1 - i]["number"]}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataset_within_another_one(dataset: Any, other: Any, num_workers: int) -> None:
    batches = list(DataLoader(Pairs(dataset, other), 16, num_workers=num_workers))
    assert torch.cat([batch["a"] for batch in batches]).tolist() == ROWS
    assert torch.cat([batch["b"] for batch in batches]).tolist() == [-row for row in reversed(ROWS)]


class MadeInside(IterableDataset[Any]):
    """A dataset that each worker makes for itself."""

    def __init__(self, name: str, kind: Any) -> None:
        self.name, self.kind = name, kind

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        with opened(self.name, kind=self.kind, process=plain) as dataset:
            if isinstance(dataset, ShmMultimodalDataset):
                yield from (dataset[i] for i in range(worker.id, len(dataset), worker.num_workers))
            else:
                yield from dataset


@pytest.mark.parametrize("kind", [ShmMultimodalDataset, ShmMultimodalIterableDataset])
def test_a_dataset_that_is_made_in_a_worker(name: str, kind: Any) -> None:
    loader = DataLoader(MadeInside(name, kind), 16, num_workers=2)
    assert sorted(numbers(loader)) == ROWS


def test_threads_read_at_once(dataset: Any) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: int(dataset[i]["number"]), ROWS)) == ROWS


def test_iterators_in_several_threads(dataset: Any, stream: Any) -> None:
    """Without workers: those that a thread forks end with status 1 in Python 3.11, whatever the dataset."""
    found: dict[int, list[int]] = {}
    barrier = threading.Barrier(4)

    def read(k: int) -> None:
        barrier.wait()
        found[k] = numbers(DataLoader((dataset, stream)[k % 2], 16))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    assert found == dict.fromkeys(range(4), ROWS)


def test_children_forked_by_hand_read_and_their_parent_goes_on(dataset: Any, stream: Any) -> None:
    assert numbers(dataset) == ROWS

    def work() -> None:
        assert numbers(dataset) == ROWS
        assert numbers(stream) == ROWS
        dataset.close()
        assert os.getpid() != dataset._reader.owner_pid

    children = [in_child(work) for _ in range(2)]
    assert numbers(stream) == ROWS
    assert [join(child) for child in children] == [0, 0]
    assert numbers(dataset) == ROWS
    assert not dataset._reader.is_closed
