"""Several datasets mixed by weight: which row an index stands for, and that every reader has it so."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from conftest import opened
from support_several import CONFIG, bytes_of, write_stories
from torch.utils.data import DataLoader

from shmloader import Options
from shmloader.errors import OptionError
from shmloader.weighting import Weighting, weights_by_source

SIZES = (100, 30, 7)


def epoch_of(weighting: Weighting, epoch: int) -> list[int]:
    return weighting.rows(epoch, range(len(weighting)))


def by_source(rows: list[int]) -> list[list[int]]:
    """The rows of each source, counted from its first."""
    starts = np.cumsum([0, *SIZES])
    return [[row - low for row in rows if low <= row < high] for low, high in itertools.pairwise(starts)]


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.7, 0.2, 0.1), (1, 50, 3)])
def test_each_epoch_has_the_given_shares_and_goes_on_where_the_last_one_ended(weights):
    weighting = Weighting(weights, SIZES, seed=4)
    assert len(weighting) == sum(SIZES)
    epochs = [by_source(epoch_of(weighting, epoch)) for epoch in range(40)]
    for source, (size, share) in enumerate(zip(SIZES, weighting.shares, strict=True)):
        for rows in epochs:
            assert abs(len(rows[source]) - share * len(weighting)) <= 2 * 66  # twice the bound of `Mixture`
        drawn = [row for rows in epochs for row in rows[source]]
        assert abs(len(drawn) - share * 40 * len(weighting)) <= 66
        passes = [drawn[at : at + size] for at in range(0, len(drawn), size)]
        for one in passes[:-1]:
            assert sorted(one) == list(range(size))
        assert len(set(passes[-1])) == len(passes[-1])
        if size > 20 and len(passes) > 2:
            assert passes[0] != passes[1]


def test_an_index_stands_for_the_same_row_however_it_is_asked_for():
    weighting = Weighting((3, 2, 1), SIZES, seed=1)
    whole = epoch_of(weighting, 5)
    picked = np.random.default_rng(0).permutation(len(weighting)).tolist()
    assert Weighting((3, 2, 1), SIZES, seed=1).rows(5, picked) == [whole[i] for i in picked]
    assert [weighting.rows(5, [i])[0] for i in picked[:20]] == [whole[i] for i in picked[:20]]
    assert whole != epoch_of(Weighting((3, 2, 1), SIZES, seed=2), 5)
    assert whole != epoch_of(weighting, 6)
    assert epoch_of(weighting, 1 << 61)  # no number of an epoch is too large


@pytest.mark.parametrize(
    ("weights", "asked", "found"),
    [
        ([3, 1], ["a", "b"], [3, 1]),
        ({"b": 1, "a": 3}, ["a", "b"], [3, 1]),
        ({"x": 1, "b": 2}, ["x", "b"], [1, 2]),  # as it was asked for, before it fell back
        ({"a": 1, "b": 2}, ["x", "x"], [1, 2]),
    ],
)
def test_weights_are_found_by_name_and_in_order(weights, asked, found):
    assert weights_by_source(weights, ["a", "b"], asked) == found


@pytest.mark.parametrize("weights", [{"a": 1, "c": 2}, {"x": 1, "y": 2}])
def test_a_name_without_a_dataset_is_an_error_that_lists_those_there_are(weights):
    with pytest.raises(OptionError, match="the datasets are 'a', 'b'") as caught:
        weights_by_source(weights, ["a", "b"], ["a", "b"])
    assert caught.value.name == "weights"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("weighted")
    return [write_stories(root / str(num), num) for num in (60, 20)]


@pytest.mark.parametrize(
    "weights",
    [[1], [1, 2, 3], [1, 0], [1, -1], [1, float("nan")], {"a": 1}, "ab", 3, [1, "x"], [1, None]],
)
def test_bad_weights_are_an_error_before_anything_is_opened(weights):
    with pytest.raises(OptionError) as caught, opened(["no/such-a", "no/such-b"], weights=weights):
        raise AssertionError
    assert caught.value.name == "weights"


def test_weights_of_one_dataset_are_an_error(paths):
    with pytest.raises(OptionError, match="there is only one"), opened(paths[0], weights=[1]):
        raise AssertionError


def identity(sample: Any) -> tuple[str, str]:
    return sample["source"], bytes_of(sample["text"])


def epoch_through(dataset: Any, epoch: int, num_workers: int, begin: int = 0) -> list[tuple[str, str]]:
    """The samples of an epoch in the order of their indices, from one on, through a loader."""
    dataset.set_epoch(epoch)
    indices = range(begin, len(dataset))
    loader = DataLoader(dataset, batch_size=8, num_workers=num_workers, sampler=list(indices))  # type: ignore[arg-type]
    found = []
    for batch in loader:
        for source, text, mask in zip(batch["source"], batch["text"], batch["attention_mask"], strict=True):
            found.append((source, bytes_of(text[mask.bool()])))
    return found


@pytest.mark.parametrize("options", [Options(), Options(ring_bytes="64KiB", in_flight=8, ahead=8)], ids=["all", "some"])
def test_readers_follow_the_weights_whatever_their_number_and_wherever_they_begin(paths, options):
    weights = {paths[1]: 3, paths[0]: 1}
    with opened(paths, config=CONFIG, weights=weights, options=options) as dataset:
        assert len(dataset) == 80
        epochs = [epoch_through(dataset, epoch, num_workers=2 * (epoch % 2)) for epoch in range(4)]
        counts = Counter(source for epoch in epochs for source, _ in epoch)
        assert abs(counts[paths[1]] - 240) < 20
        assert len({sample for epoch in epochs for sample in epoch if sample[0] == paths[0]}) >= 60  # all, by now
        assert epoch_through(dataset, 1, num_workers=0, begin=35) == epochs[1][35:]
        assert epoch_through(dataset, 2, num_workers=2, begin=35) == epochs[2][35:]
        assert identity(dataset[70]) == epochs[2][70]
        sampler = dataset.sampler(seed=1)
        sampler.set_epoch(3)
        batches = list(DataLoader(dataset, batch_size=16, sampler=sampler))
        assert Counter(source for batch in batches for source in batch["source"]) == Counter(s for s, _ in epochs[3])


def test_an_iteration_keeps_its_rows_when_another_one_begins(paths):
    with opened(paths, config=CONFIG, weights=[3, 1]) as dataset:
        alone = [identity(sample) for sample in map(dataset.__getitem__, dataset.sampler(shuffle=False))]
        sampler = dataset.sampler(shuffle=False)
        first = iter(sampler)
        begun = [identity(dataset[next(first)]) for _ in range(20)]
        second = [identity(dataset[index]) for index in itertools.islice(sampler, 20)]
        assert begun + [identity(dataset[index]) for index in first] == alone
        assert second != alone[:20]
        with pytest.raises(IndexError, match="out of range"):
            dataset[len(dataset)]
