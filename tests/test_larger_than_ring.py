"""Data larger than the ring behind a stock DataLoader: every sample is right, however it is asked for."""

from __future__ import annotations

import hashlib
import random
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from conftest import opened, small_options
from support_sets import kill, prefetchers_of, supervisor_of, wait_for_end, wait_until, write_numbers, write_pictures
from support_spill import labels_of
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler

import shmloader._native as native
from shmloader import ShmMultimodalDataset

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # more workers than cores
    pytest.mark.filterwarnings("ignore:.* in an order that the prefetchers do not know:UserWarning"),
]

NUM_ROWS = 400
EVERY_ROW = list(range(NUM_ROWS))
#: The records of `sized` take some 500 KiB, those of the pictures some 400 KiB.
QUARTER = 112 << 10
WORKERS = [0, 1, 3]


def length_of(number: int) -> int:
    return 100 + number * 37 % 1900


def sized(row: dict[str, Any]) -> dict[str, Any]:
    """Records of many sizes, which nobody knows before."""
    number = row["number"]
    return {"number": number, "data": np.full(length_of(number), number % 255 + 1, np.uint8)}


def check_number(number: int, data: torch.Tensor) -> None:
    expected = torch.zeros(len(data), dtype=torch.uint8)
    expected[: length_of(number)] = number % 255 + 1
    assert torch.equal(data, expected), f"row {number}"


def rows_of(batches: Iterable[dict[str, Any]]) -> list[int]:
    """The rows of all batches, each of which must hold what belongs to its rows."""
    rows: list[int] = []
    for batch in batches:
        for number, data in zip(batch["number"].tolist(), batch["data"], strict=True):
            check_number(number, data)
            rows.append(number)
    return rows


def check_set(dataset: ShmMultimodalDataset) -> None:
    """The set works as one whose data do not fit, and its memory is in order."""
    stats = dataset.stats()
    assert 0 < stats.transit_bytes < stats.ring_bytes
    assert stats.ring_used_bytes <= stats.ring_bytes
    assert dataset._reader.attach().segment.check() is None


@pytest.fixture(scope="module")
def numbers_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_numbers(tmp_path_factory.mktemp("numbers"), NUM_ROWS)


@pytest.fixture(scope="module")
def pictures_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pictures(tmp_path_factory.mktemp("pictures"), NUM_ROWS)


def opened_numbers(path: str, **arguments: Any) -> Any:
    options = {"ring_bytes": QUARTER, "prefetchers": 2, **arguments.pop("options", {})}
    return opened(path, process=sized, options=small_options(**options), **arguments)


@pytest.fixture(scope="module")
def dataset(numbers_path: str) -> Iterator[ShmMultimodalDataset]:
    with opened_numbers(numbers_path) as made:
        yield made
        check_set(made)


# ---- every sample, however it is asked for -----------------------------------------------------------------


class ByLength:
    """Batches of rows of like length, in random sequence."""

    def __init__(self, seed: int, batch_size: int = 16) -> None:
        rows = sorted(EVERY_ROW, key=length_of)
        self.batches = [rows[i : i + batch_size] for i in range(0, NUM_ROWS, batch_size)]
        random.Random(seed).shuffle(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@pytest.mark.parametrize("num_workers", WORKERS)
def test_a_random_sampler_gives_every_row_once(dataset: Any, num_workers: int) -> None:
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(dataset, 16, sampler=sampler, num_workers=num_workers)
    assert sorted(rows_of(loader)) == EVERY_ROW


@pytest.mark.parametrize("num_workers", WORKERS)
def test_a_sequential_sampler_gives_the_rows_in_their_order(dataset: Any, num_workers: int) -> None:
    loader = DataLoader(dataset, 16, sampler=SequentialSampler(dataset), num_workers=num_workers)
    assert rows_of(loader) == EVERY_ROW


@pytest.mark.parametrize("num_workers", WORKERS)
def test_a_sampler_with_replacement_gives_what_it_drew(dataset: Any, num_workers: int) -> None:
    weights = [float(row % 7 == 0) for row in EVERY_ROW]
    sampler = WeightedRandomSampler(weights, 500, generator=torch.Generator().manual_seed(2))
    drawn = list(WeightedRandomSampler(weights, 500, generator=torch.Generator().manual_seed(2)))
    assert rows_of(DataLoader(dataset, 16, sampler=sampler, num_workers=num_workers)) == drawn
    assert max(Counter(drawn).values()) > 5


@pytest.mark.parametrize("num_workers", WORKERS)
def test_a_batch_sampler_by_length_gives_its_batches(dataset: Any, num_workers: int) -> None:
    batches = ByLength(seed=3)
    found = [rows_of([batch]) for batch in DataLoader(dataset, batch_sampler=batches, num_workers=num_workers)]
    assert found == batches.batches


@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_its_own_sampler_gives_every_row_once(dataset: Any, num_workers: int, shuffle: bool) -> None:
    sampler = dataset.sampler(shuffle, seed=4)
    loader = DataLoader(dataset, 16, sampler=sampler, num_workers=num_workers)
    epochs = [rows_of(loader) for _ in range(2)]
    assert [sorted(rows) for rows in epochs] == [EVERY_ROW] * 2
    assert (epochs[0] == EVERY_ROW, epochs[0] == epochs[1]) == (not shuffle, not shuffle)


@pytest.mark.parametrize("num_workers", WORKERS)
def test_pictures_of_known_size_are_right_in_every_epoch(pictures_path: str, num_workers: int) -> None:
    with opened(pictures_path, options=small_options(ring_bytes="96KiB", prefetchers=2)) as dataset:
        loader = DataLoader(dataset, 16, shuffle=True, num_workers=num_workers)
        for _ in range(2):
            assert sorted(labels_of(loader)) == EVERY_ROW
        check_set(dataset)


def test_single_samples_are_right_front_to_back_twice(dataset: Any) -> None:
    for _ in range(2):
        for row in EVERY_ROW:
            sample = dataset[row]
            assert int(sample["number"]) == row
            check_number(row, sample["data"])


def test_a_batch_of_all_rows_is_read(dataset: Any) -> None:
    """It is larger than the ring, so that it can only be had as copies."""
    samples = dataset.__getitems__(EVERY_ROW[::-1])
    for row, sample in zip(EVERY_ROW[::-1], samples, strict=True):
        check_number(row, sample["data"])


# ---- loaders side by side, and abandoned ---------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_loaders_with_different_orders_are_read_side_by_side(dataset: Any, num_workers: int) -> None:
    one = DataLoader(dataset, 16, sampler=dataset.sampler(seed=5), num_workers=num_workers)
    other = DataLoader(dataset, 16, sampler=dataset.sampler(seed=6), num_workers=num_workers)
    pairs = list(zip(one, other, strict=True))
    rows, other_rows = (rows_of(batches) for batches in zip(*pairs, strict=True))
    assert sorted(rows) == sorted(other_rows) == EVERY_ROW
    assert rows != other_rows


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_that_was_abandoned_is_begun_again(dataset: Any, num_workers: int) -> None:
    loader = DataLoader(dataset, 16, sampler=dataset.sampler(seed=7), num_workers=num_workers)
    for num_batches in (1, 12):
        batches = iter(loader)
        begun = rows_of(next(batches) for _ in range(num_batches))
        assert len(set(begun)) == 16 * num_batches
        del batches
    assert sorted(rows_of(loader)) == EVERY_ROW


def test_persistent_workers_read_three_epochs(dataset: Any) -> None:
    sampler = dataset.sampler(seed=8)
    loader = DataLoader(dataset, 16, sampler=sampler, num_workers=2, persistent_workers=True)
    epochs = [rows_of(loader) for _ in range(3)]
    again = dataset.sampler(seed=8)
    assert epochs == [list(again) for _ in range(3)]
    assert len({tuple(rows) for rows in epochs}) == 3


@pytest.mark.parametrize("is_looked_at", [True, False])
def test_samples_that_are_kept_for_ever_stay_right_and_stop_nobody(numbers_path: str, is_looked_at: bool) -> None:
    with opened_numbers(numbers_path) as dataset:
        loader = DataLoader(dataset, 16, sampler=dataset.sampler(seed=9), num_workers=2)
        hoard = []
        for _ in range(2):
            for batch, row in zip(loader, range(0, NUM_ROWS, 16), strict=True):
                rows_of([batch])
                sample = dataset[row]
                hoard.append((row, sample["data"] if is_looked_at else sample))
        for row, kept in hoard:
            check_number(row, kept if is_looked_at else kept["data"])
        check_set(dataset)


# ---- the same for all ------------------------------------------------------------------------------------------


def augmented(sample: dict[str, Any]) -> dict[str, Any]:
    noise = [*torch.rand(2).tolist(), random.random(), float(np.random.random())]
    return {**sample, "noise": torch.tensor(noise)}


def test_random_numbers_of_a_transform_do_not_depend_on_the_workers(numbers_path: str) -> None:
    found = []
    with opened_numbers(numbers_path, transform=augmented) as dataset:
        for num_workers in WORKERS:
            sampler = dataset.sampler(seed=10)
            noise: dict[int, Any] = {}
            for _ in range(2):
                for batch in DataLoader(dataset, 16, sampler=sampler, num_workers=num_workers):
                    for number, values in zip(batch["number"].tolist(), batch["noise"].tolist(), strict=True):
                        noise.setdefault(number, []).append(values)
            found.append(noise)
    assert found[0] == found[1] == found[2]
    assert all(first != second for first, second in found[0].values())
    assert len({tuple(first) for first, _ in found[0].values()}) == NUM_ROWS


def fingerprint(loader: Iterable[dict[str, Any]]) -> str:
    """Of all bytes of all batches, in their sequence."""
    digest = hashlib.sha256()
    for batch in loader:
        for name, value in batch.items():
            digest.update(
                f"{name} {value.dtype} {value.shape}".encode() if torch.is_tensor(value) else repr(value).encode()
            )
            digest.update(value.numpy().tobytes() if torch.is_tensor(value) else b"")
    return digest.hexdigest()


def test_batches_do_not_depend_on_workers_and_prefetchers(numbers_path: str) -> None:
    prints = {}
    for prefetchers in (1, 2, 4):
        with opened_numbers(numbers_path, options={"prefetchers": prefetchers}) as dataset:
            for num_workers in (*WORKERS, 8):
                method = "fork" if num_workers else None  # nothing is imported again
                sampler = dataset.sampler(seed=11)
                loader = DataLoader(
                    dataset, 16, sampler=sampler, num_workers=num_workers, multiprocessing_context=method
                )
                prints[prefetchers, num_workers] = fingerprint(loader)
    assert len(set(prints.values())) == 1, prints


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_divide_one_order_among_them(dataset: Any, world_size: int) -> None:
    whole = list(dataset.sampler(seed=12))
    whole += whole[: -len(whole) % world_size]
    for rank in range(world_size):
        sampler = dataset.sampler(seed=12, rank=rank, world_size=world_size)
        assert rows_of(DataLoader(dataset, 16, sampler=sampler, num_workers=1)) == whole[rank::world_size]


# ---- what is done twice ----------------------------------------------------------------------------------------


def counts(dataset: ShmMultimodalDataset) -> tuple[int, int, int]:
    stats = dataset.stats()
    return stats.samples_read, stats.commits, stats.fetched_bytes


def resident_rows(dataset: ShmMultimodalDataset) -> int:
    states = dataset._reader.attach().segment.look(array("Q", EVERY_ROW), None)
    return states.count(native.ROW_FINAL)


def test_what_stays_is_decoded_once_and_all_else_once_an_epoch(pictures_path: str) -> None:
    options = small_options(ring_bytes="192KiB", in_flight=16, ahead=8)
    with opened(pictures_path, options=options) as dataset:
        record_bytes = dataset._reader.plan.schema.most_record_bytes()
        loader = DataLoader(dataset, 8, sampler=dataset.sampler(seed=13))
        num_transit = dataset.stats().transit_bytes // record_bytes
        num_stay = (dataset.stats().ring_bytes - dataset.stats().transit_bytes) // record_bytes
        for epoch in range(4):
            before = counts(dataset)
            assert sum(len(batch["labels"]) for batch in loader) == NUM_ROWS
            reads, decodes = (now - then for now, then in zip(counts(dataset)[:2], before[:2], strict=True))
            assert reads == NUM_ROWS
            hits = reads - decodes
            assert resident_rows(dataset) == num_stay
            if epoch:
                assert num_stay <= hits <= num_stay + num_transit, f"epoch {epoch}"
        assert dataset.stats().hit_rate > 0.75 * num_stay / NUM_ROWS
        check_set(dataset)


def test_next_to_nothing_is_decoded_in_vain(pictures_path: str) -> None:
    """Neither before anybody reads nor while an order is followed, but for what is in hand at the end."""
    options = small_options(ring_bytes="192KiB", in_flight=16, ahead=8, prefetchers=2)
    with opened(pictures_path, options=options) as dataset:
        wait_until(lambda: resident_rows(dataset) > 100)
        loader = DataLoader(dataset, 8, sampler=dataset.sampler(seed=17))
        assert sum(len(batch["labels"]) for batch in loader) == NUM_ROWS
        assert NUM_ROWS <= counts(dataset)[1] <= 1.15 * NUM_ROWS


def test_chunks_of_which_all_stays_are_fetched_once(pictures_path: str) -> None:
    chunk_bytes = 16 * 100  # of 16 small pictures, about
    options = small_options(ring_bytes="192KiB", in_flight=16, ahead=8, window_bytes=2 * chunk_bytes)
    with opened(pictures_path, options=options) as dataset:
        loader = DataLoader(dataset, 8, sampler=dataset.sampler(seed=14))
        fetched = []
        for _ in range(4):
            before = counts(dataset)[2]
            assert sum(len(batch["labels"]) for batch in loader) == NUM_ROWS
            fetched.append(counts(dataset)[2] - before)
        share = dataset._reader.attach().segment.stats()["chunks_done"] / (NUM_ROWS // 16)
        assert share > 0.2
        assert all(0 < later <= (1 - share) * fetched[0] * 1.2 for later in fetched[1:]), (share, fetched)


def test_encoded_chunks_that_fit_the_window_are_fetched_once_whatever_the_order(pictures_path: str) -> None:
    with opened(pictures_path, options=small_options(ring_bytes="96KiB", prefetchers=2)) as dataset:
        loader = DataLoader(dataset, 16, sampler=RandomSampler(dataset, generator=torch.Generator().manual_seed(18)))
        assert sum(len(batch["labels"]) for batch in loader) == NUM_ROWS
        before = counts(dataset)
        for _ in range(2):
            assert sum(len(batch["labels"]) for batch in loader) == NUM_ROWS
        assert counts(dataset)[1] > before[1]
        assert counts(dataset)[2] == before[2]


# ---- kills -----------------------------------------------------------------------------------------------------


def a_prefetcher(dataset: ShmMultimodalDataset) -> int:
    return wait_until(lambda: prefetchers_of(dataset))[0]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("victim_of", [a_prefetcher, supervisor_of])
def test_epochs_in_which_a_service_is_killed_are_complete(numbers_path: str, victim_of: Any, num_workers: int) -> None:
    with opened_numbers(numbers_path) as dataset:
        loader = DataLoader(dataset, 16, sampler=dataset.sampler(seed=15), num_workers=num_workers)
        for _ in range(2):
            batches = iter(loader)
            rows = rows_of(next(batches) for _ in range(5))
            victim = victim_of(dataset)
            kill(victim)
            wait_for_end(victim)
            assert sorted(rows + rows_of(batches)) == EVERY_ROW
            del batches
        assert dataset.stats().samples_bad == 0
        check_set(dataset)


def test_a_worker_that_is_killed_with_samples_in_its_hands_keeps_nothing(numbers_path: str) -> None:
    with opened_numbers(numbers_path) as dataset:
        batches: Any = iter(DataLoader(dataset, 16, sampler=dataset.sampler(seed=16), num_workers=2))
        next(batches)
        with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):  # noqa: PT012 (by torch's SIGCHLD handler)
            kill(batches._workers[0].pid)
            rows_of(batches)
        del batches
        wait_until(lambda: dataset.stats().num_workers == 0)
        assert sorted(rows_of(DataLoader(dataset, 16, sampler=dataset.sampler(seed=16), num_workers=2))) == EVERY_ROW
        check_set(dataset)
