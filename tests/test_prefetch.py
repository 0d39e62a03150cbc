"""The services: what they share out, and when they end."""

from __future__ import annotations

import os
import threading
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, IterableDataset, Value
from support_prefetch import make
from support_sets import (
    Gate,
    gated,
    kill,
    marked,
    number,
    prefetchers_of,
    roles,
    services,
    supervisor_of,
    wait_at,
    wait_for_end,
    wait_until,
    write_numbers,
)
from torch.utils.data import DataLoader

import shmloader._native as native
from shmloader import ShmMultimodalDataset
from shmloader.errors import ClosedError, ServiceError
from shmloader.prefetch.plan_file import read_parts, write_failure
from shmloader.prefetch.spawn import spawn


def with_pid(row: dict[str, Any]) -> dict[str, Any]:
    return {"number": row["number"], "pid": os.getpid()}


# ---- sharing out -------------------------------------------------------------------------------------


def test_each_row_is_processed_once_by_one_of_four_prefetchers(tmp_path: Path) -> None:
    seen = tmp_path / "seen"

    def process(row: dict[str, Any], seen: str = str(seen)) -> dict[str, Any]:
        import os

        fd = os.open(seen, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, b"%d\n" % row["number"])
        os.close(fd)
        return {"number": row["number"]}

    with make(write_numbers(tmp_path / "d", 400, 8), process=process, prefetchers=4) as dataset:
        assert [int(s["number"]) for s in dataset.__getitems__(range(400))] == list(range(400))
        assert dataset.stats().commits == 400
    assert Counter(seen.read_text().split()) == {str(i): 1 for i in range(400)}


def test_chunks_are_shared_among_prefetchers(tmp_path: Path) -> None:
    folder, gate = tmp_path / "here", Gate(tmp_path / "gate")
    folder.mkdir()

    def process(row: dict[str, Any], folder: str = str(folder), gate: str = gate.path) -> dict[str, Any]:
        open(f"{folder}/{os.getpid()}", "w").close()  # noqa: PTH123
        wait_at(gate)
        return {"pid": os.getpid()}

    with make(write_numbers(tmp_path / "d", 64, 8), process=process, prefetchers=4) as dataset:
        wait_until(lambda: len(list(folder.iterdir())) == 4)
        gate.open()
        assert len({int(s["pid"]) for s in dataset.__getitems__(range(64))}) == 4


def read_after_a_kill(dataset: ShmMultimodalDataset, row: int) -> int:
    """The number of ``row``, which is waited for when the one prefetcher is killed over its first chunk."""
    segment, found = dataset._reader.attach().segment, []
    starts = [chunk.first_row for chunk in dataset._reader.plan.source.chunks]
    chunk = array("I", [max(i for i, start in enumerate(starts) if start <= row)])
    wait_until(lambda: segment.stats()["num_claimed"])
    reader = threading.Thread(target=lambda: found.append(int(dataset[row]["number"])))
    reader.start()
    wait_until(lambda: row in segment.wanted(4096))
    # Fetched before the kill: what is not there yet cannot come before what is.
    wait_until(lambda: segment.chunk_look(chunk)[0] & native.CHUNK_HAS_RAW)
    kill(*wait_until(lambda: prefetchers_of(dataset)))
    reader.join(40)
    return found[0]


def test_a_chunk_that_is_waited_for_comes_before_those_that_are_not(tmp_path: Path) -> None:
    gate, name = Gate(tmp_path / "gate"), write_numbers(tmp_path / "d", 256, 8)

    def process(row: dict[str, Any], gate: str = gate.path) -> dict[str, Any]:
        if row["number"] // 8 != 25:
            wait_at(gate)
        return {"number": row["number"]}

    with make(name, process=process, prefetchers=1) as dataset:
        assert read_after_a_kill(dataset, 203) == 203


def test_the_rows_of_a_chunk_that_are_waited_for_come_first(tmp_path: Path) -> None:
    gate, name = Gate(tmp_path / "gate"), write_numbers(tmp_path / "d", 32, 16)

    def process(row: dict[str, Any], gate: str = gate.path) -> dict[str, Any]:
        if row["number"] != 27:
            wait_at(gate)
        return {"number": row["number"]}

    with make(name, process=process, prefetchers=1) as dataset:
        assert read_after_a_kill(dataset, 27) == 27
        assert dataset.stats().samples_ready == 1


def test_prefetchers_agree_on_the_schema_of_a_process(tmp_path: Path) -> None:
    def process(row: dict[str, Any]) -> dict[str, Any]:
        return {"x": 1 if row["number"] % 2 else 2.5}

    with make(write_numbers(tmp_path / "d", 128, 4), process=process, prefetchers=4) as dataset:
        good, bad = set(), 0
        for i in range(128):
            try:
                good.add(dataset[i]["x"].dtype)
            except ValueError:
                raise
            except Exception as error:
                assert "must be" in str(error)  # noqa: PT017
                bad += 1
        assert len(good) == 1
        assert bad in (0, 64)


def test_a_sequential_stream_is_read_once_by_one_and_decoded_by_all(tmp_path: Path) -> None:
    opened, gate = tmp_path / "opened", Gate(tmp_path / "gate")

    def generate(opened: str = str(opened)) -> Iterator[dict[str, int]]:
        with open(opened, "a") as file:  # noqa: PTH123
            file.write(f"{os.getpid()} ")
        yield from ({"number": i} for i in range(300))

    def process(row: dict[str, Any], gate: str = gate.path, here: str = str(tmp_path)) -> dict[str, Any]:
        open(f"{here}/decodes-{os.getpid()}", "w").close()  # noqa: PTH123
        wait_at(gate)
        return {"number": row["number"]}

    features = Features(number=Value("int64"))
    rows = IterableDataset.from_generator(generate, features=features)
    with make(rows, process=process, prefetchers=3) as dataset:
        assert dataset.sources[0]["mode"] == "sequential"
        wait_until(lambda: len(list(tmp_path.glob("decodes-*"))) == 3)
        gate.open()
        assert len(dataset.__getitems__(range(300))) == 300
        assert len(opened.read_text().split()) == 2  # the planner, to count its rows, and one prefetcher
        assert sorted(int(i) for batch in DataLoader(dataset, 32, shuffle=True) for i in batch["number"]) == list(
            range(300)
        )
        assert dataset.stats().commits == 300


def test_a_sequential_stream_goes_on_after_its_reader_was_killed(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    rows = Dataset.from_dict({"number": list(range(300))}).to_iterable_dataset()
    with make(rows, process=gated(gate, 150), prefetchers=2) as dataset:
        dataset[140]
        segment = dataset._reader.attach().segment
        victims = wait_until(lambda: prefetchers_of(dataset))
        kill(*victims)
        gate.open()
        assert [int(s["number"]) for s in dataset.__getitems__(range(300))] == list(range(300))
        assert dataset.stats().commits == 300
        assert segment.check() is None


def test_a_reader_that_waits_is_told_when_its_dataset_is_closed(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    dataset = make(Dataset.from_dict({"number": list(range(100))}), process=gated(gate, 0), prefetchers=1)
    found: list[BaseException] = []

    def read() -> None:
        try:
            dataset[50]
        except ClosedError as error:
            found.append(error)

    segment = dataset._reader.attach().segment
    wait_until(lambda: segment.stats()["num_claimed"])  # the prefetcher waits at the gate, with other rows
    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: 50 in segment.wanted(4096))
    dataset.close()
    reader.join()
    assert found
    gate.open()


# ---- when they end -----------------------------------------------------------------------------------


def test_prefetchers_end_when_all_is_there_and_the_supervisor_stays(tmp_path: Path) -> None:
    with marked() as kin, make(write_numbers(tmp_path / "d", 64), process=number) as dataset:
        dataset.__getitems__(range(64))
        wait_until(lambda: set(roles(kin())) == {"supervisor"})
        assert dataset.stats().prefetchers == 0
        assert dataset.stats().restarts == 0


def test_services_end_when_the_set_is_closed(tmp_path: Path) -> None:
    with marked() as kin:
        with make(write_numbers(tmp_path / "d", 64), process=gated(Gate(tmp_path / "gate"), 0)):
            wait_until(lambda: len(services(kin())) == 3)
        wait_until(lambda: kin() == [])


def test_services_end_when_the_set_is_forgotten(tmp_path: Path) -> None:
    with marked() as kin:
        dataset = make(write_numbers(tmp_path / "d", 64), process=gated(Gate(tmp_path / "gate"), 0))
        assert services(kin())
        del dataset
        wait_until(lambda: kin() == [])


def test_what_a_process_started_ends_with_its_prefetcher(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    def process(row: dict[str, Any], path: str = str(pid_file)) -> dict[str, Any]:
        import subprocess
        import sys

        if row["number"] == 0:
            child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
            with open(path, "w") as file:  # noqa: PTH123
                file.write(str(child.pid))
        return {"number": row["number"]}

    with make(write_numbers(tmp_path / "d", 64), process=process) as dataset:
        dataset[0]
    wait_for_end(int(pid_file.read_text()))


def test_a_second_supervisor_ends_at_once(tmp_path: Path) -> None:
    with marked() as kin, make(write_numbers(tmp_path / "d", 64), process=gated(Gate(tmp_path / "gate"), 0)) as dataset:
        first = supervisor_of(dataset)
        assert spawn("supervisor", dataset._reader.files.fds()).wait(30) == 0
        wait_until(lambda: roles(kin())["supervisor"] == [first])
        assert len(roles(kin())["prefetcher"]) == 2


def test_a_supervisor_without_owners_ends(tmp_path: Path) -> None:
    with marked() as kin:
        dataset = make(write_numbers(tmp_path / "d", 8), process=number)
        files = dataset._reader.files
        copies = {name: os.dup(fd) for name, fd in files.fds().items()}
        dataset.close()
        wait_until(lambda: kin() == [])
        assert spawn("supervisor", copies).wait(30) == 0
        wait_until(lambda: kin() == [])
        for fd in copies.values():
            os.close(fd)


def test_a_prefetcher_that_ends_again_and_again_is_given_up(tmp_path: Path) -> None:
    class Process:
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return {}

        def __getstate__(self) -> dict[str, int]:
            return {"status": 5}

        def __setstate__(self, state: dict[str, int]) -> None:
            import os
            import sys

            if sys.argv[1] == "prefetcher":
                os._exit(state["status"])

    with make(write_numbers(tmp_path / "d", 8), process=Process()) as dataset:
        with pytest.raises(ServiceError, match=r"end at once.*exit status 5.*stderr") as caught:
            dataset[0]
        assert caught.value.role == "prefetcher"


# ---- the plan ----------------------------------------------------------------------------------------


def test_a_plan_that_was_torn_is_no_plan() -> None:
    fd = os.memfd_create("plan")
    assert read_parts(fd) is None
    write_failure(fd, {})
    head = os.pread(fd, 24, 0)
    os.pwrite(fd, bytes(24), 0)  # it is written last
    assert any(head)
    assert read_parts(fd) is None
    os.close(fd)


def test_the_name_of_a_row_tells_its_shard(tmp_path: Path) -> None:
    with make(write_numbers(tmp_path / "d", 64), process=number) as dataset:
        told = dataset._reader.plan.describe(63)
    assert told.startswith(f"row 63 of '{tmp_path / 'd'}' (split 'train', shard '")
    assert "train-00000-of-00001.parquet" in told


def test_rows_of_many_dtypes_come_as_they_were_made(tmp_path: Path) -> None:
    def process(row: dict[str, Any]) -> dict[str, Any]:
        return {"a": np.float16(row["number"]), "b": np.arange(row["number"] + 1, dtype=np.uint8), "c": True}

    with make(write_numbers(tmp_path / "d", 8), process=process) as dataset:
        sample = dataset[3]
        assert (float(sample["a"]), sample["b"].tolist(), bool(sample["c"])) == (3.0, [0, 1, 2, 3], True)
