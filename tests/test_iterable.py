"""The iterable dataset behind a stock DataLoader: all workers together give each position of the stream once."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from conftest import run_script, small_options
from datasets import Dataset, Features, IterableDataset, Value
from support_sets import Gate, number, wait_at, wait_until, write_numbers, write_table
from support_streams import (
    counted,
    ends,
    num_iterations,
    numbers,
    open_stream,
    stream_of,
    with_worker,
)
from torch.utils.data import DataLoader

from shmloader import ShmMultimodalDataset, ShmMultimodalIterableDataset
from shmloader.errors import ClosedError, EmptyDatasetError, OptionError, RingError, SourceError

for name in ("support_streams", __name__):
    cloudpickle.register_pickle_by_value(sys.modules[name])
pytestmark = [
    pytest.mark.timeout(100),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # more workers than cores
]

NUM = 1000  # no multiple of the rows of a chunk, nor of a number of workers


@pytest.fixture(scope="module")
def dataset() -> Iterator[ShmMultimodalIterableDataset]:
    """A stream of `NUM` numbers, one shard, whose length nobody tells; two prefetchers."""
    with open_stream(stream_of(counted, num=NUM), options=small_options(prefetchers=2)) as made:
        yield made


@pytest.fixture(scope="module")
def of_one_prefetcher() -> Iterator[ShmMultimodalIterableDataset]:
    """The same stream, and a single prefetcher."""
    with open_stream(stream_of(counted, num=NUM)) as made:
        yield made


def loader(dataset: Any, num_workers: int = 2, batch_size: int | None = None, **kwargs: Any) -> DataLoader[Any]:
    method = kwargs.pop("method", "fork") if num_workers else None
    return DataLoader(dataset, batch_size, num_workers=num_workers, multiprocessing_context=method, **kwargs)


# -- who gets what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["dataset", "of_one_prefetcher"])
@pytest.mark.parametrize("num_workers", [0, 1, 3, 8])
def test_worker_w_of_n_gives_every_nth_position_from_w_on(
    request: pytest.FixtureRequest, which: str, num_workers: int
) -> None:
    """Also where there are more workers than the stream has shards."""
    dataset = request.getfixturevalue(which)
    found: dict[int, list[int]] = {}
    for worker, value in loader(dataset, num_workers, collate_fn=with_worker):
        found.setdefault(worker, []).append(value)
    if num_workers == 0:
        assert found == {-1: list(range(NUM))}
    else:
        assert found == {w: list(range(w, NUM, num_workers)) for w in range(num_workers)}


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_of_any_start_method_share_the_stream(dataset: Any, method: str) -> None:
    assert sorted(numbers(loader(dataset, 3, method=method))) == list(range(NUM))


@pytest.mark.parametrize("num_workers", [0, 3])
def test_batches_hold_each_sample_once(dataset: Any, num_workers: int) -> None:
    batches = list(loader(dataset, num_workers, 16))
    assert sorted(numbers(batches)) == list(range(NUM))
    assert batches[0]["source"] == [dataset.name] * 16


def test_more_workers_than_samples(dataset: Any) -> None:
    with open_stream(stream_of(counted, num=3)) as made:
        assert numbers(loader(made, 8)) == [0, 1, 2]


def test_an_iteration_of_one_reader_is_over_with_its_last_sample(dataset: Any) -> None:
    for num_workers in (0, 1):
        samples = iter(loader(dataset, num_workers, prefetch_factor=2 if num_workers else None))
        assert numbers(samples) == list(range(NUM))
        wait_until(lambda: num_iterations(dataset) == 0)


def test_each_iteration_begins_at_the_front(dataset: Any) -> None:
    for _ in range(3):
        assert numbers(dataset) == list(range(NUM))


def test_persistent_workers_give_each_sample_once_in_each_epoch(dataset: Any) -> None:
    batches = loader(dataset, 2, 16, persistent_workers=True)
    for _ in range(3):
        assert sorted(numbers(batches)) == list(range(NUM))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_iterators_at_once_each_give_the_whole(dataset: Any, num_workers: int) -> None:
    first, second = [], []
    for a, b in zip(loader(dataset, num_workers), loader(dataset, num_workers), strict=True):
        first += numbers([a])
        second += numbers([b])
    assert first == second == list(range(NUM))


def test_loaders_with_the_same_seed_each_give_the_whole(dataset: Any) -> None:
    """Their workers' seeds are the same, and so are the keys by which these find one another."""
    loaders = [loader(dataset, 2, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    for a, b in zip(*loaders, strict=True):
        assert numbers([a]) == numbers([b])
    assert sorted(numbers(loaders[0])) == list(range(NUM))


def test_a_worker_that_starts_when_the_others_are_done_joins_their_iteration(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")

    def be_late(worker: int) -> None:
        if worker == 1:
            wait_at(gate.path)

    with open_stream(stream_of(counted, num=100)) as dataset:
        samples = iter(loader(dataset, 2, worker_init_fn=be_late, prefetch_factor=100))
        wait_until(lambda: dataset.stats().samples_read == 50)  # all of worker 0's
        gate.open()
        assert numbers(samples) == list(range(100))
        assert dataset.stats().commits == 100


# -- where it ends ---------------------------------------------------------------------------------------------


def test_an_endless_stream_ends_after_max_samples_over_all_workers() -> None:
    with open_stream(stream_of(counted, num=None), max_samples=500) as dataset:
        for num_workers in (0, 3):
            assert sorted(numbers(loader(dataset, num_workers))) == list(range(500))


def test_a_stream_that_repeats_for_ever_can_be_iterated_over() -> None:
    stream = Dataset.from_dict({"number": list(range(100))}).to_iterable_dataset().repeat(None)
    with open_stream(stream) as dataset:
        assert numbers(itertools.islice(dataset, 250)) == [i % 100 for i in range(250)]


def test_the_map_style_dataset_names_this_one_as_the_remedy_for_a_stream_without_end() -> None:
    stream = Dataset.from_dict({"number": list(range(100))}).to_iterable_dataset().repeat(None)
    with pytest.raises(SourceError, match="ShmMultimodalIterableDataset"):
        ShmMultimodalDataset(dataset_name=stream, process=number, options=small_options())


def test_max_samples_beyond_the_end_changes_nothing() -> None:
    with open_stream(stream_of(counted, num=70), max_samples=10**6) as dataset:
        assert sorted(numbers(loader(dataset, 2))) == list(range(70))


def test_an_iteration_that_is_left_ends_and_the_next_begins_at_the_front() -> None:
    with open_stream(stream_of(counted, num=None)) as dataset:
        for num_workers in (0, 2, 0, 2):
            batches = iter(loader(dataset, num_workers, 16))
            first = numbers([next(batches)])
            assert first[0] == 0
            assert num_iterations(dataset) >= 1
            del batches
            ends(dataset)


def test_an_empty_stream_gives_nothing() -> None:
    with open_stream(stream_of(counted, num=0)) as dataset:
        for num_workers in (0, 2):
            assert list(loader(dataset, num_workers)) == []


def test_an_empty_stream_that_does_not_know_its_columns_is_an_error() -> None:
    stream = IterableDataset.from_generator(counted, gen_kwargs={"num": 0})
    with pytest.raises(EmptyDatasetError):
        ShmMultimodalIterableDataset(dataset_name=stream, process=number, options=small_options())


@pytest.mark.parametrize("num", [1, 64, 65])
def test_streams_around_the_size_of_a_chunk(num: int) -> None:
    with open_stream(stream_of(counted, num=num)) as dataset:
        assert numbers(dataset) == numbers(loader(dataset, 2)) == list(range(num))


# -- sources whose length is known -----------------------------------------------------------------------------


def test_parquet_that_fits_the_ring_is_decoded_once(tmp_path: Path) -> None:
    with open_stream(write_numbers(tmp_path / "d", 300)) as dataset:
        for num_workers in (0, 3):
            assert sorted(numbers(loader(dataset, num_workers))) == list(range(300))
        stats = dataset.stats()
        assert (stats.num_rows, stats.commits) == (300, 300)


def test_where_all_samples_stay_no_order_is_needed(tmp_path: Path) -> None:
    name = write_table(tmp_path / "d", {"text": ["x" * (i % 7) for i in range(100)], "label": list(range(100))})
    with open_stream(name, process=None) as dataset:
        for num_workers in (0, 3):
            assert sorted(int(s["labels"]) for s in loader(dataset, num_workers)) == list(range(100))
        stats = dataset.stats()
        assert (stats.transit_bytes, stats.commits, num_iterations(dataset)) == (0, 100, 0)


def blocks(row: dict[str, Any]) -> dict[str, Any]:
    return {"number": row["number"], "block": torch.full((1000,), row["number"])}


def test_parquet_that_is_larger_than_the_ring_is_read_from_it_in_part(tmp_path: Path) -> None:
    name = write_numbers(tmp_path / "d", 600)
    # Sizes of samples are not known to begin with, so that a quarter of the ring is transit: 70 of the 600 stay.
    with open_stream(name, process=blocks, options=small_options(ring_bytes="1MiB", prefetchers=2)) as dataset:
        for num_workers in (0, 3, 0, 3):
            assert sorted(numbers(loader(dataset, num_workers))) == list(range(600))
        stats = dataset.stats()
        assert stats.transit_bytes > 0
        assert 600 < stats.commits < 4 * 600


def test_max_samples_of_a_source_of_known_length(tmp_path: Path) -> None:
    name = write_numbers(tmp_path / "d", 300, rows_per_chunk=64)
    with open_stream(name, max_samples=100) as dataset:
        for num_workers in (0, 2):
            assert sorted(numbers(loader(dataset, num_workers))) == list(range(100))
        assert dataset.stats().num_rows == 100


def test_max_samples_of_a_loaded_dataset() -> None:
    with open_stream(Dataset.from_dict({"number": list(range(300))}), max_samples=100) as dataset:
        assert numbers(dataset) == list(range(100))


def test_a_stream_whose_card_tells_its_rows_is_of_known_length(tmp_path: Path) -> None:
    from datasets.splits import SplitDict, SplitInfo

    stream = Dataset.from_dict({"number": list(range(150))}).to_iterable_dataset()
    stream.info.splits = SplitDict({"train": SplitInfo("train", num_bytes=1200, num_examples=150)})
    stream._split = "train"
    for most, expected in ((None, 150), (100, 100)):
        with open_stream(stream, max_samples=most) as dataset:
            assert dataset.stats().num_rows == expected
            assert sorted(numbers(loader(dataset, 2))) == list(range(expected))


# -- samples ---------------------------------------------------------------------------------------------------


def drawn(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "drawn": torch.tensor(random.random())}


def test_a_transform_depends_on_seed_epoch_and_position_alone() -> None:
    def all_drawn(dataset: Any, num_workers: int) -> list[float]:
        found = {int(s["number"]): float(s["drawn"]) for s in loader(dataset, num_workers)}
        return [found[i] for i in range(200)]

    stream = stream_of(counted, num=200)
    with open_stream(stream, transform=drawn) as dataset, open_stream(stream, transform=drawn, seed=1) as other:
        first = all_drawn(dataset, 0)
        assert all_drawn(dataset, 3) == first
        assert len(set(first)) == 200
        dataset.set_epoch(1)
        assert all_drawn(dataset, 2) != first
        dataset.set_epoch(0)
        assert all_drawn(dataset, 2) == first
        assert all_drawn(other, 0) != first


def test_samples_are_views_or_private_copies_as_asked() -> None:
    with (
        open_stream(stream_of(counted, num=10)) as dataset,
        open_stream(stream_of(counted, num=10), writable=True) as writable,
    ):
        view, copy = next(iter(dataset))["number"], next(iter(writable))["number"]
        assert dataset._reader.attach().mapping.holds(view.data_ptr())
        assert not writable._reader.attach().mapping.holds(copy.data_ptr())


def test_samples_stay_as_they_are_while_the_stream_goes_on() -> None:
    """All of them are kept: those beyond this process's share of transit are copies."""
    options = small_options(ring_bytes="1MiB")
    with open_stream(stream_of(counted, num=2000), process=blocks, options=options) as dataset:
        samples = list(dataset)
        assert numbers(samples) == list(range(2000))
        assert all(bool((s["block"] == i).all()) for i, s in enumerate(samples))


def test_texts_of_a_stream_without_process() -> None:
    def rows() -> Iterator[dict[str, Any]]:
        for i in range(100):
            yield {"text": "x" * (i % 7), "label": i}

    features = Features(text=Value("string"), label=Value("int64"))
    stream = IterableDataset.from_generator(rows, features=features)
    with open_stream(stream, process=None) as dataset:
        batches = list(loader(dataset, 0, 10))
        assert [int(n) for batch in batches for n in batch["attention_mask"].sum(1)] == [i % 7 for i in range(100)]
        assert [int(n) for batch in batches for n in batch["labels"]] == list(range(100))


def shuffled(seed: int = 3) -> IterableDataset:
    stream = Dataset.from_dict({"number": list(range(200))}).to_iterable_dataset(num_shards=4)
    return stream.shuffle(seed=seed, buffer_size=50)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_set_epoch_shuffles_the_stream_anew(num_workers: int) -> None:
    def expected(epoch: int) -> list[int]:
        stream = shuffled()
        stream.set_epoch(epoch)
        return [row["number"] for row in stream]

    with open_stream(shuffled(), options=small_options(prefetchers=2)) as dataset:
        batches = loader(dataset, num_workers, persistent_workers=num_workers > 0)
        assert numbers(batches) == expected(0)
        for epoch in (2, 0, 1):
            dataset.set_epoch(epoch)
            assert numbers(batches) == expected(epoch)
        assert expected(0) != expected(1)


# -- what it is not, and what it is told -----------------------------------------------------------------------


def test_it_has_no_length_and_no_indices(dataset: Any) -> None:
    with pytest.raises(TypeError):
        len(dataset)
    with pytest.raises(TypeError, match="iterate over it"):
        dataset[0]
    with pytest.raises(TypeError):
        len(loader(dataset, 0, 16))


@pytest.mark.parametrize("value", [0, -1, 1.5, "10", True])
def test_max_samples_must_be_a_whole_number_from_1_up(value: Any) -> None:
    with pytest.raises(OptionError, match="max_samples"):
        ShmMultimodalIterableDataset(dataset_name=stream_of(counted, num=3), max_samples=value)


def test_stats_tell_what_is_known(dataset: Any) -> None:
    assert numbers(dataset) == list(range(NUM))
    stats = dataset.stats()
    assert stats.num_rows is None
    assert stats.decodes_per_sample >= 1
    assert 0 <= stats.hit_rate <= 1
    assert dataset.sources[0]["rows"] is None
    assert "rows=unknown" in repr(dataset)


def test_a_closed_dataset_raises() -> None:
    with open_stream(stream_of(counted, num=10**6)) as dataset:
        samples = iter(dataset)
        assert int(next(samples)["number"]) == 0
        dataset.close()
        with pytest.raises(ClosedError):
            list(samples)
        with pytest.raises(ClosedError):
            next(iter(dataset))


def test_a_program_may_end_in_the_middle_of_an_iteration() -> None:
    done = run_script("""
        from datasets import Features, IterableDataset, Value
        from shmloader import Options, ShmMultimodalIterableDataset

        def rows():
            i = 0
            while True:
                yield {"number": i}
                i += 1

        stream = IterableDataset.from_generator(rows, features=Features(number=Value("int64")))
        dataset = ShmMultimodalIterableDataset(dataset_name=stream, process=dict, options=Options(ring_bytes="8MiB"))
        samples = iter(dataset)
        print([int(next(samples)["number"]) for _ in range(3)])
    """)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[0, 1, 2]", "")


def test_more_iterations_at_once_than_can_be_is_an_error_until_one_ends() -> None:
    with open_stream(stream_of(counted, num=None)) as dataset:
        all_of_them = [iter(dataset) for _ in range(64)]
        for samples in all_of_them:
            assert int(next(samples)["number"]) == 0
        with pytest.raises(RingError, match="64 iterations"):
            next(iter(dataset))
        all_of_them[0].close()
        assert int(next(iter(dataset))["number"]) == 0
