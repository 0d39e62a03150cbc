"""One process's attachment to a set: get_many finds the records of a batch, and waits for what is missing.

Resident records stay where they are. What lies in transit gives way to other records, so a look-up *pins* it: in
the same critical section, for as long as its `Refs` (or a view made of them) lives. Nobody sleeps with pins: what a
reader that waits for the rest of a batch has found is kept for it until it is in the way of others, and then it copies
that out; who holds more than its share of transit gets copies as well. A worker for whom the set's table of clients has
no slot is a *guest*: it gets copies of all that does not stay (guest.py), until it finds a slot.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import threading
import time
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import shmloader._native as native
from shmloader.deaths import Deaths, killed_by_chunk, killed_by_row
from shmloader.errors import ClosedError, RingError, ServiceError, ShmloaderError, WaitTimeoutError, from_wire
from shmloader.files import RingFiles, boot_id, pid_namespace
from shmloader.guest import REF, GuestBatch, copy_error
from shmloader.outages import Outages

log = logging.getLogger("shmloader")

#: Which positions of an order a look-up is for: (order, generation, begin, end).
Place = tuple[int, int, int, int]

# Only the exit of the interpreter ends all users of a mapping; no deallocation may unmap before that.
atexit.register(native.set_exiting)


#: Records begin at multiples of it: SHML_ALIGN in native/layout.h.
ALIGNMENT = 64
#: As the core says that an id has no chunk (UINT32_MAX).
_NO_CHUNK = 0xFFFFFFFF
#: A guest that waits looks this often whether there is a slot by now (guessed: a try costs some 0.1 ms).
JOIN_S = 1.0


@dataclass(frozen=True)
class Refs:
    """Where the records of some ids lie, in the ids' order; packed as the core gives and takes them.

    base: the memory in which they lie: the ring, or copies of this process alone.
    pins: keep those in transit where they are; None: none is in transit.
    """

    ids: Sequence[int]
    packed: bytes
    base: native.Mapping
    pins: native.Pins | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def one(self, i: int) -> bytes:
        """The packed reference of the i-th id."""
        return self.packed[i * native.REF_BYTES : (i + 1) * native.REF_BYTES]

    def place(self, i: int) -> tuple[int, int]:
        """Offset in ``base`` and size in bytes of the i-th record."""
        offset, num_bytes, *_ = REF.unpack_from(self.packed, i * native.REF_BYTES)
        return offset, num_bytes

    def pin(self, i: int) -> native.Pins | None:
        """One more pin of the i-th record alone, for a view that outlives the others."""
        return None if self.pins is None else self.pins.one(i)

    def record(self, i: int) -> memoryview:
        """The bytes of the i-th record; valid while these `Refs` live."""
        return memoryview(self.base.view(*self.place(i), self.pins))

    def statuses(self) -> list[tuple[int, int]]:
        """(status, chunk) of each; of one that is there, chunk tells whether it is pinned."""
        words = memoryview(self.packed).cast("I").tolist()
        step = native.REF_BYTES // 4
        return list(zip(words[6::step], words[7::step], strict=True))


class Ring:
    """This process's attachment to a set: a client with a role, a mapping of the control and one of the ring.

    Services map the ring read-write, all others read-only. Not to be used in a forked child: attach again there
    (`is_home` tells).

    is_guest: this is a worker, and no client (yet): all slots of the table are taken.

    Raises:
        RingError: the same, of an owner or a service.
    """

    def __init__(self, files: RingFiles, role: int, owner: tuple[int, int] | None = None) -> None:
        self.files = files
        self.role = role
        writable = role == native.SERVICE
        control_bytes = os.fstat(files.control_fd).st_size
        self._control = native.Mapping(files.control_fd, control_bytes, True, "control")
        # A read-only *open file*: not even mprotect can make a reader's mapping writable.
        fd = files.ring_fd if writable else os.open(f"/proc/self/fd/{files.ring_fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.mapping = native.Mapping(fd, files.file_bytes, writable, "ring")
        finally:
            if not writable:
                os.close(fd)
        self.segment = native.Segment(self._control, self.mapping, files.lock_fd, boot_id(), pid_namespace())
        self._owner = owner if owner is not None else (-1, 0)
        self.slot, self.gen = -1, 0
        self.is_guest = not self._register()
        if self.is_guest:
            if role != native.WORKER:
                raise _no_slot(role)
            log.info("process %d reads as a guest: the set's table of clients is full", os.getpid())
        self.has_transit = self.segment.stats()["transit_bytes"] > 0
        self._lock = threading.Lock()  # one want-list per client: one thread of it waits at a time
        self._joining = threading.Lock()  # one slot per process: one thread of a guest takes it
        self._join_at = time.monotonic() + JOIN_S
        self._has_left = False

    @property
    def is_home(self) -> bool:
        """False in a child that was forked after this attachment was made."""
        return bool(self._control.is_home)

    def leave(self) -> None:
        """Give the client slot back. Views stay valid; nothing else may be called any more."""
        self._has_left = True
        self.segment.unregister()

    def _register(self) -> bool:
        """Whether there was a slot for this process."""
        registered = self.segment.register(self.role, *self._owner)
        if isinstance(registered, int):
            return False
        self.slot, self.gen = registered
        return True

    # -- reading ---------------------------------------------------------------------------------------

    def get_many(
        self,
        ids: Sequence[int],
        timeout_s: float,
        on_tick: Callable[[], None] | None = None,
        describe: Callable[[int], str] = str,
        place: Place | None = None,
    ) -> Refs:
        """Where the records of ``ids`` lie, once all are there; waits for them. Those beyond an order's end are none.

        on_tick: called at least every 100 ms while waiting (to see that the services live).
        describe: source, shard and row of an id, for the message of an error.
        place: (order, generation, begin, end): the positions of an order that the ids are.

        Raises:
            SampleError, DecodeError, ProcessError: a sample cannot be had; as its prefetcher told it.
            SourceError, RingError, ServiceError: its chunk cannot be read, or not now (`Outages`).
            WaitTimeoutError: nothing at all moved for ``timeout_s``.
            ServiceError: this is a worker, and its training process is gone.
        """
        if self.is_guest:
            found = self._get_as_guest(ids, timeout_s, on_tick, describe)
            if found is not None:
                return found
        packed, missing, pins, is_over = self.segment.get_many(array("Q", ids), 0, place)
        if not missing and not _has_bad(packed):
            refs = Refs(ids, packed, self.mapping, pins)
            return self._copied(ids, {}, range(len(ids)), refs) if is_over else refs
        pins = None  # given back before we wait, for others of our threads too
        with self._lock:
            try:
                return self._wait_for(ids, timeout_s, on_tick, describe, place)
            except BaseException:
                with contextlib.suppress(ShmloaderError):  # closed meanwhile: they are gone with the client
                    self.segment.get_many(array("Q"), native.GET_POST, None)  # withdraw the wants
                raise

    def _wait_for(
        self,
        ids: Sequence[int],
        timeout_s: float,
        on_tick: Callable[[], None] | None,
        describe: Callable[[int], str],
        place: Place | None,
    ) -> Refs:
        patience = _Patience(self, timeout_s, on_tick, describe)
        flags, starved = native.GET_POST, self.segment.starved()
        copies: dict[int, bytes] = {}  # of records in transit, by their index in ids
        left: Sequence[int] = range(len(ids))
        while True:
            seen = self.segment.wake_word()
            left_ids = [ids[i] for i in left]
            packed, missing, pins, is_over = self.segment.get_many(array("Q", left_ids), flags, place)
            refs = Refs(left_ids, packed, self.mapping, pins)
            error = self._bad(refs, describe)
            if error is not None:
                refs, pins = replace(refs, pins=None), None  # an error that is kept must not keep them
                raise error
            if not missing and not _has_bad(packed):
                return self._copied(ids, copies, left, refs) if copies or is_over else refs
            if pins is not None:
                taken = [k for k, word in enumerate(refs.statuses()) if word == (native.READY, 1)]  # 1: pinned
                copies.update((left[k], bytes(refs.record(k))) for k in taken)
                left = [i for i in left if i not in copies]
                refs, pins = replace(refs, pins=None), None  # given back before we sleep
            # Others may need the room of what we found: then, and only then, it is copied out.
            flags = native.GET_POST | (native.GET_TAKE if self.segment.starved() != starved else 0)
            patience.check(refs)
            self.segment.wait(seen, native.TICK_MS)

    def _get_as_guest(
        self,
        ids: Sequence[int],
        timeout_s: float,
        on_tick: Callable[[], None] | None,
        describe: Callable[[int], str],
    ) -> Refs | None:
        """`get_many` without a slot. Any number of threads. None: this process has a slot now."""
        batch = GuestBatch(self.segment, self.mapping, ids)
        patience = _Patience(self, timeout_s, on_tick, describe)
        while True:
            seen = self.segment.guest_word()
            asked, packed, missing = batch.look()
            refs = Refs(asked, packed, self.mapping)
            error = self._bad(refs, describe)
            if error is not None:
                raise error
            if not batch.left:
                stay = sorted(batch.resident)
                packed = b"".join(batch.resident[i] for i in stay)
                resident = Refs([ids[i] for i in stay], packed, self.mapping)
                return self._copied(ids, batch.copies, stay, resident) if batch.copies else resident
            patience.check(refs)
            if self._has_left:
                raise ClosedError("The dataset was closed")
            if self._join():
                return None
            if missing:  # else something gave way just now, and is missing at the next look
                self.segment.guest_wait(seen, native.TICK_MS)

    def are_at_hand(self, ids: Sequence[int]) -> list[bool]:
        """Of each whether its sample is in the ring now, or its encoded row. Nothing is waited for, or kept."""
        asked = array("Q", ids)
        packed = self.segment.guest_get(asked)[0] if self.is_guest else self.segment.get_many(asked, 0, None)[0]
        found = Refs(ids, packed, self.mapping).statuses()
        chunks = {chunk for status, chunk in found if status == native.MISSING and chunk != _NO_CHUNK}
        is_fetched = self._are_fetched(chunks)
        return [status == native.READY or (status == native.MISSING and chunk in is_fetched) for status, chunk in found]

    def has_slot(self) -> bool:
        """Whether this process is a client of the set. A guest tries to become one, but not too often."""
        return not self.is_guest or self._join()

    def _join(self) -> bool:
        """Whether a guest is a client by now; tries to become one, but not too often."""
        if time.monotonic() >= self._join_at and self._joining.acquire(blocking=False):
            try:
                if self.is_guest and self._register():
                    self.is_guest = False
                    log.info("process %d found a slot in the set's table of clients", os.getpid())
                self._join_at = time.monotonic() + JOIN_S
            finally:
                self._joining.release()
        return not self.is_guest

    @staticmethod
    def _copied(ids: Sequence[int], copies: dict[int, bytes], left: Sequence[int], refs: Refs) -> Refs:
        """All records of a batch in memory of this process: ``copies``, and those that ``refs`` finds (``left``)."""
        records: dict[int, Any] = dict(copies)
        records.update((i, refs.record(k)) for k, i in enumerate(left))
        sizes = [_round_up(len(records[i]), ALIGNMENT) for i in range(len(ids))]
        base = native.Mapping(-1, sum(sizes), True, "copies")
        packed = bytearray()
        offset = 0
        for i, size in enumerate(sizes):
            record = records[i]
            memoryview(base.view(offset, size))[: len(record)] = record
            packed += REF.pack(offset, len(record), 0, 0, native.READY, 0)
            offset += size
        return Refs(ids, bytes(packed), base)

    def _bad(self, refs: Refs, describe: Callable[[int], str]) -> ShmloaderError | None:
        """Why one of the records will not come. Returned, not raised: a traceback would keep the pins of ``refs``."""
        for row, (status, chunk) in zip(refs.ids, refs.statuses(), strict=True):
            if status == native.ERROR:
                error = self._error_of(row)
                if error is not None:
                    error.at = row, None
                    return error
            if status == native.BROKEN:
                if (error := self._fatal()) is None:
                    error = self._chunk_error(row, chunk, describe)
                    error.at = row, chunk
                return error
            if status == native.ASIDE:
                error = killed_by_row(Deaths(self.files.deaths_fd), row, describe)
                error.at = row, None
                return error
        return None

    def _error_of(self, record: int) -> ShmloaderError | None:
        """What an error record tells; None: it is not there (any more). Looked up by itself, so that it is pinned."""
        if self.is_guest:
            data = copy_error(self.segment, self.mapping, record)
        else:
            packed, _, pins, _ = self.segment.get_many(array("Q", [record]), 0, None)
            refs = Refs([record], packed, self.mapping, pins)
            data = bytes(refs.record(0)) if refs.statuses()[0][0] == native.ERROR else None
        return None if data is None else from_wire(json.loads(data.rstrip(b"\0")))

    def _chunk_error(self, row: int, chunk: int, describe: Callable[[int], str]) -> ShmloaderError:
        told = self._error_of(native.CHUNK_ERROR | chunk)
        return told or killed_by_chunk(Deaths(self.files.deaths_fd), row, chunk, describe)

    def _fatal(self) -> ShmloaderError | None:
        """Why nothing more will come."""
        text = self.segment.text_get(native.TEXT_FATAL)
        return None if text is None else from_wire(json.loads(text))

    def _outage(self, refs: Refs, since_s: float) -> ShmloaderError | None:
        """Why a chunk of what is missing could not be fetched since then, though it will be tried again."""
        told = zip(refs.ids, refs.statuses(), strict=True)
        rows = {chunk: row for row, (status, chunk) in told if status == native.MISSING and chunk != _NO_CHUNK}
        found = Outages(self.files.deaths_fd).of(rows.keys() - self._are_fetched(rows), since_s) if rows else None
        if found is not None:
            found[1].at = rows[found[0]], found[0]
        return None if found is None else found[1]

    def _are_fetched(self, chunks: Collection[int]) -> set[int]:
        """Those of ``chunks`` of which the encoded rows are there."""
        states = zip(chunks, self.segment.chunk_look(array("I", chunks)), strict=True)
        return {chunk for chunk, state in states if state & native.CHUNK_HAS_RAW}

    def _timed_out(self, refs: Refs, waited_s: float, describe: Callable[[int], str]) -> WaitTimeoutError:
        missing = [row for row, (status, _) in zip(refs.ids, refs.statuses(), strict=True) if status == native.MISSING]
        missing = missing or list(refs.ids)  # of a guest: what gives way again and again
        services = [pid for _, pid, role in self.segment.clients() if role == native.SERVICE]
        return WaitTimeoutError(
            f"{describe(missing[0])} did not arrive: for {waited_s:.1f} s no prefetch process made any progress "
            f"(processes of the set: {services or 'none'}; {len(missing)} of {len(refs)} samples are missing). "
            "SHMLOADER_TIMEOUT_S sets how long to wait, SHMLOADER_LOG=DEBUG shows what they do.",
            row=missing[0],
            waited_s=waited_s,
        )


class _Patience:
    """Says whether a reader should wait on, between two looks."""

    def __init__(
        self, ring: Ring, timeout_s: float, on_tick: Callable[[], None] | None, describe: Callable[[int], str]
    ) -> None:
        self._ring, self._timeout_s, self._on_tick, self._describe = ring, timeout_s, on_tick, describe
        self._progress, self._since = -1, time.monotonic()
        self._began = self._since

    def check(self, refs: Refs) -> None:
        """Return if it should; ``refs``: as the last look found them. Raises as `Ring.get_many`."""
        ring, now = self._ring, time.monotonic()
        error = ring._fatal() or ring._outage(refs, self._began)
        if error is not None:
            raise error
        if (moved := ring.segment.progress()) != self._progress:
            self._progress, self._since = moved, now
        elif now - self._since > self._timeout_s:
            raise ring._timed_out(refs, now - self._since, self._describe)
        ring.segment.reap(False)
        if ring.role == native.WORKER and not ring.segment.count(native.OWNER):
            raise ServiceError(
                "The training process that this worker reads for is gone, or has closed the dataset", role="owner"
            )
        if self._on_tick is not None:
            self._on_tick()


def _has_bad(packed: bytes) -> bool:
    statuses = memoryview(packed).cast("I")[6 :: native.REF_BYTES // 4].tolist()
    return any(statuses) and any(status not in (native.READY, native.END) for status in statuses)


def _no_slot(role: int) -> RingError:
    who = "training process" if role == native.OWNER else "prefetch process"
    return RingError(
        f"This {who} cannot enter the set: living processes have all {native.MAX_CLIENTS} slots of its table of "
        "clients. Only a worker can read without one, since a set lives as long as those that own and serve it: end "
        "workers of this dataset (fewer num_workers), or make a dataset of its own for this process.",
        clients=native.MAX_CLIENTS,
    )


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
