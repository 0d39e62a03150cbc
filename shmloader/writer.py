"""The services' side of a ring: claim rows, reserve room, write, commit. Not for readers: their ring is read-only."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence

import shmloader._native as native
from shmloader.errors import MemoryLimitError, PoisonedError, RingTooSmallError, to_json
from shmloader.files import memory_limits
from shmloader.ring import Ring
from shmloader.sizes import record_too_large

Ticket = tuple[int, int, int, int]
Stamp = tuple[int, int, int]


class NoRoom(Exception):
    """Nothing can make way for this record now. Wait for the segment's work word to change and try again."""


class Writer:
    """Writes records of one set, from one service. Thread-safe as the core is: each call is one critical section."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self._segment = ring.segment
        stats = ring.segment.stats()
        self._room = {  # the most that one record can take, by what it is
            "sample": max(stats["transit_bytes"], stats["resident_bytes"] if not stats["transit_bytes"] else 0),
            "chunk": stats["raw_bytes"],
        }

    def claim(self, rows: Sequence[int]) -> list[int]:
        """Those of ``rows`` that are nowhere yet and now are this process's to decode. A suspect row is had alone."""
        got = self._segment.claim_rows(array("Q", rows))
        return [row for row, mine in zip(rows, got, strict=True) if mine]

    def unclaim(self, rows: Sequence[int]) -> None:
        """Give back claims that no record came of."""
        self._segment.unclaim_rows(array("Q", rows))

    def reserve(self, record: int, num_bytes: int, stamp: Stamp | None = None, urgent: bool = False) -> Ticket | None:
        """Room for a record, for `record_of` and `commit`; None if it is there, or another's, already.

        stamp: (order, generation, position) until which it is of use. urgent: somebody waits for it.

        Raises:
            NoRoom: try again later.
            RecordTooLargeError, RingTooSmallError, MemoryLimitError: with the bytes needed and what to set.
        """
        is_pressing = False  # only what nobody needs makes way at first, also for what somebody waits for
        while True:
            ticket = self._segment.reserve(record, num_bytes, stamp, is_pressing)
            if isinstance(ticket, tuple):
                if len(ticket) == 4:
                    return ticket
                self._extend(num_bytes, ticket[1], ticket[2])
            elif ticket == native.EXISTS:
                return None
            elif ticket == native.FULL:
                if not self._segment.stats()["transit_bytes"] and record < native.RAW:
                    raise self._too_small(num_bytes)
                if is_pressing or not urgent:
                    raise NoRoom
                is_pressing = True
            elif ticket == native.TOOBIG:
                raise record_too_large(num_bytes, self._room["sample" if record < native.RAW else "chunk"])
            else:
                raise self._no_memory(num_bytes, *memory_limits()[1:])

    def _extend(self, num_bytes: int, region: int, need_end: int) -> None:
        status, available, limited_by = self._segment.back(self.ring.files.ring_fd, region, need_end)
        if status != native.MEMORY:
            return
        stats = self._segment.stats()
        if region == native.RESIDENT and stats["transit_bytes"]:
            self._warn_frozen(stats["resident_backed_bytes"], available, limited_by)
        elif stats[f"{('resident', 'transit', 'raw')[region]}_backed_bytes"] < num_bytes or region == native.RESIDENT:
            raise self._no_memory(num_bytes, available, limited_by)

    def _warn_frozen(self, have_bytes: int, available: int, limited_by: str) -> None:
        self._warn(
            native.TEXT_MEMORY,
            f"shmloader: the ring stays at {have_bytes:,} bytes of samples that are kept, since only {available:,} "
            f"bytes of memory are available ({limited_by}; a spare is left). The samples beyond are decoded each time "
            "they are read. Give the job more memory, or set SHMLOADER_RING_BYTES lower to have no warning.",
        )

    def _warn(self, which: int, message: str) -> None:
        self._segment.text_put(which, json.dumps({"message": message}).encode())

    def _no_memory(self, num_bytes: int, available: int, limited_by: str) -> MemoryLimitError:
        stats = self._segment.stats()
        have = stats["resident_backed_bytes"] + stats["transit_backed_bytes"]
        needed = self._estimate(stats, num_bytes)
        return MemoryLimitError(
            f"There is not enough memory for the ring: about {needed:,} bytes are needed, it has "
            f"{have:,} and cannot grow, since only {available:,} are available ({limited_by}; a spare "
            "is left). Give the job more memory, or load a part of the dataset.",
            needed_bytes=needed,
            have_bytes=have,
            limit=limited_by,
        )

    def _too_small(self, num_bytes: int) -> RingTooSmallError:
        """All samples were to fit, and do not: reasons why there are none take more room than they would."""
        stats = self._segment.stats()
        needed = self._estimate(stats, num_bytes)
        return RingTooSmallError(
            f"The ring is full: about {needed:,} bytes are needed, it has {stats['resident_bytes']:,} (full after "
            f"{stats['num_ready']:,} samples and {stats['num_errors']:,} that could not be made). Set "
            f"SHMLOADER_RING_BYTES={-(-2 * needed >> 20)}MiB or more (or Options.ring_bytes).",
            needed_bytes=needed,
            have_bytes=stats["resident_bytes"],
            variable="SHMLOADER_RING_BYTES",
        )

    @staticmethod
    def _estimate(stats: dict[str, int], num_bytes: int) -> int:
        mean = stats["commit_bytes"] / stats["num_commits"] if stats["num_commits"] else num_bytes
        return max(int(mean * stats["num_records"]), stats["resident_used_bytes"] + num_bytes)

    def record_of(self, ticket: Ticket) -> memoryview:
        """The reserved bytes, writable until `commit`."""
        return memoryview(self.ring.mapping.view(ticket[0], ticket[1]))

    def commit(self, ticket: Ticket, is_error: bool = False) -> None:
        """Publish a record that is written completely."""
        if self._segment.commit(ticket, native.ERROR if is_error else native.READY) != 0:
            raise PoisonedError("a reservation of this living process was taken away", reason="stale ticket")

    def abort(self, ticket: Ticket) -> None:
        """Give a reservation back."""
        self._segment.abort(ticket)

    def put_error(self, record: int, error: BaseException, stamp: Stamp | None = None, urgent: bool = False) -> None:
        """Publish why ``record`` cannot be had; readers that ask for it raise it. Raises as `reserve`."""
        text = to_json(error, native.TEXT_BYTES)
        ticket = self.reserve(record, len(text), stamp, urgent)
        if ticket is not None:
            place = self.record_of(ticket)
            place[: len(text)] = text
            place[len(text) :] = bytes(len(place) - len(text))
            self.commit(ticket, is_error=True)

    def put_fatal(self, error: BaseException) -> None:
        """Tell all readers that nothing more will come; the first error wins."""
        self._segment.text_put(native.TEXT_FATAL, to_json(error, native.TEXT_BYTES))
