"""Encoded chunks that somebody waits for are pinned until the rows that are waited for are decoded.

No order is known to need such a chunk, so nothing else keeps the next one that is fetched from taking its place:
readers in a random order wait for rows of many chunks at once, and each of these would be fetched again and again.
What is held is bounded in bytes: beyond, the next one is fetched when rows of the first ones are decoded. Nothing idle
is held.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection

import shmloader._native as native


class Held:
    """The pins of one fetcher, of ``most_bytes`` and one chunk at most. For one thread."""

    def __init__(self, segment: native.Segment, most_bytes: int) -> None:
        self._segment, self._most_bytes = segment, most_bytes
        self._pins: dict[int, tuple[native.Pins, int]] = {}

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def is_full(self) -> bool:
        """No more may be held."""
        return sum(num_bytes for _, num_bytes in self._pins.values()) >= self._most_bytes

    def add(self, chunk: int, num_bytes: int) -> None:
        """Hold ``chunk``, whose record was just written."""
        _, missing, pins, _ = self._segment.get_many(array("Q", [native.RAW | chunk]), 0, None)
        if pins is not None and not missing:
            self._pins[chunk] = pins, num_bytes

    def keep(self, wanted: Collection[int]) -> None:
        """Give up all but the ``wanted`` ones."""
        self._pins = {chunk: held for chunk, held in self._pins.items() if chunk in wanted}
