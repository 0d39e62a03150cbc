"""What the planner found out: the plan of the sources, and the samples' schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

import shmloader._native as native
from shmloader.order import Chunks
from shmloader.prefetch.plan_file import Layout, map_listings, read_parts, write_parts
from shmloader.sample import Schema
from shmloader.sources.base import SourcePlan
from shmloader.sources.listing import path_of
from shmloader.sources.rows import BATCH_ROWS

#: Positions of an open set's orders are below this, which also stands for an end that nobody knows.
LAST_POSITION = (1 << native.POSITION_BITS) - 1


@dataclass(frozen=True)
class SetPlan:
    """The plan of the sources, and the samples' schema if it is known before the first row was processed.

    window_bytes: encoded bytes of the chunks that an order shuffles among one another.
    """

    source: SourcePlan
    schema: Schema | None
    window_bytes: int

    def chunks(self) -> Chunks:
        """How the source is cut, for the order."""
        source = self.source
        units = np.unique(np.array(source.units, np.int64), return_inverse=True)[1]
        return Chunks(
            np.array([chunk.first_row for chunk in source.chunks], np.int64),
            np.array([chunk.num_rows for chunk in source.chunks], np.int64),
            units.astype(np.int64),
            np.array(source.chunk_bytes, np.int64),
        )

    def origin(self, row: int) -> dict[str, Any]:
        """Where ``row`` is from, as errors tell it: the names of source and split, its shard and its number there.

        The number is that in the whole split, also of a slice; in an open set the row's position, which its id ends in.
        Where that may not be the index in the dataset, this is told as well.
        """
        told = {"source": self.name(row), "shard": self.shard(row), "row": self.number(row)}
        return told | {"index": row} if self.source.parts else told

    def number(self, row: int) -> int:
        """The number of ``row`` in its split: in an open set that is its position, which the row's id ends in."""
        return self._found(row)[1]

    def shard(self, row: int) -> str | None:
        """The shard that ``row`` lies in, or its file; None: there are none."""
        return _shard(*self._found(row))

    def name(self, row: int) -> str:
        """The name of the source that ``row`` is of."""
        return self._of(row).name

    def class_names(self, row: int) -> tuple[str, ...]:
        """Of the source that ``row`` is of, those of the classes that its labels number; none if nobody told."""
        return self._of(row).columns.class_names or ()

    def span(self, row: int) -> tuple[int, int]:
        """The first row of the source that ``row`` is of, and the end of that source."""
        first, source = 0, self.source
        if source.is_mixed:
            for part in source.sources:
                end = min(first + (part.num_rows or 0), source.num_rows or 0)
                if row < end:
                    return first, end
                first = end
        return 0, source.num_rows or 0

    def chunk_rows(self, row: int) -> tuple[int, int]:
        """The first row of the chunk that ``row`` is in, and the one behind its last. Not of an open source."""
        chunk = self.source.chunks[self.source.chunk_at(row)]
        return chunk.first_row, chunk.first_row + chunk.num_rows

    def describe(self, row: int) -> str:
        """Where ``row`` is to be found, for messages: source, split, shard and row."""
        found, number = self._found(row)
        shard = _shard(found, number) or "?"
        return f"row {number} of {self.name(row)!r} (split {found.split!r}, shard {shard!r})"

    def _found(self, row: int) -> tuple[SourcePlan, int]:
        return (self.source, row & LAST_POSITION) if self.source.is_open else self.source.origin(row)

    def _of(self, row: int) -> SourcePlan:
        source = self.source
        return source.sources[source.source_of(source.chunk_at(row))] if source.is_mixed else source


def _shard(source: SourcePlan, row: int) -> str | None:
    """The shard that a row of a plan without parts lies in, or its file; None: there are none."""
    if source.listing is not None:
        return path_of(source.listing, row)
    if not source.shards or source.is_open:
        return source.shards[0] if source.shards else None
    return source.shards[source.chunks[source.chunk_at(row)].shard]


def describe_fields(schema: Schema) -> str:
    """The fields of a sample, for the log: name, dtype and shape of each."""
    shapes = (", ".join("any" if n is None else str(n) for n in field.shape) for field in schema.fields)
    return ", ".join(f"{f.name} {f.dtype} [{shape}]" for f, shape in zip(schema.fields, shapes, strict=True))


def write_plan(fd: int, plan: SetPlan) -> None:
    """Store ``plan`` in the (empty) plan memfd."""
    source, schema = plan.source, plan.schema
    layout = Layout(
        num_rows=source.num_rows or 0,
        chunks=[(chunk.first_row, chunk.num_rows) for chunk in source.chunks],
        units=list(source.units),
        chunk_bytes=list(source.chunk_bytes),
        record_bytes=None if schema is None else schema.record_bytes(),
        most_record_bytes=None if schema is None else schema.most_record_bytes(),
        window_bytes=plan.window_bytes,
        rows_per_chunk=BATCH_ROWS if source.is_open else 0,
    )
    listings = [memoryview(listing) for listing in source.listings()]
    write_parts(fd, layout, source.to_json(), None if schema is None else schema.to_json(), listings)


def read_plan(fd: int) -> SetPlan | None:
    """The plan in ``fd``, None if none was written yet. Raises what the planner raised."""
    parts = read_parts(fd)
    if parts is None:
        return None
    layout, text, schema = parts
    source = SourcePlan.from_json(text, [pa.py_buffer(listing) for listing in map_listings(fd)])
    return SetPlan(source, None if schema is None else Schema.from_json(schema), layout.window_bytes)
