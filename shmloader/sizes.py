"""How large the regions of a ring are, from what is known before the first sample is made.

::

    ring file   resident | transit | raw
                └─ the ring's bytes ┘  └ encoded chunks, of the services

Where all samples are sure to fit, all of the ring is resident. Else *transit* has room for what is on its way, twice:
the samples that readers work on at once, and those that are decoded ahead of them. What is left stays resident.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shmloader.errors import RecordTooLargeError, RingTooSmallError

PAGE = 4096
#: Readers work on so many samples at once, if nobody says otherwise: eight workers with batches of 64.
DEFAULT_IN_FLIGHT = 512
#: And so many are decoded ahead of them (guessed: 0.1 s of two cores that decode JPEGs).
DEFAULT_AHEAD = 256
#: Transit takes no more than this share of the ring, if nobody has said what is in flight (guessed).
MOST_DEFAULT_SHARE = 0.25
#: With fewer records than this in transit readers and prefetchers would only wait for one another (guessed).
LEAST_RECORDS = 16
#: Of encoded chunks two windows are kept: the one that is read, and the next.
WINDOWS = 2
#: An Arrow IPC stream is this much larger than its rows, beside 8 % (buffers are padded; guessed).
IPC_BYTES = 64 << 10
#: Of an open set, whose streams are read as they lie, so that no window is needed: encoded bytes that are fetched ahead
#: of its readers, all iterations together (guessed: some seconds of decoding), and twice that before one is evicted.
OPEN_AHEAD_BYTES = 64 << 20
#: And so many chunks of each iteration at most: of small rows more would only be read in vain if it is left (guessed).
OPEN_AHEAD_CHUNKS = 64
#: Places for chunks of one iteration: as far as its readers may be apart, together with what is fetched ahead of them.
#: With chunks of 64 rows 16,384 positions: as far as the core knows which ones were read. A megabyte in all.
CHUNKS_PER_ORDER = 256
#: Descriptors for samples in an open set: one for each so many bytes of transit (guessed: smaller samples are evicted
#: before transit is full), but at least twice an iteration's places and no more than take 30 MB.
OPEN_RECORD_BYTES = 1024
LEAST_OPEN_RECORDS, MOST_OPEN_RECORDS = 1 << 15, 1 << 18


@dataclass(frozen=True)
class Sizes:
    """Bytes of the ring's regions, each a multiple of a page; and how many encoded ones the services keep at most.

    most_resident: so many samples stay, and no more; 0: as many as find room. most_transit: so many of the others are
    there at once; 0: the same.
    """

    resident_bytes: int
    transit_bytes: int
    raw_bytes: int
    raw_budget_bytes: int
    most_resident: int = 0
    most_transit: int = 0

    @property
    def file_bytes(self) -> int:
        """Of the ring's file."""
        return self.resident_bytes + self.transit_bytes + self.raw_bytes

    @property
    def ring_bytes(self) -> int:
        """Of the samples' regions: what was asked for."""
        return self.resident_bytes + self.transit_bytes


def divide(
    ring_bytes: int,
    *,
    num_rows: int,
    most_record_bytes: int | None,
    chunk_bytes: list[int],
    in_flight: int | None,
    ahead: int | None,
    window_bytes: int,
    cache_size: int | None = None,
) -> Sizes:
    """The regions of a ring of ``ring_bytes``.

    most_record_bytes: no sample is larger; None: not known. chunk_bytes: (estimated) encoded bytes of each chunk.
    in_flight, ahead: samples that readers work on at once, and that are decoded ahead of them; None: not said.
    cache_size: most samples that stay, beside those in transit, of which there are `most_on_their_way` then; None: as
    many as find room.

    Raises:
        RingTooSmallError: it cannot hold what is in flight; RecordTooLargeError: not even one sample.
    """
    ring_bytes = _pages(ring_bytes)
    budget = min(sum(chunk_bytes), raw_budget(chunk_bytes, window_bytes))
    # Estimates may be far too low (dictionaries are stored once, and unpacked for each row). The file is sparse, so
    # addresses are free; the budget is what is kept to.
    raw = _pages(int(1.08 * budget) + IPC_BYTES) * 4 + (1 << 30)
    most_resident = 0 if cache_size is None or cache_size >= num_rows else cache_size
    if not most_resident and most_record_bytes is not None and most_record_bytes * num_rows <= ring_bytes:
        return Sizes(ring_bytes, 0, raw, budget)
    transit = _transit(ring_bytes, most_record_bytes, in_flight, ahead)
    resident = ring_bytes - transit
    if most_resident and most_record_bytes is not None:
        resident = min(resident, _pages(most_resident * most_record_bytes))
    most_transit = most_on_their_way(in_flight, ahead) if most_resident else 0
    return Sizes(resident, transit, raw, budget, most_resident, most_transit)


def most_on_their_way(in_flight: int | None, ahead: int | None) -> int:
    """Where ``cache_size`` is given: samples in transit at most, as many as it has room for where their size is known.

    Twice those that readers work on at once and those that are decoded ahead of them.
    """
    return 2 * max(_samples(in_flight, ahead), LEAST_RECORDS)


def most_ahead(cache_size: int | None) -> int | None:
    """Of an open set's samples, how many are decoded ahead of the readers at most; None: as many as there is room for.

    Of a stream nothing stays, so ``cache_size`` can only mean these. With too few of them nothing moves.
    """
    return None if cache_size is None else max(cache_size, LEAST_RECORDS)


def divide_open(
    ring_bytes: int,
    *,
    most_record_bytes: int | None,
    in_flight: int | None,
    ahead: int | None,
    cache_size: int | None = None,
) -> Sizes:
    """The regions of the ring of an open set, of at most ``ring_bytes``; see `divide`.

    Nothing stays, since no row ever comes again: all is transit, and only as large as it needs to be. Where the
    samples' size is known that is twice what is in flight and decoded ahead, but twice ``cache_size`` at most; else
    a share of the ring.
    """
    ring_bytes = _pages(ring_bytes)
    budget = 2 * OPEN_AHEAD_BYTES
    raw = _pages(int(1.08 * budget) + IPC_BYTES) * 4 + (1 << 30)
    most_share = MOST_DEFAULT_SHARE if most_record_bytes is None else 1.0
    transit = _transit(ring_bytes, most_record_bytes, in_flight, ahead, most_share)
    most = most_ahead(cache_size)
    if most is None:
        return Sizes(0, transit, raw, budget)
    if most_record_bytes is not None:
        transit = min(transit, _pages(2 * most * most_record_bytes))
    return Sizes(0, transit, raw, budget, most_transit=min(2 * most, most_on_their_way(in_flight, ahead)))


def open_records(transit_bytes: int) -> int:
    """How many samples an open set has descriptors for."""
    return min(max(transit_bytes // OPEN_RECORD_BYTES, LEAST_OPEN_RECORDS), MOST_OPEN_RECORDS)


def raw_budget(chunk_bytes: Sequence[int], window_bytes: int) -> int:
    """Encoded bytes of chunks to be kept for an order: some windows, and the chunk that is being read."""
    largest = max(chunk_bytes, default=0)
    return WINDOWS * max(window_bytes, largest) + largest


def _transit(
    ring_bytes: int,
    record_bytes: int | None,
    in_flight: int | None,
    ahead: int | None,
    most_share: float = MOST_DEFAULT_SHARE,
) -> int:
    """Room for twice what is in flight and what is decoded ahead; if nobody said how many, that share at most."""
    is_said = in_flight is not None
    samples = _samples(in_flight, ahead)
    share = _pages(int(ring_bytes * most_share))
    if record_bytes is None:
        return share
    if record_bytes > ring_bytes:
        raise record_too_large(record_bytes, ring_bytes)
    needed = _pages(2 * samples * record_bytes)
    if not is_said:
        least = _pages(2 * LEAST_RECORDS * record_bytes)
        needed = min(needed, max(share, least))
        samples = needed // (2 * record_bytes)
    if needed > ring_bytes:
        raise RingTooSmallError(
            f"The ring is too small for what is in flight: {needed:,} bytes are needed, it has {ring_bytes:,}. That is "
            f"twice {samples} samples of up to {record_bytes:,} bytes: those that readers work on at once (in_flight: "
            f"workers × batch size, {in_flight or DEFAULT_IN_FLIGHT}), and those decoded ahead of them (ahead: "
            f"{ahead or DEFAULT_AHEAD}). Set SHMLOADER_RING_BYTES={-(-needed >> 20)}MiB or more, or lower "
            "SHMLOADER_IN_FLIGHT and SHMLOADER_AHEAD.",
            needed_bytes=needed,
            have_bytes=ring_bytes,
            samples=samples,
            record_bytes=record_bytes,
            variable="SHMLOADER_RING_BYTES",
        )
    return needed


def _samples(in_flight: int | None, ahead: int | None) -> int:
    """That readers work on at once, and that are decoded ahead of them."""
    return (DEFAULT_IN_FLIGHT if in_flight is None else in_flight) + (DEFAULT_AHEAD if ahead is None else ahead)


def record_too_large(record_bytes: int, have_bytes: int) -> RecordTooLargeError:
    """The error of a sample that is larger than what it would lie in."""
    return RecordTooLargeError(
        f"One sample takes {record_bytes:,} bytes, the ring has room for {have_bytes:,} at a time: "
        "set SHMLOADER_RING_BYTES (or Options.ring_bytes) higher.",
        needed_bytes=record_bytes,
        have_bytes=have_bytes,
        variable="SHMLOADER_RING_BYTES",
    )


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE
