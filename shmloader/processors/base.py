"""The contract between a prefetcher and what turns rows into the fields of a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from shmloader.sample import Field


class Rows(Protocol):
    """A few rows on their way into the ring; made by `Processor.begin`, used once per row, in any order.

    Both methods raise `SampleError` (usually `DecodeError` or `ProcessError`) for a row that cannot be
    used, with ``field`` set; the prefetcher adds source, shard and row. Other rows are not affected.
    """

    def shapes(self, row: int) -> Mapping[str, tuple[int, ...]]:
        """The shape of each field of row ``row`` (0-based within these rows); called once, before `write`."""
        ...

    def write(self, row: int, out: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Fill ``out[name]`` (stored dtype, the shapes told) for this processor's fields; they lie in the ring."""
        ...


class Processor(Protocol):
    """Turns the rows of a chunk into fields. Built and used in one prefetcher, in one thread.

    fields: what it yields, in order; ``shape`` has None for a dimension that differs between samples.
    columns: the columns of the source that it reads.
    """

    fields: tuple[Field, ...]
    columns: tuple[str, ...]

    def begin(self, batch: pa.RecordBatch) -> Rows:
        """Take the rows of ``batch`` (columns as the source stores them; at most a few hundred rows).

        Work that is cheaper for many rows at once (tokenising) is done here. It does not raise for a bad
        row: that is told by `Rows.shapes` or `Rows.write` of that row.
        """
        ...
