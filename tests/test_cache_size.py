"""cache_size: at most so many samples are kept, just as many where there is room, and all of them are right."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from conftest import opened, small_options
from support_sets import kill, number, prefetchers_of, wait_until, write_numbers, write_pictures
from support_streams import counted, open_stream, stream_of

from shmloader import MultimodalConfig, ShmMultimodalDataset, ShmMultimodalIterableDataset
from shmloader.errors import OptionError
from shmloader.iteration import BLOCK
from shmloader.sizes import LEAST_RECORDS

for name in ("support_streams", __name__):
    cloudpickle.register_pickle_by_value(sys.modules[name])

NUM_ROWS = 200
ROWS = 16  # of a chunk


@pytest.fixture(scope="module")
def numbers_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_numbers(tmp_path_factory.mktemp("numbers"), NUM_ROWS, ROWS)


def num_kept(dataset: Any) -> int:
    """Samples that stay now; the invariants, of which the limits are two, are checked on the way."""
    segment = dataset._reader.attach().segment
    assert segment.check() is None
    return int(segment.stats()["num_resident"])


@pytest.mark.parametrize("bad", [0, -1, 1.5, "100", True, False, 1 << 41, [5]])
@pytest.mark.parametrize("kind", [ShmMultimodalDataset, ShmMultimodalIterableDataset])
def test_a_bad_size_is_an_error_with_what_is_allowed(bad: Any, kind: Any) -> None:
    with pytest.raises(OptionError, match=r"cache_size=.* whole number of samples from 1") as caught:
        kind(dataset_name="nowhere", cache_size=bad)
    assert (caught.value.name, caught.value.value) == ("cache_size", str(bad))


def test_a_size_may_be_of_any_integer_type(numbers_path: str) -> None:
    with opened(numbers_path, process=number, cache_size=np.int64(20)) as dataset:
        assert dataset._reader.attach().segment.stats()["most_resident"] == 20


@pytest.mark.parametrize("cache_size", [1, ROWS - 1, ROWS, 5 * ROWS + 3])
def test_just_as_many_are_kept_and_never_more(numbers_path: str, cache_size: int) -> None:
    """Also of a size that ends in the middle of a chunk, or is less than the first one."""
    rows = list(range(NUM_ROWS))
    with opened(numbers_path, process=number, cache_size=cache_size) as dataset:
        for epoch in range(3):
            random.Random(epoch).shuffle(rows)
            for at in range(0, NUM_ROWS, 20):
                found = [int(sample["number"]) for sample in dataset.__getitems__(rows[at : at + 20])]
                assert found == rows[at : at + 20]
                assert num_kept(dataset) <= cache_size
        assert wait_until(lambda: num_kept(dataset) == cache_size)
        assert dataset.stats().samples_kept == cache_size


@pytest.mark.parametrize("cache_size", [NUM_ROWS, NUM_ROWS + 1])
def test_a_size_for_all_samples_changes_nothing(numbers_path: str, cache_size: int) -> None:
    with opened(numbers_path, process=number, cache_size=cache_size) as dataset:
        assert dataset._reader.attach().segment.stats()["most_resident"] == 0
        assert [int(sample["number"]) for sample in dataset] == list(range(NUM_ROWS))
        assert dataset.stats().samples_kept == NUM_ROWS


def test_of_what_is_kept_no_reading_decodes_again(numbers_path: str) -> None:
    """Of a known order just the rest is decoded in each epoch, and of that what the last epoch left may be used."""
    with opened(numbers_path, process=number, cache_size=NUM_ROWS // 2) as dataset:
        sampler = dataset.sampler(seed=3)
        for epoch in range(4):
            before = dataset.stats()
            sampler.set_epoch(epoch)
            rows = list(sampler)
            assert sorted(int(dataset[row]["number"]) for row in rows) == list(range(NUM_ROWS))
            after = dataset.stats()
            if epoch:
                assert after.commits - before.commits <= NUM_ROWS // 2 + 32  # made ahead of the next epoch
        assert num_kept(dataset) == NUM_ROWS // 2


def test_room_is_taken_only_for_what_is_kept(tmp_path: Path) -> None:
    """Where the samples' size is known: what is not kept does not lie there unused."""
    path = write_pictures(tmp_path, 64)
    with opened(path, cache_size=8, config=MultimodalConfig(vision_dim=16, image_dtype="uint8")) as dataset:
        stats = dataset.stats()
        record_bytes = dataset._reader.plan.schema.most_record_bytes()
        assert stats.transit_bytes > 0
        assert 8 * record_bytes <= stats.ring_bytes - stats.transit_bytes < 8 * record_bytes + 4096
        assert 0 <= stats.transit_bytes - stats.most_passing * record_bytes < 4096
        assert len({float(sample["image"].float().mean()) for sample in dataset}) > 1
        assert wait_until(lambda: num_kept(dataset) == 8)


#: With this few in flight and ahead `LEAST_RECORDS` decide how many are on their way.
FEW = replace(small_options(), in_flight=4, ahead=4)


def grown(row: dict[str, Any]) -> dict[str, Any]:
    """Of very different sizes, none of which is known before."""
    return {"number": row["number"], "padding": np.full(1 + row["number"] * 7919 % 400, row["number"])}


@pytest.mark.parametrize("is_sampled", [False, True])
def test_of_samples_of_any_size_no_more_are_on_their_way_than_is_told(numbers_path: str, is_sampled: bool) -> None:
    """`process` tells no size, and transit has room for all of them many times over."""
    rows = list(range(NUM_ROWS))
    with opened(numbers_path, process=grown, cache_size=5, options=FEW) as dataset:
        sampler = dataset.sampler(seed=1)
        most = 0
        for epoch in range(3):
            sampler.set_epoch(epoch)
            random.Random(epoch).shuffle(rows)
            for row in list(sampler) if is_sampled else rows:
                sample = dataset[row]
                assert sample["number"] == row
                assert (sample["padding"] == row).all()
                stats = dataset.stats()
                assert stats.most_passing == 2 * LEAST_RECORDS
                most = max(most, stats.samples_passing)
            assert num_kept(dataset) <= 5
        assert 0 < most <= 2 * LEAST_RECORDS
        assert dataset.stats().samples_ready <= 5 + 2 * LEAST_RECORDS


def test_pictures_are_limited_alike(tmp_path: Path) -> None:
    path = write_pictures(tmp_path, 120)
    with opened(path, cache_size=8, options=FEW, config=MultimodalConfig(vision_dim=16)) as dataset:
        for _ in range(2):
            for row in range(len(dataset)):
                assert dataset[row]["image"].shape == (3, 16, 16)
                assert dataset.stats().samples_passing <= 2 * LEAST_RECORDS
            assert num_kept(dataset) <= 8


def test_more_samples_than_are_on_their_way_can_be_read_at_once_and_held(numbers_path: str) -> None:
    """By copies: who holds more than its share of what passes, in number, holds up nobody."""
    with opened(numbers_path, process=grown, cache_size=5, options=FEW) as dataset:
        held = dataset.__getitems__(list(range(NUM_ROWS)))
        held += [dataset[row] for row in reversed(range(NUM_ROWS))]
        assert [int(sample["number"]) for sample in held] == [*range(NUM_ROWS), *reversed(range(NUM_ROWS))]
        assert dataset._reader.attach().segment.check() is None
        assert dataset.stats().samples_passing <= 2 * LEAST_RECORDS


def test_without_a_cache_size_as_many_are_on_their_way_as_find_room(numbers_path: str) -> None:
    with opened(numbers_path, process=grown, options=FEW) as dataset:
        assert dataset.stats().most_passing is None


def test_prefetchers_that_die_leave_no_more_than_may_stay(numbers_path: str) -> None:
    options = small_options(prefetchers=2)
    with opened(numbers_path, process=number, cache_size=50, options=options) as dataset:
        for row in range(0, NUM_ROWS, 7):
            if row % 49 == 0:
                kill(*prefetchers_of(dataset))
            assert int(dataset[row]["number"]) == row
            assert num_kept(dataset) <= 50


def test_an_iteration_keeps_no_more_either(numbers_path: str) -> None:
    with opened(numbers_path, ShmMultimodalIterableDataset, process=number, cache_size=50) as dataset:
        for _ in range(2):
            assert sorted(int(sample["number"]) for sample in dataset) == list(range(NUM_ROWS))
            assert num_kept(dataset) <= 50


@pytest.mark.parametrize("cache_size", [1, 40])
def test_of_a_stream_no_more_are_made_ahead(cache_size: int) -> None:
    """Nothing of it is kept; with less than `LEAST_RECORDS` readers and prefetchers would wait for one another."""
    most = max(cache_size, LEAST_RECORDS)
    with open_stream(stream_of(counted, num=500), cache_size=cache_size) as dataset:
        assert dataset.stats().most_passing == 2 * most
        for num_read, _ in enumerate(dataset):
            commits = dataset._reader.attach().segment.stats()["num_commits"]
            assert commits <= num_read + BLOCK + most
        assert num_read == 499
