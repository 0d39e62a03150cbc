"""The dataset behind a stock DataLoader: whatever the loader's settings, every sample comes once and is right."""

from __future__ import annotations

import gc
import pickle
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import pytest
import torch
from conftest import NUM_ROWS, opened
from support_rows import EVERY_ROW, make_row, rows_of
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
    random_split,
)

from shmloader import ShmMultimodalDataset
from shmloader.errors import ClosedError, OptionError
from shmloader.tokens import batch_ring

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # more workers than cores
]


@pytest.fixture(scope="module")
def dataset(rows_path: str) -> Iterator[ShmMultimodalDataset]:
    with opened(rows_path, process=make_row) as made:
        yield made


# -- every sample once -----------------------------------------------------------------------------------------


def test_main_process_gives_every_row_once(dataset: Any) -> None:
    assert sorted(rows_of(DataLoader(dataset, batch_size=16, shuffle=True))) == EVERY_ROW


@pytest.mark.parametrize("num_workers", [1, 2, 8])
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_give_every_row_once(dataset: Any, method: str, num_workers: int) -> None:
    """Two epochs of the same workers; batches in order."""
    loader = DataLoader(
        dataset, batch_size=16, num_workers=num_workers, multiprocessing_context=method, persistent_workers=True
    )
    for _ in range(2):
        assert rows_of(loader) == EVERY_ROW


@pytest.mark.parametrize("persistent", [False, True])
def test_shuffled_epochs_give_every_row_once(dataset: Any, persistent: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(
        dataset, batch_size=16, shuffle=True, num_workers=2, generator=generator, persistent_workers=persistent
    )
    epochs = [rows_of(loader) for _ in range(3)]
    assert [sorted(rows) for rows in epochs] == [EVERY_ROW] * 3
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("prefetch_factor", [1, 4])
def test_prefetch_factor(dataset: Any, prefetch_factor: int) -> None:
    assert rows_of(DataLoader(dataset, batch_size=16, num_workers=2, prefetch_factor=prefetch_factor)) == EVERY_ROW


def test_batches_out_of_order(dataset: Any) -> None:
    try:
        loader = DataLoader(dataset, batch_size=16, num_workers=2, in_order=False)
    except TypeError:
        pytest.skip("this torch has no in_order")
    assert sorted(rows_of(loader)) == EVERY_ROW


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_automatic_batching(dataset: Any, num_workers: int) -> None:
    samples = list(DataLoader(dataset, batch_size=None, num_workers=num_workers))
    assert rows_of(samples) == EVERY_ROW
    assert samples[7]["x"].shape == ()
    assert [len(sample["tail"]) for sample in samples[:4]] == [0, 1, 2, 3]


def test_batch_sampler(dataset: Any) -> None:
    sampler = BatchSampler(SequentialSampler(dataset), batch_size=16, drop_last=False)
    assert rows_of(DataLoader(dataset, batch_sampler=sampler, num_workers=2)) == EVERY_ROW


def test_batches_of_a_sampler_that_gives_whole_batches(dataset: Any) -> None:
    """``batch_size=None`` with a batch sampler as the sampler: the dataset's ``__getitems__`` has no part in it."""
    loader = DataLoader(dataset, sampler=SequentialSampler(dataset), batch_size=None, num_workers=1)
    assert rows_of(loader) == EVERY_ROW


@pytest.mark.parametrize("num_workers", [0, 2])
def test_subset(dataset: Any, num_workers: int) -> None:
    chosen = [5, 3, 150, 3]
    assert rows_of(DataLoader(Subset(dataset, chosen), batch_size=3, num_workers=num_workers)) == chosen


def test_random_split(dataset: Any) -> None:
    parts = random_split(dataset, [0.75, 0.25], torch.Generator().manual_seed(0))
    seen = [rows_of(DataLoader(part, batch_size=16, num_workers=2)) for part in parts]
    assert [len(rows) for rows in seen] == [150, 50]
    assert sorted(seen[0] + seen[1]) == EVERY_ROW


def test_concat_with_itself(dataset: Any) -> None:
    both = ConcatDataset([dataset, Subset(dataset, range(10))])
    assert rows_of(DataLoader(both, batch_size=16, num_workers=2)) == EVERY_ROW + EVERY_ROW[:10]


def test_sampling_with_replacement(dataset: Any) -> None:
    weights = [0.0] * 100 + [1.0] * 100
    generator = torch.Generator().manual_seed(1)
    sampler = WeightedRandomSampler(weights, 300, replacement=True, generator=generator)
    rows = rows_of(DataLoader(dataset, batch_size=16, sampler=sampler, num_workers=2))
    assert len(rows) == 300
    assert min(rows) >= 100
    assert max(Counter(rows).values()) > 1


def test_several_loaders_at_once(dataset: Any) -> None:
    loaders = [DataLoader(dataset, batch_size=16, num_workers=n, shuffle=n == 1) for n in (0, 1, 2)]
    batches: list[list[Any]] = [[], [], []]
    for together in zip(*loaders, strict=True):
        for seen, batch in zip(batches, together, strict=True):
            seen.append(batch)
    assert [sorted(rows_of(seen)) for seen in batches] == [EVERY_ROW] * 3


def test_nested_iteration_of_one_loader(dataset: Any) -> None:
    loader = DataLoader(Subset(dataset, range(48)), batch_size=16, num_workers=1)
    for outer in loader:
        assert rows_of(loader) == EVERY_ROW[:48]
        rows_of([outer])


def test_pinned_batches_free_their_slots(dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pin that copies, as a real one does: the slot is free as soon as the batch is pinned."""
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self.clone())
    pinned = [pin_memory(batch) for batch in DataLoader(dataset, batch_size=16, num_workers=2)]
    gc.collect()
    ring = batch_ring()
    assert ring is not None
    assert ring.ring.stats()["num_held"] == 0
    assert {type(batch) for batch in pinned} == {dict}
    assert rows_of(pinned) == EVERY_ROW


def test_pinned_samples_are_right(dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self.clone())
    pinned = [pin_memory(dataset[i]) for i in range(10)]
    assert rows_of(pinned) == EVERY_ROW[:10]
    assert not dataset._reader.attach().mapping.holds(pinned[3]["block"].data_ptr())


def test_every_sample_is_committed_once(rows_path: str) -> None:
    """Three epochs of eight workers each, from the first row on."""
    with opened(rows_path, process=make_row) as dataset:
        for _ in range(3):
            loader = DataLoader(dataset, batch_size=16, shuffle=True, num_workers=8)
            assert sorted(rows_of(loader)) == EVERY_ROW
        stats = dataset.stats()
        assert stats.commits == stats.samples_ready == NUM_ROWS
        assert stats.samples_bad == 0
        assert stats.decodes_per_sample == 1.0


# -- indices ---------------------------------------------------------------------------------------------------


def test_iteration_gives_every_row_once(dataset: Any) -> None:
    assert rows_of(dataset) == EVERY_ROW
    assert len(dataset) == NUM_ROWS


# -- life and death --------------------------------------------------------------------------------------------


def test_closed_dataset_raises(rows_path: str) -> None:
    with opened(rows_path, process=make_row) as dataset:
        loader = DataLoader(dataset, batch_size=16)
        dataset.close()
        dataset.close()
        for use in (
            lambda: dataset[0],
            lambda: next(iter(loader)),
            lambda: dataset.stats(),
            lambda: dataset.set_epoch(1),
            lambda: dataset.__enter__(),
        ):
            with pytest.raises(ClosedError, match="was closed"):
                use()
        assert "closed" in repr(dataset)
        assert len(dataset) == NUM_ROWS


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_closed_dataset_raise(rows_path: str, method: str) -> None:
    with opened(rows_path, process=make_row) as dataset:
        dataset.close()
        with pytest.raises(ClosedError, match="was closed"):
            list(DataLoader(dataset, batch_size=16, num_workers=1, multiprocessing_context=method))


def test_closing_in_a_worker_closes_nothing_of_its_parent(dataset: Any) -> None:
    def close(samples: list[Any]) -> Any:
        dataset.close()
        return samples[0]

    assert len(list(DataLoader(Subset(dataset, range(4)), batch_size=2, num_workers=1, collate_fn=close))) == 2
    assert dataset[0]["x"] == 0


@pytest.mark.parametrize("travel", [pickle.dumps, __import__("copy").deepcopy, __import__("copy").copy])
def test_dataset_cannot_be_pickled_but_for_a_spawned_process(dataset: Any, travel: Callable[[Any], Any]) -> None:
    threads = threading.active_count()
    with pytest.raises(TypeError, match="only on its way to a process that multiprocessing spawns"):
        travel(dataset)
    assert threading.active_count() == threads


def test_transform_that_cannot_travel_is_an_error_that_names_it(rows_path: str, make_dataset: Any) -> None:
    lock = threading.Lock()
    dataset = make_dataset(
        rows_path, process=make_row, transform=lambda sample: {**sample, "is_free": not lock.locked()}
    )
    loader = DataLoader(dataset, num_workers=1, multiprocessing_context="spawn")
    with pytest.raises(OptionError, match="transform= cannot be sent"):
        iter(loader)
    assert dataset[1]["x"] == 1


def test_threads_may_read_at_once(rows_path: str) -> None:
    """From the start, so that all of them wait for samples; and through loaders with workers."""
    with opened(rows_path, process=make_row) as dataset:
        seen: list[list[int]] = []
        barrier = threading.Barrier(6)

        def read(k: int) -> None:
            barrier.wait()
            order = random.Random(k).sample(EVERY_ROW, NUM_ROWS)
            seen.append(sorted(rows_of(DataLoader(Subset(dataset, order), batch_size=16, num_workers=0))))

        threads = [threading.Thread(target=read, args=(k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [EVERY_ROW] * 6
