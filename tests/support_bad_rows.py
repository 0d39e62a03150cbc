"""Sets with bad rows: their options, and what fails at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from shmloader import Options

#: All fits; most makes way.
RINGS = {"fits": "32MiB", "does not fit": "256KiB"}


def options(ring: str = "fits", **changes: Any) -> Options:
    sizes = {} if ring == "fits" else {"in_flight": 16, "ahead": 16}
    return Options(**{"ring_bytes": RINGS[ring], "prefetchers": 2, "timeout_s": 30, **sizes, **changes})


def fails_at(*bad: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A `process`: the number, and what takes room; raises for these rows."""

    def process(row: dict[str, Any]) -> dict[str, Any]:
        if row["number"] in bad:
            raise ValueError(f"number {row['number']} is bad")
        return {"number": row["number"], "room": np.zeros(4000, np.uint8)}

    return process
