"""What the planner found out, as it lies in the plan memfd: JSON, without secrets."""

from __future__ import annotations

import bisect
import json
import os
from dataclasses import dataclass
from typing import Any

from shmloader.errors import from_wire
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
    schema = None if plan.schema is None else plan.schema.to_json()
    _write(fd, {"source": plan.source.to_json(), "schema": schema})


def write_failure(fd: int, wire: dict[str, Any]) -> None:
    """Store why there is no plan (see `errors.to_wire`)."""
    _write(fd, {"error": wire})


def read_plan(fd: int) -> SetPlan | None:
    """The plan in ``fd``, None if none was written yet.

    Raises:
        ShmloaderError: what the planner stored with `write_failure`.
    """
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    if not data:
        return None
    raw = json.loads(data)
    if "error" in raw:
        raise from_wire(raw["error"])
    schema = None if raw["schema"] is None else Schema.from_json(raw["schema"])
    return SetPlan(SourcePlan.from_json(raw["source"]), schema)


def _write(fd: int, raw: dict[str, Any]) -> None:
    data = memoryview(json.dumps(raw).encode())
    at = 0
    while at < len(data):
        at += os.pwrite(fd, data[at:], at)
