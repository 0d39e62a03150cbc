"""When a set is given up: its prefetchers do nothing but die.

What a row or a chunk does to those that try it alone the core bounds (three deaths set it aside), so such deaths are no
sign that nothing goes on; nor are several at once, which have one cause. The others are counted until something is
made, and so is what was set aside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shmloader.deaths import Death
from shmloader.errors import ServiceError

#: Of deaths of which neither a row nor a chunk is known to be the cause, so many in a row (guessed).
MAX_IDLE_DEATHS = 8
#: Rows and chunks that were set aside in a row: bad ones may lie side by side (guessed).
MAX_ASIDE = 32


class Futility:
    """Counts for the supervisor, of one set."""

    def __init__(self) -> None:
        self._moved, self._num_made = (-1, 0, 0), -1
        self._idle_deaths, self._aside_before = 0, 0
        self._chunks_aside = 0  # most broken chunks cannot be read, which is nobody's death

    def count(self, stats: Mapping[str, int], dead: Sequence[Death]) -> ServiceError | None:
        """Why the set is to be given up, now that these (one or more) died together; None: it is not.

        stats: of the segment, after the dead were reaped.
        """
        moved = (stats["num_commits"], stats["num_aside"], stats["chunks_broken"])
        self._chunks_aside += min(moved[2] - self._moved[2], sum(death.chunk is not None for death in dead))
        num_aside = stats["num_aside"] + self._chunks_aside
        if moved[0] != self._num_made:
            self._num_made, self._aside_before = moved[0], num_aside
        if moved != self._moved:
            self._idle_deaths = 0
        elif any(death.row is None and death.chunk is None for death in dead):
            self._idle_deaths += 1
        self._moved = moved
        if self._idle_deaths >= MAX_IDLE_DEATHS:
            return _given_up(f"Prefetch processes end at once, {self._idle_deaths} times in a row", dead[-1])
        if num_aside - self._aside_before >= MAX_ASIDE:
            what = (
                f"{num_aside - self._aside_before} rows or chunks in a row ended all prefetch processes that tried them"
            )
            return _given_up(f"{what}, and nothing was made in between", dead[-1])
        return None


def _given_up(what: str, last: Death) -> ServiceError:
    return ServiceError(
        f"{what}: the last one, {last}. What they logged, or wrote to stderr, may say why.",
        role="prefetcher",
        pid=last.pid,
        status=last.status,
    )
