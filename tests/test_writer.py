"""The services' side of a ring: claims, reservations, memory, and errors as records."""

from __future__ import annotations

import os
import signal
from array import array
from collections.abc import Callable
from typing import Any

import pytest
from support_sets import in_child, join, kill, put, ring_files

import shmloader._native as native
from shmloader.errors import (
    DecodeError,
    MemoryLimitError,
    PoisonedError,
    ProcessError,
    RecordTooLargeError,
    RingTooSmallError,
)
from shmloader.files import RingFiles
from shmloader.ring import Ring
from shmloader.writer import NoRoom, Writer

TIB = 1 << 40


def writer_of(files: RingFiles) -> Writer:
    return Writer(Ring(files, native.SERVICE))


def dies_after(files: RingFiles, work: Callable[[Writer], Any]) -> None:
    """Have a service do ``work`` and be killed over it; it is buried then."""

    def do() -> None:
        work(writer_of(files))
        kill(os.getpid())

    assert join(in_child(do)) == -signal.SIGKILL
    assert writer_of(files).ring.segment.reap(True) == 1


def look(writer: Writer, *rows: int) -> list[int]:
    return list(writer.ring.segment.look(array("Q", rows), None))


# ---- claims ----------------------------------------------------------------------------------------------


def test_a_row_is_claimed_by_one_and_given_back() -> None:
    with ring_files() as files:
        one, other = writer_of(files), writer_of(files)
        assert one.claim([1, 2, 3]) == [1, 2, 3]
        assert other.claim([2, 3, 4]) == [4]
        one.unclaim([1, 2, 3])
        assert other.claim([2, 3]) == [2, 3]
        assert other.ring.segment.check() is None


def test_what_is_there_is_not_claimed() -> None:
    with ring_files() as files:
        writer = writer_of(files)
        put(writer, 1, b"one")
        writer.put_error(2, DecodeError("bad"))
        assert writer.claim([0, 1, 2]) == [0]


def test_a_claimed_row_is_reserved_by_its_claimant_only() -> None:
    with ring_files() as files:
        one, other = writer_of(files), writer_of(files)
        one.claim([1])
        assert other.reserve(1, 10) is None
        assert one.reserve(1, 10) is not None


def test_claims_of_others_and_of_what_was_reserved_are_not_given_back() -> None:
    with ring_files() as files:
        one, other = writer_of(files), writer_of(files)
        one.claim([1, 2])
        ticket = one.reserve(1, 10)
        assert ticket is not None
        other.unclaim([1, 2])
        one.unclaim([1])
        assert other.claim([1, 2]) == []
        one.commit(ticket)


def test_a_row_over_which_a_service_died_is_had_alone() -> None:
    with ring_files() as files:
        writer = writer_of(files)
        dies_after(files, lambda other: other.claim([1, 2]))
        assert look(writer, 1, 2, 3) == [native.ROW_SUSPECT, native.ROW_SUSPECT, native.ROW_MISSING]
        assert writer.claim([1, 2, 3]) == [3]
        assert writer.claim([1]) == [1]
        assert writer.claim([1]) == []
        assert writer.claim([2]) == [2]


def test_a_row_that_was_made_in_the_end_is_no_suspect_any_more() -> None:
    with ring_files(resident_bytes=0, transit_bytes=4096) as files:
        writer = writer_of(files)
        for _ in range(native.MAX_ATTEMPTS - 1):
            dies_after(files, lambda other: other.claim([1]))
        put(writer, 1, bytes(4096))
        put(writer, 2, bytes(4096))  # takes its place
        dies_after(files, lambda other: other.claim([1]))
        assert look(writer, 1) == [native.ROW_SUSPECT]


def test_a_service_that_leaves_gives_its_claims_back_without_suspicion() -> None:
    with ring_files() as files:
        one, other = writer_of(files), writer_of(files)
        one.claim([1, 2])
        one.ring.leave()
        assert other.claim([1, 2]) == [1, 2]


def test_a_chunk_is_claimed_by_one() -> None:
    with ring_files(num_rows=8, rows_per_chunk=4) as files:
        one, other = Ring(files, native.SERVICE).segment, Ring(files, native.SERVICE).segment
        assert one.chunk_claim(0) == 0
        assert other.chunk_claim(0) == native.STALE
        assert other.chunk_claim(1) == 0
        one.chunk_end(0, native.FETCH_GIVEN_UP)
        assert other.chunk_claim(0) == 0


def test_chunks_of_a_unit_are_for_the_one_that_reads_it() -> None:
    with ring_files(num_rows=12, rows_per_chunk=4, units=[0, 0, 2]) as files:
        one, other = Ring(files, native.SERVICE).segment, Ring(files, native.SERVICE).segment
        assert one.chunk_claim(0) == 0
        assert other.chunk_claim(1) == native.STALE
        assert other.chunk_claim(2) == 0
        one.chunk_end(0, native.FETCH_OK)
        assert one.chunk_claim(1) == 0


def test_chunks_that_are_waited_for_are_told_with_how_many_rows() -> None:
    with ring_files(num_rows=40, rows_per_chunk=10) as files:
        reader, service = Ring(files, native.OWNER), Ring(files, native.SERVICE)
        reader.segment.get_many(array("Q", [5, 25, 26]), native.GET_POST, None)
        assert sorted(service.segment.chunks_wanted(8)) == [(0, 1), (2, 2)]


def test_reaping_a_killed_client_frees_its_reservation_and_its_chunk() -> None:
    with ring_files() as files:
        writer = writer_of(files)

        def work(other: Writer) -> None:
            assert other.ring.segment.chunk_claim(0) == 0
            assert other.reserve(0, 100) is not None

        dies_after(files, work)
        stats = writer.ring.segment.stats()
        names = ("num_reserved", "chunks_claimed", "num_services_lost", "resident_used_bytes")
        assert [stats[name] for name in names] == [0, 0, 1, 0]
        assert writer.ring.segment.chunk_claim(0) == 0
        assert writer.reserve(0, 100) is not None
        assert writer.ring.segment.check() is None


# ---- reservations ----------------------------------------------------------------------------------------


def test_a_row_is_reserved_once() -> None:
    with ring_files() as files:
        writer = writer_of(files)
        assert writer.reserve(1, 10) is not None
        assert writer.reserve(1, 10) is None


def test_an_aborted_reservation_can_be_made_again() -> None:
    with ring_files() as files:
        writer = writer_of(files)
        ticket = writer.reserve(1, 10)
        assert ticket is not None
        writer.abort(ticket)
        assert writer.reserve(1, 10) is not None
        assert writer.ring.segment.check() is None


def test_a_commit_of_an_aborted_reservation_is_an_error() -> None:
    with ring_files() as files:
        writer = writer_of(files)
        ticket = writer.reserve(1, 10)
        assert ticket is not None
        writer.abort(ticket)
        with pytest.raises(PoisonedError):
            writer.commit(ticket)


def test_where_nothing_can_give_way_there_is_no_room_until_it_can() -> None:
    with ring_files(resident_bytes=0, transit_bytes=4096) as files:
        writer = writer_of(files)
        ticket = writer.reserve(0, 4096)
        assert ticket is not None
        seen = writer.ring.segment.work_word()
        for urgent in (False, True):
            with pytest.raises(NoRoom):
                writer.reserve(1, 4096, urgent=urgent)
        writer.commit(ticket)
        assert writer.ring.segment.work_word() != seen
        assert writer.reserve(1, 4096) is not None


def test_what_an_order_will_come_to_gives_way_only_to_what_is_urgent() -> None:
    with ring_files(num_rows=8, resident_bytes=0, transit_bytes=8192) as files:
        writer, reader = writer_of(files), Ring(files, native.OWNER)
        order, gen = reader.segment.order_begin(0, 0, 8, 0, 0, 1, False)
        put(writer, 0, bytes(4096), (order, gen, 1))
        put(writer, 1, bytes(4096), (order, gen, 2))
        with pytest.raises(NoRoom):
            writer.reserve(2, 4096)
        assert reader.get_many([0], 30, place=(order, gen, 0, 1)).place(0)[1] == 4096  # and read: it is past it
        put(writer, 2, bytes(4096), (order, gen, 3))
        assert look(writer, 0, 1, 2) == [native.ROW_MISSING, native.ROW_TRANSIT, native.ROW_TRANSIT]
        put(writer, 5, bytes(4096), urgent=True)
        assert look(writer, 5) == [native.ROW_TRANSIT]


def test_what_is_urgent_takes_the_place_of_what_nobody_needs_before_that_of_what_an_order_will_come_to() -> None:
    with ring_files(resident_bytes=0, transit_bytes=8192) as files:
        writer, reader = writer_of(files), Ring(files, native.OWNER)
        begun = reader.segment.order_begin(1, 0, 100, 0, 0, 1, False)
        assert isinstance(begun, tuple)
        put(writer, 0, bytes(4096), stamp=(*begun, 5))  # where a search begins
        put(writer, 1, bytes(4096))
        put(writer, 2, bytes(4096), urgent=True)
        states = writer.ring.segment.look(array("Q", [0, 1, 2]), None)
        assert list(states) == [native.ROW_TRANSIT, native.ROW_MISSING, native.ROW_TRANSIT]


# ---- memory ----------------------------------------------------------------------------------------------


def test_the_ring_is_backed_as_it_fills() -> None:
    with ring_files(num_rows=8, resident_bytes=160 << 20) as files:
        writer = writer_of(files)

        def backed() -> int:
            return writer.ring.segment.stats()["resident_backed_bytes"]

        before = backed()
        assert writer.reserve(0, 40 << 20) is not None
        middle = backed()
        assert writer.reserve(1, 40 << 20) is not None
        assert before < middle < backed() < 160 << 20


def test_a_service_that_finds_the_ring_extended_by_another_does_not_extend_it_again() -> None:
    with ring_files(num_rows=8, resident_bytes=256 << 20) as files:
        one, other = writer_of(files), writer_of(files)

        class Late:
            """The other one's reservation, made between a reservation that needs more memory and its extension."""

            def __init__(self, segment: Any) -> None:
                self._segment, self.is_first = segment, True

            def __getattr__(self, name: str) -> Any:
                return getattr(self._segment, name)

            def reserve(self, *args: Any) -> Any:
                result = self._segment.reserve(*args)
                if result[0] == native.EXTEND and self.is_first:
                    self.is_first = False
                    assert other.reserve(7, 1000) is not None
                return result

        one._segment = late = Late(one._segment)  # type: ignore[assignment]
        assert one.reserve(0, 1000) is not None
        assert not late.is_first
        assert one.ring.segment.stats()["resident_backed_bytes"] == 64 << 20


class Refusing:
    """A segment whose memory is refused."""

    def __init__(self, segment: Any) -> None:
        self._segment = segment

    def __getattr__(self, name: str) -> Any:
        return getattr(self._segment, name)

    def back(self, ring_fd: int, region: int, need_end: int) -> tuple[int, int, str]:
        return native.MEMORY, 12345, "/sys/fs/cgroup/job"


def test_refused_memory_names_need_have_and_what_limits() -> None:
    with ring_files(num_rows=10) as files:
        writer = writer_of(files)
        writer._segment = Refusing(writer._segment)  # type: ignore[assignment]
        with pytest.raises(MemoryLimitError, match=r"about 10,000 bytes.*12,345.*/sys/fs/cgroup/job") as caught:
            writer.reserve(0, 1000)
        assert caught.value.needed_bytes == 10_000
        assert caught.value.limit == "/sys/fs/cgroup/job"
        assert isinstance(caught.value, MemoryError)


def test_a_reader_that_waits_is_told_of_refused_memory() -> None:
    with ring_files() as files:
        writer, reader = writer_of(files), Ring(files, native.OWNER)
        writer._segment = Refusing(writer._segment)  # type: ignore[assignment]
        with pytest.raises(MemoryLimitError) as refused:
            writer.put_error(0, DecodeError("?"))
        writer.put_fatal(refused.value)
        with pytest.raises(MemoryLimitError, match="cgroup"):
            reader.get_many([0], 30)


def test_where_memory_for_what_stays_is_refused_samples_go_to_transit_with_a_warning() -> None:
    with ring_files(num_rows=8, rows_per_chunk=8, resident_bytes=4 * TIB, transit_bytes=8192) as files:
        writer = writer_of(files)
        assert writer.ring.segment.chunk_claim(0) == 0
        assert writer.ring.segment.chunk_look(array("I", [0]))[0] & native.CHUNK_STAYS
        with pytest.raises(RecordTooLargeError):  # no machine has that, and transit neither
            writer.reserve(0, TIB)
        put(writer, 1, b"one")
        assert look(writer, 1) == [native.ROW_TRANSIT]
        text = writer.ring.segment.text_get(native.TEXT_MEMORY)
        assert text is not None
        assert all(part in text.decode() for part in ("stays at 0 bytes", "SHMLOADER_RING_BYTES", "each time"))
        assert writer.ring.segment.stats()["resident_frozen"] == 1


def test_where_memory_for_transit_is_refused_what_has_memory_is_used_again() -> None:
    with ring_files(num_rows=8, resident_bytes=0, transit_bytes=4 * TIB) as files:
        writer = writer_of(files)
        put(writer, 0, b"zero")
        with pytest.raises(MemoryLimitError, match=r"has 67,108,864 and cannot grow") as caught:
            writer.reserve(1, TIB)
        assert caught.value.have_bytes == 64 << 20
        for row in (2, 3, 4):
            ticket = writer.reserve(row, 30 << 20)
            assert ticket is not None
            writer.commit(ticket)
        assert look(writer, 0, 1, 2, 3, 4).count(native.ROW_TRANSIT) == 2
        assert writer.ring.segment.stats()["transit_frozen"] == 1
        assert writer.ring.segment.text_get(native.TEXT_MEMORY) is None


# ---- what does not fit -----------------------------------------------------------------------------------


def test_without_transit_a_full_ring_names_the_bytes_needed_and_the_variable() -> None:
    with ring_files(num_rows=8, resident_bytes=4096) as files:
        writer = writer_of(files)
        put(writer, 0, bytes(2048))
        put(writer, 1, bytes(2048))
        with pytest.raises(RingTooSmallError, match=r"16,384 bytes.*4,096.*SHMLOADER_RING_BYTES=1MiB") as caught:
            writer.reserve(2, 2048)
        assert (caught.value.needed_bytes, caught.value.have_bytes) == (8 * 2048, 4096)


@pytest.mark.parametrize(("resident_bytes", "transit_bytes"), [(4096, 0), (8192, 4096), (0, 4096)])
def test_a_record_larger_than_its_room_names_both_sizes_and_the_variable(
    resident_bytes: int, transit_bytes: int
) -> None:
    with ring_files(resident_bytes=resident_bytes, transit_bytes=transit_bytes) as files:
        writer = writer_of(files)
        with pytest.raises(RecordTooLargeError, match=r"10,000 bytes.*4,096.*SHMLOADER_RING_BYTES") as caught:
            writer.reserve(0, 10_000)
        assert (caught.value.needed_bytes, caught.value.have_bytes) == (10_000, 4096)
        assert look(writer, 0) == [native.ROW_MISSING]


def test_an_encoded_chunk_larger_than_its_room_names_that_room() -> None:
    with ring_files(transit_bytes=4096, raw_bytes=8192) as files, pytest.raises(RecordTooLargeError) as caught:
        writer_of(files).reserve(native.RAW | 0, 10_000)
    assert caught.value.have_bytes == 8192


# ---- errors as records -----------------------------------------------------------------------------------


def test_an_error_of_a_row_is_a_record_like_others() -> None:
    with ring_files() as files:
        writer = writer_of(files)
        assert writer.claim([0]) == [0]
        writer.put_error(0, DecodeError("bad"))
        writer.put_error(0, DecodeError("again"))
        stats = writer.ring.segment.stats()
        assert (stats["num_errors"], stats["num_ready"], stats["num_claimed"]) == (1, 0, 0)
        assert look(writer, 0) == [native.ROW_FINAL]


def test_the_error_of_a_row_does_not_take_more_room_than_a_message_needs() -> None:
    with ring_files() as files:
        writer = writer_of(files)
        writer.put_error(0, ProcessError("x" * (1 << 22), field="x" * (1 << 22)))
        assert writer.ring.segment.stats()["resident_used_bytes"] <= 40_000
