"""Notices that chunks are fetched again and again for a few rows each, and says what helps."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

import shmloader._native as native

#: Fetched again on demand so often, it is told (guessed).
TELL_AFTER = 32


class Refetches:
    """What one prefetcher fetches on demand, while readers follow no order that is known.

    name: of the source. num_chunks: 0 in an open set, whose readers all follow an order. describe_disk: says why what
    was fetched is not on disk.
    """

    def __init__(
        self, segment: native.Segment, name: str, num_rows: int, num_chunks: int, describe_disk: Callable[[], str]
    ) -> None:
        self._segment, self._name, self._describe_disk = segment, name, describe_disk
        self._mean_rows = num_rows / max(num_chunks, 1)
        self._seen = np.zeros(num_chunks, bool)
        self._is_told = False
        self._forget()

    def _forget(self) -> None:
        stats = self._segment.stats()
        self._before = stats["num_commits"], stats["num_fetched"], stats["fetched_bytes"]
        self._num = 0

    def note(self, chunk: int, urgent: bool) -> None:
        """``chunk`` was fetched; urgent: somebody waits for it. Tells it, once in a set, if that is too often."""
        if not len(self._seen):
            return
        is_again, self._seen[chunk] = bool(self._seen[chunk]), True
        if self._is_told or not urgent or not is_again or self._segment.num_orders():
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

    def _tell(self, row_bytes: float) -> None:
        self._is_told = True
        message = (
            f"{self._name}: samples are read in an order that the prefetchers do not know, and do not fit the ring: "
            f"they are fetched from the source again and again, {64 * row_bytes / (1 << 20):,.1f} MiB for every 64 of "
            f"them. {self._describe_disk()} Give the DataLoader sampler=dataset.sampler() in place of shuffle=True: it "
            "shuffles so that each part is fetched once an epoch. Or have what was fetched kept on disk, by "
            "SHMLOADER_SPILL_BYTES and, for a larger disk, SHMLOADER_SPILL_DIR. Or set SHMLOADER_RING_BYTES higher."
        )
        self._segment.text_put(native.TEXT_REFETCH, json.dumps({"message": message}).encode())
