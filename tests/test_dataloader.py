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
import numpy as np
import pytest
import torch
from conftest import NUM_ROWS, opened
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


def make_row(row: dict[str, Any]) -> dict[str, Any]:
    return {"x": row["x"], "block": np.full((2, 50), row["x"], np.float32), "tail": np.arange(row["x"] % 4)}


@pytest.fixture(scope="module")
def dataset(rows_path: str) -> Iterator[ShmMultimodalDataset]:
    with opened(rows_path, process=make_row) as made:
        yield made


def rows_of(batches: Any) -> list[int]:
    """The rows of all batches, each of which must hold what belongs to its rows."""
    rows: list[int] = []
    for batch in batches:
        x = batch["x"].reshape(-1)
        assert torch.equal(batch["block"].reshape(-1, 2, 50)[:, 1, 49], x.float())
        rows += x.tolist()
    return rows


EVERY_ROW = list(range(NUM_ROWS))


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


@pytest.mark.parametrize("index", [-1, -NUM_ROWS, 0, np.int64(3), np.uint8(3), torch.tensor(3), True])
def test_index_as_of_a_list(dataset: Any, index: Any) -> None:
    assert dataset[index]["x"] == EVERY_ROW[index]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, EVERY_ROW)], ids=["itself", "subset"])
def test_a_batch_sampler_may_be_the_sampler(dataset: Any, wrap: Any, num_workers: int) -> None:
    sampler = BatchSampler(SequentialSampler(dataset), 16, drop_last=False)
    batches = list(DataLoader(wrap(dataset), sampler=sampler, batch_size=None, num_workers=num_workers))
    assert len(batches) == len(sampler)
    assert rows_of(batches) == EVERY_ROW


@pytest.mark.parametrize(
    "index",
    [[0, 1, -1], (0, 1, -1), np.array([0, 1, -1]), torch.tensor([0, 1, -1]), [torch.tensor(0), np.int64(1), -1]],
)
def test_several_indices_give_their_batch(dataset: Any, index: Any) -> None:
    assert rows_of([dataset[index]]) == [0, 1, NUM_ROWS - 1]


def test_a_slice_gives_its_batch(dataset: Any) -> None:
    assert rows_of([dataset[3:6]]) == [3, 4, 5]
    assert rows_of([dataset[-1:-NUM_ROWS:-2]]) == EVERY_ROW[:0:-2]
    assert rows_of([dataset[torch.tensor([3])]]) == [3]


@pytest.mark.parametrize("index", [slice(5, 5), [], np.array([], np.int64)])
def test_no_indices_make_no_batch(dataset: Any, index: Any) -> None:
    with pytest.raises(IndexError, match="which makes no batch"):
        dataset[index]


@pytest.mark.parametrize("index", [NUM_ROWS, -NUM_ROWS - 1, 10**30, -(10**30)])
def test_index_out_of_range(dataset: Any, index: int) -> None:
    with pytest.raises(IndexError, match=rf"index {index} is out of range: .* has {NUM_ROWS} samples"):
        dataset[index]


def test_one_index_out_of_range_among_many(dataset: Any) -> None:
    with pytest.raises(IndexError, match=rf"index {NUM_ROWS} "):
        dataset.__getitems__([0, -1, NUM_ROWS])


@pytest.mark.parametrize("index", [slice(0, 3.5), 1.0, "1", None, [1, 2.0], [True, False], np.array([True])])
def test_index_of_a_wrong_type(dataset: Any, index: Any) -> None:
    with pytest.raises(TypeError, match=r"index must be a whole number|integer|slice indices"):
        dataset[index]


def test_no_indices_give_no_samples(dataset: Any) -> None:
    assert dataset.__getitems__([]) == []


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


# -- transform -------------------------------------------------------------------------------------------------


def noise(sample: dict[str, Any]) -> dict[str, Any]:
    """One number from each of the global generators."""
    sample["noise"] = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)
    sample["block"].add_(0)  # private, so this is allowed
    return sample


@pytest.fixture
def noisy(rows_path: str, make_dataset: Any) -> ShmMultimodalDataset:
    made: ShmMultimodalDataset = make_dataset(rows_path, process=make_row, transform=noise)
    return made


def noises(dataset: Any, num_workers: int, **kwargs: Any) -> torch.Tensor:
    """Of one epoch, by row."""
    batches = list(DataLoader(dataset, batch_size=16, num_workers=num_workers, **kwargs))
    assert rows_of(batches) == EVERY_ROW
    return torch.cat([batch["noise"] for batch in batches])


def test_transform_does_not_depend_on_the_number_of_workers(noisy: Any) -> None:
    epochs = []
    for num_workers in (0, 1, 3):
        noisy.set_epoch(4)
        epochs.append(noises(noisy, num_workers))
    assert torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[0], epochs[2])
    assert len(epochs[0].unique()) == 3 * NUM_ROWS


def test_transform_without_set_epoch_is_new_in_each_epoch(rows_path: str, make_dataset: Any) -> None:
    """And the k-th epoch is the same for any number of workers."""
    by_workers = []
    for num_workers in (0, 3):
        dataset = make_dataset(rows_path, process=make_row, transform=noise)
        by_workers.append([noises(dataset, num_workers) for _ in range(2)])
    assert torch.equal(by_workers[0][0], by_workers[1][0])
    assert torch.equal(by_workers[0][1], by_workers[1][1])
    assert not (by_workers[0][0] == by_workers[0][1]).any()


def test_transform_follows_the_seed(noisy: Any) -> None:
    noisy.set_epoch(0)
    first = noises(noisy, 0)
    noisy.seed = 1
    assert not (noises(noisy, 1) == first).any()


def test_set_epoch_reaches_persistent_workers(noisy: Any) -> None:
    """Also when the workers started before it was ever called."""
    loader = DataLoader(noisy, batch_size=16, num_workers=2, persistent_workers=True)
    epochs: list[torch.Tensor] = []
    for epoch in (None, 7, 8, 7):
        if epoch is not None:
            noisy.set_epoch(epoch)
        epochs.append(torch.cat([batch["noise"] for batch in loader]))
    assert torch.equal(epochs[1], epochs[3])
    assert not (epochs[1] == epochs[2]).any()
    assert not (epochs[1] == epochs[0]).any()


def test_epoch_zero_is_an_epoch(noisy: Any) -> None:
    noisy.set_epoch(0)
    first = noises(noisy, 0)
    noisy.set_epoch(0)
    assert torch.equal(noises(noisy, 0), first)


@pytest.mark.parametrize("epoch", [-1, 1 << 64])
def test_epoch_out_of_range_is_an_error(dataset: Any, epoch: int) -> None:
    with pytest.raises(OptionError, match="epoch="):
        dataset.set_epoch(epoch)


def test_transform_leaves_the_generators_of_its_process_alone(noisy: Any) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seed() -> None:
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    seed()
    expected = draw()
    seed()
    noisy[3]
    assert draw() == expected


def test_transform_has_private_copies(noisy: Any) -> None:
    noisy[3]["block"].fill_(-1)
    assert (noisy[3]["block"] == 3).all()


def test_transformed_samples_are_padded_as_the_schema_says(noisy: Any) -> None:
    batch = next(iter(DataLoader(noisy, batch_size=4)))
    assert batch["tail"].tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 1, 2]]


def test_transform_that_returns_no_dict_is_an_error(rows_path: str, make_dataset: Any) -> None:
    dataset = make_dataset(rows_path, process=make_row, transform=lambda sample: None)
    with pytest.raises(OptionError, match=r"transform= must return a dict, but got NoneType \(sample 3 of"):
        dataset[3]


def test_error_of_a_transform_names_the_sample(rows_path: str, make_dataset: Any) -> None:
    dataset = make_dataset(rows_path, process=make_row, transform=lambda sample: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        dataset[3]
    assert "sample 3 of" in caught.value.__notes__[0]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_lambdas_travel_to_spawned_workers(rows_path: str, make_dataset: Any, method: str) -> None:
    dataset = make_dataset(
        rows_path, process=lambda row: {"x": row["x"] * 2}, transform=lambda sample: {"y": sample["x"] + 1}
    )
    loader = DataLoader(dataset, batch_size=16, num_workers=2, multiprocessing_context=method)
    assert torch.cat([batch["y"] for batch in loader]).tolist() == [2 * x + 1 for x in EVERY_ROW]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_two_datasets_go_to_one_spawned_worker(rows_path: str, make_dataset: Any, method: str) -> None:
    pair = ConcatDataset([make_dataset(rows_path, process=make_row) for _ in range(2)])
    loader = DataLoader(pair, batch_size=50, num_workers=1, multiprocessing_context=method)
    seen = [int(x) for batch in loader for x in batch["x"]]
    assert seen == [*range(NUM_ROWS), *range(NUM_ROWS)]


def test_a_transform_may_read_another_dataset_that_has_one(rows_path: str, make_dataset: Any) -> None:
    other = make_dataset(rows_path, process=make_row, transform=lambda sample: sample)
    dataset = make_dataset(
        rows_path,
        process=make_row,
        transform=lambda sample: {"x": sample["x"], "pair": other[int(sample["x"]) + 1]["x"]},
    )
    assert int(dataset[3]["pair"]) == 4


def test_another_seed_gives_other_random_numbers(rows_path: str, make_dataset: Any) -> None:
    def draw(sample: dict[str, Any]) -> dict[str, Any]:
        return {"drawn": torch.rand(())}

    values = {
        float(make_dataset(rows_path, process=make_row, transform=draw, seed=seed)[0]["drawn"]) for seed in (0, 0, 1)
    }
    assert len(values) == 2
