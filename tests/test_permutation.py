"""Keyed permutations: bijections of any size, the same for ever, and as even as numpy's."""

from __future__ import annotations

import itertools
import math
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmloader.errors import OptionError
from shmloader.permutation import (
    MAX_SIZE,
    NUM_ROUNDS,
    TABLE_SIZE,
    Permutation,
    bad_option,
    make_keys,
    runs,
    whole_number,
)

LARGE = [10_007, 1 << 20, (1 << 20) + 1, 3_037_000_499**2 + 1, 10**12, (1 << 62) - 1, MAX_SIZE]


def permutation(size: int, *numbers: int) -> Permutation:
    return Permutation(size, make_keys("test", *numbers))


def everything(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.int64)


def excess(counts: np.ndarray) -> float:
    """How many standard deviations chi² of equally likely ``counts`` is above its mean."""
    degrees = counts.size - 1
    expected = counts.sum() / counts.size
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees))


# -- a bijection -----------------------------------------------------------------------------------------------


def test_every_small_size_is_permuted() -> None:
    """Of 0 to 300 numbers each comes once, and `find` takes them back."""
    for size in range(301):
        taken = permutation(size, size).take(everything(size))
        assert np.array_equal(np.sort(taken), everything(size)), size
        assert np.array_equal(permutation(size, size).find(taken), everything(size)), size


@pytest.mark.parametrize("size", [1000, 65_536, 65_537, 99_991])
def test_a_size_of_several_blocks_is_permuted(size: int) -> None:
    """Each number comes once, however the array is cut for the caches."""
    taken = permutation(size).take(everything(size))
    assert np.array_equal(np.bincount(taken, minlength=size), np.ones(size))


@pytest.mark.parametrize("size", LARGE)
def test_a_large_permutation_is_taken_back(size: int) -> None:
    """`find` is the inverse of `take`, as a sample of numbers and the ends show."""
    random = np.random.default_rng(1)
    numbers = np.concatenate((random.integers(0, size, 20_000), [0, 1, size - 2, size - 1]))
    taken = permutation(size, 7).take(numbers)
    assert taken.min() >= 0
    assert taken.max() < size
    assert np.array_equal(permutation(size, 7).find(taken), numbers)
    assert len(np.unique(taken)) == len(np.unique(numbers))


@settings(deadline=None, derandomize=True)
@given(size=st.integers(1, MAX_SIZE), seed=st.integers(), data=st.data())
def test_an_int_is_permuted_as_an_array_is(size: int, seed: int, data: st.DataObject) -> None:
    """Python's integers and numpy's give the same, forwards and backwards."""
    number = data.draw(st.integers(0, size - 1))
    made = permutation(size, seed)
    value = made[number]
    assert 0 <= value < size
    assert made.index(value) == number
    many = np.full(40, number, np.int64)
    assert made.take(many).tolist() == [value] * 40
    assert made.find(np.full(40, value, np.int64)).tolist() == [number] * 40


def test_a_few_numbers_are_permuted_as_many_are() -> None:
    """The way for short arrays gives what that for long ones does."""
    made = permutation(5000)
    whole = made.take(everything(5000))
    for size in (0, 1, 2, 16, 17):
        assert np.array_equal(made.take(everything(size)), whole[:size])
        assert made.take(everything(size)).dtype == np.int64


def test_the_argument_is_left_as_it_was() -> None:
    """`take` and `find` write into arrays of their own."""
    numbers = everything(1000)
    permutation(1000).take(numbers)
    permutation(1000).find(numbers)
    assert np.array_equal(numbers, everything(1000))


@pytest.mark.parametrize("size", [0, 1, 10, 1000])
def test_a_number_outside_is_an_index_error(size: int) -> None:
    """Below 0 and from the size on, both ways."""
    for number in (-1, size, size + 5):
        with pytest.raises(IndexError):
            permutation(size)[number]
        with pytest.raises(IndexError):
            permutation(size).index(number)


def test_a_permutation_of_any_size_takes_no_memory() -> None:
    """One of 2**63 numbers has a few words."""
    tracemalloc.start()
    try:
        kept = [permutation(MAX_SIZE, i) for i in range(100)]
        assert tracemalloc.get_traced_memory()[0] / len(kept) < 2000
    finally:
        tracemalloc.stop()


# -- the same for ever -----------------------------------------------------------------------------------------

GOLDEN = {
    10: [1, 4, 8, 6, 5, 7, 2, 3],
    64: [55, 9, 27, 49, 56, 50, 52, 6],
    65: [52, 57, 15, 44, 63, 25, 56, 8],
    1_000: [598, 93, 826, 536, 131, 886, 252, 518],
    1_281_167: [803068, 258377, 17666, 1014350, 312658, 447039, 595960, 419917],
    1_000_000_000_000: [
        690678156968,
        73729796384,
        347145333219,
        137080723765,
        773301343581,
        608250980764,
        522719682307,
        584596038037,
    ],
    9_223_372_036_854_775_807: [
        7434122458036627208,
        8797790305755672640,
        9171363205429626662,
        7407749345389202959,
        7661783417509847433,
        1772233611406492722,
        2403241928284632687,
        3121050067217207010,
    ],
}


@pytest.mark.parametrize("size", GOLDEN)
def test_permutations_are_those_of_every_version(size: int) -> None:
    """Literal values: whoever changes them changes what users' runs are trained on."""
    made = Permutation(size, make_keys("golden", 1, -2, 1 << 70))
    assert [made[i] for i in range(8)] == GOLDEN[size]


def test_keys_are_those_of_every_version() -> None:
    """Literal values, of a hash that is the same on every machine."""
    assert [hex(key) for key in make_keys("golden", 1, -2, 1 << 70)[:2]] == ["0x5b23dbd279a0ea9f", "0x9faa519d641aa340"]


def test_keys_differ_for_all_that_they_are_made_of() -> None:
    """Purpose, each number, its sign, its place and how many there are."""
    made = [
        make_keys("a"),
        make_keys("b"),
        make_keys("a", 0),
        make_keys("a", 0, 0),
        make_keys("a", 1),
        make_keys("a", -1),
        make_keys("a", 1, 2),
        make_keys("a", 2, 1),
        make_keys("a", 255),
        make_keys("a", 256),
        make_keys("a", 1 << 64),
        make_keys("a", 1 << 20_000),
        make_keys("a", -(1 << 20_000)),
    ]
    assert len({key for keys in made for key in keys}) == len(made) * NUM_ROUNDS


# -- as even as chance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_permutations_of_a_handful_are_equally_likely(size: int) -> None:
    """chi² of the 2, 6, 24 and 120 permutations, over 12,000 seeds."""
    every = {order: at for at, order in enumerate(itertools.permutations(range(size)))}
    found = [every[tuple(permutation(size, seed).take(everything(size)).tolist())] for seed in range(12_000)]
    assert excess(np.bincount(found, minlength=len(every))) < 4


@pytest.mark.parametrize("size", [TABLE_SIZE, TABLE_SIZE + 1, 100, 256, 257])
def test_a_network_is_as_even_as_chance(size: int) -> None:
    """Where two neighbours go, how far apart all neighbours come, and how many numbers stay, over 3,000 seeds."""
    taken = np.array([permutation(size, seed).take(everything(size)) for seed in range(3000)])
    assert excess(np.bincount(taken[:, 0], minlength=size)) < 4
    assert excess(np.bincount(taken[:, -1], minlength=size)) < 4
    assert excess(np.bincount(((taken[:, 1:] - taken[:, :-1]) % size).ravel(), minlength=size)[1:]) < 4
    other = math.ceil(size / math.ceil(math.sqrt(size)))  # this far apart, numbers differ in one half only
    assert excess(np.bincount((taken[:, other] - taken[:, 0]) % size, minlength=size)[1:]) < 4
    staying = (taken == everything(size)).sum(axis=1)
    assert abs(staying.mean() - 1) < 4 / math.sqrt(len(taken))


@pytest.mark.parametrize("size", [1000, 1_000_003])
def test_neighbours_of_a_large_permutation_are_not_related(size: int) -> None:
    """Neither numbers and their values nor values in a row are correlated; the gaps are those of chance."""
    taken = permutation(size, 3).take(everything(size)).astype(float)
    assert abs(np.corrcoef(everything(size), taken)[0, 1]) < 4 / math.sqrt(size)
    assert abs(np.corrcoef(taken[:-1], taken[1:])[0, 1]) < 4 / math.sqrt(size)
    gaps = np.abs(np.diff(taken)) / size
    for share, quantile in ((0.05, 1 - math.sqrt(0.95)), (0.5, 1 - math.sqrt(0.5)), (0.95, 1 - math.sqrt(0.05))):
        assert np.quantile(gaps, share) == pytest.approx(quantile, abs=4 / math.sqrt(size))


def test_seeds_give_unrelated_permutations() -> None:
    """Of two seeds, the numbers that go to the same place are as few as chance has it."""
    size = 100_000
    first, second = (permutation(size, seed).take(everything(size)) for seed in (0, 1))
    assert (first == second).sum() < 10


# -- what the others use ---------------------------------------------------------------------------------------


def test_runs_are_the_stretches_of_equal_numbers() -> None:
    """Each with its first place and the place after its last."""
    assert list(runs(np.array([3, 3, 1, 3], np.int64))) == [(0, 2), (2, 3), (3, 4)]
    assert list(runs(np.zeros(0, np.int64))) == []


@pytest.mark.parametrize("value", [1.0, "1", None, True, np.float64(1), [1]])
def test_what_is_no_whole_number_is_an_error(value: object) -> None:
    """Floats, texts and bools are none; the error names argument and value."""
    with pytest.raises(OptionError, match="seed=") as caught:
        whole_number("seed", value)
    assert (caught.value.name, caught.value.value) == ("seed", str(value))


def test_a_whole_number_may_be_numpys_and_of_any_size() -> None:
    """What has an ``__index__`` is one, if it is not too small."""
    assert whole_number("seed", np.int32(-5)) == -5
    assert whole_number("seed", sys.maxsize**9) == sys.maxsize**9
    assert whole_number("rank", 0, 0) == 0
    with pytest.raises(OptionError, match="a whole number from 1 up"):
        whole_number("world_size", 0, 1)
    assert bad_option("a", 1, "2").allowed == "2"
