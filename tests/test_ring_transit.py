"""Reading records that give way to others: what is pinned stays, what is not makes room, and nobody is in the way."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from support_sets import in_child, join, kill, put, read, wait_until
from support_transit import BLOCK, NUM_ROWS, block, is_there, transit, write

import shmloader._native as native
from shmloader.errors import DecodeError, ServiceError, WaitTimeoutError
from shmloader.ring import Refs, Ring
from shmloader.writer import NoRoom, Writer


def records(refs: Refs) -> list[bytes]:
    return [bytes(refs.record(i)) for i in range(len(refs))]


@contextmanager
def served(writer: Writer) -> Iterator[None]:
    """A thread that makes what is waited for, as prefetchers do."""
    done, failures, segment = threading.Event(), [], writer.ring.segment

    def serve() -> None:
        try:
            while not done.is_set():
                seen = segment.work_word()
                for row in writer.claim(sorted(set(segment.wanted(NUM_ROWS)))):
                    try:
                        put(writer, row, block(row), urgent=True)
                    except NoRoom:
                        writer.unclaim([row])
                segment.work_wait(seen, 50)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(30)
        assert failures == []


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


# ---- pins ------------------------------------------------------------------------------------------------


def test_a_record_stays_as_long_as_its_refs_live() -> None:
    with transit() as (_, writer, reader):
        write(writer, 0, 1)
        refs = reader.get_many([0], 30)
        assert (refs.base, reader.segment.pinned_bytes()) == (reader.mapping, BLOCK)
        write(writer, *range(2, 40))
        assert (is_there(writer, 0), is_there(writer, 1)) == (True, False)
        assert records(refs) == [block(0)]


def test_a_record_stays_as_long_as_a_view_of_it_lives() -> None:
    with transit() as (_, writer, reader):
        write(writer, 0, 1)
        refs = reader.get_many([0, 1], 30)
        view = refs.record(1)
        del refs
        write(writer, *range(2, 40))
        assert bytes(view) == block(1)
        del view
        write(writer, *range(40, 50))
        assert not is_there(writer, 1)


def test_a_pin_of_one_record_keeps_that_one_alone() -> None:
    with transit() as (_, writer, reader):
        write(writer, 0, 1, 2)
        refs = reader.get_many([0, 1, 2], 30)
        pin = refs.pin(1)
        assert reader.segment.pinned_bytes() == 3 * BLOCK
        del refs
        assert (pin is None, reader.segment.pinned_bytes()) == (False, BLOCK)
        write(writer, *range(3, 40))
        assert [is_there(writer, row) for row in (0, 1, 2)] == [False, True, False]


def test_what_is_let_go_gives_way_and_is_made_again() -> None:
    with transit(num_blocks=2) as (_, writer, reader):
        write(writer, 0, 1)
        refs = reader.get_many([0], 30)
        del refs
        write(writer, 2, 3)
        assert reader.segment.get_many(array("Q", [0, 1]), 0, None)[1] == 2
        write(writer, 0)
        assert read(reader, 0, BLOCK) == block(0)
        assert writer.ring.segment.stats()["num_evicted"] == 3


def test_a_row_that_comes_twice_in_a_batch_is_pinned_until_the_last_use_ends() -> None:
    with transit() as (_, writer, reader):
        write(writer, 0, 1)
        refs = reader.get_many([0, 1, 0, 0], 30)
        assert (records(refs), reader.segment.pinned_bytes()) == ([block(i) for i in (0, 1, 0, 0)], 2 * BLOCK)
        pin = refs.pin(2)
        del refs
        write(writer, *range(2, 40))
        assert (is_there(writer, 0), is_there(writer, 1)) == (True, False)
        del pin
        assert reader.segment.pinned_bytes() == 0


def test_a_row_that_two_readers_have_stays_until_both_let_go() -> None:
    with transit() as (files, writer, reader):
        other = Ring(files, native.WORKER, (reader.slot, reader.gen))
        write(writer, 0)
        first, second = reader.get_many([0], 30), other.get_many([0], 30)
        del first
        write(writer, *range(1, 20))
        assert records(second) == [block(0)]
        del second
        write(writer, *range(20, 40))
        assert not is_there(writer, 0)


def test_views_of_a_reader_that_left_stay_valid() -> None:
    with transit() as (_, writer, reader):
        write(writer, 0)
        view = reader.get_many([0], 30).record(0)
        reader.leave()
        write(writer, *range(1, 40))
        assert bytes(view) == block(0)
        del view
        write(writer, *range(40, 50))
        assert not is_there(writer, 0)
        assert writer.ring.segment.check() is None


# ---- batches of which something is missing -----------------------------------------------------------------


def waiting(
    reader: Ring, rows: Sequence[int], writer: Writer, missing: set[int], num_ticks: int = 1
) -> tuple[list[Refs], threading.Thread]:
    """A thread that reads ``rows``, once it has waited for so many ticks for those of them that are missing."""
    found: list[Refs] = []
    ticks: list[int] = []
    thread = in_thread(lambda: found.append(reader.get_many(rows, 30, lambda: ticks.append(0))))
    wait_until(lambda: len(ticks) >= num_ticks)
    assert set(writer.ring.segment.wanted(NUM_ROWS)) == missing
    return found, thread


def test_a_batch_keeps_in_place_what_it_found_while_the_rest_comes() -> None:
    with transit(num_blocks=16) as (_, writer, reader):
        write(writer, 0, 1)
        found, thread = waiting(reader, [0, 40, 1], writer, {40}, num_ticks=3)
        assert reader.segment.pinned_bytes() == 0
        write(writer, *range(2, 34))
        assert is_there(writer, 0)
        assert is_there(writer, 1)
        write(writer, 40)
        thread.join(30)
        assert found[0].base is reader.mapping
        assert records(found[0]) == [block(0), block(40), block(1)]


def test_a_batch_that_is_in_the_way_of_what_it_waits_for_is_copied() -> None:
    with transit(num_blocks=2) as (_, writer, reader):
        write(writer, 0, 1)
        found, thread = waiting(reader, [1, 40, 0], writer, {40})
        with pytest.raises(NoRoom):
            writer.reserve(40, BLOCK)
        assert (is_there(writer, 0), is_there(writer, 1)) == (True, True)
        with served(writer):
            thread.join(30)
        assert found[0].base is not reader.mapping
        assert (found[0].pins, reader.segment.pinned_bytes()) == (None, 0)
        assert records(found[0]) == [block(1), block(40), block(0)]


def test_a_batch_that_is_in_the_way_of_others_is_copied() -> None:
    with transit(num_blocks=2) as (files, writer, reader):
        write(writer, 0, 1)
        found, thread = waiting(reader, [0, 1, 40], writer, {40})
        other = Ring(files, native.WORKER, (reader.slot, reader.gen))
        with served(writer):
            assert read(other, 50, BLOCK) == block(50)
            thread.join(30)
        assert records(found[0]) == [block(0), block(1), block(40)]
        assert found[0].base is not reader.mapping


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_a_batch_larger_than_transit_is_read(num_blocks: int) -> None:
    rows = [*range(0, 40, 3), 7, 7, 0]
    with transit(num_blocks) as (_, writer, reader), served(writer):
        refs = reader.get_many(rows, 30)
        assert records(refs) == [block(row) for row in rows]
        assert reader.segment.pinned_bytes() == 0
        del refs


def test_copies_are_the_readers_own() -> None:
    with transit(num_blocks=2) as (_, writer, reader), served(writer):
        refs = reader.get_many([0, 1, 2, 3], 30)
        for row in range(10, 30):
            assert read(reader, row, BLOCK) == block(row)
        assert records(refs) == [block(row) for row in range(4)]


# ---- more than a fair share ------------------------------------------------------------------------------


def test_who_holds_more_than_its_share_gets_copies() -> None:
    with transit() as (_, writer, reader):
        write(writer, *range(8))
        held = reader.get_many([0, 1, 2], 30)
        over = reader.get_many([3, 4], 30)
        assert (held.base is reader.mapping, over.base is reader.mapping) == (True, False)
        assert (records(held), records(over)) == ([block(i) for i in (0, 1, 2)], [block(3), block(4)])
        assert reader.segment.pinned_bytes() == 3 * BLOCK
        del held
        assert reader.get_many([3, 4], 30).base is reader.mapping


def test_a_batch_larger_than_the_share_is_copied() -> None:
    with transit() as (_, writer, reader):
        write(writer, *range(8))
        refs = reader.get_many(list(range(8)), 30)
        assert refs.base is not reader.mapping
        assert (records(refs), reader.segment.pinned_bytes()) == ([block(i) for i in range(8)], 0)


def test_readers_divide_what_may_be_pinned() -> None:
    with transit() as (files, writer, reader):
        write(writer, *range(8))
        assert reader.get_many([0, 1, 2, 3], 30).base is reader.mapping
        other = Ring(files, native.WORKER, (reader.slot, reader.gen))
        assert reader.get_many([0, 1, 2], 30).base is not reader.mapping
        assert other.get_many([0, 1], 30).base is other.mapping


def test_views_that_are_hoarded_for_ever_stop_nobody() -> None:
    with transit() as (files, writer, reader):
        other = Ring(files, native.WORKER, (reader.slot, reader.gen))
        hoard = []
        with served(writer):
            for row in range(NUM_ROWS):
                hoard.append(reader.get_many([row], 30).record(0))
                assert read(other, NUM_ROWS - 1 - row, BLOCK) == block(NUM_ROWS - 1 - row)
        assert [bytes(view) for view in hoard] == [block(row) for row in range(NUM_ROWS)]
        assert 0 < reader.segment.pinned_bytes() <= 4 * BLOCK


# ---- errors, ends ----------------------------------------------------------------------------------------


def test_an_error_in_transit_is_raised_and_not_kept() -> None:
    with transit() as (_, writer, reader):
        write(writer, 0)
        writer.put_error(1, DecodeError("no picture", row=1))
        with pytest.raises(DecodeError, match="no picture") as caught:
            reader.get_many([0, 1], 30)
        assert caught.value.row == 1
        del caught
        gc.collect()
        assert reader.segment.pinned_bytes() == 0
        write(writer, *range(2, 40))
        assert not is_there(writer, 1)


def test_the_reason_of_a_broken_chunk_outlives_what_is_in_transit() -> None:
    with transit(num_blocks=4) as (_, writer, reader):
        assert writer.ring.segment.chunk_claim(1) == 0
        writer.put_error(native.CHUNK_ERROR | 1, ServiceError("cannot read it", role="prefetcher"))
        writer.ring.segment.chunk_end(1, native.FETCH_BROKEN)
        write(writer, *range(30, 60))
        with pytest.raises(ServiceError, match="cannot read it"):
            reader.get_many([8], 30)


def test_a_reader_that_gives_up_keeps_nothing() -> None:
    with transit(num_blocks=2) as (_, writer, reader):
        write(writer, 0, 1)
        with pytest.raises(WaitTimeoutError, match=r"row 9 did not arrive.*1 of 3 samples are missing") as caught:
            reader.get_many([0, 9, 1], 0.2, None, lambda row: f"row {row}")
        assert caught.value.row == 9
        del caught
        gc.collect()
        assert (writer.ring.segment.wanted(8), reader.segment.pinned_bytes()) == ([], 0)
        write(writer, 2, 3)
        assert not is_there(writer, 0)


def test_pins_of_a_killed_reader_are_given_back() -> None:
    with transit() as (files, writer, reader):
        write(writer, 0, 1)

        def work() -> None:
            refs = Ring(files, native.WORKER, (reader.slot, reader.gen)).get_many([0], 30)
            os.kill(os.getpid(), signal.SIGSTOP)
            assert refs

        child = in_child(work)
        os.waitpid(child, os.WUNTRACED)
        write(writer, *range(2, 20))
        assert is_there(writer, 0)
        kill(child)
        assert join(child) == -signal.SIGKILL
        assert writer.ring.segment.reap(True) == 1
        write(writer, *range(20, 40))
        assert not is_there(writer, 0)
        assert writer.ring.segment.check() is None


def test_a_forked_child_gives_no_pins_of_its_parent_back() -> None:
    with transit() as (_, writer, reader):
        write(writer, 0)
        held = [reader.get_many([0], 30)]
        view = held[0].record(0)

        def work() -> None:
            held.clear()
            gc.collect()

        assert join(in_child(work)) == 0
        held.clear()
        write(writer, *range(1, 40))
        assert bytes(view) == block(0)


def test_two_threads_of_a_reader_each_get_their_rows_while_others_take_their_place() -> None:
    seed, num_rounds = 7, 150
    failures: list[str] = []
    with transit() as (_, writer, reader):

        def work(name: int) -> None:
            rng, kept = random.Random(seed + name), []
            for _ in range(num_rounds):
                rows = rng.choices(range(NUM_ROWS), k=rng.randrange(1, 6))
                refs = reader.get_many(rows, 30)
                kept = [*kept[-1:], (rows, refs)]
                for asked, got in kept:
                    if records(got) != [block(row) for row in asked]:
                        failures.append(f"{asked} in thread {name}, seed {seed}")

        with served(writer):
            threads = [in_thread(lambda name=name: work(name)) for name in range(2)]
            for thread in threads:
                thread.join(60)
        gc.collect()
        assert failures == []
        assert reader.segment.pinned_bytes() == 0
        stats = writer.ring.segment.stats()
        assert (stats["num_reserved"], stats["num_claimed"]) == (0, 0)
        assert writer.ring.segment.check() is None
