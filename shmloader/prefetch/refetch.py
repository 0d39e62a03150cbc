"""Notices that chunks are fetched again where that costs, and says what helps."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

import shmloader._native as native
from shmloader.options import size_text

#: Fetched again on demand so often, it is told (guessed).
TELL_AFTER = 32

_OUR_SAMPLER = (
    "sampler=dataset.sampler() in place of shuffle=True: it shuffles so that each part is fetched once an epoch."
)


class Refetches:
    """What one prefetcher fetches again: of a source that is dear to read any chunk; of others many, for few rows each.

    name: of the source. num_chunks: 0 in an open set, which keeps nothing. is_dear: to read a chunk again costs, in
    whatever order. describe_disk: says why what was fetched is not on disk.
    """

    def __init__(
        self,
        segment: native.Segment,
        name: str,
        num_rows: int,
        num_chunks: int,
        is_dear: bool,
        describe_disk: Callable[[], str],
    ) -> None:
        self._segment, self._name, self._is_dear, self._describe_disk = segment, name, is_dear, describe_disk
        self._mean_rows = num_rows / max(num_chunks, 1)
        self._seen = np.zeros(num_chunks, bool)
        self._is_told = False
        self._forget()

    def _forget(self) -> None:
        stats = self._segment.stats()
        self._before = stats["num_commits"], stats["num_fetched"], stats["fetched_bytes"]
        self._num = 0

    def note(self, chunk: int, row_bytes: float, urgent: bool, is_refused: bool) -> None:
        """``chunk`` was fetched. Tells it, once in a set, if that is too often.

        row_bytes: of its rows, on average, encoded. urgent: somebody waits for it. is_refused: it was to lie on disk,
        which did not take it.
        """
        if not len(self._seen):
            return
        is_again, self._seen[chunk] = bool(self._seen[chunk]), True
        if self._is_told or not is_again:
            return
        if self._is_dear:
            if is_refused:
                self._tell_dear(row_bytes)
            return
        if not urgent or self._segment.num_orders():
            return
        self._num += 1
        if self._num < TELL_AFTER:
            return
        stats = self._segment.stats()
        now = stats["num_commits"], stats["num_fetched"], stats["fetched_bytes"]
        num_commits, num_fetched, fetched_bytes = (b - a for a, b in zip(self._before, now, strict=True))
        # Where most rows of what is fetched are used, as when they are read as they lie, nothing is wrong.
        if num_commits < num_fetched * self._mean_rows / 2:
            self._tell(fetched_bytes / max(num_commits, 1))
        self._forget()

    def _tell_dear(self, row_bytes: float) -> None:
        # How often each is fetched is not known yet: in an order that is known once an epoch, else for few of its rows.
        is_known = self._segment.num_orders() > 0
        message = (
            f"{self._name}: samples that do not fit the ring are fetched from the source again, where they have been "
            f"before: {'' if is_known else 'at least '}{size_text(64 * row_bytes)} for every 64 of them. "
            f"{self._describe_disk()} Have all that is fetched kept on disk, by a larger SHMLOADER_SPILL_BYTES and, "
            "for a larger disk, SHMLOADER_SPILL_DIR. Or set SHMLOADER_RING_BYTES higher."
        )
        if not is_known:
            message += f" Or give the DataLoader {_OUR_SAMPLER}"
        self._put(message)

    def _tell(self, row_bytes: float) -> None:
        self._put(
            f"{self._name}: samples are read in an order that the prefetchers do not know, and do not fit the ring: "
            f"they are fetched from the source again and again, {size_text(64 * row_bytes)} for every 64 of "
            f"them. {self._describe_disk()} Give the DataLoader {_OUR_SAMPLER} Or have what was fetched kept on disk, "
            "by SHMLOADER_SPILL_BYTES and, for a larger disk, SHMLOADER_SPILL_DIR. Or set SHMLOADER_RING_BYTES higher."
        )

    def _put(self, message: str) -> None:
        self._is_told = True
        self._segment.text_put(native.TEXT_REFETCH, json.dumps({"message": message}).encode())
