"""Notes of chunks that cannot be fetched for now."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from shmloader.deaths import Deaths
from shmloader.errors import ReadError
from shmloader.outages import _BODIES_AT, PER_SLOT, Outages


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("deaths")
    yield made
    os.close(made)


def error(chunk: int) -> ReadError:
    return ReadError(
        f"chunk {chunk}", dataset="org/texts", shard="a.parquet", first_row=0, num_rows=1, endpoint="http://h"
    )


def test_who_waits_is_told_why_and_who_waits_for_others_is_not(fd):
    began = time.monotonic()
    Outages(fd).note(3, range(7, 8), error(7))
    chunk, found = Outages(fd).of({6, 7}, began)
    assert chunk == 7
    assert isinstance(found, ReadError)
    assert (str(found), found.shard, found.endpoint) == ("chunk 7", "a.parquet", "http://h")
    assert Outages(fd).of({6}, began) is None


def test_who_waits_for_what_can_only_be_read_behind_it_is_told_too(fd):
    Outages(fd).note(3, range(7, 500), error(7))
    assert Outages(fd).of({6, 500}, 0.0) is None
    chunk, found = Outages(fd).of({6, 499, 500}, 0.0)
    assert (chunk, str(found)) == (499, "chunk 7")


def test_what_failed_before_the_wait_is_not_told(fd):
    Outages(fd).note(3, range(7, 8), error(7))
    assert Outages(fd).of({7}, time.monotonic()) is None


def test_several_chunks_of_several_prefetchers_are_told_and_the_oldest_make_way(fd):
    began = time.monotonic()
    for slot in (1, 255):
        outages = Outages(fd)
        for chunk in range(PER_SLOT + 1):
            outages.note(slot, range(100 * slot + chunk, 100 * slot + chunk + 1), error(chunk))
        assert outages.of({100 * slot}, began) is None
        for i in range(1, PER_SLOT + 1):
            chunk, found = outages.of({100 * slot + i}, began)
            assert (chunk, str(found)) == (100 * slot + i, f"chunk {i}")


def test_a_body_that_is_half_written_is_not_read(fd):
    began = time.monotonic()
    Outages(fd).note(0, range(7, 8), error(7))
    os.pwrite(fd, b"{}", _BODIES_AT)
    assert Outages(fd).of({7}, began) is None


def test_deaths_are_kept_beside_them(fd):
    began, deaths = time.monotonic(), Deaths(fd)
    deaths.begin(2)
    Outages(fd).note(2, range(7, 8), error(7))
    deaths.bury(os.getpid(), -9, False)
    assert [death.status for death in deaths._where(lambda death: True)] == [-9]
    assert Outages(fd).of({7}, began) is not None


def test_a_set_without_any_is_none(fd):
    assert Outages(fd).of({7}, 0.0) is None
