"""Workers beyond the table of clients, behind a stock DataLoader."""

from __future__ import annotations

import functools
import json
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cloudpickle
import numpy as np
import pytest
from conftest import opened, small_options
from support_guests import Waiting, full_table
from support_sets import (
    TESTS,
    in_child,
    join,
    kill,
    prefetchers_of,
    run_script,
    wait_until,
    write_numbers,
)
from torch.utils.data import DataLoader, RandomSampler

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.filterwarnings("ignore:.* in an order that the prefetchers do not know:UserWarning")

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
