"""Workers beyond the table of clients: they read every sample right, wait for what is missing, and leave nothing."""

from __future__ import annotations

import functools
import json
import logging
import signal
import sys
import textwrap
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cloudpickle
import numpy as np
import pytest
from conftest import opened, small_options
from support_guests import full_table
from support_sets import (
    TESTS,
    in_child,
    join,
    kill,
    prefetchers_of,
    put,
    read,
    ring_files,
    run_script,
    wait_until,
    write_numbers,
)
from support_transit import BLOCK, block, is_there, transit, write
from torch.utils.data import DataLoader, RandomSampler

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


class Waiting:
    """A thread that reads; `result` gives what it got, or raises what it raised."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._results: list[Any] = []
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(work,))
        self._thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self._results.append(work())
        except BaseException as error:
            self._errors.append(error)

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self._errors:
            raise self._errors[0]
        return self._results[0]


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


# ---- behind a DataLoader -----------------------------------------------------------------------------------

NUM_ROWS = 400
EVERY_ROW = list(range(NUM_ROWS))
#: A quarter of what the records of `sized` take.
QUARTER = 112 << 10


def sized(row: dict[str, Any]) -> dict[str, Any]:
    """Records of many sizes, which nobody knows before."""
    number = row["number"]
    return {"number": number, "data": np.full(100 + number * 37 % 1900, number % 255 + 1, np.uint8)}


def rows_of(loader: DataLoader[Any]) -> list[int]:
    """The rows of all batches, each of which must hold what belongs to its rows."""
    rows = []
    for batch in loader:
        for number, data in zip(batch["number"].tolist(), batch["data"].numpy(), strict=True):
            expected = sized({"number": number})["data"]
            assert np.array_equal(data[: len(expected)], expected), number
            assert not data[len(expected) :].any()
            rows.append(number)
    return rows


def count_rows(batches: Iterator[Any]) -> int:
    return sum(len(batch["number"]) for batch in batches)


@pytest.fixture(scope="module")
def numbers_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_numbers(tmp_path_factory.mktemp("numbers"), NUM_ROWS)


@contextmanager
def opened_full(path: str, ring_bytes: Any = QUARTER, **arguments: Any) -> Iterator[Any]:
    """A dataset whose table has no slot for a worker."""
    options = small_options(ring_bytes=ring_bytes, prefetchers=2 if ring_bytes == QUARTER else 1)
    with opened(path, process=sized, options=options, **arguments) as dataset:
        if ring_bytes != QUARTER:  # prefetchers leave when all is there, and their slots with them
            wait_until(lambda: dataset.stats().samples_ready == NUM_ROWS and not dataset.stats().prefetchers)
        with full_table(dataset._reader.files.ring):
            yield dataset
        assert dataset._reader.attach().segment.check() is None


@pytest.mark.parametrize("ring_bytes", [QUARTER, "32MiB"], ids=["transit", "all fit"])
@pytest.mark.parametrize("kind", ["random", "sampler"])
def test_guests_of_a_loader_give_every_row_once(numbers_path: str, ring_bytes: Any, kind: str) -> None:
    with opened_full(numbers_path, ring_bytes) as dataset:
        sampler = dataset.sampler(seed=1) if kind == "sampler" else RandomSampler(dataset)
        for epoch in range(2):
            assert sorted(rows_of(DataLoader(dataset, 16, sampler=sampler, num_workers=2))) == EVERY_ROW
            stats = dataset.stats()
            assert stats.guest_reads == stats.samples_read == (epoch + 1) * NUM_ROWS
        assert (stats.commits > NUM_ROWS) == (ring_bytes == QUARTER)


def test_guests_and_clients_of_two_loaders_read_side_by_side(numbers_path: str) -> None:
    with opened(numbers_path, process=sized, options=small_options(ring_bytes=QUARTER, prefetchers=2)) as dataset:
        clients = DataLoader(dataset, 16, sampler=dataset.sampler(seed=1), num_workers=2, persistent_workers=True)
        iterator = iter(clients)  # its workers have slots
        first = next(iterator)
        wait_until(lambda: dataset.stats().num_workers == 2)
        with full_table(dataset._reader.files.ring):
            guests = DataLoader(dataset, 16, sampler=dataset.sampler(seed=2), num_workers=2)
            waiting = Waiting(functools.partial(count_rows, iterator))
            assert sorted(rows_of(guests)) == EVERY_ROW
            assert waiting.result() + len(first["number"]) == NUM_ROWS
            stats = dataset.stats()
            assert 0 < stats.guest_reads < stats.samples_read
        del iterator, clients


def test_a_guest_can_ask_for_stats_name_an_epoch_and_iterate_a_sampler(numbers_path: str) -> None:
    with opened_full(numbers_path) as dataset:

        def work() -> None:
            assert dataset.stats().num_rows == NUM_ROWS
            assert dataset._reader.attach().is_guest
            dataset.set_epoch(3)
            rows = list(dataset.sampler(seed=1))
            assert sorted(rows) == EVERY_ROW
            samples = dataset.__getitems__(rows[:20])
            assert [int(sample["number"]) for sample in samples] == rows[:20]
            dataset.close()
            assert [int(sample["data"][0]) for sample in samples] == [row % 255 + 1 for row in rows[:20]]

        assert join(in_child(work)) == 0


def test_a_transform_of_a_guest_gets_its_samples(numbers_path: str) -> None:
    def transform(sample: dict[str, Any]) -> dict[str, Any]:
        return {"number": sample["number"] + 1000, "sum": sample["data"].sum()}

    with opened_full(numbers_path, transform=transform) as dataset:
        for batch in DataLoader(dataset, 20, num_workers=2):
            for number, total in zip(batch["number"].tolist(), batch["sum"].tolist(), strict=True):
                assert total == sized({"number": number - 1000})["data"].sum()


def test_spawned_workers_can_be_guests(numbers_path: str) -> None:
    with opened_full(numbers_path) as dataset:
        loader = DataLoader(dataset, 40, num_workers=1, multiprocessing_context="spawn")
        assert rows_of(loader) == EVERY_ROW
        assert dataset.stats().guest_reads == NUM_ROWS


def test_prefetchers_that_are_killed_are_replaced_while_guests_wait_for_a_slot(numbers_path: str) -> None:
    """A guest may take a dead one's slot: there must be others for the new ones."""
    with opened_full(numbers_path) as dataset:
        batches = iter(DataLoader(dataset, 16, num_workers=2))
        rows = next(batches)["number"].tolist()
        for _ in range(2):
            kill(*wait_until(lambda: prefetchers_of(dataset)))
            rows += next(batches)["number"].tolist()
        rows += [row for batch in batches for row in batch["number"].tolist()]
        assert rows == EVERY_ROW
        assert dataset.stats().guest_reads > 0


def test_workers_beyond_the_batch_ring_s_table_send_their_batches_as_bytes(numbers_path: str, tmp_path: Any) -> None:
    """In a process of its own: its batch ring stays full until it ends."""
    script = textwrap.dedent("""
        import json, sys
        import shmloader._native as native
        from shmloader import Options, ShmMultimodalDataset
        from shmloader import tokens
        from torch.utils.data import DataLoader

        def number(row):
            return {"number": row["number"]}

        options = Options(ring_bytes="32MiB")
        with ShmMultimodalDataset(dataset_name=sys.argv[1], process=number, options=options) as dataset:
            def rows():
                return [int(n) for batch in DataLoader(dataset, 40, num_workers=2) for n in batch["number"]]
            first, others = rows(), []
            while not others or others[-1].register(native.WORKER) != native.CLIENTS:
                others.append(native.BatchRing(tokens.batch_ring().mapping, tokens._known.fd))
            before = dataset.stats()
            second = rows()
            after = dataset.stats()
            print(json.dumps([first, second, before.batches_inline, after.batches_inline, after.batches_in_slots]))
    """)
    status, out, err = run_script(tmp_path, script, numbers_path, env={"PYTHONPATH": str(TESTS.parent)})
    assert status == 0, err
    first, second, inline_before, inline_after, in_slots = json.loads(out)
    assert first == second == EVERY_ROW
    assert (inline_before, inline_after, in_slots) == (0, 10, 10)
