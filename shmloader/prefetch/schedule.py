"""Which rows a prefetcher decodes next.

Most urgent first, always of chunks whose encoded rows are in the ring:

1. rows that readers wait for,
2. rows that a living order needs next, as many as its share of transit holds (lookahead.py),
3. fill: the rows of chunks that stay, which are decoded once and for all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

import shmloader._native as native
from shmloader.permutation import Rows
from shmloader.prefetch.cut import Cut, look_at_chunks
from shmloader.prefetch.lookahead import IS_TO_DO, LOOK_ROWS, Lookahead, Pace, is_fillable, look
from shmloader.prefetch.orders import Followed, Follows
from shmloader.writer import Stamp, Writer

#: Most wanted rows that are looked at: more than readers wait for at once.
MOST_WANTED = 4096
#: Rows of a living order that are decoded ahead where all rows stay, and so none is in the way of another.
MOST_AHEAD = 4096
#: How often rows are tried to be claimed that others claim at the same time, before the next look.
MOST_TRIES = 8
#: Rows to fill with that are looked for in one go.
FILL_ROWS = 1024
#: Candidates of an order whose chunks are looked at in one go.
_BLOCK = 256
#: Rows that an order needs are looked at again after so long at the latest, for want of any sign that they changed.
_REFRESH_S = 1.0


@dataclass
class Task:
    """Rows that this process has claimed.

    rows: (chunk, row), sorted. stamps: of rows that an order needs. urgent: somebody waits for those without a stamp.
    is_suspect: somebody died over its only row, which is to take no others with it.
    """

    rows: list[tuple[int, int]]
    urgent: bool = False
    stamps: dict[int, Stamp] = field(default_factory=dict)
    is_suspect: bool = False


class DecodeSchedule:
    """Decides for one prefetcher, and claims. For one thread.

    cut: which chunk a row is of. num_prefetchers: of the set. record_bytes: of every sample, if it is known before the
    first. most_ahead: rows of all living orders that are decoded ahead at most; None: as many as find room.
    """

    def __init__(
        self,
        segment: native.Segment,
        writer: Writer,
        cut: Cut,
        orders: Follows,
        num_prefetchers: int,
        record_bytes: int | None,
        most_ahead: int | None = None,
    ) -> None:
        self._most_ahead = most_ahead
        self._segment, self._writer, self._orders = segment, writer, orders
        self._cut = cut
        self._first_rows, self._num_rows = cut.chunks.first_rows, cut.chunks.num_rows
        self._num_prefetchers = num_prefetchers
        self._record_bytes = record_bytes
        self._chunk_ids = np.arange(len(cut.chunks))
        self._ahead: dict[tuple[int, int], Lookahead] = {}
        self._fill: Rows = np.zeros(0, np.int64)
        self._refresh_pace, self._fill_pace, self._mean_pace = Pace(), Pace(), Pace()
        self._refreshed: tuple[int, float] = (-1, 0.0)
        self._turn = 0
        self._blocked_word: int | None = None
        self._checked_word: int | None = None
        self._wait_s = 0.0
        stats = segment.stats()
        self._transit_bytes, self._most_transit = stats["transit_bytes"], stats["most_transit"]

    # -- for the decoder -----------------------------------------------------------------------------------

    def next(self, most: int) -> Task | None:
        """A task of up to ``most`` rows, claimed; None: there is nothing to do before `wait_s`, or the work word."""
        self._wait_s = float("inf")
        word = self._checked_word = self._segment.work_word()
        task = self._next_wanted(most)
        if task is None and word != self._blocked_word:
            return self._next_ordered(most) or self._next_fill(most)
        if task is not None and self._may_top_up(task, most) and word != self._blocked_word:
            self._top_up(task, most)
        return task

    def wait_s(self) -> float:
        """Seconds after which `next` may find something although the work word did not move."""
        return min(self._wait_s, self._cut.wait_s())

    def has_wanted(self) -> bool:
        """Whether somebody began to wait, since this or `next` was last called, for rows that can be decoded."""
        word = self._segment.work_word()
        if word == self._checked_word:
            return False
        self._checked_word = word
        return len(self._wanted()) > 0

    def give_back(self, task: Task, rows: Sequence[int]) -> None:
        """Of ``task`` these were not decoded."""
        if rows:
            self._writer.unclaim(rows)
            if task.stamps:
                for ahead in self._ahead.values():
                    ahead.states[np.isin(ahead.rows, rows)] = native.ROW_MISSING
            elif not task.urgent:
                self._fill = np.concatenate((np.array(rows, np.int64), self._fill))

    def block(self) -> None:
        """There was no room for what nobody waits for: nothing more of it until the work word moves."""
        self._blocked_word = self._checked_word

    # -- the three kinds -----------------------------------------------------------------------------------

    def _next_wanted(self, most: int) -> Task | None:
        for _ in range(MOST_TRIES):
            rows = self._wanted()
            if not len(rows):
                return None
            # The other prefetchers get their part too.
            num = min(most, max(-(-len(rows) // self._num_prefetchers), 2))
            got, is_suspect = self._claim(rows[:num])
            if got:
                return self._task(got, is_suspect, urgent=True)
        return None

    def _may_top_up(self, task: Task, most: int) -> bool:
        return self._cut.is_open and len(task.rows) < most and not task.is_suspect

    def _top_up(self, task: Task, most: int) -> None:
        """Add to what readers of a stream wait for what they will want next: else each waits for row after row."""
        more = self._next_ordered(most - len(task.rows))
        if more is not None and more.is_suspect:
            self.give_back(more, [row for _, row in more.rows])
        elif more is not None:
            task.rows = sorted(task.rows + more.rows)
            task.stamps = more.stamps

    def _next_ordered(self, most: int) -> Task | None:
        living = list(self._orders.now())
        self._ahead = {order.key: self._ahead.get(order.key) or Lookahead(self._segment) for order in living}
        if not living:
            return None
        num_ahead = self._num_ahead(len(living))
        self._turn = (self._turn + 1) % len(living)
        for order in living[self._turn :] + living[: self._turn]:
            ahead = self._ahead[order.key]
            if ahead.move(order, num_ahead):
                self._wait_s = 0.0
            got, is_suspect = self._claim_ahead(order, ahead, most)
            if not got and self._may_refresh(ahead):
                with self._refresh_pace:
                    ahead.refresh(order)
                    got, is_suspect = self._claim_ahead(order, ahead, most)
            if got:
                task = self._task(ahead.rows[got].tolist(), is_suspect)
                untils = (np.array(got) + (ahead.begin + 1)).tolist()
                task.stamps = dict(zip(ahead.rows[got].tolist(), map(order.stamp, untils), strict=True))
                return task
        return None

    def _may_refresh(self, ahead: Lookahead) -> bool:
        """Whether something may have changed, and it is not too often."""
        word, now = self._segment.work_word(), time.monotonic()
        if not len(ahead.rows) or (word == self._refreshed[0] and now < self._refreshed[1] + _REFRESH_S):
            return False
        if not self._is_due(self._refresh_pace):
            return False
        self._refreshed = word, now
        return True

    def _num_ahead(self, num_living: int) -> int:
        """Rows of one order that may be decoded ahead."""
        least = 2 * self._num_prefetchers
        if not self._transit_bytes:
            return max(least, MOST_AHEAD)
        if self._mean_pace.wait_s() == 0:
            with self._mean_pace:
                stats = self._segment.stats()
            if stats["num_commits"]:
                self._record_bytes = max(stats["commit_bytes"] // stats["num_commits"], 1)
        if self._record_bytes is None:
            return least
        num_ahead = self._transit_bytes // (2 * num_living) // self._record_bytes
        if self._most_transit:
            num_ahead = min(num_ahead, self._most_transit // (2 * num_living))
        if self._most_ahead is not None:
            num_ahead = min(num_ahead, self._most_ahead // num_living)
        return max(least, num_ahead)

    def _claim_ahead(self, living: Followed, ahead: Lookahead, most: int) -> tuple[list[int], bool]:
        """Claim the first rows that can be had: where in the window they are, and whether it is a suspect."""
        to_do = ahead.to_do()
        for start in range(0, len(to_do), _BLOCK):
            at = to_do[start : start + _BLOCK]
            at = at[self._cut.has_encoded(ahead.rows[at])]
            for i in range(0, len(at), most):
                part = at[i : i + most]
                # Others may have made them since, and readers have read them, and they been evicted.
                ahead.refresh(living, int(part[0]), int(part[-1]) + 1)
                part = part[IS_TO_DO[ahead.states[part]]]
                got, is_suspect = self._claim(ahead.rows[part])
                ahead.states[part] = native.ROW_WORK
                if got:
                    mine = set(got)
                    rows = ahead.rows[part].tolist()
                    return [i for i, row in zip(part.tolist(), rows, strict=True) if row in mine], is_suspect
        return [], False

    def _next_fill(self, most: int) -> Task | None:
        for _ in range(MOST_TRIES):
            if len(self._fill):  # others fill with the same, and what was to stay may have found no room
                self._fill = self._fill[IS_TO_DO[look(self._segment, self._fill)]]
                chunks = self._cut.chunk_of(self._fill)
                self._fill = self._fill[is_fillable(look_at_chunks(self._segment, chunks))]
            if not len(self._fill):
                if not self._is_due(self._fill_pace):
                    return None
                pace = Pace()
                with pace:
                    self._fill = self._look_for_fill()
                if not len(self._fill):
                    self._fill_pace = pace
                    return None
            part, self._fill = self._fill[:most], self._fill[most:]
            got, is_suspect = self._claim(part)
            if got:
                return self._task(got, is_suspect)
        self._wait_s = 0.0
        return None

    def _look_for_fill(self) -> Rows:
        """Some rows to do of chunks that stay, the first ones; none if there are none."""
        found: list[Rows] = [np.zeros(0, np.int64)]
        num_found = 0
        for chunk in np.flatnonzero(is_fillable(look_at_chunks(self._segment, self._chunk_ids))).tolist():
            first, end = int(self._first_rows[chunk]), int(self._first_rows[chunk] + self._num_rows[chunk])
            for start in range(first, end, LOOK_ROWS):
                rows = np.arange(start, min(start + LOOK_ROWS, end))
                found.append(rows[IS_TO_DO[look(self._segment, rows)]])
                num_found += len(found[-1])
                if num_found >= FILL_ROWS:
                    return np.concatenate(found)
        return np.concatenate(found)

    # -- parts ---------------------------------------------------------------------------------------------

    def _wanted(self) -> Rows:
        """Rows that clients wait for and that can be decoded, each once."""
        wanted = self._segment.wanted(MOST_WANTED)
        if not len(wanted):
            return np.zeros(0, np.int64)
        rows = np.unique(np.array(wanted, np.int64))
        return rows[self._cut.has_encoded(rows)]

    def _claim(self, rows: Rows) -> tuple[list[int], bool]:
        """Those of ``rows`` that are had now, False; or one over which somebody died, if only such can be had, True."""
        if len(rows) > 1 and (got := self._writer.claim(rows.tolist())):
            return got, False
        suspects = rows[look(self._segment, rows) == native.ROW_SUSPECT]
        for row in suspects.tolist():
            if got := self._writer.claim([row]):
                return got, True
        return (self._writer.claim(rows.tolist()) if len(rows) == 1 else []), False

    def _task(self, rows: list[int], is_suspect: bool, urgent: bool = False) -> Task:
        chunks = self._cut.chunk_of(np.array(rows, np.int64)).tolist()
        return Task(sorted(zip(chunks, rows, strict=True)), urgent, is_suspect=is_suspect)

    def _is_due(self, pace: Pace) -> bool:
        wait_s = pace.wait_s()
        self._wait_s = min(self._wait_s, wait_s) if wait_s else self._wait_s
        return wait_s == 0
