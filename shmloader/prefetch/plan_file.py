"""The plan memfd: written once by the planner, read by everybody. JSON in three parts, without secrets.

``layout`` is all that the supervisor needs; it reads nothing else, and so imports neither numpy nor pyarrow.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from shmloader.errors import from_wire


@dataclass(frozen=True)
class Layout:
    """What the control memory is laid out for.

    chunks: (first row, number of rows) of each. units: for each the index of its unit's first chunk. chunk_bytes: its
    (estimated) encoded bytes. record_bytes: of every sample, None: they differ. most_record_bytes: no sample
    is larger, None: not known.
    window_bytes: encoded bytes of the chunks that an order shuffles among one another.
    rows_per_chunk: of an open set, of whose rows and chunks nobody knows how many there are; else 0.
    """

    num_rows: int
    chunks: list[tuple[int, int]]
    units: list[int]
    chunk_bytes: list[int]
    record_bytes: int | None
    most_record_bytes: int | None
    window_bytes: int
    rows_per_chunk: int = 0


def write_parts(fd: int, layout: Layout, source: str, schema: str | None) -> None:
    """Store a plan in the (empty) plan memfd."""
    _write(fd, {"layout": asdict(layout), "source": source, "schema": schema})


def write_failure(fd: int, wire: dict[str, Any]) -> None:
    """Store why there is no plan (see `errors.to_wire`)."""
    _write(fd, {"error": wire})


def read_parts(fd: int) -> tuple[Layout, str, str | None] | None:
    """What `write_parts` stored: layout, and the texts of source and schema; None if nothing was written
    yet, or not all of it.

    Raises:
        ShmloaderError: what the planner stored with `write_failure`.
    """
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    if not data:
        return None
    try:
        raw = json.loads(data)
    except ValueError:
        return None  # its writer was killed over it
    if "error" in raw:
        raise from_wire(raw["error"])
    return Layout(**raw["layout"]), raw["source"], raw["schema"]


def _write(fd: int, raw: dict[str, Any]) -> None:
    data = memoryview(json.dumps(raw).encode())
    at = 0
    while at < len(data):
        at += os.pwrite(fd, data[at:], at)
