"""What a reader gets in the place of a row that cannot be had: the next good one of its source.

Which one that is depends on the data alone: the next row, or the one at the same place of the next chunk if its own
cannot be read, and so on until one is good; behind the source's last row comes its first. So length, order and resuming
stay exact, whatever the number of workers, the size of the ring, or the time. Only while a server cannot be reached are
it rows that happen to be at hand, and only for that read.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from shmloader.errors import ShmloaderError, TooManyBadRowsError
from shmloader.policy import BadRows, is_bad_row, is_passing
from shmloader.prefetch.plan import SetPlan
from shmloader.quarantine import Quarantine
from shmloader.ring import Place, Refs

log = logging.getLogger("shmloader")

#: Rows that are looked at at once, for those that are at hand, and how long all such looks of a read may take, in
#: seconds: some 4 million rows, at 60 µs for 256.
_LOOK_ROWS = 256
_LOOK_S = 1.0
#: What was at hand may be gone when it is asked for: so often others are looked for, for one read of a source.
_MOST_LOOKS = 3
#: What stands in for now is told so often at most, in seconds.
_TELL_S = 10.0
#: So many bad rows are shown.
_SHOWN = 3


class WaitsFor(Protocol):
    """Finds the records of rows, or raises why one of them cannot be had."""

    def __call__(self, rows: Sequence[int], place: Place | None, /) -> Refs:
        """Where the records of ``rows`` lie."""
        ...


class StandIns:
    """One process's knowledge of which row stands in for which. Any number of threads.

    wait_for: as `Reader.wait_for`. are_at_hand: as `Ring.are_at_hand`.
    """

    def __init__(
        self,
        plan: SetPlan,
        policy: BadRows,
        quarantine: Quarantine,
        wait_for: WaitsFor,
        are_at_hand: Callable[[Sequence[int]], list[bool]],
    ) -> None:
        self._plan, self._policy, self._quarantine = plan, policy, quarantine
        self._wait_for, self._are_at_hand = wait_for, are_at_hand
        self._told_at = float("-inf")
        self._next: dict[int, int] = {}  # bad row → the one to take instead, if that is not bad itself

    def known(self, rows: Sequence[int]) -> Sequence[int]:
        """``rows``, with what is known to stand in for bad ones; the same object if nothing does.

        Raises:
            TooManyBadRowsError: there are more bad rows than are allowed, one of ``rows`` among them.
        """
        if not self._next or not any(row in self._next for row in rows):
            return rows
        self._check(None)
        return [self._resolved(row) for row in rows]

    def find(self, rows: Sequence[int], place: Place | None) -> Refs:
        """Where the records of ``rows`` lie, or of those that stand in for them; waits.

        Raises:
            TooManyBadRowsError; as `Reader.wait_for`, of all that is not of a row alone.
        """
        asked = self.known(rows)
        looks: Counter[tuple[int, int]] = Counter()
        while True:
            try:
                return self._wait_for(asked, place)
            except ShmloaderError as error:
                if is_passing(error):
                    span = self._span(error)
                    looks[span] += 1
                    if looks[span] > _MOST_LOOKS:
                        raise
                    asked = self._at_hand(asked, span, error)
                    continue
                if error.at is None or not is_bad_row(error):
                    raise
                self._learn(*error.at, asked, error)
            asked = [self._resolved(row) for row in asked]

    def _learn(self, bad: int, chunk: int | None, asked: Sequence[int], error: ShmloaderError) -> None:
        """Note what comes after ``bad``, and if it is a chunk that cannot be read, after all of ``asked`` in it."""
        self._check(error)
        first, end = self._plan.span(bad)
        if chunk is None:
            self._next[bad] = bad + 1 if bad + 1 < end else first
            return
        torn = range(*self._plan.chunk_rows(bad))
        behind = torn.stop if torn.stop < end else first
        # Not one row for all of them: a batch out of a torn chunk would be copies of one sample.
        num_behind = min(self._plan.chunk_rows(behind)[1], end) - behind
        self._next.update((row, behind + (row - torn.start) % num_behind) for row in asked if row in torn)

    def _resolved(self, row: int) -> int:
        seen = {row}
        while (other := self._next.get(row)) is not None:
            if other in seen:
                raise self.too_many("all of its rows are bad")
            seen.add(other)
            row = other
        return row

    def _span(self, error: ShmloaderError) -> tuple[int, int]:
        """The rows of the source that ``error`` is of; all rows, if it does not say."""
        return (0, self._plan.source.num_rows or 0) if error.at is None else self._plan.span(error.at[0])

    def _at_hand(self, rows: Sequence[int], span: tuple[int, int], error: ShmloaderError) -> list[int]:
        """``rows``, with others of the same source in the place of those of ``span`` that are not at hand.

        Raises ``error``: there are none.
        """
        found = zip(rows, self._are_at_hand(rows), strict=True)
        lacking = list(dict.fromkeys(row for row, is_there in found if not is_there and span[0] <= row < span[1]))
        others: dict[int, int] = {}
        for own in {self._plan.span(row) for row in lacking}:
            ours = [row for row in lacking if own[0] <= row < own[1]]
            there = self._look_for(own, ours, set(rows))
            if not there:
                raise error
            others.update(zip(ours, itertools.cycle(there), strict=False))
        if others and time.monotonic() - self._told_at > _TELL_S:
            self._told_at = time.monotonic()
            log.warning("for now others stand in for %d rows of a batch of %d: %s", len(others), len(rows), error)
        return [others.get(row, row) for row in rows]

    def _look_for(self, span: tuple[int, int], lacking: Sequence[int], asked: set[int]) -> list[int]:
        """As many rows of ``span`` that are at hand as are ``lacking``, if there are; from the first of these on.

        Those that were ``asked`` for anyway are taken if there are no others.
        """
        first, num_rows = span[0], span[1] - span[0]
        num_blocks = -(-num_rows // _LOOK_ROWS)
        # Blocks in the order of multiples of the golden ratio, which are far apart wherever one stops: what is at hand
        # may be the first tenth of a source that is too long to be looked through.
        step = next(s for s in itertools.count(round(num_blocks * 0.618)) if math.gcd(s, num_blocks) == 1)
        others: list[int] = []
        doubles: list[int] = []
        until = time.monotonic() + _LOOK_S
        for k in range(num_blocks):
            begin = k * step % num_blocks * _LOOK_ROWS
            at = lacking[0] - first + 1 + begin
            block = [first + (at + i) % num_rows for i in range(min(_LOOK_ROWS, num_rows - begin))]
            there = list(itertools.compress(block, self._are_at_hand(block)))
            others += (row for row in there if row not in asked)
            doubles += (row for row in there if row in asked)
            if len(others) >= len(lacking) or time.monotonic() > until:
                break
        return others or doubles

    def _check(self, error: ShmloaderError | None) -> None:
        """Raise if more rows are bad than may be."""
        num_rows = self._plan.source.num_rows or 0
        most = self._policy.most(num_rows)
        if most is None:
            return
        num_bad = self._quarantine.num_met()
        told = f"{num_bad} of its {num_rows} rows are bad"
        if num_bad > most:
            raise self.too_many(f"{told}, and max_bad={self._policy.max_bad} allows {most}") from error
        if self._quarantine.is_full:
            raise self.too_many(f"{told}, and the list of them is full: no more can be counted") from error

    def too_many(self, what: str) -> TooManyBadRowsError:
        """The error that says ``what`` there is too much of, and shows some of those that are known."""
        plan, bad = self._plan, [row for row in self._quarantine.rows() if row.is_met]
        shown = [f"{row.error}: {row.message}" for row in bad[:_SHOWN]]
        listed = "".join(f"\n    {text}" for text in shown) + ("\n    …" if len(bad) > _SHOWN else "")
        return TooManyBadRowsError(
            f"{plan.source.name!r} (split {plan.source.split!r}): {what}.{listed}\ndataset.quarantine lists them. Mend "
            "the data, or choose other columns or a process= that takes them; or allow a larger share with max_bad= "
            "(1.0: any number).",
            source=plan.source.name,
            num_bad=sum(row.num_rows for row in bad),
            num_rows=plan.source.num_rows,
            max_bad=self._policy.max_bad,
            examples=shown,
        )
