"""A prefetcher: takes a chunk, reads its rows, makes each a sample in the ring, until there is none left.

Every row of a chunk that it finishes is in the ring, as a sample or as the reason why there is none. It keeps
nothing in between: killed at any point, its chunk is done again by another, which leaves out what is there.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

import shmloader._native as native
from shmloader import processors
from shmloader.errors import RingError, SampleError, ServiceError, ShmloaderError
from shmloader.prefetch.payload import read_work
from shmloader.prefetch.plan import SetPlan, read_plan
from shmloader.processors.base import Processor, Rows
from shmloader.processors.user import UserProcessor
from shmloader.ring import Ring, RingFiles
from shmloader.sample import RecordLayout, Schema
from shmloader.sources import open_reader
from shmloader.sources.base import Chunk

log = logging.getLogger("shmloader.prefetcher")

#: How long it sleeps when others hold all chunks that are left; it is woken when one is given back.
IDLE_MS = 1000


class Prefetcher:
    """Fills the ring of one set from one source."""

    def __init__(self, ring: Ring, plan: SetPlan, built: Sequence[Processor], reader: Any) -> None:
        self.ring = ring
        self.plan = plan
        self.processors = built
        self.reader = reader
        self.schema = plan.schema

    def run(self) -> None:
        """Work until every chunk is done or cannot be had."""
        segment = self.ring.segment
        while True:
            seen = segment.work_word()
            index = segment.claim()
            if index >= 0:
                self._do(index)
                continue
            stats = segment.stats()
            if stats["chunks_todo"] == 0 and stats["chunks_claimed"] == 0:
                log.debug("nothing is left to do")
                return
            segment.work_wait(seen, IDLE_MS)
            segment.reap(False)

    def _do(self, index: int) -> None:
        chunk = self.plan.source.chunks[index]
        try:
            self._fill(chunk)
        except RingError as error:
            # No room: nothing more can be stored, for this chunk or any other.
            log.error("%s", error)
            self.ring.put_fatal(error)
            raise SystemExit(0) from error
        except ShmloaderError as error:
            log.error("chunk %d: %s", index, error)
            self.ring.put_error(native.CHUNK_ERROR | index, error)
            self.ring.segment.finish(index, True)
        else:
            self.ring.segment.finish(index, False)

    def _fill(self, chunk: Chunk) -> None:
        segment = self.ring.segment
        have = segment.have(chunk.first_row, chunk.num_rows)
        wanted = segment.wanted(chunk.first_row, chunk.num_rows)
        for first_row, batch in self.reader.read(chunk, wanted):
            segment.touch()
            begun = [processor.begin(batch) for processor in self.processors]
            now = set(segment.wanted(first_row, batch.num_rows))
            # Rows that somebody waits for come first.
            for i in sorted(range(batch.num_rows), key=lambda i: first_row + i not in now):
                row = first_row + i
                bit = row - chunk.first_row
                if not have[bit // 8] >> (bit % 8) & 1:
                    self._put(row, i, begun, chunk)
            del begun, batch

    def _put(self, row: int, i: int, begun: Sequence[Rows], chunk: Chunk) -> None:
        ticket = None
        try:
            shapes: dict[str, tuple[int, ...]] = {}
            for rows in begun:
                shapes.update(rows.shapes(i))
            layout = RecordLayout(self._schema(), shapes)
            ticket = self.ring.reserve(row, layout.num_bytes)
            if ticket is None:
                return  # a predecessor that lost its chunk had committed it
            record = self.ring.record_of(ticket)
            layout.write_header(record)
            arrays = layout.arrays(record)
            for rows in begun:
                rows.write(i, arrays)
        except SampleError as error:
            if ticket is not None:
                self.ring.abort(ticket)
            self.ring.put_error(row, self._place(error, row, chunk))
        else:
            self.ring.commit(ticket)

    def _place(self, error: SampleError, row: int, chunk: Chunk) -> SampleError:
        """The same error with source, shard and row, in its data and its message."""
        shard = self.plan.source.shards[chunk.shard] if self.plan.source.shards else None
        data = {**error.data, "source": self.plan.source.name, "shard": shard, "row": row}
        placed = type(error)(f"{self.plan.describe(row)}: {error}", **data)
        placed.__cause__ = error
        return placed

    def _schema(self) -> Schema:
        """The schema of the set; the first prefetcher that has processed a row decides it."""
        if self.schema is None:
            schema = processors.schema_of(self.processors, self.plan.source.name)
            self.ring.segment.text_put(native.TEXT_SCHEMA, schema.to_json().encode())
            first = self.ring.segment.text_get(native.TEXT_SCHEMA)
            assert first is not None
            self.schema = Schema.from_json(first.decode())
            for processor in self.processors:
                if isinstance(processor, UserProcessor):
                    processor.adopt(self.schema.fields)
        return self.schema


def main(fds: dict[str, int], head: dict[str, Any]) -> None:
    """Be a prefetcher: load what the work needs while the planner is at it, wait for the word, work."""
    if not native.die_with_parent(os.getppid()):
        return
    pa.set_cpu_count(1)
    pa.set_io_thread_count(2)
    problem: BaseException | None = None
    work = None
    try:
        work = read_work(fds["payload"])
    except Exception as error:
        problem = error
    told = os.read(fds["go"], 4096)
    os.close(fds["go"])
    if not told:
        return
    files = RingFiles(head["uuid"], fds["control"], fds["ring"], fds["lock"])
    ring = Ring(files, native.SERVICE, tuple(json.loads(told)["supervisor"]))
    try:
        if problem is not None or work is None:
            raise ServiceError(f"A prefetch process cannot load what it was sent: {problem}") from problem
        plan = read_plan(fds["plan"])
        assert plan is not None
        built = processors.build(plan.source.columns, work.config, work.tokenizer, work.process)
        reader = open_reader(work.request, plan.source)
    except Exception as error:
        log.debug("cannot start", exc_info=True)
        ring.put_fatal(error)
        sys.exit(0)
    Prefetcher(ring, plan, built, reader).run()
    ring.leave()
