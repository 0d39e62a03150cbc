"""Workers beyond the table of clients: they read every sample right, wait for what is missing, and leave nothing."""

from __future__ import annotations

import logging
import signal
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cloudpickle
import pytest
from support_guests import Waiting, full_table
from support_sets import (
    in_child,
    join,
    kill,
    put,
    read,
    ring_files,
    wait_until,
)
from support_transit import BLOCK, block, is_there, transit, write

import shmloader._native as native
from shmloader.errors import ClosedError, DecodeError, RingError, ServiceError, WaitTimeoutError
from shmloader.files import RingFiles
from shmloader.ring import Refs, Ring
from shmloader.writer import Writer

cloudpickle.register_pickle_by_value(sys.modules[__name__])
#: Slots that no worker gets: SHML_KEPT_CLIENTS in native/shml.h.
KEPT = 72
pytestmark = pytest.mark.filterwarnings("ignore:.* in an order that the prefetchers do not know:UserWarning")


@contextmanager
def guest_of(files: RingFiles, owner: Ring) -> Iterator[tuple[Ring, Callable[[], int]]]:
    """A guest in this process, and a function that makes a slot free."""
    with full_table(files) as free_one:
        guest = Ring(files, native.WORKER, (owner.slot, owner.gen))
        assert guest.is_guest
        yield guest, free_one


@contextmanager
def transit_guest(num_blocks: int = 8) -> Iterator[tuple[Writer, Ring, Ring]]:
    """A set whose records all give way to others: a service, a reader, and a guest."""
    with transit(num_blocks) as (files, writer, reader), guest_of(files, reader) as (guest, _):
        yield writer, reader, guest


def records(refs: Refs) -> list[bytes]:
    return [bytes(refs.record(i)) for i in range(len(refs))]


# ---- entering --------------------------------------------------------------------------------------------


def test_a_worker_beyond_the_table_is_a_guest_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with ring_files() as files, caplog.at_level(logging.INFO, logger="shmloader"):
        owner = Ring(files, native.OWNER)
        with guest_of(files, owner) as (guest, _):
            assert (guest.slot, guest.segment.count(native.WORKER)) == (-1, native.MAX_CLIENTS - KEPT - 1)
        assert ["guest" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(("role", "who"), [(native.OWNER, "training process"), (native.SERVICE, "prefetch process")])
def test_an_owner_or_service_beyond_the_table_is_told_why_it_cannot_enter(role: int, who: str) -> None:
    told = rf"{who} cannot enter .* 256 slots .*num_workers"
    with ring_files() as files, full_table(files, native.SERVICE), pytest.raises(RingError, match=told):
        Ring(files, role)


def test_services_and_owners_enter_where_workers_find_no_slot() -> None:
    with ring_files() as files, full_table(files):
        assert not Ring(files, native.OWNER).is_guest
        assert not Ring(files, native.SERVICE).is_guest


# ---- reading ---------------------------------------------------------------------------------------------


def test_a_guest_reads_resident_records_in_place() -> None:
    with ring_files() as files:
        owner = Ring(files, native.OWNER)
        for row in (0, 1, 2):
            put(Ring(files, native.SERVICE), row, b"%d" % row)
        with guest_of(files, owner) as (guest, _):
            refs = guest.get_many([2, 0, 1, 0], 30)
            assert (refs.base, refs.pins) == (guest.mapping, None)
            assert [data[:1] for data in records(refs)] == [b"2", b"0", b"1", b"0"]
            assert guest.segment.stats()["num_guest_reads"] == 4


def test_a_guest_has_copies_of_what_gives_way() -> None:
    with transit_guest() as (writer, _, guest):
        write(writer, 0, 1)
        refs = guest.get_many([1, 0, 1], 30)
        view = refs.record(0)
        assert refs.base is not guest.mapping
        write(writer, *range(2, 40))
        assert not is_there(writer, 1)
        assert (records(refs), bytes(view)) == ([block(1), block(0), block(1)], block(1))


def test_resident_and_copied_records_of_a_batch_come_in_the_order_asked_for() -> None:
    with ring_files(8, 4, resident_bytes=BLOCK, transit_bytes=4 * BLOCK) as files:
        owner, writer = Ring(files, native.OWNER), Writer(Ring(files, native.SERVICE))
        writer.ring.segment.chunk_claim(0)
        write(writer, 0, 1, 4)
        with guest_of(files, owner) as (guest, _):
            assert records(guest.get_many([4, 0, 1], 30)) == [block(4), block(0), block(1)]
            assert guest.segment.stats()["resident_used_bytes"] == BLOCK


def test_no_ids_are_no_records_for_a_guest() -> None:
    with transit_guest() as (_, _, guest):
        assert len(guest.get_many([], 30)) == 0


class Interrupted:
    """A segment in which something happens between a guest's look and its check, the first times."""

    def __init__(self, segment: native.Segment, happenings: list[Callable[[], None]]) -> None:
        self._segment, self._happenings = segment, happenings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._segment, name)

    def guest_check(self, refs: bytes) -> bytes:
        if self._happenings:
            self._happenings.pop(0)()
        return self._segment.guest_check(refs)


def test_what_gave_way_under_the_copy_is_asked_for_again() -> None:
    """The second look finds it at another place."""
    with transit_guest() as (writer, _, guest):

        def make_room() -> None:
            write(writer, *range(10, 18))
            write(writer, 0)

        write(writer, 0, 1)
        happenings: list[Callable[[], None]] = [make_room]
        guest.segment = Interrupted(guest.segment, happenings)  # type: ignore[assignment]
        waiting = Waiting(lambda: records(guest.get_many([0, 1], 30)))
        wait_until(lambda: 1 in writer.ring.segment.wanted(8))
        write(writer, 1)
        assert waiting.result() == [block(0), block(1)]
        assert happenings == []


def test_a_copy_of_what_another_record_has_overwritten_is_never_had() -> None:
    with transit_guest(2) as (writer, _, guest):
        happenings: list[Callable[[], None]] = [lambda: write(writer, 2, 3), lambda: write(writer, 4, 5)]
        write(writer, 0, 1)
        guest.segment = Interrupted(guest.segment, happenings)  # type: ignore[assignment]
        waiting = Waiting(lambda: records(guest.get_many([0, 1], 30)))
        wait_until(lambda: write(writer, *sorted(writer.ring.segment.wanted(8))) or waiting.is_done)
        assert waiting.result() == [block(0), block(1)]
        assert happenings == []


# ---- waiting ---------------------------------------------------------------------------------------------


def test_a_commit_wakes_the_guests_that_wait_for_it() -> None:
    with transit_guest() as (writer, _, guest):
        waiting = [Waiting(lambda: read(guest, 5, BLOCK)) for _ in range(2)]
        wait_until(lambda: writer.ring.segment.wanted(8) == [5])
        write(writer, 5)
        assert [one.result() for one in waiting] == [block(5), block(5)]
        assert writer.ring.segment.wanted(8) == []


def test_a_guest_gets_a_batch_that_is_larger_than_transit() -> None:
    with transit_guest(2) as (writer, _, guest):
        waiting = Waiting(lambda: records(guest.get_many(range(8), 30)))
        for row in range(8):
            wait_until(lambda row=row: row in writer.ring.segment.wanted(16))
            write(writer, row)
            wait_until(lambda row=row: guest.segment.stats()["num_guest_reads"] > row)
        assert waiting.result() == [block(row) for row in range(8)]


def test_a_guest_gets_the_error_that_is_in_its_row_s_place() -> None:
    with transit_guest() as (writer, _, guest):
        write(writer, 0)
        writer.put_error(3, DecodeError("no picture", row=3))
        with pytest.raises(DecodeError, match="no picture") as caught:
            guest.get_many([0, 3], 30)
        assert caught.value.row == 3


def test_a_guest_that_waits_gets_the_error_of_a_chunk_that_breaks() -> None:
    with transit_guest() as (writer, _, guest):
        waiting = Waiting(lambda: guest.get_many([3], 30))
        segment = writer.ring.segment
        wait_until(lambda: segment.wanted(8) == [3])
        assert segment.chunk_claim(0) == 0
        assert segment.chunk_end(0, native.FETCH_BROKEN) == 0
        with pytest.raises(ServiceError, match="cannot be read"):
            waiting.result()
        assert segment.wanted(8) == []


def test_a_guest_that_waits_gets_the_reason_why_nothing_more_will_come() -> None:
    with transit_guest() as (writer, _, guest):
        waiting = Waiting(lambda: guest.get_many([3], 30))
        wait_until(lambda: writer.ring.segment.wanted(8) == [3])
        writer.put_fatal(RingError("no more"))
        with pytest.raises(RingError, match="no more"):
            waiting.result()


def test_a_guest_times_out_when_nothing_moves() -> None:
    with transit_guest() as (_, _, guest), pytest.raises(WaitTimeoutError, match="shard 'a', row 1 did not"):
        guest.get_many([1], 0.2, None, lambda row: f"shard 'a', row {row}")


def test_a_guest_whose_owner_is_gone_is_told() -> None:
    with transit() as (files, _, reader), guest_of(files, reader) as (guest, _):
        waiting = Waiting(lambda: guest.get_many([3], 30))
        reader.leave()
        with pytest.raises(ServiceError, match=r"training process .* gone"):
            waiting.result()


def test_a_guest_that_waits_when_its_process_closes_the_set_is_told() -> None:
    with transit_guest() as (writer, _, guest):
        waiting = Waiting(lambda: guest.get_many([3], 30))
        wait_until(lambda: writer.ring.segment.wanted(8) == [3])
        guest.leave()
        with pytest.raises(ClosedError):
            waiting.result()


# ---- becoming a client -----------------------------------------------------------------------------------


def test_a_guest_that_waits_becomes_a_client_when_a_slot_is_free() -> None:
    with transit() as (files, writer, reader), guest_of(files, reader) as (guest, free_one):
        write(writer, 0)
        waiting = Waiting(lambda: guest.get_many([0, 3], 30))
        wait_until(lambda: writer.ring.segment.wanted(8) == [3])
        free_one()
        wait_until(lambda: not guest.is_guest)
        assert guest.slot >= 0
        write(writer, 3)
        assert records(waiting.result()) == [block(0), block(3)]
        assert guest.segment.stats()["num_guest_reads"] == 1  # of 0, before
        assert guest.segment.get_many(array("Q", [0]), 0, None)[2] is not None  # it can pin
        guest.leave()


# ---- kills -----------------------------------------------------------------------------------------------


def test_a_guest_that_is_killed_leaves_nothing_but_a_want_that_is_met_in_vain() -> None:
    with transit() as (files, writer, reader), full_table(files):
        segment = writer.ring.segment
        clients = segment.clients()

        def wait_for_ever() -> None:
            guest = Ring(files, native.WORKER, (reader.slot, reader.gen))
            assert guest.is_guest
            guest.get_many([5], 60)

        child = in_child(wait_for_ever)
        wait_until(lambda: segment.wanted(8) == [5])
        kill(child)
        assert join(child) == -signal.SIGKILL
        assert (segment.reap(True), segment.clients(), segment.check()) == (0, clients, None)
        write(writer, 5)
        assert (segment.wanted(8), segment.check()) == ([], None)
        write(writer, *range(10, 40))
        assert not is_there(writer, 5)
