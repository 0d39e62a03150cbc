"""What is to be done about what cannot be had: the values of ``fallback=``, ``on_error=`` and ``max_bad=``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from shmloader.errors import OptionError, RecordTooLargeError, RingError, ShmloaderError, SourceError

#: ``fallback=``: what may stand in for a dataset that cannot be read as it was asked for (sources/fallback.py).
FALLBACKS = ("synthetic", "download", "error")
#: ``on_error=``: what a reader gets in the place of a bad row.
POLICIES = ("raise", "skip", "synthetic")


def check_fallback(value: Any) -> None:
    """Raise an OptionError unless ``fallback=`` can have this value."""
    _check_one_of("fallback", value, FALLBACKS)


@dataclass(frozen=True)
class BadRows:
    """What a reader does about bad rows.

    on_error: one of `POLICIES`. max_bad: the share of the rows, 0 to 1, of which more is an error.
    """

    on_error: str = "raise"
    max_bad: float = 0.01

    def __post_init__(self) -> None:
        _check_one_of("on_error", self.on_error, POLICIES)
        is_number = isinstance(self.max_bad, int | float) and not isinstance(self.max_bad, bool)
        if not is_number or not 0 <= self.max_bad <= 1:
            allowed = "a share of the rows, from 0 (none) to 1 (any number)"
            raise OptionError(
                f"max_bad={self.max_bad!r} is not valid: it must be {allowed}",
                name="max_bad",
                value=repr(self.max_bad),
                allowed=allowed,
            )

    @property
    def substitutes(self) -> bool:
        """Whether something stands in for a bad row."""
        return self.on_error != "raise"

    def most(self, num_rows: int) -> int | None:
        """Most bad rows of ``num_rows``: one in any case, unless there are to be none; None: any number."""
        if self.max_bad >= 1:
            return None
        # A product that is a whole number but for its rounding counts as that: 0.07 × 100 is 7.000000000000001.
        return max(1, math.floor(self.max_bad * num_rows + 1e-9)) if self.max_bad > 0 else 0


def is_bad_row(error: ShmloaderError) -> bool:
    """Whether what a reader met is the fault of a row, or of the chunk that it is in, and of nothing else.

    Not what is wrong with the ring, what died of want of memory, or that nothing moves. A sample that is larger than
    the ring is its row's; a chunk that is larger than the room for it is not, since then the room is too small.
    """
    if error.at is None or error.data.get("of_memory"):
        return False
    return not isinstance(error, RingError) or (isinstance(error, RecordTooLargeError) and error.at[1] is None)


def is_passing(error: ShmloaderError) -> bool:
    """Whether it comes of a server that cannot be reached now: then nothing is known of the row."""
    return isinstance(error, SourceError) and "endpoint" in error.data


def _check_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise OptionError(
            f"{name}={value!r} is not valid: it must be one of {', '.join(map(repr, allowed))}",
            name=name,
            value=repr(value),
            allowed=list(allowed),
        )
