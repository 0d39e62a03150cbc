"""Fetches chunks from the source into the raw region or to disk, in a thread of its own beside the one that decodes."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace

import pyarrow as pa

import shmloader._native as native
from shmloader.deaths import Deaths
from shmloader.errors import RecordTooLargeError, RingError, ServiceError, ShmloaderError, SourceError
from shmloader.options import size_text
from shmloader.outages import Outages
from shmloader.prefetch.fetch_schedule import Pick, Schedule, Why
from shmloader.prefetch.held import Held
from shmloader.prefetch.lookahead import Pace
from shmloader.prefetch.plan import SetPlan
from shmloader.prefetch.refetch import Refetches
from shmloader.prefetch.store import RawStore
from shmloader.prefetch.want_of_memory import end_process, is_want_of_memory
from shmloader.sources.base import Chunk, Reader
from shmloader.writer import NoRoom, Writer

log = logging.getLogger("shmloader.prefetcher")

#: How long it sleeps when there is nothing to do; whoever has something wakes it.
IDLE_MS = 1000
#: But not more often than this, when looking is dear (guessed: little beside fetching a chunk).
PACE_S = 0.01
#: Sources of which a chunk is dear to read again: a Hub, and what is only read front to back.
DEAR = ("streaming", "sequential", "remote files")
#: After a server was not reached, before it is asked for another chunk (guessed: it costs the log and a core nothing).
PAUSE_S = 0.25
#: And so long while what is held is waited for, and nothing else can be (guessed: about a task).
FULL_MS = 10


@dataclass(frozen=True)
class _Fetched:
    """A chunk that was read and has no room yet."""

    pick: Pick
    batches: list[pa.RecordBatch]
    read_s: float

    @property
    def num_bytes(self) -> int:
        """Encoded, of its rows."""
        return sum(batch.nbytes for batch in self.batches)


class Fetcher:
    """The fetching of one prefetcher. What it has claimed when it dies is claimed by another.

    Holds at most two chunks in memory: one that waits for room, and one that somebody waits for and goes before it.

    most_held_bytes: of the raw region, for chunks that nobody but who waits for them is known to need (held.py).
    """

    def __init__(
        self,
        segment: native.Segment,
        writer: Writer,
        plan: SetPlan,
        reader: Reader,
        store: RawStore,
        schedule: Schedule,
        most_held_bytes: int,
    ) -> None:
        self._segment, self._writer, self._store, self._schedule = segment, writer, store, schedule
        self._plan, self._reader = plan, reader
        self._deaths = Deaths(writer.ring.files.deaths_fd)
        self._outages = Outages(writer.ring.files.deaths_fd)
        self._is_out = False
        self._waiting: _Fetched | None = None
        self._held = Held(segment, most_held_bytes)
        source = plan.source
        self._dear = [source.leaf(chunk).mode in DEAR for chunk in range(len(source.chunks))]
        num_rows, num_chunks = source.num_rows or 0, len(source.chunks)
        is_dear = any(self._dear)
        self._refetches = Refetches(segment, source.name, num_rows, num_chunks, is_dear, store.describe_disk)
        self._is_stopped = threading.Event()
        # A daemon: the process must be able to end while a read hangs in the network.
        self._thread = threading.Thread(target=self._run, name="fetch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End after the chunk that is being read; whether it did in ``timeout_s``."""
        self._is_stopped.set()
        self._segment.work_tell()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        self._held.keep(())  # else the raw region could not be given back
        return True

    def _run(self) -> None:
        pace = Pace()
        try:
            while not self._is_stopped.is_set():
                seen = self._segment.work_word()
                with pace:
                    is_done = self._step()
                if not is_done:
                    # The word moves with every batch that is read; looking each time would slow the decoding down.
                    self._is_stopped.wait(min(pace.wait_s(), PACE_S))
                    wait_ms = IDLE_MS if self._waiting is None and not len(self._held) else native.TICK_MS
                    if self._held.is_full:  # rows that are decoded do not move the word
                        wait_ms = FULL_MS
                    self._segment.work_wait(seen, int(min(wait_ms, self._schedule.wait_s * 1000 + 1)))
                    self._segment.reap(False)
        except Exception as error:
            if self._is_stopped.is_set():  # the process is about to end
                return
            if is_want_of_memory(error):
                end_process(self._writer.ring, error)
            log.error("%s", error, exc_info=not isinstance(error, ShmloaderError))
            self._writer.put_fatal(error)
            self._segment.work_tell()  # the thread that decodes sees it

    def _step(self) -> bool:
        """Fetch a chunk; False: there is none to be had, or no room, before something moves."""
        can_hold = self._settle()
        if self._waiting is None:
            pick = self._schedule.next(can_hold)
            return pick is not None and self._fetch(pick)
        waiting = self._waiting
        if not self._schedule.is_of_use(waiting.pick):
            self._waiting = None
            self._segment.chunk_end(waiting.pick.chunk, native.FETCH_GIVEN_UP)
            return True
        if not waiting.pick.urgent and waiting.pick.chunk in self._schedule.waited_for():
            waiting = self._waiting = replace(waiting, pick=replace(waiting.pick, why=Why.WANTED))
        if self._put(waiting):
            self._waiting = None
            return True
        pick = None if waiting.pick.urgent or not can_hold else self._schedule.next_wanted()
        return pick is not None and self._fetch(pick)

    def _settle(self) -> bool:
        """Give up what need not be held any more; whether more can be held."""
        if len(self._held):
            self._held.keep(self._schedule.waited_for())
        return not self._held.is_full

    def _fetch(self, pick: Pick) -> bool:
        """Read the chunk and put it; False: it has no room, and waits for it."""
        chunk = self._chunk_of(pick)
        slot, began = self._writer.ring.slot, time.monotonic()
        self._deaths.note_chunk(slot, pick.chunk)
        try:
            batches = self._read(chunk)
        except (RingError, MemoryError):
            raise
        except Exception as error:
            is_news = self._schedule.read(pick.chunk, False)
            if _is_passing(error) and (resting := self._schedule.rest(pick.chunk)):
                self._give_up_for_now(pick, resting, error)
                return True
            if is_news:
                log.error("chunk %d: %s", pick.chunk, error, exc_info=not isinstance(error, ShmloaderError))
            self._give_up_for_ever(pick, error)
            return True
        self._deaths.note_chunk(slot, None)
        self._schedule.read(pick.chunk, True)
        if self._is_out:
            self._is_out = False
            log.warning("chunk %d could be fetched: the server is back", pick.chunk)
        if pick.rows is not None and not batches:  # the stream had ended before it, or is not needed any more
            self._segment.chunk_end(pick.chunk, native.FETCH_GIVEN_UP)
            return True
        fetched = _Fetched(pick, batches, time.monotonic() - began)
        self._segment.count_fetched(fetched.num_bytes)
        if self._put(fetched, is_first=True):
            return True
        log.debug("chunk %d has no room now: %s encoded", pick.chunk, size_text(fetched.num_bytes))
        if self._waiting is None and (pick.why is not Why.PASSING or pick.stays):
            self._waiting = fetched
            return False
        if pick.urgent and self._waiting is not None:  # it goes first
            self._segment.chunk_end(self._waiting.pick.chunk, native.FETCH_GIVEN_UP)
            self._waiting = fetched
            return False
        self._segment.chunk_end(pick.chunk, native.FETCH_GIVEN_UP)
        return True

    def _read(self, chunk: Chunk) -> list[pa.RecordBatch]:
        batches = []
        for _, batch in self._reader.read(chunk):
            self._segment.touch()
            batches.append(batch)
        return batches

    def _put(self, fetched: _Fetched, is_first: bool = False) -> bool:
        """Write the chunk to disk (tried once: room there does not come back) or into the ring; False: no room now."""
        pick = fetched.pick
        try:
            if is_first and self._is_for_disk(pick) and self._store.put_on_disk(pick.chunk, fetched.batches):
                self._end(fetched, is_on_disk=True)
                return True
            try:
                num_bytes = self._store.put(pick.chunk, fetched.batches, pick.stamp, False)
            except NoRoom:  # only now in the place of what an order needs
                if not pick.urgent:
                    return False
                num_bytes = self._store.put(pick.chunk, fetched.batches, pick.stamp, True)
        except NoRoom:
            return False
        except MemoryError:
            raise
        except pa.ArrowException as error:  # what was read cannot be written
            log.error("chunk %d", pick.chunk, exc_info=True)
            self._give_up_for_ever(pick, error)
            return True
        except RecordTooLargeError as error:
            raise self._too_large(pick, error) from error
        if pick.urgent and not pick.stays and pick.stamp is None:
            self._held.add(pick.chunk, num_bytes)
        self._end(fetched, is_on_disk=False)
        return True

    def _is_for_disk(self, pick: Pick) -> bool:
        """Whether it would be fetched again, and that costs or is not known to be once an epoch."""
        is_dear = pick.rows is None and self._dear[pick.chunk]
        return not pick.stays and (is_dear or pick.stamp is None)

    def _end(self, fetched: _Fetched, is_on_disk: bool) -> None:
        pick = fetched.pick
        self._segment.chunk_end(pick.chunk, native.FETCH_OK)
        num_rows = sum(batch.num_rows for batch in fetched.batches)
        row_bytes = fetched.num_bytes / max(num_rows, 1)
        if log.isEnabledFor(logging.DEBUG):
            why, where = pick.why.name.lower(), "on disk" if is_on_disk else "in memory"
            size = size_text(fetched.num_bytes)
            log.debug(
                "chunk %d (%s): %d rows, %s, read in %.3f s, kept %s",
                pick.chunk, why, num_rows, size, fetched.read_s, where,
            )  # fmt: skip
        self._refetches.note(pick.chunk, row_bytes, pick.urgent, not is_on_disk and self._is_for_disk(pick))

    def _chunk_of(self, pick: Pick) -> Chunk:
        return self._plan.source.chunks[pick.chunk] if pick.rows is None else pick.rows

    def _give_up_for_now(self, pick: Pick, resting: range, error: Exception) -> None:
        """Tell who waits for it or what rests with it, and leave it as it was before: the server may be back later."""
        log.log(logging.DEBUG if self._is_out else logging.WARNING, "chunk %d, for now: %s", pick.chunk, error)
        self._is_out = True
        slot = self._writer.ring.slot
        self._deaths.note_chunk(slot, None)
        self._outages.note(slot, resting, error)
        self._segment.chunk_end(pick.chunk, native.FETCH_GIVEN_UP)
        self._is_stopped.wait(PAUSE_S)

    def _give_up_for_ever(self, pick: Pick, error: Exception) -> None:
        index, chunk = pick.chunk, self._chunk_of(pick)
        if not isinstance(error, ShmloaderError):
            told = ServiceError(
                f"{self._plan.describe(chunk.first_row)} and the {chunk.num_rows - 1} after it cannot be read: "
                f"{type(error).__name__}: {error}",
                role="prefetcher",
            )
            told.__cause__ = error
            error = told
        try:
            self._writer.put_error(native.CHUNK_ERROR | index, error)
        except NoRoom:
            log.warning("no room for the reason why chunk %d is broken", index)
        self._segment.chunk_end(index, native.FETCH_BROKEN)

    def _too_large(self, pick: Pick, error: RecordTooLargeError) -> RecordTooLargeError:
        chunk = self._chunk_of(pick)
        needed, have = error.data.get("needed_bytes", 0), error.data.get("have_bytes", 0)
        return RecordTooLargeError(
            f"{self._plan.describe(chunk.first_row)} and the {chunk.num_rows - 1} after it, which are read at once, "
            f"take {needed:,} bytes; there is room for {have:,}. Set SHMLOADER_RING_BYTES (or Options.ring_bytes) "
            "higher, or write the file with smaller row groups.",
            **error.data,
        )


def _is_passing(error: Exception) -> bool:
    """Whether a later try may succeed: a server was not reached, or could not work (sources/answers.py)."""
    return isinstance(error, SourceError) and "endpoint" in error.data
