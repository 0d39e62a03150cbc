"""A prefetcher: fetches chunks of the source and decodes rows into the ring, until there is none left.

::

    thread "fetch"   source ──read──▶ Arrow ──────────▶ raw region          fetch_schedule.py, fetcher.py
    main thread                  raw region ──decode──▶ records of samples  schedule.py, decoder.py

Any prefetcher decodes rows of any chunk in the raw region, whoever fetched it. It keeps nothing in between: killed at
any point, what it had claimed is done again by another.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

import shmloader._native as native
from shmloader.deaths import Deaths
from shmloader.errors import ShmloaderError
from shmloader.files import RingFiles
from shmloader.prefetch.cut import ClosedCut, Cut, OpenCut, PlaceRows
from shmloader.prefetch.decoder import Decoder
from shmloader.prefetch.fetch_schedule import FetchSchedule, Schedule
from shmloader.prefetch.fetcher import IDLE_MS, Fetcher
from shmloader.prefetch.lent import Lent
from shmloader.prefetch.open_orders import OpenOrders
from shmloader.prefetch.orders import FollowedOrders, Follows
from shmloader.prefetch.payload import read_work
from shmloader.prefetch.plan import SetPlan, read_plan
from shmloader.prefetch.recipes import Recipe, recipes_of
from shmloader.prefetch.schedule import DecodeSchedule
from shmloader.prefetch.spill import Spill
from shmloader.prefetch.store import RawStore
from shmloader.prefetch.stream_schedule import LendingReader, StreamSchedule
from shmloader.prefetch.want_of_memory import end_process, is_want_of_memory
from shmloader.ring import Ring
from shmloader.sizes import OPEN_AHEAD_BYTES, most_ahead, raw_budget
from shmloader.sources import open_reader
from shmloader.sources.base import OpenReader, Reader
from shmloader.sources.rows import BATCH_ROWS
from shmloader.writer import NoRoom, Writer

log = logging.getLogger("shmloader.prefetcher")

#: How long the fetching thread is waited for at the end: it may hang in a read.
STOP_S = 1.0

#: How often the log is told what was decoded, while something is.
SUMMARY_S = 1.0

#: What differs between closed and open sets; the number is a budget in bytes.
_Parts = tuple[Cut, Follows, RawStore, Schedule, Reader, int]


class Prefetcher:
    """Fills the ring of one set from one source; one of ``num_prefetchers``."""

    def __init__(
        self,
        ring: Ring,
        plan: SetPlan,
        recipes: Sequence[Recipe],
        reader: Reader | OpenReader,
        num_prefetchers: int,
        spill: Spill,
        verify: bool = False,
        cache_size: int | None = None,
    ) -> None:
        self.ring, self._verify = ring, verify
        self.segment = ring.segment
        self.writer = Writer(ring)
        Deaths(ring.files.deaths_fd).begin(ring.slot)
        if plan.source.is_open:
            parts = self._follow_streams(plan, reader)
        else:
            assert not isinstance(reader, OpenReader)
            parts = self._follow_chunks(plan, reader, spill)
        cut, orders, store, fetching, fetches, budget_bytes = parts
        record_bytes = None if plan.schema is None else plan.schema.record_bytes()
        most = most_ahead(cache_size) if plan.source.is_open else None
        self.schedule = DecodeSchedule(self.segment, self.writer, cut, orders, num_prefetchers, record_bytes, most)
        self.decoder = Decoder(ring, self.writer, plan, recipes, store, self.schedule, verify)
        held_bytes = budget_bytes // num_prefetchers
        self.fetcher = Fetcher(self.segment, self.writer, plan, fetches, store, fetching, held_bytes)

    def _follow_chunks(self, plan: SetPlan, reader: Reader, spill: Spill) -> _Parts:
        """What is particular to a closed set: all its chunks are known."""
        chunks = plan.chunks()
        orders = FollowedOrders(self.segment, chunks, plan.window_bytes)
        schemas = [plan.source.leaf(chunk).schema for chunk in range(len(plan.source.chunks))]
        first_rows = chunks.first_rows.tolist()
        store = RawStore(self.ring, self.writer, schemas, first_rows, spill=spill, verify=self._verify)
        units = np.array(plan.source.units, np.int64)
        budget_bytes = raw_budget(plan.source.chunk_bytes, plan.window_bytes)
        schedule = FetchSchedule(self.segment, chunks, units, orders, budget_bytes)
        return ClosedCut(self.segment, chunks), orders, store, schedule, reader, budget_bytes

    def _follow_streams(self, plan: SetPlan, reader: Reader | OpenReader) -> _Parts:
        """What is particular to an open set: streams, as many as there are iterations."""
        assert isinstance(reader, OpenReader)
        lent = Lent()
        orders = OpenOrders(self.segment, BATCH_ROWS)
        schema = plan.source.schema
        store = RawStore(self.ring, self.writer, schema, PlaceRows(self.segment), lent=lent, verify=self._verify)
        chunk_bytes = BATCH_ROWS * plan.source.row_bytes
        schedule = StreamSchedule(self.segment, orders, OPEN_AHEAD_BYTES, chunk_bytes, BATCH_ROWS, reader.keep)
        lending = LendingReader(self.segment, reader, lent, schedule)
        return OpenCut(self.segment, lent), orders, store, schedule, lending, OPEN_AHEAD_BYTES

    def run(self) -> bool:
        """Work until every chunk is done or broken, or nothing can be done any more. False: a read still hangs."""
        began = time.monotonic()
        self.fetcher.start()
        try:
            self._decode()
        except Exception as error:
            if is_want_of_memory(error):
                end_process(self.ring, error)
            log.error("%s", error, exc_info=not isinstance(error, ShmloaderError))
            self.writer.put_fatal(error)
        ended = self.fetcher.stop(STOP_S)
        self.segment.raw_release(self.ring.files.ring_fd)
        total_s = max(time.monotonic() - began, 1e-9)
        log.debug(
            "decoded for %.1f of %.1f s (%.1f %%)", self.decoder.busy_s, total_s, 100 * self.decoder.busy_s / total_s
        )
        return ended

    def _decode(self) -> None:
        summary = _Summary(self.decoder)
        while True:
            seen = self.segment.work_word()
            task = self.schedule.next(self.decoder.most_rows)
            if task is not None:
                try:
                    self.decoder.do(task)
                except NoRoom:
                    summary.num_blocked += 1
                    self.schedule.block()
                summary.tell()
                continue
            if self._is_over():
                return
            wait_ms = min(self.schedule.wait_s() * 1000 + 1, IDLE_MS)
            self.segment.work_wait(seen, int(wait_ms))
            self.segment.reap(False)

    def _is_over(self) -> bool:
        stats = self.segment.stats()
        if stats["chunks_todo"] == 0 and stats["chunks_claimed"] == 0:
            log.debug("nothing is left to do")
            return True
        return self.segment.text_get(native.TEXT_FATAL) is not None


class _Summary:
    """Tells the log, from time to time, what was decoded."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.num_blocked = 0
        self._begin()

    def _begin(self) -> None:
        self._at, self._rows, self._busy_s = time.monotonic(), self._decoder.num_rows, self._decoder.busy_s
        self.num_blocked = 0

    def tell(self) -> None:
        """Say it, if it is time."""
        seconds = time.monotonic() - self._at
        if seconds < SUMMARY_S:
            return
        rows, busy = self._decoder.num_rows - self._rows, 100 * (self._decoder.busy_s - self._busy_s) / seconds
        log.debug("%d rows in %.1f s, busy for %.0f %%; no room %d times", rows, seconds, busy, self.num_blocked)
        self._begin()


def main(fds: dict[str, int], head: dict[str, Any]) -> None:
    """Be a prefetcher: load what the work needs while the planner is at it, wait for the word, work."""
    pa.set_cpu_count(1)
    pa.set_io_thread_count(2)
    began = time.monotonic()
    problem: ShmloaderError | None = None
    work = None
    try:
        work = read_work(fds["payload"])
    except ShmloaderError as error:
        problem = error
    log.debug("ready after %.2f s", time.monotonic() - began)
    told = os.read(fds["go"], 4096)
    os.close(fds["go"])
    if not told:
        return
    files = RingFiles.inherited(head["uuid"], fds)
    ring = Ring(files, native.SERVICE, tuple(json.loads(told)["supervisor"]))
    try:
        if problem is not None:
            raise problem
        assert work is not None
        plan = read_plan(fds["plan"])
        assert plan is not None
        recipes = recipes_of(plan.source, work)
        reader = open_reader(work.requests, plan.source, ring.segment.touch)
    except Exception as error:
        log.debug("cannot start", exc_info=True)
        Writer(ring).put_fatal(error)
    else:
        spill = Spill(ring.segment, fds.get("spill"), head["why_no_spill"], head["spill_dir"])
        settings = (head["num_prefetchers"], spill, head["verify"], head["cache_size"])
        if Prefetcher(ring, plan, recipes, reader, *settings).run():
            reader.close()
    ring.leave()
    # Without the interpreter's teardown: pyarrow's threads that still wind down can make it abort (seen with files of
    # a Hub: "terminate called without an active exception"), and a read may still hang in the network.
    logging.shutdown()
    sys.stderr.flush()
    os._exit(0)
