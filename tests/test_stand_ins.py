"""Which row stands in for which: of any rows that cannot be had, without a set."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmloader import quarantine
from shmloader._native import Mapping
from shmloader.errors import (
    ChecksumError,
    ReadError,
    RecordTooLargeError,
    SampleError,
    ServiceError,
    ShmloaderError,
    SourceError,
    TooManyBadRowsError,
    WaitTimeoutError,
)
from shmloader.policy import BadRows, is_bad_row, is_passing
from shmloader.prefetch.plan import SetPlan
from shmloader.quarantine import Quarantine
from shmloader.ring import Refs
from shmloader.sources.base import Chunk, Columns, SourcePlan
from shmloader.stand_ins import StandIns

ROWS, CHUNK = 40, 8


def plan() -> SetPlan:
    chunks = tuple(Chunk(first, CHUNK, 0) for first in range(0, ROWS, CHUNK))
    num = len(chunks)
    schema = pa.schema({"x": pa.int64()}).serialize().to_pybytes()
    sizes = {"units": tuple(range(num)), "chunk_bytes": (100,) * num}
    return SetPlan(SourcePlan("d", "train", "local", ROWS, ("s",), chunks, Columns(), schema, **sizes), None, 1 << 20)


class Ring:
    """What `StandIns` sees of a reader: rows that are there, and why others are not."""

    def __init__(self, bad: Sequence[int] = (), broken: Sequence[int] = (), away: Sequence[int] = ()) -> None:
        self.bad, self.broken, self.away = set(bad), set(broken), set(away)
        self.fd = os.memfd_create("quarantine")
        Quarantine.prepare(self.fd)
        self.quarantine = Quarantine(self.fd)
        self.num_looks = 0

    def error_of(self, row: int) -> ShmloaderError | None:
        chunk = row // CHUNK
        error: ShmloaderError
        if chunk in self.away:
            error = SourceError("no Hub", dataset="d", endpoint="http://x")
        elif chunk in self.broken:
            error = ReadError("torn", dataset="d")
            self.quarantine.add(chunk * CHUNK, CHUNK, error, is_met=True)
        elif row in self.bad:
            error = SampleError(f"row {row} is bad")
            self.quarantine.add(row, 1, error, is_met=True)
        else:
            return None
        error.at = row, chunk if chunk in self.away | self.broken else None
        return error

    def wait_for(self, rows: Sequence[int], place: Any) -> Refs:
        self.num_looks += 1
        for row in rows:
            if (error := self.error_of(row)) is not None:
                raise error
        return Refs(rows, b"", Mapping(-1, 64, True, "none"))

    def are_at_hand(self, rows: Sequence[int]) -> list[bool]:
        return [row not in self.bad and row // CHUNK not in self.away | self.broken for row in rows]

    def stand_ins(self, **policy: Any) -> StandIns:
        said = BadRows(**{"on_error": "skip", "max_bad": 1.0, **policy})
        return StandIns(plan(), said, self.quarantine, self.wait_for, self.are_at_hand)


def instead_of(row: int, ring: Ring) -> int:
    """The next row, or the one at the same place of the next chunk if its own is broken."""
    while row in ring.bad or row // CHUNK in ring.broken:
        row = (row + (CHUNK if row // CHUNK in ring.broken else 1)) % ROWS
    return row


@pytest.fixture
def ring() -> Iterator[type[Ring]]:
    return Ring


@given(
    st.sets(st.integers(0, ROWS - 1), max_size=ROWS - 10),
    st.sets(st.integers(0, ROWS // CHUNK - 1), max_size=2),
    st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=60),
    st.integers(1, 7),
)
def test_the_next_good_row_stands_in_whatever_was_asked_for_before(bad, broken, rows, batch):
    ring = Ring(bad, broken)
    try:
        if all(row in bad or row // CHUNK in broken for row in range(ROWS)):
            return
        stand_ins = ring.stand_ins()
        for at in range(0, len(rows), batch):
            some = rows[at : at + batch]
            assert list(stand_ins.find(some, None).ids) == [instead_of(row, ring) for row in some]
    finally:
        os.close(ring.fd)


def test_good_rows_are_handed_on_as_they_are():
    ring = Ring()
    rows = [3, 1, 2]
    assert ring.stand_ins().find(rows, None).ids is rows


def test_what_stands_in_is_known_the_next_time():
    ring = Ring(bad=[1, 2], broken=[1])
    stand_ins = ring.stand_ins()
    stand_ins.find([1, 9], None)
    ring.num_looks = 0
    assert list(stand_ins.find([0, 1, 2, 9], None).ids) == [0, 3, 3, 17]
    assert ring.num_looks == 1


def test_a_chunk_that_cannot_be_read_is_stepped_over_at_once():
    ring = Ring(broken=[0, 1, 2])
    assert list(ring.stand_ins().find([1], None).ids) == [25]
    assert ring.num_looks == 4


def test_the_rows_of_a_chunk_that_cannot_be_read_have_different_stand_ins_found_at_once():
    ring = Ring(broken=[ROWS // CHUNK - 1])
    assert list(ring.stand_ins().find([31, *range(32, 40), 0], None).ids) == [31, *range(8), 0]
    assert ring.num_looks == 2


def test_a_chunk_behind_a_torn_one_that_is_shorter_stands_in_more_than_once():
    chunks = (Chunk(0, 8, 0), Chunk(8, 3, 0), Chunk(11, 29, 0))
    short = plan()
    source = replace(short.source, chunks=chunks, units=(0, 1, 2), chunk_bytes=(100,) * 3)
    ring = Ring(broken=[0])
    stand_ins = StandIns(
        replace(short, source=source), BadRows("skip", 1.0), ring.quarantine, ring.wait_for, ring.are_at_hand
    )
    assert list(stand_ins.find(list(range(8)), None).ids) == [8, 9, 10, 8, 9, 10, 8, 9]


def test_where_all_rows_are_bad_it_is_an_error():
    ring = Ring(broken=range(ROWS // CHUNK))
    with pytest.raises(TooManyBadRowsError, match="all of its rows are bad"):
        ring.stand_ins().find([17], None)


@pytest.mark.parametrize(("max_bad", "num_bad"), [(0.1, 5), (0.0, 1), (0.01, 2)])
def test_more_bad_rows_than_allowed_are_an_error_of_each_look_that_meets_one(max_bad, num_bad):
    ring = Ring(bad=range(10, 10 + num_bad))
    stand_ins = ring.stand_ins(max_bad=max_bad)
    for _ in range(2):
        with pytest.raises(TooManyBadRowsError, match=f"{num_bad} of its {ROWS} rows") as caught:
            stand_ins.find(list(range(8, 20)), None)
        assert (caught.value.num_bad, caught.value.num_rows, caught.value.max_bad) == (num_bad, ROWS, max_bad)
        assert caught.value.examples[0] == "SampleError: row 10 is bad"
    assert list(stand_ins.find([1, 2], None).ids) == [1, 2]


def test_what_other_processes_have_met_counts():
    ring = Ring(bad=[1])
    stand_ins = ring.stand_ins(max_bad=0.05)
    stand_ins.find([1], None)
    for row in (20, 21):
        Quarantine(ring.fd).add(row, 1, SampleError("bad"), is_met=True)
    with pytest.raises(TooManyBadRowsError, match="3 of its 40"):
        stand_ins.find([1], None)


def test_while_a_server_cannot_be_reached_a_row_that_is_at_hand_stands_in_and_only_then():
    ring = Ring(bad=[16], away=[1])
    stand_ins = ring.stand_ins(max_bad=0.0)
    assert list(stand_ins.find([7, 9, 15, 9], None).ids) == [7, 17, 18, 17]
    assert ring.quarantine.num_met() == 0
    ring.away.clear()
    assert list(stand_ins.find([7, 9], None).ids) == [7, 9]


def test_rows_that_only_have_to_be_decoded_are_waited_for_while_a_server_cannot_be_reached():
    ring = Ring(away=[1, 3])
    stand_ins = ring.stand_ins()
    found = stand_ins.find([0, 8, 16, 24], None)
    assert list(found.ids) == [0, 17, 16, 18]
    assert ring.num_looks == 2  # what is not at hand was replaced at once


def test_what_was_asked_for_anyway_stands_in_if_there_is_nothing_else():
    ring = Ring(away=[1, 2, 3, 4], bad=[2, 3, 4, 5, 6, 7])
    assert list(ring.stand_ins().find([0, 1, *range(8, 13)], None).ids) == [0, 1, 0, 1, 0, 1, 0]


def test_of_a_long_source_of_which_a_tenth_is_at_hand_that_is_found_in_a_few_looks():
    rows, there = 1_280_000, 128_000
    chunks = tuple(Chunk(first, 1000, 0) for first in range(0, rows, 1000))
    num = len(chunks)
    source = replace(plan().source, num_rows=rows, chunks=chunks, units=(0,) * num, chunk_bytes=(1,) * num)
    looks = []
    error = SourceError("no Hub", dataset="d", endpoint="http://x")
    error.at = (rows - 1, num - 1)

    def wait_for(asked: Sequence[int], place: Any) -> Refs:
        if any(row >= there for row in asked):
            raise error
        return Refs(asked, b"", Mapping(-1, 64, True, "none"))

    def are_at_hand(asked: Sequence[int]) -> list[bool]:
        looks.append(len(asked))
        return [row < there for row in asked]

    ring = Ring()
    stand_ins = StandIns(SetPlan(source, None, 1), BadRows("skip"), ring.quarantine, wait_for, are_at_hand)
    asked = random.Random(0).sample(range(rows), 64)
    found = list(stand_ins.find(asked, None).ids)
    assert len(set(found)) == 64
    assert len(looks) <= 40
    assert max(looks) <= 256


def test_stand_ins_that_are_gone_when_they_are_asked_for_are_looked_for_a_few_times_only():
    ring = Ring(away=[1])
    error = SourceError("no Hub", dataset="d", endpoint="http://x")
    error.at = (9, 1)
    num_waits = 0

    def wait_for(rows: Sequence[int], place: Any) -> Refs:
        nonlocal num_waits
        num_waits += 1
        raise error

    stand_ins = StandIns(plan(), BadRows("skip"), ring.quarantine, wait_for, ring.are_at_hand)
    with pytest.raises(SourceError, match="no Hub"):
        stand_ins.find([9], None)
    assert num_waits == 4


def test_a_full_list_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(quarantine, "MOST", 4)
    ring = Ring(bad=range(6))
    with pytest.raises(TooManyBadRowsError, match=f"4 of its {ROWS} rows are bad, and the list of them is full"):
        ring.stand_ins(max_bad=0.5).find([0], None)


def test_while_a_server_cannot_be_reached_and_nothing_is_at_hand_its_error_is_raised():
    ring = Ring(away=range(ROWS // CHUNK))
    with pytest.raises(SourceError, match="no Hub"):
        ring.stand_ins().find([9], None)


def test_a_sample_that_is_larger_than_the_ring_is_the_fault_of_its_row_a_chunk_is_not():
    error = RecordTooLargeError("x")
    for error.at, expected in (((3, None), True), ((3, 0), False), (None, False)):
        assert is_bad_row(error) is expected


@pytest.mark.parametrize("kind", [ChecksumError, WaitTimeoutError, ServiceError])
def test_what_is_no_fault_of_a_row_is_raised(kind, monkeypatch):
    ring = Ring()
    error = kind("x", of_memory=True)
    error.at = None if kind is WaitTimeoutError else (3, None)
    assert not is_bad_row(error)

    def wait_for(rows: Sequence[int], place: Any) -> Refs:
        raise error

    stand_ins = StandIns(plan(), BadRows("skip"), ring.quarantine, wait_for, ring.are_at_hand)
    with pytest.raises(kind):
        stand_ins.find([3], None)


def test_only_what_says_that_a_server_was_not_reached_passes():
    assert is_passing(SourceError("x", endpoint="http://x"))
    assert not is_passing(ReadError("x"))
    assert not is_passing(SampleError("x", endpoint="http://x"))


@pytest.mark.parametrize(
    ("max_bad", "rows", "most"),
    [(0.01, 10, 1), (0.01, 300, 3), (0.07, 100, 7), (0.29, 100, 29), (0.0, 1000, 0), (1.0, 5, None), (1, 5, None)],
)
def test_the_budget_is_a_share_of_the_rows_and_one_at_least(max_bad, rows, most):
    assert BadRows("skip", max_bad).most(rows) == most
