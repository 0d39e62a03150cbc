"""What a reader gets in the place of a row that cannot be had: the next good one of its source.

Which one that is depends on the data alone: the next row, or the row behind the chunk if that cannot be read, and so on
until one is good; behind the source's last row comes its first. So length, order and resuming stay exact, whatever
the number of workers, the size of the ring, or the time. Only while a server cannot be reached is it the next row that
happens to be at hand, and only for that read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from shmloader.errors import ShmloaderError, TooManyBadRowsError
from shmloader.policy import BadRows, is_bad_row, is_passing
from shmloader.prefetch.plan import SetPlan
from shmloader.quarantine import Quarantine
from shmloader.ring import Place, Refs

log = logging.getLogger("shmloader")

#: Rows that are looked at at once, for one that is at hand.
_LOOK_ROWS = 256
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
        while True:
            try:
                return self._wait_for(asked, place)
            except ShmloaderError as error:
                if is_passing(error):
                    asked = self._at_hand(asked, error)
                    continue
                if error.at is None or not is_bad_row(error):
                    raise
                bad = error.at[0]
                other = self._after(bad, error)
            asked = [other if row == bad else row for row in asked]

    def _after(self, bad: int, error: ShmloaderError) -> int:
        """The first row behind ``bad`` that is not known to be bad."""
        self._check(error)
        assert error.at is not None
        first, end = self._plan.span(bad)
        behind = bad + 1 if error.at[1] is None else self._plan.chunk_rows(bad)[1]
        self._next[bad] = behind if behind < end else first
        return self._resolved(bad)

    def _resolved(self, row: int) -> int:
        seen = {row}
        while (other := self._next.get(row)) is not None:
            if other in seen:
                raise self.too_many("all of its rows are bad")
            seen.add(other)
            row = other
        return row

    def _at_hand(self, rows: Sequence[int], error: ShmloaderError) -> list[int]:
        """``rows``, with others in the place of those that are not at hand, as far as they are of the same source.

        Raises ``error``: there are none.
        """
        first, end = (0, self._plan.source.num_rows or 0) if error.at is None else self._plan.span(error.at[0])
        found = zip(rows, self._are_at_hand(rows), strict=True)
        lacking = {row for row, is_there in found if not is_there and first <= row < end}
        others = {row: self._next_at_hand(row, error) for row in lacking}
        if others and time.monotonic() - self._told_at > _TELL_S:
            self._told_at = time.monotonic()
            log.warning("for now others stand in for %d rows of a batch of %d: %s", len(others), len(rows), error)
        return [others.get(row, row) for row in rows]

    def _next_at_hand(self, row: int, error: ShmloaderError) -> int:
        first, end = self._plan.span(row)
        for begin, stop in ((row + 1, end), (first, row)):
            for at in range(begin, stop, _LOOK_ROWS):
                some = range(at, min(at + _LOOK_ROWS, stop))
                for other, is_there in zip(some, self._are_at_hand(some), strict=True):
                    if is_there:
                        return other
        raise error

    def _check(self, error: ShmloaderError | None) -> None:
        """Raise if more rows are bad than may be."""
        num_rows = self._plan.source.num_rows or 0
        most = self._policy.most(num_rows)
        if most is None:
            return
        num_bad = self._quarantine.num_met()
        if num_bad > most or self._quarantine.is_full:
            what = f"{num_bad} of its {num_rows} rows are bad, and max_bad={self._policy.max_bad} allows {most}"
            raise self.too_many(what) from error

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
