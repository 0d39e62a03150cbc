"""Which row an index stands for where several sources are mixed by weight: ``weights=``.

::

    index ─▶ position of an endless mixture ─▶ (source, nth of it) ─▶ pass, place in it ─▶ row
             epoch × length + index            mixture.py              permutation.py

An epoch goes on where the one before ended. So a source that has fewer samples in an epoch than it has rows is seen
whole over some epochs, and one that has more comes around evenly: all of its rows once before any comes twice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from shmloader.errors import OptionError
from shmloader.mixture import BLOCK_LENGTH, Mixture
from shmloader.order import Chunks
from shmloader.permutation import Permutation, make_keys, runs

#: Passes whose permutations are kept: an epoch of a small source may have many, but a batch is of few (guessed).
_KEEP = 256
#: Blocks that a shuffled order takes rows of at once: no more than a `Mixture` keeps.
WINDOW = 32
#: An index from here on names its epoch as well: this, and the position in the endless mixture.
FIRST_NAMED = 1 << 53
#: Positions are below this. Epochs that would go beyond it begin again: 140 years of a million samples a second.
_LAST_POSITION = 1 << 52


class Weighting:
    """The rows of an epoch's indices; a pure function of (weights, rows of each source, seed, epoch).

    weights: one for each source. num_rows: of each source, whose rows lie one source after the other.

    Raises:
        OptionError: a weight is not positive, or not finite.
    """

    def __init__(self, weights: Sequence[Any], num_rows: Sequence[int], seed: int) -> None:
        assert len(weights) == len(num_rows)
        self._mixture = Mixture(weights, seed=seed)
        self._num_rows = tuple(num_rows)
        self._starts = (0, *accumulate(num_rows))
        self._seed = seed
        self._passes: OrderedDict[tuple[int, int], Permutation] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def shares(self) -> tuple[float, ...]:
        """Of all samples, those of each source."""
        return self._mixture.shares

    def chunks(self, epoch: int) -> Chunks:
        """The indices of an epoch in pieces, for an order that shuffles them: each has only some blocks to make.

        They name the epoch, so that an iteration keeps its rows when another one begins.
        """
        first = np.arange(0, len(self), BLOCK_LENGTH, dtype=np.int64)
        num = np.minimum(BLOCK_LENGTH, len(self) - first)
        first += FIRST_NAMED + self._first(epoch)
        return Chunks(first, num, np.arange(len(first), dtype=np.int64), np.ones(len(first), np.int64))

    def _first(self, epoch: int) -> int:
        return epoch % (_LAST_POSITION // len(self)) * len(self)

    def parse(self, index: int) -> tuple[int | None, int]:
        """The epoch that an index names, and the index in it; None: it names none."""
        return (None, index) if index < FIRST_NAMED else divmod(index - FIRST_NAMED, len(self))

    def rows(self, epoch: int, indices: Sequence[int]) -> list[int]:
        """The row that each of ``indices`` stands for, in ``epoch`` or in the one that it names. Any number of threads.

        4 us each where they are near one another, 0.1 ms where each is of another block (measured, batches of 64).
        """
        asked = np.asarray(indices, np.int64)
        positions = np.where(asked < FIRST_NAMED, asked + self._first(epoch), asked - FIRST_NAMED)
        sources, nth = self._mixture.at(positions)
        found = np.empty(len(sources), np.int64)
        # By source and pass; within one, in any sequence.
        passes, places = np.divmod(nth, np.array(self._num_rows, np.int64)[sources])
        keys = sources + len(self._num_rows) * passes
        order = np.argsort(keys, kind="stable")
        for start, stop in runs(keys[order]):
            some = order[start:stop]
            source = int(sources[some[0]])
            permutation = self._permutation(source, int(passes[some[0]]))
            found[some] = self._starts[source] + permutation.take(places[some])
        rows: list[int] = found.tolist()
        return rows

    def _permutation(self, source: int, number: int) -> Permutation:
        found = self._passes.get((source, number))
        if found is None:
            keys = make_keys("weighting", self._seed, source, number)
            found = self._passes[source, number] = Permutation(self._num_rows[source], keys)
            if len(self._passes) > _KEEP:
                self._passes.popitem(last=False)
        return found


def checked_weights(weights: Any, num_sources: int) -> None:
    """Raise an OptionError unless ``weights`` can be those of so many sources, whatever their names."""
    if num_sources < 2:
        raise _error(weights, "mixes several datasets, but there is only one")
    if isinstance(weights, str | bytes) or not isinstance(weights, Mapping | Sequence):
        raise _error(weights, f"must be {_ALLOWED}, but got {type(weights).__name__}")
    if len(weights) != num_sources:
        raise _error(weights, f"must have one weight for each of the {num_sources} datasets, but has {len(weights)}")
    Mixture(weights.values() if isinstance(weights, Mapping) else weights)


def weights_by_source(weights: Any, names: Sequence[str], asked: Sequence[str]) -> list[Any]:
    """The weight of each source, in order.

    names: of the sources, as samples have them. asked: as they were asked for, which counts as well, where there are no
        two of it.

    Raises:
        OptionError: a source has none, or one has no source.
    """
    if not isinstance(weights, Mapping):
        return list(weights)
    found = []
    for name, other in zip(names, asked, strict=True):
        key = name if name in weights or asked.count(other) > 1 else other
        if key not in weights:
            unknown = ", ".join(repr(key) for key in weights if key not in (*names, *asked)) or "none besides"
            raise _error(
                weights,
                f"has none for {name!r}: the datasets are {', '.join(map(repr, names))}, and it names {unknown}",
            )
        found.append(weights[key])
    return found


_ALLOWED = "a dict of a weight for each dataset's name, or a list of weights in the order of the datasets"


def _error(weights: Any, why: str) -> OptionError:
    return OptionError(f"weights={weights!r:.200} {why}", name="weights", value=repr(weights), allowed=_ALLOWED)
