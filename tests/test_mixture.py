"""The mixture of several sources: shares that hold in every prefix, and positions that can be asked both ways."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from shmloader.errors import OptionError
from shmloader.mixture import BLOCK_LENGTH, Mixture

WEIGHTS: list[list[Any]] = [
    [1],
    [0.5, 0.5],
    [0.9, 0.1],
    [3, 2, 1],
    [0.1] * 10,
    [1e-6, 1, 1e-6],
    [Fraction(1, 3), Fraction(2, 3)],
    [1e300, 1e300],
    [5e-324, 5e-324, 1e-323],
    [1 / n for n in range(1, 41)],
    [0.001] * 500 + [0.5],
]
NAMES = [str(i) for i in range(len(WEIGHTS))]


@pytest.mark.parametrize("weights", WEIGHTS, ids=NAMES)
def test_a_mixture_has_its_shares_in_every_prefix(weights: list[Any]) -> None:
    """Less than what the docstring says away from the exact share, at each of 30,000 positions, also late ones."""
    mixture = Mixture(weights, seed=2)
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    assert mixture.shares == pytest.approx([float(share) for share in shares])
    slack = 2 + math.log(len(weights)) + BLOCK_LENGTH / 4
    for start in (0, 10**12):
        sources, nth = mixture.sources(start, start + 30_000)
        places = start + np.arange(30_000)
        for source, share in enumerate(mixture.shares):
            is_its = sources == source
            if is_its.any():
                assert np.abs(nth[is_its] - places[is_its] * share).max() < slack + 1  # +1: share is a float here
                assert np.array_equal(nth[is_its], nth[is_its][0] + np.arange(is_its.sum()))
            else:
                assert share * 30_000 < slack


@pytest.mark.parametrize("weights", WEIGHTS, ids=NAMES)
def test_a_mixture_can_be_asked_both_ways(weights: list[Any]) -> None:
    """Position to source and nth, one at a time, in slices, with steps, and back."""
    mixture = Mixture(weights, seed=3, epoch=1)
    for start in (0, 255, 10**15):
        sources, nth = mixture.sources(start, start + 600)
        pairs = list(zip(sources.tolist(), nth.tolist(), strict=True))
        assert [mixture.source(start + i) for i in range(0, 600, 7)] == pairs[::7]
        assert [mixture.position(*pair) for pair in pairs[::7]] == list(range(start, start + 600, 7))
        assert np.array_equal(mixture.sources(start, start + 600, 7), np.stack((sources, nth))[:, ::7])
    assert len(mixture.sources(9, 9)[0]) == len(mixture.sources(9, 5)[1]) == 0


def test_every_sample_of_a_mixture_comes_once() -> None:
    """The pairs of source and nth of a prefix differ, and each source's begin at 0 without gaps."""
    sources, nth = Mixture([5, 3, 1], seed=8).sources(0, 9 * BLOCK_LENGTH)
    for source, weight in enumerate((5, 3, 1)):
        assert nth[sources == source].tolist() == list(range(weight * BLOCK_LENGTH))


GOLDEN_MIXTURE = [(0, 501), (0, 502), (2, 296), (1, 203), (2, 297), (2, 298), (0, 503), (1, 204), (0, 504), (2, 299)]


def test_mixtures_are_those_of_every_version() -> None:
    """Literal values: whoever changes them changes what users' runs are trained on."""
    mixture = Mixture([0.5, 0.2, 0.3], seed=-7, epoch=3)
    assert [mixture.source(position) for position in range(1000, 1010)] == GOLDEN_MIXTURE


def test_seeds_and_epochs_give_mixtures_of_their_own() -> None:
    """And the same ones the same."""
    made = [
        tuple(Mixture([1, 2], seed=seed, epoch=epoch).sources(0, 200)[0].tolist())
        for seed, epoch in [(0, 0), (1, 0), (0, 1), (-1, 0), (1 << 90, 0), (0, 0)]
    ]
    assert len(set(made)) == 5
    assert made[0] == made[-1]


def test_sources_of_a_mixture_alternate_at_random() -> None:
    """Of two equal sources, the next is the same as the last in about half of the cases."""
    sources, _ = Mixture([1, 1]).sources(0, 100_000)
    assert (sources[1:] == sources[:-1]).mean() == pytest.approx(0.5, abs=0.01)


def test_a_mixture_keeps_some_blocks_only() -> None:
    """After 100,000 positions."""
    mixture = Mixture([1, 1])
    mixture.sources(0, 100_000)
    assert len(mixture._blocks) <= 64


@pytest.mark.parametrize(
    "weights", [[], [0], [1, 0], [1, -1], [float("nan")], [float("inf"), 1], ["1"], [None], [True], [1 + 1j], [[1]]]
)
def test_bad_weights_are_an_error(weights: list[Any]) -> None:
    """None at all, or one that is not above 0, not finite, or no number."""
    with pytest.raises(OptionError, match=r"^weights="):
        Mixture(weights)


def test_a_position_or_source_that_is_not_in_the_mixture_is_an_error() -> None:
    """Positions go from 0 on without end."""
    mixture = Mixture([1, 2])
    for call in (lambda: mixture.source(-1), lambda: mixture.sources(-1, 5), lambda: mixture.position(0, -1)):
        with pytest.raises(OptionError):
            call()
    for source in (-1, 2):
        with pytest.raises(IndexError):
            mixture.position(source, 0)
