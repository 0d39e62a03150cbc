"""Encoded chunks in the ring's raw region or on disk: written by whoever fetched one, read in place by all prefetchers.

A chunk's record is an Arrow IPC stream of its rows. It is pinned while a task decodes rows of it, and only then: what
stays open between tasks is kept *without* a pin, and used again only if the next pin finds the very same record
(descriptor and generation), so that nothing that lies idle can keep the raw region from being used again. One on disk
(spill.py) is the same stream, needs no pin, and never changes.

With ``SHMLOADER_VERIFY`` the last bytes of either are a checksum of all before them, which who opens it compares: once,
since rows are taken from it again and again.
"""

from __future__ import annotations

import bisect
import json
import logging
import struct
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Protocol

import pyarrow as pa

import shmloader._native as native
from shmloader.checksum import SEAL_BYTES, Damage, Sealing, damage, seal
from shmloader.errors import ChecksumError, ShmloaderError, from_wire, to_json
from shmloader.prefetch.spill import Spill
from shmloader.ring import Ring
from shmloader.writer import Stamp, Writer

#: Chunks that are kept open: opening one costs 12 us (measured), keeping it a few KB.
MAX_OPEN = 256
#: Rows of at least this many encoded bytes are taken one by one, in place; smaller ones are copied into one batch, so
#: that a tokenizer gets many at once (guessed: a copy of less costs less than handling a batch).
LARGE_ROW_BYTES = 16 << 10
#: Most rows of a batch: enough for a tokenizer to work by the batch (guessed).
BATCH_ROWS = 64

#: Records and what is spilled take multiples of it: SHML_ALIGN in native/layout.h.
ALIGNMENT = 64
#: Where a chunk is damaged, all of its rows are.
_ALL_ROWS = 1 << 62
#: Of the schema's metadata: why a chunk has not all of its rows.
_FAILURE = b"shmloader.failure"

_REF = struct.Struct("<QQIIII")  # shml_ref_t in native/shml.h
#: In the place of the descriptor of a chunk that lies on disk, its offset in that of the generation.
_ON_DISK = -1


@dataclass(frozen=True)
class RawChunk:
    """An encoded chunk in the ring or on disk.

    record: its descriptor and generation. starts: the first row of each batch. row_bytes: mean encoded bytes of a row.
    failure: JSON, of a chunk that could not be read to its end (`with_failure`).
    """

    record: tuple[int, int]
    batches: list[pa.RecordBatch]
    starts: list[int]
    row_bytes: int
    failure: bytes | None = None

    @property
    def end(self) -> int:
        """The row behind the last."""
        return self.starts[-1] + int(self.batches[-1].num_rows)

    def slices(self, first: int, end: int) -> Iterator[pa.RecordBatch]:
        """Rows ``first`` to ``end - 1``, in place."""
        at = bisect.bisect_right(self.starts, first) - 1
        while first < end:
            batch, start = self.batches[at], self.starts[at]
            num = min(end - first, start + batch.num_rows - first)
            yield batch.slice(first - start, num)
            first += num
            at += 1


log = logging.getLogger("shmloader.prefetcher")


def raw_chunk(
    record: tuple[int, int],
    first_row: int,
    batches: list[pa.RecordBatch],
    num_bytes: int,
    failure: bytes | None = None,
) -> RawChunk:
    """A chunk that begins with ``first_row`` and takes ``num_bytes``."""
    starts, end = [], first_row
    for batch in batches:
        starts.append(end)
        end += batch.num_rows
    return RawChunk(record, batches, starts, num_bytes // max(end - first_row, 1), failure)


class Lends(Protocol):
    """Rows that are not in the ring or on disk, but at hand in this process."""

    def chunks(self, chunks: Sequence[int]) -> dict[int, RawChunk]:
        """Those of ``chunks`` of which there are rows."""
        ...


class FirstRows(Protocol):
    """The first row of each chunk."""

    def __getitem__(self, chunk: int, /) -> int: ...


def with_failure(batch: pa.RecordBatch, num_rows: int, error: ShmloaderError) -> pa.RecordBatch:
    """The first rows of a chunk of ``num_rows``, with the reason why the others cannot be had."""
    return batch.replace_schema_metadata({_FAILURE: _failure_text(num_rows, error)})


def _failure_text(num_rows: int, error: ShmloaderError) -> bytes:
    return json.dumps({"num_rows": num_rows, "error": json.loads(to_json(error, native.TEXT_BYTES))}).encode()


def _damaged(found: Damage, place: str, is_on_disk: bool) -> ChecksumError:
    if is_on_disk:
        where = f"on disk, in the folder {place}"
        why = (
            "The disk gave back something else than it took: see the kernel's log, and set SHMLOADER_SPILL_DIR to "
            "another disk, or SHMLOADER_SPILL_BYTES=0 to keep none of them there."
        )
    else:
        where = "in shared memory"
        why = (
            "Something wrote to the ring behind our back: a decoder past the end of its array (a C extension that "
            "`process=` or the tokenizer uses?), another process of this user, or memory that is faulty."
        )
    return ChecksumError(
        f"the encoded rows that it is of are damaged: {where}, they have the checksum {found.found:#010x}, but were "
        f"written with {found.told}. {why} Make the dataset again.",
        place=place,
        expected=found.expected,
        found=found.found,
    )


class Pinned:
    """Some chunks, to be read in place until `release`."""

    def __init__(self, chunks: dict[int, RawChunk], pins: native.Pins | None) -> None:
        self.chunks = chunks
        self._pins = pins

    def holds(self, chunk: int, row: int) -> bool:
        """Whether ``row`` is there; its chunk's place may be another chunk's by now."""
        raw = self.chunks.get(chunk)
        return raw is not None and len(raw.starts) > 0 and raw.starts[0] <= row < raw.end

    def failure(self, chunk: int, row: int) -> ShmloaderError | None:
        """Why ``row`` is not there, if its chunk could only be read up to a row before it."""
        raw = self.chunks.get(chunk)
        if raw is None or raw.failure is None or row < raw.end:
            return None
        told = json.loads(raw.failure)
        return from_wire(told["error"]) if row < raw.starts[0] + told["num_rows"] else None

    def release(self) -> None:
        """Give the pins back: nothing of the chunks may be looked at any more."""
        self.chunks = {}
        self._pins = None


class RawStore:
    """The raw region and the disk, as one prefetcher uses them. One thread may write, another one read.

    first_rows: of each chunk, asked for while it is pinned. schema: of the rows of all chunks, or of each. lent: rows
    that this process has read of a chunk that is not complete. spill: the file on disk; None: there is none. verify:
    chunks are sealed.
    """

    def __init__(
        self,
        ring: Ring,
        writer: Writer,
        schema: pa.Schema | Sequence[pa.Schema],
        first_rows: FirstRows,
        *,
        lent: Lends | None = None,
        spill: Spill | None = None,
        verify: bool = False,
    ) -> None:
        self._verify = verify
        self._ring, self._writer, self._schemas = ring, writer, schema
        self._first_rows, self._lent = first_rows, lent
        self._spill = Spill(ring.segment, None) if spill is None else spill
        self._open: OrderedDict[int, RawChunk] = OrderedDict()

    # -- the fetching thread -----------------------------------------------------------------------------

    def put(self, chunk: int, batches: Sequence[pa.RecordBatch], stamp: Stamp | None, urgent: bool) -> int:
        """Write the rows of ``chunk``; returns the bytes of its record. Nothing happens if it is there already.

        Raises:
            NoRoom: try again when something has moved. RingError: as of `Writer.reserve`.
        """
        num_bytes = self._num_bytes(chunk, batches)
        ticket = self._writer.reserve(native.RAW | chunk, num_bytes, stamp, urgent)
        if ticket is None:
            return num_bytes
        try:
            record = self._writer.record_of(ticket)
            with pa.FixedSizeBufferWriter(pa.py_buffer(record)) as sink:
                self._write(sink, chunk, batches)
                end = sink.tell()
            if self._verify:
                record[end:] = bytes(len(record) - end)
                seal(record, len(record) - SEAL_BYTES)
        except BaseException:
            self._writer.abort(ticket)
            raise
        self._writer.commit(ticket)
        return num_bytes

    def put_on_disk(self, chunk: int, batches: Sequence[pa.RecordBatch]) -> bool:
        """As `put`, on disk, for good; False: there is no room, or the disk refused.

        Only for a chunk that this process has claimed, in place of `put`: never both.
        """
        num_bytes, write = self._num_bytes(chunk, batches), self._write
        if self._verify:
            return self._spill.put(chunk, num_bytes, lambda file: self._write_sealed(file, chunk, batches, num_bytes))
        return self._spill.put(chunk, num_bytes, lambda file: write(file, chunk, batches))

    def describe_disk(self) -> str:
        """As `Spill.describe`."""
        return self._spill.describe()

    def _schema(self, chunk: int) -> pa.Schema:
        return self._schemas if isinstance(self._schemas, pa.Schema) else self._schemas[chunk]

    def _num_bytes(self, chunk: int, batches: Sequence[pa.RecordBatch]) -> int:
        sink = pa.MockOutputStream()
        self._write(sink, chunk, batches)
        num_bytes = int(sink.size())
        return -(-(num_bytes + SEAL_BYTES) // ALIGNMENT) * ALIGNMENT if self._verify else num_bytes

    def _write(self, sink: pa.NativeFile | IO[bytes], chunk: int, batches: Sequence[pa.RecordBatch]) -> None:
        failure = next(((b.schema.metadata or {}).get(_FAILURE) for b in batches), None)
        schema = self._schema(chunk)
        if failure is not None:
            schema = schema.with_metadata({_FAILURE: failure})
        with pa.ipc.new_stream(sink, schema) as stream:
            for batch in batches:
                stream.write_batch(batch)

    def _write_sealed(self, file: IO[bytes], chunk: int, batches: Sequence[pa.RecordBatch], num_bytes: int) -> None:
        """As `_write`, and up to ``num_bytes`` zeros and the checksum of all."""
        sealing = Sealing(file)
        self._write(sealing, chunk, batches)
        sealing.seal(num_bytes)

    # -- the decoding thread -----------------------------------------------------------------------------

    def pin(self, chunks: Sequence[int]) -> Pinned:
        """Those of ``chunks`` that are there; -1 is none."""
        chunks = [chunk for chunk in chunks if chunk >= 0]
        spilled = {chunk: place for chunk in chunks if (place := self._spill.find(chunk)) is not None}
        there = {} if self._lent is None else self._lent.chunks(chunks)
        there |= {chunk: self._opened(chunk, *place, _ON_DISK, place[0]) for chunk, place in spilled.items()}
        raw = [chunk for chunk in chunks if chunk not in spilled]
        if not raw:
            return Pinned(there, None)
        ids = array("Q", [native.RAW | chunk for chunk in raw])
        packed, _, pins, _ = self._ring.segment.get_many(ids, native.GET_TAKE, None)
        refs = zip(raw, _REF.iter_unpack(packed), strict=True)
        there |= {chunk: self._opened(chunk, *ref[:4]) for chunk, ref in refs if ref[4] == native.READY}
        return Pinned(there, pins)

    def _opened(self, chunk: int, offset: int, num_bytes: int, desc: int, gen: int) -> RawChunk:
        found = self._open.pop(chunk, None)
        if found is None or found.record != (desc, gen):
            mapping = self._spill if desc == _ON_DISK else self._ring.mapping
            view = mapping.view(offset, num_bytes, None, True)
            found_damage = damage(memoryview(view), num_bytes - SEAL_BYTES) if self._verify else None
            if found_damage is None:
                stream = pa.ipc.open_stream(pa.py_buffer(view))
                batches, failure = list(stream), (stream.schema.metadata or {}).get(_FAILURE)
            else:
                place = self._spill.folder if desc == _ON_DISK else "ring"
                error = _damaged(found_damage, place, is_on_disk=desc == _ON_DISK)
                log.error("chunk %d: %s", chunk, error)
                batches = [pa.RecordBatch.from_pylist([], schema=self._schema(chunk))]
                failure = _failure_text(_ALL_ROWS, error)
            found = raw_chunk((desc, gen), self._first_rows[chunk], batches, num_bytes, failure)
        self._open[chunk] = found
        if len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)
        return found


def batches_of(rows: Sequence[tuple[int, int]], pinned: Pinned) -> Iterator[tuple[list[int], pa.RecordBatch]]:
    """(rows, the batch of exactly these) for all of ``rows``, which are (chunk, row), sorted.

    Large rows in place, run by run; small ones of several runs and chunks together, in a copy.
    """
    begun: list[int] = []
    slices: list[pa.RecordBatch] = []
    for chunk, first, end in _runs(rows):
        raw = pinned.chunks[chunk]
        is_large = raw.row_bytes >= LARGE_ROW_BYTES
        if begun and (is_large or len(begun) + end - first > BATCH_ROWS):
            yield begun, _joined(slices)
            begun, slices = [], []
        begun += range(first, end)
        slices += raw.slices(first, end)
        if is_large:
            yield begun, _joined(slices)
            begun, slices = [], []
    if begun:
        yield begun, _joined(slices)


def _runs(rows: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(chunk, first, end) of rows that follow one another, at most a batch at a time."""
    at = 0
    while at < len(rows):
        chunk, first = rows[at]
        num = 1
        while at + num < len(rows) and num < BATCH_ROWS and rows[at + num] == (chunk, first + num):
            num += 1
        yield chunk, first, first + num
        at += num


def _joined(slices: list[pa.RecordBatch]) -> pa.RecordBatch:
    return slices[0] if len(slices) == 1 else pa.concat_batches(slices)
