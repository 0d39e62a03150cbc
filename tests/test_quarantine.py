"""The list of bad rows that the processes of a set share."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator

import pytest
from support_sets import in_child, join

from shmloader import quarantine
from shmloader.errors import DecodeError, ReadError, SampleError
from shmloader.quarantine import ENTRY_BYTES, BadRow, Quarantine


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("quarantine")
    Quarantine.prepare(made)
    yield made
    os.close(made)


def test_what_one_adds_another_one_finds(fd):
    one, other = Quarantine(fd), Quarantine(fd)
    assert one.add(7, 1, DecodeError("row 7 is bad", field="image"), is_met=False)
    assert one.add(3, 1, SampleError("row 3 is bad"), is_met=True)
    assert other.rows() == [
        BadRow(3, 1, "SampleError", "row 3 is bad", None, True),
        BadRow(7, 1, "DecodeError", "row 7 is bad", "image", False),
    ]
    assert other.add(1, 1, SampleError("row 1 is bad"), is_met=True)
    assert [bad.id for bad in one.rows()] == [1, 3, 7]


def test_a_row_is_listed_once_and_counts_when_a_reader_has_met_it(fd):
    one, other = Quarantine(fd), Quarantine(fd)
    assert one.add(7, 1, SampleError("found"), is_met=False)
    assert not other.add(7, 1, SampleError("found"), is_met=False)
    assert other.num_met() == 0
    assert other.add(7, 1, SampleError("met"), is_met=True)
    assert not one.add(7, 1, SampleError("met"), is_met=True)
    assert not one.add(7, 1, SampleError("found"), is_met=False)
    assert one.num_met() == 1
    assert [(bad.message, bad.is_met) for bad in one.rows()] == [("met", True)]
    assert os.fstat(fd).st_size == 2 * ENTRY_BYTES


def test_rows_that_cannot_be_read_count_all(fd):
    bad = Quarantine(fd)
    bad.add(64, 64, ReadError("torn"), is_met=True)
    bad.add(3, 1, SampleError("bad"), is_met=True)
    assert bad.num_met() == 65
    assert [(row.id, row.num_rows) for row in bad.rows()] == [(3, 1), (64, 64)]


@pytest.mark.parametrize("message", ["", "x" * 5000, "\N{SNOWMAN}" * 2000, '"\n' * 900])
@pytest.mark.parametrize("field", [None, "f" * 3000])
def test_an_entry_has_one_size_whatever_it_tells(fd, message, field):
    bad = Quarantine(fd)
    bad.add(1 << 63, (1 << 32) - 1, SampleError(message, field=field), is_met=True)
    assert os.fstat(fd).st_size == ENTRY_BYTES
    (found,) = Quarantine(fd).rows()
    assert message.startswith(found.message.removesuffix(" […]"))
    assert (found.id, found.num_rows, found.error) == (1 << 63, (1 << 32) - 1, "SampleError")


def test_what_several_processes_add_at_the_same_time_is_all_there(fd):
    def work(first: int) -> None:
        own = Quarantine(fd)
        for row in range(first, first + 200):
            own.add(row % 500, 1, SampleError(f"row {row % 500} is bad"), is_met=True)

    children = [in_child(lambda first=first: work(first)) for first in (0, 200, 400)]
    assert [join(child) for child in children] == [0, 0, 0]
    found = Quarantine(fd).rows()
    assert [bad.id for bad in found] == list(range(500))
    assert all(bad.message == f"row {bad.id} is bad" for bad in found)
    assert os.fstat(fd).st_size % ENTRY_BYTES == 0


def test_the_list_has_an_end(fd, monkeypatch):
    monkeypatch.setattr(quarantine, "MOST", 3)
    bad = Quarantine(fd)
    assert [bad.add(row, 1, SampleError("bad"), is_met=True) for row in range(5)] == [True] * 3 + [False] * 2
    assert bad.is_full
    assert len(bad.rows()) == 3


def test_what_nobody_asked_for_leaves_room_for_what_is_counted(fd, monkeypatch):
    monkeypatch.setattr(quarantine, "MOST", 4)
    bad = Quarantine(fd)
    assert [bad.add(row, 1, SampleError("bad"), is_met=False) for row in range(3)] == [True, True, False]
    assert not bad.is_full
    assert [bad.add(row, 1, SampleError("bad"), is_met=True) for row in (7, 0, 8)] == [True, True, False]
    assert bad.num_met() == 2


def test_threads_may_count_and_list_while_others_add(fd):
    one, other = Quarantine(fd), Quarantine(fd)
    failed, is_over = [], threading.Event()

    def read() -> None:
        try:
            while not is_over.is_set():
                assert other.num_met() <= 2000
                assert len(other.rows()) <= 2000
        except Exception as error:
            failed.append(error)

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=read) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        for row in range(2000):
            one.add(row, 1, SampleError("bad"), is_met=True)
            other.add(row, 1, SampleError("bad"), is_met=False)
    finally:
        is_over.set()
        sys.setswitchinterval(switching)
        for thread in threads:
            thread.join()
    assert not failed
    assert (one.num_met(), other.num_met()) == (2000, 2000)


def test_a_child_that_is_forked_while_the_list_is_read_counts_anew(fd):
    bad = Quarantine(fd)
    bad.add(1, 5, ReadError("torn"), is_met=True)

    def work() -> None:
        assert bad.num_met() == 5

    with quarantine._reading:
        bad._num_met = 3  # half-way
        child = in_child(work)
    assert join(child) == 0
