"""What the planner found out: the source's plan and the samples' schema."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from shmloader.prefetch.plan_file import Layout, read_parts, write_parts
from shmloader.sample import Schema
from shmloader.sources.base import SourcePlan


@dataclass(frozen=True)
class SetPlan:
    """The source's plan, and the samples' schema if it is known before the first row was processed."""

    source: SourcePlan
    schema: Schema | None

    def describe(self, row: int) -> str:
        """Where ``row`` is to be found, for messages: source, split, shard and row."""
        chunks = self.source.chunks
        chunk = chunks[bisect.bisect_right(chunks, row, key=lambda c: c.first_row) - 1]
        shard = self.source.shards[chunk.shard] if self.source.shards else "?"
        return f"row {row} of {self.source.name!r} (split {self.source.split!r}, shard {shard!r})"


def write_plan(fd: int, plan: SetPlan) -> None:
    """Store ``plan`` in the (empty) plan memfd."""
    source, schema = plan.source, plan.schema
    layout = Layout(
        num_rows=source.num_rows,
        chunks=[(chunk.first_row, chunk.num_rows) for chunk in source.chunks],
        is_sequential=source.is_sequential,
        record_bytes=None if schema is None else schema.record_bytes(),
    )
    write_parts(fd, layout, source.to_json(), None if schema is None else schema.to_json())


def read_plan(fd: int) -> SetPlan | None:
    """The plan in ``fd``, None if none was written yet. Raises what the planner raised."""
    parts = read_parts(fd)
    if parts is None:
        return None
    _, source, schema = parts
    return SetPlan(SourcePlan.from_json(source), None if schema is None else Schema.from_json(schema))
