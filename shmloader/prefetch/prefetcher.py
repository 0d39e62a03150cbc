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
from shmloader.errors import ProcessError, RecordTooLargeError, RingError, SampleError, ServiceError, ShmloaderError
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
        if self.schema is None and ring.segment.text_get(native.TEXT_SCHEMA) is not None:
            self._adopt()

    def run(self) -> None:
        """Work until every chunk is done or cannot be had."""
        segment = self.ring.segment
        while True:
            seen = segment.work_word()
            index = segment.claim()
            if index >= 0:
                if not self._do(index):
                    return
                continue
            stats = segment.stats()
            if stats["chunks_todo"] == 0 and stats["chunks_claimed"] == 0:
                log.debug("nothing is left to do")
                return
            segment.work_wait(seen, IDLE_MS)
            segment.reap(False)

    def _do(self, index: int) -> bool:
        """Fill one chunk; False: there is no room, for this chunk or any other."""
        chunk = self.plan.source.chunks[index]
        try:
            try:
                self._fill(chunk)
            except RingError:
                raise
            except Exception as error:
                log.error("chunk %d: %s", index, error, exc_info=not isinstance(error, ShmloaderError))
                self.ring.put_error(native.CHUNK_ERROR | index, self._of_chunk(error, chunk))
                self.ring.segment.finish(index, True)
            else:
                self.ring.segment.finish(index, False)
        except RingError as error:
            log.error("%s", error)
            self.ring.put_fatal(error)
            return False
        return True

    def _of_chunk(self, error: Exception, chunk: Chunk) -> Exception:
        if isinstance(error, ShmloaderError):
            return error
        told = ServiceError(
            f"{self.plan.describe(chunk.first_row)} and the {chunk.num_rows - 1} after it cannot be processed: "
            f"{type(error).__name__}: {error}",
            role="prefetcher",
        )
        told.__cause__ = error
        return told

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
        try:
            self._make(row, i, begun)
        except RecordTooLargeError as error:
            raise self._place(error, row, chunk) from error
        except RingError:
            raise
        except Exception as error:
            self.ring.put_error(row, self._place(error, row, chunk))

    def _make(self, row: int, i: int, begun: Sequence[Rows]) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        for rows in begun:
            shapes.update(rows.shapes(i))
        if self.schema is None and self._agree():
            for rows in begun:  # what another prefetcher found first is what every row must have
                shapes.update(rows.shapes(i))
        assert self.schema is not None
        layout = RecordLayout(self.schema, shapes)
        ticket = self.ring.reserve(row, layout.num_bytes)
        if ticket is None:
            return  # a predecessor that lost its chunk had committed it
        try:
            record = self.ring.record_of(ticket)
            layout.write_header(record)
            arrays = layout.arrays(record)
            for rows in begun:
                rows.write(i, arrays)
        except Exception:
            self.ring.abort(ticket)
            raise
        self.ring.commit(ticket)

    def _place(self, error: Exception, row: int, chunk: Chunk) -> ShmloaderError:
        """The same error with source, shard and row, in its data and its message."""
        shard = self.plan.source.shards[chunk.shard] if self.plan.source.shards else None
        kind: type[ShmloaderError] = SampleError
        text, data = f"{type(error).__name__}: {error}", {}
        if isinstance(error, SampleError | RecordTooLargeError):
            kind, text, data = type(error), str(error), error.data
        data = {**data, "source": self.plan.source.name, "shard": shard, "row": row}
        placed = kind(f"{self.plan.describe(row)}: {text}", **data)
        placed.__cause__ = error
        return placed

    def _agree(self) -> bool:
        """Have a schema; the first prefetcher that has processed a row decides it. False: it was this one."""
        schema = processors.schema_of(self.processors, self.plan.source.name)
        text = schema.to_json().encode()
        if len(text) > native.TEXT_BYTES:
            raise ProcessError(f"process returns {len(schema.fields)} fields: too many to describe in 32 KiB")
        self.ring.segment.text_put(native.TEXT_SCHEMA, text)
        return self._adopt() != schema

    def _adopt(self) -> Schema:
        text = self.ring.segment.text_get(native.TEXT_SCHEMA)
        assert text is not None
        self.schema = Schema.from_json(text.decode())
        for processor in self.processors:
            if isinstance(processor, UserProcessor):
                processor.adopt(self.schema.fields)
        return self.schema


def main(fds: dict[str, int], head: dict[str, Any]) -> None:
    """Be a prefetcher: load what the work needs while the planner is at it, wait for the word, work."""
    pa.set_cpu_count(1)
    pa.set_io_thread_count(2)
    problem: ShmloaderError | None = None
    work = None
    try:
        work = read_work(fds["payload"])
    except ShmloaderError as error:
        problem = error
    told = os.read(fds["go"], 4096)
    os.close(fds["go"])
    if not told:
        return
    files = RingFiles(head["uuid"], fds["control"], fds["ring"], fds["lock"])
    ring = Ring(files, native.SERVICE, tuple(json.loads(told)["supervisor"]))
    try:
        if problem is not None:
            raise problem
        assert work is not None
        plan = read_plan(fds["plan"])
        assert plan is not None
        built = processors.build(plan.source.columns, work.config, work.tokenizer, work.process)
        reader = open_reader(work.request, plan.source, ring.segment.touch)
    except Exception as error:
        log.debug("cannot start", exc_info=True)
        ring.put_fatal(error)
    else:
        Prefetcher(ring, plan, built, reader).run()
        reader.close()
    ring.leave()
    # Without the interpreter's teardown: pyarrow's threads that still wind down can make it abort (seen with files of
    # a Hub: "terminate called without an active exception").
    logging.shutdown()
    sys.stderr.flush()
    os._exit(0)
