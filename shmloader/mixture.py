"""Which of several sources is next: a pure function of (seed, epoch, position)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from numbers import Rational
from typing import Any

import numpy as np

from shmloader.permutation import Permutation, Rows, bad_option, make_keys, runs, whole_number

#: Positions of a block of `Mixture`: the longest in which a source may be ahead of its weight or behind (a compromise:
#: longer is more random, shorter is closer to the weights).
BLOCK_LENGTH = 256

#: Blocks that are kept.
_KEEP = 64


class Mixture:
    """Which of several sources is next, at random in proportion to ``weights``, for ever.

    The positions are cut into blocks of `BLOCK_LENGTH` (256), and each source has in each block as many as keeps it at
    its share of all positions so far. Within a block the sources are shuffled. After any number *t* of positions a
    source has had ``t * share`` samples, give or take less than ``2 + ln(number of sources) + BLOCK_LENGTH / 4``
    (typically some few), however large *t* is. It is exact: floats count as the fractions that they are.

    It keeps a table of the last blocks that it was asked for, and nothing else; any number of threads may ask it.

    Args:
        weights: one for each source, above 0 and finite; their sum is of no matter.
        seed, epoch: as of `Order`.

    Raises:
        OptionError: there are no weights, or one is not positive or not finite; seed or epoch is no integer.
    """

    def __init__(self, weights: Iterable[Any], *, seed: int = 0, epoch: int = 0) -> None:
        exact = [_weight(weight) for weight in weights]
        if not exact:
            raise bad_option("weights", exact, "one for each source, at least one")
        self.shares = tuple(float(weight / sum(exact)) for weight in exact)
        self.seed = whole_number("seed", seed)
        self.epoch = whole_number("epoch", epoch, 0)
        # As whole numbers, the largest first: source, weight, and the weight of it and all that follow.
        unit = math.lcm(*(weight.denominator for weight in exact))
        whole = sorted(((i, int(weight * unit)) for i, weight in enumerate(exact)), key=lambda pair: -pair[1])
        self._whole = [(i, weight, sum(w for _, w in whole[at:])) for at, (i, weight) in enumerate(whole)]
        self._blocks: dict[int, tuple[Rows, Rows, Rows]] = {}

    def source(self, position: int) -> tuple[int, int]:
        """(source, nth) at ``position``: ``nth`` samples of that source came before.

        Of a source of n samples, take that at position ``nth % n`` of pass ``nth // n``.
        """
        block, slot = divmod(whole_number("position", position, 0), BLOCK_LENGTH)
        sources, nth, _ = self._block(block)
        return int(sources[slot]), int(nth[slot])

    def sources(self, start: int, stop: int, step: int = 1) -> tuple[Rows, Rows]:
        """`source` at positions ``start``, ``start + step`` … below ``stop``: two arrays, int64."""
        return self.at(np.arange(whole_number("start", start, 0), stop, whole_number("step", step, 1), dtype=np.int64))

    def at(self, positions: Rows) -> tuple[Rows, Rows]:
        """`source` at any positions: two arrays, int64. Those that lie near one another cost the least."""
        found = np.empty((2, len(positions)), np.int64)
        blocks, slots = np.divmod(positions, BLOCK_LENGTH)
        order = np.argsort(blocks, kind="stable")
        for first, last in runs(blocks[order]):
            some = order[first:last]
            sources, nth, _ = self._block(int(blocks[some[0]]))
            found[0, some] = sources[slots[some]]
            found[1, some] = nth[slots[some]]
        return found[0], found[1]

    def position(self, source: int, nth: int) -> int:
        """The position at which sample ``nth`` (from 0) of ``source`` comes: the inverse of `source`."""
        if not 0 <= source < len(self.shares):
            raise IndexError(f"source {source} is not in 0 … {len(self.shares) - 1}")
        nth = whole_number("nth", nth, 0)
        # The last block before which at most nth samples came, between one that is early enough and one that is not.
        weight, total = next((weight, self._whole[0][2]) for i, weight, _ in self._whole if i == source)
        slack = 3 + len(self.shares).bit_length()
        low = max(0, (nth - slack) * total // (weight * BLOCK_LENGTH))
        high = (nth + slack) * total // (weight * BLOCK_LENGTH) + 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._counts(middle)[source] <= nth else (low, middle)
        counts, after = self._counts(low), self._counts(low + 1)
        slot = sum(after[:source]) - sum(counts[:source]) + nth - counts[source]
        return low * BLOCK_LENGTH + int(self._block(low)[2][slot])

    def _counts(self, block: int) -> list[int]:
        """How many samples of each source come before ``block``.

        One source after the other gets its share of what those before it left, rounded down. As that and what is left
        never shrink from block to block, no source ever loses one. A roundings' error is less than 1, and reaches a
        later source by its share of what is left: with the largest first, by 1/1 + 1/2 + … at most.
        """
        left = block * BLOCK_LENGTH
        counts = [0] * len(self._whole)
        for i, weight, rest in self._whole:
            counts[i] = left * weight // rest
            left -= counts[i]
        return counts

    def _block(self, block: int) -> tuple[Rows, Rows, Rows]:
        """The source of each slot, its nth, and the slots by source and nth."""
        found = self._blocks.get(block)
        if found is None:
            counts = np.array(self._counts(block))
            quotas = np.array(self._counts(block + 1)) - counts
            deal = Permutation(BLOCK_LENGTH, make_keys("mixture", self.seed, self.epoch, block))
            sources = np.repeat(np.arange(len(quotas)), quotas)[deal.take(np.arange(BLOCK_LENGTH, dtype=np.int64))]
            slots = np.argsort(sources, kind="stable")
            nth = np.empty_like(slots)
            nth[slots] = np.arange(BLOCK_LENGTH) + np.repeat(counts - (np.cumsum(quotas) - quotas), quotas)
            if len(self._blocks) >= _KEEP:
                self._blocks = {}
            found = self._blocks[block] = (sources, nth, slots)
        return found


def _weight(weight: Any) -> Fraction:
    try:
        exact = Fraction(weight) if isinstance(weight, Rational) else Fraction(float(weight))
    except (TypeError, ValueError, OverflowError):
        exact = Fraction()
    if isinstance(weight, bool | str) or exact <= 0:
        raise bad_option("weights", weight, "numbers above 0, and finite")
    return exact
