"""A small set whose records all give way to others, with a service and a reader in this process."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager

from support_sets import put, ring_files

import shmloader._native as native
from shmloader.files import RingFiles
from shmloader.ring import Ring
from shmloader.writer import Writer

BLOCK = 4096
NUM_ROWS = 64


def block(row: int) -> bytes:
    return bytes([row]) * BLOCK


@contextmanager
def transit(num_blocks: int = 8) -> Iterator[tuple[RingFiles, Writer, Ring]]:
    """A set with room for so many records, a service and a reader."""
    with ring_files(NUM_ROWS, 8, resident_bytes=0, transit_bytes=num_blocks * BLOCK) as files:
        yield files, Writer(Ring(files, native.SERVICE)), Ring(files, native.OWNER)


def write(writer: Writer, *rows: int) -> None:
    for row in rows:
        put(writer, row, block(row))


def is_there(writer: Writer, row: int) -> bool:
    return writer.ring.segment.look(array("Q", [row]), None)[0] == native.ROW_TRANSIT
