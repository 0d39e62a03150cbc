"""SIGKILL, at any time, of anybody: nothing is lost, nothing is read twice, nothing stays behind."""

from __future__ import annotations

import dataclasses
import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support_sets import (
    Gate,
    gated,
    kill,
    marked,
    prefetchers_of,
    roles,
    services,
    supervisor_of,
    wait_for_end,
    wait_until,
    write_numbers,
)
from torch.utils.data import DataLoader

from shmloader import Options, ShmMultimodalDataset
from shmloader.prefetch.futility import MAX_IDLE_DEATHS

NUM_ROWS = 256
HALF = NUM_ROWS // 2
OPTIONS = Options(ring_bytes="8MiB", prefetchers=2, timeout_s=40)


@contextmanager
def half_gated(tmp_path: Path, **kwargs: Any) -> Iterator[tuple[ShmMultimodalDataset, Gate]]:
    """A set whose second half cannot be had before the file is there, so that a kill comes in mid-epoch."""
    gate = Gate(tmp_path / "gate")
    name = write_numbers(tmp_path / "d", NUM_ROWS)
    with ShmMultimodalDataset(
        dataset_name=name, process=gated(gate, HALF, one_waits=True), **{"options": OPTIONS, **kwargs}
    ) as dataset:
        yield dataset, gate


def loader(
    dataset: ShmMultimodalDataset, num_workers: int = 2, context: str = "fork", **kwargs: Any
) -> DataLoader[Any]:
    method = context if num_workers else None
    return DataLoader(dataset, 16, num_workers=num_workers, multiprocessing_context=method, **kwargs)


def numbers(batches: Any) -> list[int]:
    return [int(i) for batch in batches for i in batch["number"]]


def interrupted_epoch(
    tmp_path: Path, stroke: Callable[[ShmMultimodalDataset], None], num_strokes: int = 1, num_workers: int = 2
) -> None:
    """The epoch with ``stroke`` in its middle has every sample once, and so has the next one, of new spawn workers."""
    with half_gated(tmp_path) as (dataset, gate):
        batches = iter(loader(dataset, num_workers))
        first = numbers(next(batches) for _ in range(HALF // 16))
        for _ in range(num_strokes):
            stroke(dataset)
        gate.open()
        assert first + numbers(batches) == list(range(NUM_ROWS))
        assert sorted(numbers(loader(dataset, context="spawn", shuffle=True))) == list(range(NUM_ROWS))
        stats = dataset.stats()
        assert (stats.samples_ready, stats.commits, stats.samples_bad) == (NUM_ROWS, NUM_ROWS, 0)
        assert dataset._reader.attach().segment.check() is None
        del batches


def kill_prefetcher(dataset: ShmMultimodalDataset) -> None:
    victim = wait_until(lambda: prefetchers_of(dataset))[0]
    kill(victim)
    wait_for_end(victim)


def kill_supervisor(dataset: ShmMultimodalDataset) -> None:
    victim = supervisor_of(dataset)
    kill(victim)
    wait_for_end(victim)


def kill_both(dataset: ShmMultimodalDataset) -> None:
    victims = [supervisor_of(dataset), wait_until(lambda: prefetchers_of(dataset))[0]]
    kill(*victims)
    for victim in victims:
        wait_for_end(victim)


def kill_all(dataset: ShmMultimodalDataset) -> None:
    victims = wait_until(lambda: len(prefetchers_of(dataset)) == 2 and dataset.stats().service_pids)
    kill(*victims)
    for victim in victims:
        wait_for_end(victim)


def test_killing_a_prefetcher_loses_nothing(tmp_path: Path) -> None:
    interrupted_epoch(tmp_path, kill_prefetcher)


def test_killing_the_supervisor_loses_nothing(tmp_path: Path) -> None:
    interrupted_epoch(tmp_path, kill_supervisor)


def test_killing_supervisor_and_prefetcher_at_once_loses_nothing(tmp_path: Path) -> None:
    interrupted_epoch(tmp_path, kill_both)


def test_killing_the_supervisor_loses_nothing_without_workers(tmp_path: Path) -> None:
    interrupted_epoch(tmp_path, kill_supervisor, num_workers=0)


def test_killing_all_services_five_times_in_an_epoch_loses_nothing(tmp_path: Path) -> None:
    interrupted_epoch(tmp_path, kill_all, num_strokes=5)


def test_killing_more_prefetchers_at_once_than_may_die_in_a_row_loses_nothing(tmp_path: Path) -> None:
    num = MAX_IDLE_DEATHS + 2
    with half_gated(tmp_path, options=dataclasses.replace(OPTIONS, prefetchers=num)) as (dataset, gate):
        first = [int(dataset[i]["number"]) for i in range(HALF)]
        wait_until(lambda: len(prefetchers_of(dataset)) == num)
        for prefetcher in prefetchers_of(dataset):
            kill(prefetcher)
        gate.open()
        assert first + [int(dataset[i]["number"]) for i in range(HALF, NUM_ROWS)] == list(range(NUM_ROWS))


def test_prefetchers_die_with_their_supervisor(tmp_path: Path) -> None:
    with marked() as kin, half_gated(tmp_path) as (dataset, _):
        victims = wait_until(lambda: len(prefetchers_of(dataset)) == 2 and prefetchers_of(dataset))
        kill_supervisor(dataset)
        for victim in victims:
            wait_for_end(victim)
        assert services(kin()) == []


def test_a_prefetcher_whose_supervisor_died_while_it_started_ends(tmp_path: Path) -> None:
    with marked() as kin, half_gated(tmp_path) as (dataset, _):
        kill_prefetcher(dataset)
        # The new one is started now, and is killed with its supervisor before it can have asked for that.
        old = set(prefetchers_of(dataset))
        new = wait_until(lambda: set(roles(kin()).get("prefetcher", [])) - old)
        kill_supervisor(dataset)
        for pid in old | new:
            wait_for_end(pid)
        assert services(kin()) == []


def test_a_stopped_prefetcher_loses_nothing(tmp_path: Path) -> None:
    with half_gated(tmp_path) as (dataset, gate):
        victim = wait_until(lambda: prefetchers_of(dataset))[0]
        kill(victim, sig=signal.SIGSTOP)
        try:
            gate.open()
            batches = iter(loader(dataset))
            # What it does not hold comes from the other one.
            wait_until(lambda: dataset.stats().samples_ready >= NUM_ROWS - 16)
        finally:
            kill(victim, sig=signal.SIGCONT)
        assert numbers(batches) == list(range(NUM_ROWS))
        assert dataset.stats().commits == NUM_ROWS


def test_a_stopped_supervisor_delays_nothing(tmp_path: Path) -> None:
    with half_gated(tmp_path) as (dataset, gate):
        victim = supervisor_of(dataset)
        kill(victim, sig=signal.SIGSTOP)
        try:
            gate.open()
            assert numbers(loader(dataset)) == list(range(NUM_ROWS))
        finally:
            kill(victim, sig=signal.SIGCONT)


def test_a_killed_worker_is_an_error_of_torch_and_the_next_epoch_works(tmp_path: Path) -> None:
    with half_gated(tmp_path) as (dataset, gate):
        batches = iter(loader(dataset))
        next(batches)
        worker = batches._workers[0].pid  # not multiprocessing's resource tracker
        with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):  # noqa: PT012 (by torch's SIGCHLD handler)
            kill(worker)
            numbers(batches)
        del batches
        gate.open()
        assert numbers(loader(dataset)) == list(range(NUM_ROWS))
        assert wait_until(lambda: dataset.stats().num_workers == 0)
        assert dataset._reader.attach().segment.check() is None


def test_workers_killed_while_they_wait_leave_no_wants(tmp_path: Path) -> None:
    name, process = write_numbers(tmp_path / "d", NUM_ROWS), gated(Gate(tmp_path / "gate"), HALF)
    with ShmMultimodalDataset(dataset_name=name, process=process, options=OPTIONS) as dataset:
        supervisor = supervisor_of(dataset)
        wait_until(lambda: len(prefetchers_of(dataset)) == OPTIONS.prefetchers)  # one that comes later would claim all
        kill(supervisor, sig=signal.SIGSTOP)
        try:
            kill(*prefetchers_of(dataset))  # nobody replaces them: what is wanted stays so, as no one claims it
            batches = iter(loader(dataset, sampler=range(HALF, NUM_ROWS)))
            segment = dataset._reader.attach().segment
            wait_until(lambda: segment.reap(True) >= 0 and segment.wanted(NUM_ROWS))
            with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):  # noqa: PT012 (by torch's SIGCHLD handler)
                kill(*(worker.pid for worker in batches._workers))
                next(batches)
            del batches
            wait_until(lambda: segment.reap(True) >= 0 and segment.wanted(NUM_ROWS) == [])
        finally:
            kill(supervisor, sig=signal.SIGCONT)


def test_random_kills_over_several_epochs_lose_nothing(tmp_path: Path) -> None:
    seed = 20240607
    rng = random.Random(seed)
    begun, epoch = time.monotonic(), 0

    def process(row: dict[str, Any]) -> dict[str, Any]:
        until = time.perf_counter() + 0.002
        while time.perf_counter() < until:
            pass
        return {"number": row["number"]}

    # A prefetcher that is killed takes a death of its chunk along: more rows than kills per chunk could set aside.
    name = write_numbers(tmp_path / "d", 1024, rows_per_chunk=8)
    num_kills = 0
    while epoch < 2 or time.monotonic() - begun < 8:
        epoch += 1
        with ShmMultimodalDataset(dataset_name=name, process=process, options=OPTIONS) as dataset:
            seen: list[int] = []
            for batch in loader(dataset, shuffle=True):
                seen += numbers([batch])
                if rng.random() < 0.15:
                    pids = dataset.stats().service_pids
                    supervisor = roles(pids).get("supervisor", [])
                    victims = supervisor if rng.random() < 0.5 else [pid for pid in pids if pid not in supervisor][:1]
                    kill(*victims)
                    num_kills += len(victims)
            assert sorted(seen) == list(range(1024)), f"epoch {epoch} with seed {seed}"
            assert sorted(numbers(loader(dataset))) == list(range(1024)), f"epoch {epoch} with seed {seed}"
            stats = dataset.stats()
            assert (stats.samples_ready, stats.samples_bad, stats.commits) == (1024, 0, 1024)
            assert dataset._reader.attach().segment.check() is None
    assert num_kills > 3


def test_a_set_lives_as_long_as_its_last_owner_though_workers_come_and_go(tmp_path: Path) -> None:
    with half_gated(tmp_path) as (dataset, gate):
        for _ in range(3):
            child = multiprocessing.get_context("fork").Process(target=dataset.__getitem__, args=(0,))
            child.start()
            child.join(30)
            assert child.exitcode == 0
        gate.open()
        assert numbers(loader(dataset)) == list(range(NUM_ROWS))
