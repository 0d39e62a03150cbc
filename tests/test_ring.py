"""The ring and the control memory of one set, without any prefetcher."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import signal
import threading
from array import array
from typing import Any

import pytest
from support_sets import descriptors, in_child, join, kill, put, read, ring_files, wait_until

import shmloader._native as native
from shmloader.errors import (
    DecodeError,
    MemoryLimitError,
    PoisonedError,
    ProcessError,
    RecordTooLargeError,
    RingFullError,
    ServiceError,
    WaitTimeoutError,
    ring_full,
)
from shmloader.ring import PAGE, Ring, RingFiles, memory_limits


class Refusing:
    """A segment whose memory is refused."""

    def __init__(self, segment: Any) -> None:
        self._segment = segment

    def __getattr__(self, name: str) -> Any:
        return getattr(self._segment, name)

    def back(self, ring_fd: int, need_end: int) -> tuple[int, int, str]:
        return native.MEMORY, 12345, "/sys/fs/cgroup/job"


def test_a_committed_record_is_read_by_a_reader_of_the_same_set() -> None:
    with ring_files() as files:
        put(Ring(files, native.SERVICE), 3, b"three")
        assert read(Ring(files, native.OWNER), 3, 5) == b"three"


def test_records_of_a_batch_come_in_the_order_asked_for() -> None:
    with ring_files() as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)
        for row in (0, 1, 2):
            put(service, row, b"%d" % row)
        refs = reader.get_many([2, 0, 1, 0], 30)
        data = [bytes(memoryview(reader.mapping.view(refs.place(i)[0], 1))) for i in range(len(refs))]
        assert data == [b"2", b"0", b"1", b"0"]


def test_a_row_is_reserved_once() -> None:
    with ring_files() as files:
        service = Ring(files, native.SERVICE)
        assert service.reserve(1, 10) is not None
        assert service.reserve(1, 10) is None


def test_an_aborted_reservation_can_be_made_again() -> None:
    with ring_files() as files:
        service = Ring(files, native.SERVICE)
        ticket = service.reserve(1, 10)
        assert ticket is not None
        service.abort(ticket)
        assert service.reserve(1, 10) is not None
        assert service.segment.check() is None


def test_a_commit_of_an_aborted_reservation_is_an_error() -> None:
    with ring_files() as files:
        service = Ring(files, native.SERVICE)
        ticket = service.reserve(1, 10)
        assert ticket is not None
        service.abort(ticket)
        with pytest.raises(PoisonedError):
            service.commit(ticket)


def test_the_ring_is_backed_as_it_fills() -> None:
    with ring_files(num_rows=8, ring_bytes=160 << 20) as files:
        service = Ring(files, native.SERVICE)
        before = service.segment.stats()["backed_bytes"]
        assert service.reserve(0, 40 << 20) is not None
        middle = service.segment.stats()["backed_bytes"]
        assert service.reserve(1, 40 << 20) is not None
        assert before < middle < service.segment.stats()["backed_bytes"] < 160 << 20


def test_a_service_that_finds_the_ring_extended_by_another_does_not_extend_it_again() -> None:
    with ring_files(num_rows=8, ring_bytes=256 << 20) as files:
        one, other = Ring(files, native.SERVICE), Ring(files, native.SERVICE)

        class Late:
            """The other one's reservation, made between a reservation that needs more memory and its extension."""

            def __init__(self, segment: Any) -> None:
                self._segment, self.is_first = segment, True

            def __getattr__(self, name: str) -> Any:
                return getattr(self._segment, name)

            def reserve(self, row: int, num_bytes: int) -> Any:
                result = self._segment.reserve(row, num_bytes)
                if result == native.EXTEND and self.is_first:
                    self.is_first = False
                    assert other.reserve(7, 1000) is not None
                return result

        one.segment = Late(one.segment)  # type: ignore[assignment]
        assert one.reserve(0, 1000) is not None
        assert one.segment.stats()["backed_bytes"] == 64 << 20


def test_a_full_ring_names_the_bytes_needed_and_the_variable() -> None:
    with ring_files(num_rows=8, ring_bytes=4096) as files:
        service = Ring(files, native.SERVICE)
        put(service, 0, bytes(2048))
        put(service, 1, bytes(2048))
        with pytest.raises(RingFullError, match=r"16,384 bytes.*4,096.*SHMLOADER_RING_BYTES=1MiB") as caught:
            service.reserve(2, 2048)
        assert (caught.value.needed_bytes, caught.value.have_bytes) == (8 * 2048, 4096)


def test_a_record_larger_than_the_ring_names_both_sizes_and_the_variable() -> None:
    with ring_files(ring_bytes=4096) as files, pytest.raises(RecordTooLargeError) as caught:
        Ring(files, native.SERVICE).reserve(0, 10_000)
    assert all(text in str(caught.value) for text in ("10,000", "4,096", "SHMLOADER_RING_BYTES"))


def test_refused_memory_names_need_have_and_what_limits() -> None:
    with ring_files(num_rows=10) as files:
        service = Ring(files, native.SERVICE)
        service.segment = Refusing(service.segment)  # type: ignore[assignment]
        with pytest.raises(MemoryLimitError, match=r"about 10,000 bytes.*12,345.*/sys/fs/cgroup/job") as caught:
            service.reserve(0, 1000)
        assert caught.value.needed_bytes == 10_000
        assert caught.value.limit == "/sys/fs/cgroup/job"
        assert isinstance(caught.value, MemoryError)


def test_a_reader_that_waits_is_told_of_refused_memory() -> None:
    with ring_files() as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)
        service.segment = Refusing(service.segment)  # type: ignore[assignment]
        with pytest.raises(MemoryLimitError) as refused:
            service.put_error(0, DecodeError("?"))
        service.put_fatal(refused.value)
        with pytest.raises(MemoryLimitError, match="cgroup"):
            reader.get_many([0], 30)


def test_a_commit_wakes_the_reader_that_waits_for_it() -> None:
    with ring_files() as files:
        reader = Ring(files, native.OWNER)
        service = Ring(files, native.SERVICE)
        found: list[bytes] = []
        thread = threading.Thread(target=lambda: found.append(read(reader, 2, 3)))
        thread.start()
        wait_until(lambda: service.segment.wanted(0, 8) == [2])
        put(service, 2, b"two")
        thread.join(30)
        assert found == [b"two"]


def test_a_forked_client_waits_for_what_another_process_commits() -> None:
    with ring_files() as files:
        service, owner = Ring(files, native.SERVICE), Ring(files, native.OWNER)

        def work() -> None:
            assert read(Ring(files, native.WORKER, (owner.slot, owner.gen)), 5, 4) == b"five"

        child = in_child(work)
        wait_until(lambda: service.segment.wanted(0, 8) == [5])
        put(service, 5, b"five")
        assert join(child) == 0


def test_only_the_missing_rows_of_a_batch_are_wanted() -> None:
    with ring_files() as files:
        reader, service = Ring(files, native.OWNER), Ring(files, native.SERVICE)
        put(service, 3, b"x")
        reader.segment.get_many(array("Q", [1, 3, 6]), True)
        assert sorted(service.segment.wanted(0, 8)) == [1, 6]


def test_a_reader_that_gives_up_withdraws_its_wants() -> None:
    with ring_files() as files:
        reader, service = Ring(files, native.OWNER), Ring(files, native.SERVICE)
        with pytest.raises(WaitTimeoutError):
            reader.get_many([1, 2], 0.2)
        assert service.segment.wanted(0, 8) == []


def test_a_reader_that_is_interrupted_withdraws_its_wants() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with ring_files() as files:
        reader, service = Ring(files, native.OWNER), Ring(files, native.SERVICE)
        with pytest.raises(KeyboardInterrupt):
            reader.get_many([1, 2], 30, interrupt)
        assert service.segment.wanted(0, 8) == []


def test_a_timeout_names_the_row_as_described_and_the_setting() -> None:
    with ring_files() as files:
        reader = Ring(files, native.OWNER)
        with pytest.raises(WaitTimeoutError, match=r"shard 'a', row 1 did not.*SHMLOADER_TIMEOUT_S") as caught:
            reader.get_many([1], 0.2, None, lambda row: f"shard 'a', row {row}")
        assert (caught.value.row, caught.value.waited_s >= 0.2) == (1, True)
        assert isinstance(caught.value, TimeoutError)


def test_a_reader_does_not_time_out_while_others_make_progress() -> None:
    with ring_files(num_rows=2, rows_per_chunk=2) as files:
        reader, service = Ring(files, native.OWNER), Ring(files, native.SERVICE)
        ticks = []

        def tick() -> None:  # at least every 100 ms, so 50 take longer than the timeout only if nothing moves
            ticks.append(0)
            service.segment.touch()
            if len(ticks) == 15:
                put(service, 0, b"late")

        assert len(reader.get_many([0], 0.3, tick)) == 1


def test_many_threads_of_one_client_each_get_their_rows() -> None:
    with ring_files(num_rows=64, rows_per_chunk=64) as files:
        reader, service = Ring(files, native.OWNER), Ring(files, native.SERVICE)
        found: dict[int, bytes] = {}
        threads = [
            threading.Thread(target=lambda row=row: found.update({row: read(reader, row, 2)})) for row in range(16)
        ]
        for thread in threads:
            thread.start()
        for row in reversed(range(16)):
            put(service, row, b"%02d" % row)
        for thread in threads:
            thread.join(30)
        assert found == {row: b"%02d" % row for row in range(16)}


def test_more_wants_than_a_list_holds_are_met() -> None:
    num = 1500
    with ring_files(num_rows=num, rows_per_chunk=100) as files:
        reader, service = Ring(files, native.OWNER), Ring(files, native.SERVICE)
        got: list[int] = []
        thread = threading.Thread(target=lambda: got.append(len(reader.get_many(list(range(num)), 30))))
        thread.start()
        wait_until(lambda: service.segment.wanted(0, num))
        for row in reversed(range(num)):
            put(service, row, b"x")
        thread.join(30)
        assert got == [num]


def test_the_chunk_with_most_wanted_rows_is_claimed_first() -> None:
    with ring_files(num_rows=40, rows_per_chunk=10) as files:
        reader, service = Ring(files, native.OWNER), Ring(files, native.SERVICE)
        reader.segment.get_many(array("Q", [5, 25, 26]), True)
        assert [service.segment.claim() for _ in range(4)] == [2, 0, 1, 3]


def test_chunks_of_a_sequential_source_are_claimed_in_order_one_at_a_time() -> None:
    with ring_files(num_rows=8, rows_per_chunk=4, is_sequential=True) as files:
        reader, service = Ring(files, native.OWNER), Ring(files, native.SERVICE)
        reader.segment.get_many(array("Q", [7]), True)
        assert service.segment.claim() == 0
        assert service.segment.claim() == native.NOTFOUND
        service.segment.finish(0, False)
        assert service.segment.claim() == 1


def test_reaping_a_killed_client_frees_its_reservation_and_its_chunk() -> None:
    with ring_files() as files:
        service = Ring(files, native.SERVICE)
        reader, writer = os.pipe()

        def work() -> None:
            ring = Ring(files, native.SERVICE)
            assert ring.segment.claim() == 0
            assert ring.reserve(0, 100) is not None
            os.write(writer, b"x")
            signal.pause()

        child = in_child(work)
        assert os.read(reader, 1) == b"x"
        os.close(reader)
        os.close(writer)
        stats = service.segment.stats()
        assert (stats["num_reserved"], stats["chunks_claimed"]) == (1, 1)
        kill(child)
        assert join(child) == -signal.SIGKILL
        assert service.segment.reap(True) == 1
        stats = service.segment.stats()
        assert (stats["num_reserved"], stats["chunks_claimed"], stats["num_services_lost"]) == (0, 0, 1)
        assert service.segment.claim() == 0
        assert service.reserve(0, 100) is not None
        assert service.segment.check() is None


def test_a_stopped_client_is_not_reaped() -> None:
    with ring_files() as files:
        service = Ring(files, native.SERVICE)

        def work() -> None:
            Ring(files, native.OWNER)
            os.kill(os.getpid(), signal.SIGSTOP)

        child = in_child(work)
        os.waitpid(child, os.WUNTRACED)
        assert service.segment.reap(True) == 0
        assert service.segment.count(native.OWNER) == 1
        kill(child, sig=signal.SIGCONT)
        assert join(child) == 0


def test_a_chunk_whose_clients_die_three_times_is_set_aside_and_named() -> None:
    with ring_files(num_rows=8, rows_per_chunk=4) as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)
        for _ in range(native.MAX_ATTEMPTS):
            child = in_child(lambda: Ring(files, native.SERVICE).segment.claim() == 0 or os.abort())
            join(child)
            service.segment.reap(True)
        with pytest.raises(ServiceError, match=r"the row 2 cannot be read.*3 prefetch processes") as caught:
            reader.get_many([2], 30, None, lambda row: f"the row {row}")
        assert (caught.value.row, caught.value.chunk) == (2, 0)
        assert service.segment.claim() == 1


def test_a_bad_row_raises_its_own_error_and_others_are_read() -> None:
    with ring_files() as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)
        put(service, 0, b"good")
        service.put_error(1, DecodeError("no picture", shard="s", row=1))
        assert read(reader, 0, 4) == b"good"
        with pytest.raises(DecodeError, match="no picture") as caught:
            reader.get_many([0, 1], 30)
        assert (caught.value.shard, caught.value.row) == ("s", 1)


def test_a_bad_row_raises_though_others_of_its_batch_are_missing() -> None:
    with ring_files() as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)
        service.put_error(1, ProcessError("bad"))
        with pytest.raises(ProcessError):
            reader.get_many([0, 1], 30)
        assert service.segment.wanted(0, 8) == []


def test_a_broken_chunk_raises_the_error_of_whoever_read_it() -> None:
    with ring_files(num_rows=8, rows_per_chunk=4) as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)
        assert service.segment.claim() == 0
        service.put_error(native.CHUNK_ERROR | 0, ServiceError("cannot read it", role="prefetcher"))
        service.segment.finish(0, True)
        with pytest.raises(ServiceError, match="cannot read it"):
            reader.get_many([3], 30)


def test_a_fatal_error_reaches_the_waiting_reader_and_the_first_one_wins() -> None:
    with ring_files() as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)
        service.put_fatal(ring_full(100, 10, 1))
        service.put_fatal(ServiceError("later"))
        with pytest.raises(RingFullError):
            reader.get_many([0], 30)


def test_rows_that_are_there_are_read_after_a_fatal_error() -> None:
    with ring_files() as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)
        put(service, 0, b"here")
        service.put_fatal(ServiceError("no more"))
        assert read(reader, 0, 4) == b"here"


@pytest.mark.parametrize("text", ["ä" * 20_000, "\N{GRINNING FACE}" * 20_000, "\0" * 20_000, "\ud800" * 20_000])
def test_a_fatal_error_with_a_long_message_is_cut_and_not_lost(text: str) -> None:
    with ring_files() as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)
        service.put_fatal(ServiceError("begin " + text, role="prefetcher", output=text))
        with pytest.raises(ServiceError, match="begin "):
            reader.get_many([0], 30)


def test_the_error_of_a_row_does_not_take_more_room_than_a_message_needs() -> None:
    with ring_files() as files:
        service = Ring(files, native.SERVICE)
        service.put_error(0, ProcessError("x" * (1 << 22), field="x" * (1 << 22)))
        assert service.segment.stats()["used_bytes"] <= 40_000


def test_a_reader_cannot_make_its_mapping_writable() -> None:
    with ring_files() as files:
        reader = Ring(files, native.OWNER)
        view = memoryview(reader.mapping.view(0, 4096))
        with open("/proc/self/maps") as maps:  # noqa: PTH123
            lines = [line for line in maps if "memfd:shmloader-ring-" + files.uuid[:8] in line]
        assert [line.split()[1] for line in lines] == ["r--s"]
        address = int(lines[0].split("-")[0], 16)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == -1
        del view


def test_a_forked_child_knows_that_the_attachment_is_not_its_own() -> None:
    with ring_files() as files:
        ring = Ring(files, native.OWNER)
        assert ring.is_home
        assert join(in_child(lambda: os._exit(3 if not ring.is_home else 4))) == 3


def test_a_client_that_left_is_not_counted() -> None:
    with ring_files() as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)
        assert service.segment.count(native.OWNER) == 1
        reader.leave()
        assert service.segment.count(native.OWNER) == 0


def test_a_worker_whose_training_process_is_gone_does_not_wait() -> None:
    with ring_files() as files:
        worker = Ring(files, native.WORKER)
        with pytest.raises(ServiceError, match="training process"):
            worker.get_many([0], 5)


def test_sizes_of_ring_and_control_are_sealed() -> None:
    with ring_files() as files:
        for fd in (files.ring_fd, files.control_fd):
            assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & (fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK) == 6


def test_attaching_before_the_control_is_laid_out_is_an_error() -> None:
    files = RingFiles.create(4096)
    try:
        with pytest.raises((OSError, ValueError, PoisonedError)):
            Ring(files, native.OWNER)
    finally:
        files.close()


def test_files_that_cannot_be_made_leave_no_descriptor() -> None:
    before = descriptors()
    with pytest.raises(OSError, match=r"Invalid argument|too large"):
        RingFiles.create(-PAGE)
    assert descriptors() == before


def test_files_never_take_the_place_of_a_closed_standard_stream() -> None:
    def work() -> None:
        for fd in (0, 1, 2):
            os.close(fd)
        assert min(RingFiles.create(4096).fds) > 2

    assert join(in_child(work)) == 0


def test_memory_limits_name_what_limits() -> None:
    limit, available, what = memory_limits()
    assert limit >= available > 0
    assert what
