"""Iterations of a stream that is slow, fails, or whose processes are killed: no position is lost, none comes twice."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from conftest import small_options
from support_sets import Gate, kill, prefetchers_of, supervisor_of, wait_at, wait_until
from support_streams import (
    always_deadly,
    counted,
    deadly,
    ends,
    failing,
    gated,
    numbers,
    open_stream,
    stream_of,
)
from torch.utils.data import DataLoader

from shmloader.errors import ReadError, ServiceError
from shmloader.iteration import Iteration, Share
from shmloader.sizes import OPEN_AHEAD_CHUNKS

for name in ("support_streams", __name__):
    cloudpickle.register_pickle_by_value(sys.modules[name])
pytestmark = [
    pytest.mark.timeout(100),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

NUM, HALF = 600, 300


def loader(dataset: Any, num_workers: int, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(dataset, None, num_workers=num_workers, **kwargs)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("at", [1, 70])
def test_a_sample_is_delivered_before_the_next_one_exists(tmp_path: Path, num_workers: int, at: int) -> None:
    """In the middle of a chunk as well."""
    gate = Gate(tmp_path / "gate")
    with open_stream(stream_of(gated, num=100, gates={at: gate.path})) as dataset:
        samples = iter(loader(dataset, num_workers))
        assert numbers(next(samples) for _ in range(at)) == list(range(at))
        gate.open()
        assert numbers(samples) == list(range(at, 100))


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_stream_that_fails_raises_in_every_reader_and_nobody_waits(
    num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The log tells it once an iteration, whoever waits beyond it."""
    with open_stream(stream_of(failing, num=200, at=100), options=small_options(prefetchers=2)) as dataset:
        for _ in range(2):
            found, failures = [], []
            samples = iter(loader(dataset, num_workers))
            while True:
                try:
                    found += numbers([next(samples)])
                except StopIteration:
                    break
                except ReadError as error:
                    failures.append(str(error))
            assert len(failures) == max(num_workers, 1)
            assert all("no number 100" in failure for failure in failures)
            assert sorted(found) == list(range(100))
        ends(dataset)
    dataset.close()  # the last records of the services come with it
    lines = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(lines) == 2
    assert all("row 100 of the stream" in line and "no number 100" in line for line in lines)


def test_a_stream_that_fails_at_its_front_raises() -> None:
    with open_stream(stream_of(failing, num=10, at=0)) as dataset, pytest.raises(ReadError, match="no number 0"):
        list(dataset)


def gated_once(gates: dict[int, str], mark: str) -> Iterator[dict[str, int]]:
    """0, 1, … without end; who opens it first waits at the gates of numbers. mark: where it is noted that one has."""
    is_first = not Path(mark).exists()
    Path(mark).touch()
    for i in itertools.count():
        if is_first and i in gates:
            wait_at(gates[i])
        yield {"number": i}


@pytest.mark.parametrize("at", [0, 5])
def test_who_blocks_in_a_stream_that_was_left_does_not_hold_up_another_prefetcher(tmp_path: Path, at: int) -> None:
    """Neither before the first row nor in the middle of a chunk."""
    gate, mark = Gate(tmp_path / "gate"), tmp_path / "mark"
    stream = stream_of(gated_once, gates={at: gate.path}, mark=str(mark))
    with open_stream(stream, options=small_options(prefetchers=2)) as dataset:
        iteration = Iteration.join(dataset._reader, Share.of(0, 1, at), None)
        for position in range(at):
            dataset._reader.wait_for([iteration._first_id + position], None)
        wait_until(mark.exists)
        iteration.leave()
        for _ in range(2):
            assert numbers(itertools.islice(dataset, 200)) == list(range(200))
        gate.open()


def test_a_slow_stream_that_was_left_is_not_read_on(tmp_path: Path) -> None:
    """A prefetcher alone goes over to the next iteration within some rows, not only with the next chunk."""
    gates = {at: Gate(tmp_path / f"gate{at}") for at in range(3, 63)}
    paths, mark = {at: gate.path for at, gate in gates.items()}, str(tmp_path / "mark")
    with open_stream(stream_of(gated_once, gates=paths, mark=mark)) as dataset, ThreadPoolExecutor(1) as pool:
        samples = iter(dataset)
        assert numbers(next(samples) for _ in range(3)) == [0, 1, 2]
        samples.close()
        ends(dataset)
        following = pool.submit(lambda: numbers(itertools.islice(dataset, 200)))
        for gate in list(gates.values())[:-1]:  # row after row; the last one stays closed
            gate.open()
            wait([following], 0.05)
        assert following.result() == list(range(200))
        gates[62].open()


@pytest.mark.parametrize("num_workers", [0, 3])
def test_killing_all_prefetchers_in_mid_stream_loses_nothing(tmp_path: Path, num_workers: int) -> None:
    gate = Gate(tmp_path / "gate")
    stream = stream_of(gated, num=NUM, gates={HALF: gate.path})
    with open_stream(stream, options=small_options(prefetchers=2)) as dataset:
        samples = iter(loader(dataset, num_workers))
        found = numbers(next(samples) for _ in range(HALF - 10))
        kill(*wait_until(lambda: prefetchers_of(dataset)))
        gate.open()
        assert found + numbers(samples) == list(range(NUM))
        assert numbers(loader(dataset, num_workers)) == list(range(NUM))
        assert dataset._reader.attach().segment.check() is None


def test_killing_the_supervisor_in_mid_stream_loses_nothing(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    with open_stream(stream_of(gated, num=NUM, gates={HALF: gate.path})) as dataset:
        samples = iter(loader(dataset, 2))
        found = numbers(next(samples) for _ in range(HALF - 10))
        kill(supervisor_of(dataset))
        gate.open()
        assert found + numbers(samples) == list(range(NUM))


@pytest.mark.parametrize("num_prefetchers", [1, 2])
def test_a_stream_that_kills_its_reader_is_read_on_by_another(tmp_path: Path, num_prefetchers: int) -> None:
    stream = stream_of(deadly, num=NUM, at=HALF, mark=str(tmp_path / "mark"))
    with open_stream(stream, options=small_options(prefetchers=num_prefetchers)) as dataset:
        assert numbers(loader(dataset, 3)) == list(range(NUM))
        assert dataset.stats().restarts >= 1


def test_a_stream_that_kills_each_reader_is_an_error() -> None:
    with open_stream(stream_of(always_deadly, num=NUM, at=HALF)) as dataset:
        found: list[int] = []
        with pytest.raises(ServiceError, match="each of the 3 prefetch processes that tried to fetch its chunk died"):
            found.extend(int(sample["number"]) for sample in dataset)
        assert found == list(range(len(found)))
        assert HALF - 64 < len(found) <= HALF


def test_a_killed_worker_is_an_error_of_torch_and_the_next_iteration_is_whole(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    with open_stream(stream_of(gated, num=NUM, gates={HALF: gate.path})) as dataset:
        samples = iter(loader(dataset, 2))
        numbers(next(samples) for _ in range(HALF - 10))
        kill(samples._workers[0].pid)
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            numbers(samples)
        del samples
        gate.open()
        assert numbers(loader(dataset, 2)) == list(range(NUM))
        ends(dataset)


def test_memory_stays_bounded_however_long_the_stream_is() -> None:
    """Longer than the set has descriptors for samples and places for chunks: all of them are used again and again."""
    num = 40_000
    with open_stream(stream_of(counted, num=None), max_samples=num, options=small_options(prefetchers=2)) as dataset:
        batches = DataLoader(dataset, 100, num_workers=0)
        most_encoded = most_used = 0
        for i, batch in enumerate(batches):
            assert batch["number"].tolist() == list(range(100 * i, 100 * i + 100))
            if i % 20 == 0:
                stats = dataset.stats()
                most_encoded, most_used = max(most_encoded, stats.encoded_bytes), max(most_used, stats.ring_used_bytes)
        stats = dataset.stats()
        assert stats.commits >= num
        assert most_used <= stats.transit_bytes == stats.ring_bytes < 32 << 20
        assert stats.ring_backed_bytes <= stats.transit_bytes
        assert most_encoded < 8 * OPEN_AHEAD_CHUNKS * 64 * 64
        assert dataset._reader.attach().segment.check() is None
