"""The thread that fetches: what it puts where, and that no error and no hang of it is lost."""

from __future__ import annotations

import json
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pytest
from support_schedule import CHUNK_BYTES, ROWS, World, world
from support_sets import wait_until

import shmloader._native as native
from shmloader.errors import ReadError, ServiceError, from_wire
from shmloader.prefetch.fetcher import Fetcher
from shmloader.prefetch.plan import SetPlan
from shmloader.prefetch.store import RawStore
from shmloader.sources.base import Chunk, Columns, SourcePlan

SCHEMA = pa.schema([("number", pa.int64())])


class Reader:
    """Reads numbers; ``before`` is called with each chunk first."""

    def __init__(self, before: Callable[[Chunk], None] = lambda chunk: None) -> None:
        self.before = before
        self.read_chunks: list[int] = []

    def read(self, chunk: Chunk) -> Iterator[tuple[int, pa.RecordBatch]]:
        self.before(chunk)
        self.read_chunks.append(chunk.first_row // ROWS)
        numbers = list(range(chunk.first_row, chunk.first_row + chunk.num_rows))
        yield chunk.first_row, pa.RecordBatch.from_pydict({"number": numbers}, schema=SCHEMA)

    def close(self) -> None:
        pass


def plan_of(made: World) -> SetPlan:
    num = len(made.chunks)
    source = SourcePlan(
        name="the set",
        split="train",
        mode="local",
        num_rows=num * ROWS,
        shards=("a-shard",),
        chunks=tuple(Chunk(i * ROWS, ROWS, 0) for i in range(num)),
        columns=Columns(),
        arrow_schema=SCHEMA.serialize().to_pybytes(),
        units=tuple(made.units.tolist()),
        chunk_bytes=(CHUNK_BYTES,) * num,
    )
    return SetPlan(source, None, made.window_bytes)


@contextmanager
def fetching(made: World, reader: Any, held_bytes: int = 1 << 20) -> Iterator[Fetcher]:
    store = RawStore(made.service, made.writer, SCHEMA, made.chunks.first_rows.tolist())
    fetcher = Fetcher(made.segment, made.writer, plan_of(made), reader, store, made.fetching(1 << 20), held_bytes)
    fetcher.start()
    try:
        yield fetcher
    finally:
        fetcher.stop(10)


def has_raw(made: World, *chunks: int) -> bool:
    return all(state & native.CHUNK_HAS_RAW for state in made.segment.chunk_look(array("I", chunks)))


def fatal(made: World) -> Exception | None:
    text = made.segment.text_get(native.TEXT_FATAL)
    return None if text is None else from_wire(json.loads(text))


def test_what_is_waited_for_is_fetched_and_counted():
    with world() as made, fetching(made, Reader()):
        made.want([33, 170])
        wait_until(lambda: has_raw(made, 2, 10))
        stats = wait_until(lambda: (s := made.segment.stats())["num_fetched"] == 2 and s)
        assert stats["fetched_bytes"] == 2 * ROWS * 8


def test_what_is_waited_for_stays_until_it_is_decoded_although_others_come():
    with world() as made, fetching(made, Reader(), held_bytes=1):
        made.want(range(0, 12 * ROWS, ROWS))  # a row of each chunk, and room for one

        def decode_what_is_there() -> bool:
            states = made.segment.chunk_look(array("I", range(12)))
            there = [i for i, state in enumerate(states) if state & native.CHUNK_HAS_RAW]
            made.decode(made.writer.claim([i * ROWS for i in there if i * ROWS in made.segment.wanted(64)]))
            return made.segment.wanted(64) == []

        wait_until(decode_what_is_there)
        assert made.segment.stats()["num_fetched"] == 12


def test_a_chunk_that_cannot_be_read_is_broken_with_the_reason():
    def fail(chunk: Chunk) -> None:
        if chunk.first_row == 2 * ROWS:
            raise ReadError("the disk is on fire", shard="a-shard")

    with world() as made, fetching(made, Reader(fail)):
        made.want([33, 50])
        wait_until(lambda: has_raw(made, 3))
        wait_until(lambda: made.segment.stats()["chunks_broken"])
        with pytest.raises(ReadError, match="the disk is on fire"):
            made.owner.get_many([33], 10)
        assert fatal(made) is None


def test_an_error_that_is_none_of_ours_names_the_rows():
    def fail(chunk: Chunk) -> None:
        raise ZeroDivisionError("a bug in the reader")

    with world() as made, fetching(made, Reader(fail)):
        made.want([33])
        wait_until(lambda: made.segment.stats()["chunks_broken"])
        with pytest.raises(ServiceError, match=r"row 32 of 'the set'.* and the 15 after it .*ZeroDivisionError: a bug"):
            made.owner.get_many([33], 10)


def test_a_chunk_that_is_too_large_ends_all_with_the_figures():
    class Large(Reader):
        def read(self, chunk: Chunk) -> Iterator[tuple[int, pa.RecordBatch]]:
            yield chunk.first_row, pa.RecordBatch.from_pydict({"number": [0] * 200_000}, schema=SCHEMA)

    with world() as made, fetching(made, Large()):
        made.want([5])
        error = wait_until(lambda: fatal(made))
        assert type(error).__name__ == "RecordTooLargeError"
        assert "row 0 of 'the set'" in str(error)
        assert "1,048,576" in str(error)


def test_an_error_beside_reading_reaches_the_readers(monkeypatch):
    with world() as made:
        monkeypatch.setattr("shmloader.prefetch.fetcher.Refetches.note", lambda *_: 1 / 0)
        with fetching(made, Reader()):
            made.want([5])
            assert "ZeroDivisionError" in str(wait_until(lambda: fatal(made)))


def test_a_reader_that_hangs_does_not_hold_up_the_end():
    gate = threading.Event()
    with world() as made, fetching(made, Reader(lambda chunk: gate.wait(60) and None)) as fetcher:
        made.want([5])
        wait_until(lambda: made.segment.stats()["chunks_claimed"])
        assert not fetcher.stop(0.01)
        gate.set()
        assert fetcher.stop(40)
        assert fatal(made) is None


def test_a_chunk_without_room_waits_in_memory_and_is_read_once():
    with world(resident_rows=1000) as made:
        made.service.segment.chunk_claim(11)
        block = made.writer.reserve(native.RAW | 11, (1 << 20) - 64)
        assert block is not None
        reader = Reader()
        with fetching(made, reader):
            made.want([5])
            wait_until(lambda: reader.read_chunks)
            wait_until(lambda: made.segment.stats()["num_starved"])  # it was tried for who waits
            made.writer.abort(block)
            wait_until(lambda: has_raw(made, 0))
            assert reader.read_chunks.count(0) == 1


def test_on_the_way_through_a_stream_all_that_has_room_is_kept():
    with world(units=[0] * 12) as made, fetching(made, Reader()):
        made.want([100])
        wait_until(lambda: has_raw(made, *range(7)))
