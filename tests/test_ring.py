"""Reading the ring of one set: found at once, waited for, or not to be had. Without any prefetcher."""

from __future__ import annotations

import os
import signal
import threading
from array import array

import pytest
from support_sets import in_child, join, kill, put, read, ring_files, wait_until

import shmloader._native as native
from shmloader.errors import DecodeError, MemoryLimitError, ProcessError, ServiceError, WaitTimeoutError
from shmloader.ring import Ring
from shmloader.writer import Writer


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
        assert [bytes(refs.record(i)[:1]) for i in range(len(refs))] == [b"2", b"0", b"1", b"0"]


def test_resident_records_are_not_pinned() -> None:
    with ring_files(transit_bytes=0) as files:
        reader = Ring(files, native.OWNER)
        put(Ring(files, native.SERVICE), 0, b"zero")
        refs = reader.get_many([0], 30)
        assert (refs.pins, refs.pin(0), reader.segment.pinned_bytes()) == (None, None, 0)
        assert refs.base is reader.mapping


def test_no_ids_are_no_records() -> None:
    with ring_files() as files:
        assert len(Ring(files, native.OWNER).get_many([], 30)) == 0


# ---- waiting ---------------------------------------------------------------------------------------------


def test_a_commit_wakes_the_reader_that_waits_for_it() -> None:
    with ring_files() as files:
        reader, service = Ring(files, native.OWNER), Ring(files, native.SERVICE)
        found: list[bytes] = []
        thread = threading.Thread(target=lambda: found.append(read(reader, 2, 3)))
        thread.start()
        wait_until(lambda: service.segment.wanted(8) == [2])
        put(service, 2, b"two")
        thread.join(30)
        assert found == [b"two"]


def test_a_forked_client_waits_for_what_another_process_commits() -> None:
    with ring_files() as files:
        service, owner = Ring(files, native.SERVICE), Ring(files, native.OWNER)

        def work() -> None:
            assert read(Ring(files, native.WORKER, (owner.slot, owner.gen)), 5, 4) == b"five"

        child = in_child(work)
        wait_until(lambda: service.segment.wanted(8) == [5])
        put(service, 5, b"five")
        assert join(child) == 0


def test_only_the_missing_rows_of_a_batch_are_wanted() -> None:
    with ring_files() as files:
        reader, service = Ring(files, native.OWNER), Ring(files, native.SERVICE)
        put(service, 3, b"x")
        reader.segment.get_many(array("Q", [1, 3, 6]), native.GET_POST, None)
        assert sorted(service.segment.wanted(8)) == [1, 6]


def test_what_a_service_has_claimed_is_not_wanted_of_others() -> None:
    with ring_files() as files:
        reader, service = Ring(files, native.OWNER), Ring(files, native.SERVICE)
        reader.segment.get_many(array("Q", [1, 6]), native.GET_POST, None)
        assert Writer(service).claim([1]) == [1]
        assert service.segment.wanted(8) == [6]


def test_a_reader_that_gives_up_withdraws_its_wants() -> None:
    with ring_files() as files:
        reader, service = Ring(files, native.OWNER), Ring(files, native.SERVICE)
        with pytest.raises(WaitTimeoutError):
            reader.get_many([1, 2], 0.2)
        assert service.segment.wanted(8) == []


def test_a_reader_that_is_interrupted_withdraws_its_wants() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with ring_files() as files:
        reader, service = Ring(files, native.OWNER), Ring(files, native.SERVICE)
        with pytest.raises(KeyboardInterrupt):
            reader.get_many([1, 2], 30, interrupt)
        assert service.segment.wanted(8) == []


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

        def tick() -> None:  # at least every 100 ms, so 15 take longer than the timeout only if nothing moves
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
    num = 3 * native.MAX_WANTS
    with ring_files(num_rows=num, rows_per_chunk=100) as files:
        reader, service = Ring(files, native.OWNER), Ring(files, native.SERVICE)
        got: list[int] = []
        thread = threading.Thread(target=lambda: got.append(len(reader.get_many(list(range(num)), 30))))
        thread.start()
        wait_until(lambda: service.segment.wanted(num))
        for row in reversed(range(num)):
            put(service, row, b"x")
        thread.join(30)
        assert got == [num]


def test_a_worker_whose_training_process_is_gone_does_not_wait() -> None:
    with ring_files() as files:
        worker = Ring(files, native.WORKER)
        with pytest.raises(ServiceError, match="training process"):
            worker.get_many([0], 5)


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


# ---- rows that cannot be had -----------------------------------------------------------------------------


def test_a_bad_row_raises_its_own_error_and_others_are_read() -> None:
    with ring_files() as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)
        put(service, 0, b"good")
        Writer(service).put_error(1, DecodeError("no picture", shard="s", row=1))
        assert read(reader, 0, 4) == b"good"
        with pytest.raises(DecodeError, match="no picture") as caught:
            reader.get_many([0, 1], 30)
        assert (caught.value.shard, caught.value.row) == ("s", 1)


def test_a_bad_row_raises_though_others_of_its_batch_are_missing() -> None:
    with ring_files() as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)
        Writer(service).put_error(1, ProcessError("bad"))
        with pytest.raises(ProcessError):
            reader.get_many([0, 1], 30)
        assert service.segment.wanted(8) == []


def test_a_broken_chunk_raises_the_error_of_whoever_read_it() -> None:
    with ring_files(num_rows=8, rows_per_chunk=4) as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)
        assert service.segment.chunk_claim(0) == 0
        Writer(service).put_error(native.CHUNK_ERROR | 0, ServiceError("cannot read it", role="prefetcher"))
        service.segment.chunk_end(0, native.FETCH_BROKEN)
        with pytest.raises(ServiceError, match="cannot read it"):
            reader.get_many([3], 30)


def test_rows_of_a_broken_chunk_that_came_before_it_broke_are_read() -> None:
    with ring_files(num_rows=8, rows_per_chunk=4) as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)
        assert service.segment.chunk_claim(0) == 0
        put(service, 2, b"two")
        service.segment.chunk_end(0, native.FETCH_BROKEN)
        assert read(reader, 2, 3) == b"two"


def test_a_chunk_whose_clients_die_three_times_is_set_aside_and_named() -> None:
    with ring_files(num_rows=8, rows_per_chunk=4) as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)

        def work() -> None:
            assert Ring(files, native.SERVICE).segment.chunk_claim(0) == 0
            kill(os.getpid())

        for _ in range(native.MAX_ATTEMPTS):
            assert join(in_child(work)) == -signal.SIGKILL
            service.segment.reap(True)
        with pytest.raises(ServiceError, match=r"the row 2 cannot be read.*3 prefetch processes") as caught:
            reader.get_many([2], 30, None, lambda row: f"the row {row}")
        assert (caught.value.row, caught.value.chunk) == (2, 0)
        assert service.segment.chunk_claim(1) == 0


@pytest.mark.parametrize("transit_bytes", [0, 64 << 10])
def test_a_row_that_kills_three_claimants_is_named_and_its_neighbours_are_read(transit_bytes: int) -> None:
    with ring_files(num_rows=8, rows_per_chunk=4, transit_bytes=transit_bytes) as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)

        def work() -> None:
            assert Writer(Ring(files, native.SERVICE)).claim([2]) == [2]
            kill(os.getpid())

        for _ in range(native.MAX_ATTEMPTS):
            assert join(in_child(work)) == -signal.SIGKILL
            service.segment.reap(True)
        put(service, 1, b"one")
        put(service, 3, b"three")
        with pytest.raises(ServiceError, match=r"the row 2 cannot be processed.*3 prefetch processes") as caught:
            reader.get_many([1, 2, 3], 30, None, lambda row: f"the row {row}")
        assert (caught.value.row, caught.value.role) == (2, "prefetcher")
        assert (read(reader, 1, 3), read(reader, 3, 5)) == (b"one", b"three")
        stats = service.segment.stats()
        assert (stats["num_aside"], stats["num_suspect"], stats["num_ready"]) == (1, 0, 2)
        assert service.segment.check() is None


def test_a_reader_that_waits_for_a_row_that_kills_is_told() -> None:
    with ring_files() as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)
        found: list[BaseException] = []

        def get() -> None:
            try:
                reader.get_many([0, 2], 30)
            except ServiceError as error:
                found.append(error)

        thread = threading.Thread(target=get)
        thread.start()
        wait_until(lambda: sorted(service.segment.wanted(8)) == [0, 2])
        for _ in range(native.MAX_ATTEMPTS):
            join(in_child(lambda: Writer(Ring(files, native.SERVICE)).claim([2]) and kill(os.getpid())))
            service.segment.reap(True)
        thread.join(30)
        assert [error.row for error in found] == [2]
        assert service.segment.wanted(8) == []


# ---- errors that end all -----------------------------------------------------------------------------------


def test_a_fatal_error_reaches_the_waiting_reader_and_the_first_one_wins() -> None:
    with ring_files() as files:
        service, reader = Writer(Ring(files, native.SERVICE)), Ring(files, native.OWNER)
        service.put_fatal(MemoryLimitError("no memory", needed_bytes=5, have_bytes=1, limit="cgroup"))
        service.put_fatal(ServiceError("later"))
        with pytest.raises(MemoryError, match="no memory") as caught:
            reader.get_many([0], 30)
        assert caught.value.limit == "cgroup"


def test_rows_that_are_there_are_read_after_a_fatal_error() -> None:
    with ring_files() as files:
        service, reader = Writer(Ring(files, native.SERVICE)), Ring(files, native.OWNER)
        put(service, 0, b"here")
        service.put_fatal(ServiceError("no more"))
        assert read(reader, 0, 4) == b"here"


@pytest.mark.parametrize("text", ["ä" * 20_000, "\N{GRINNING FACE}" * 20_000, "\0" * 20_000, "\ud800" * 20_000])
def test_a_fatal_error_with_a_long_message_is_cut_and_not_lost(text: str) -> None:
    with ring_files() as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)
        Writer(service).put_fatal(ServiceError("begin " + text, role="prefetcher", output=text))
        with pytest.raises(ServiceError, match="begin "):
            reader.get_many([0], 30)
