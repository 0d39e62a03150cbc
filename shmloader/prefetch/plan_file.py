"""The plan memfd: written once by the planner, read by everybody. JSON in three parts, without secrets, and listings.

========  =========================================================================================
bytes     what
========  =========================================================================================
0         the head: bytes of the JSON, offset and bytes of the listings (0: there are none); written last
24        JSON: ``layout``, ``source``, ``schema``; or ``error``
a page's  of listings of loose files (sources/listing.py): their number, offset from here and bytes of each; and they
          themselves, which readers map in place, each at a multiple of 64
========  =========================================================================================

``layout`` is all that the supervisor needs; it reads nothing else, and so imports neither numpy nor pyarrow.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shmloader.errors import from_wire

_HEAD = struct.Struct("<QQQ")
_NUMBER, _PLACE = struct.Struct("<Q"), struct.Struct("<QQ")
#: Of each listing; what Arrow wants. Source: Arrow Columnar Format, "Buffer Alignment and Padding".
_ALIGNMENT = 64


@dataclass(frozen=True)
class Layout:
    """What the control memory is laid out for.

    chunks: (first row, number of rows) of each. units: for each the index of its unit's first chunk. chunk_bytes: its
    (estimated) encoded bytes. record_bytes: of every sample, None: they differ. most_record_bytes: no sample
    is larger, None: not known.
    window_bytes: encoded bytes of the chunks that an order shuffles among one another.
    rows_per_chunk: of an open set, of whose rows and chunks nobody knows how many there are; else 0.
    """

    num_rows: int
    chunks: list[tuple[int, int]]
    units: list[int]
    chunk_bytes: list[int]
    record_bytes: int | None
    most_record_bytes: int | None
    window_bytes: int
    rows_per_chunk: int = 0


def write_parts(fd: int, layout: Layout, source: str, schema: str | None, listings: Sequence[memoryview] = ()) -> None:
    """Store a plan in the plan memfd; what was there before is written over."""
    _write(fd, {"layout": asdict(layout), "source": source, "schema": schema}, listings)


def write_failure(fd: int, wire: dict[str, Any]) -> None:
    """Store why there is no plan (see `errors.to_wire`)."""
    _write(fd, {"error": wire}, ())


def read_parts(fd: int) -> tuple[Layout, str, str | None] | None:
    """What `write_parts` stored: layout, and the texts of source and schema; None if nothing was written
    yet, or not all of it.

    Raises:
        ShmloaderError: what the planner stored with `write_failure`.
    """
    head = _read_head(fd)
    if head is None:
        return None
    raw = json.loads(os.pread(fd, head[0], _HEAD.size))
    if "error" in raw:
        raise from_wire(raw["error"])
    return Layout(**raw["layout"]), raw["source"], raw["schema"]


def map_listings(fd: int) -> list[memoryview]:
    """The listings that `write_parts` stored, in place; their memory lives as long as something refers to it."""
    head = _read_head(fd)
    if head is None or not head[1]:
        return []
    whole = memoryview(mmap.mmap(fd, head[2], mmap.MAP_SHARED, mmap.PROT_READ, offset=head[1]))
    (number,) = _NUMBER.unpack_from(whole)
    places = [_PLACE.unpack_from(whole, _NUMBER.size + i * _PLACE.size) for i in range(number)]
    return [whole[offset : offset + size] for offset, size in places]


def _read_head(fd: int) -> tuple[int, int, int] | None:
    """Bytes of the JSON, offset and bytes of the listings; None: its writer has not ended, or was killed over it."""
    data = os.pread(fd, _HEAD.size, 0)
    if len(data) < _HEAD.size or not any(data):
        return None
    json_bytes, offset, listing_bytes = _HEAD.unpack(data)
    return json_bytes, offset, listing_bytes


def _write(fd: int, raw: dict[str, Any], listings: Sequence[memoryview]) -> None:
    _write_at(fd, bytes(_HEAD.size), 0)
    data = json.dumps(raw).encode()
    _write_at(fd, data, _HEAD.size)
    offset = listing_bytes = 0
    if listings:
        offset = -(-(_HEAD.size + len(data)) // mmap.PAGESIZE) * mmap.PAGESIZE
        listing_bytes = _write_listings(fd, listings, offset)
    _write_at(fd, _HEAD.pack(len(data), offset, listing_bytes), 0)


def _write_listings(fd: int, listings: Sequence[memoryview], offset: int) -> int:
    """Store them from ``offset`` on; returns the bytes that they take."""
    end = _NUMBER.size + len(listings) * _PLACE.size
    table = _NUMBER.pack(len(listings))
    for listing in listings:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        _write_at(fd, listing, offset + start)
        end = start + listing.nbytes
        table += _PLACE.pack(start, listing.nbytes)
    _write_at(fd, table, offset)
    return end


def _write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data).cast("B")
    at = 0
    while at < len(view):
        at += os.pwrite(fd, view[at:], offset + at)
