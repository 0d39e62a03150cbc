"""The end of the training process, whichever way and whenever it comes: its services end with it, and nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support_sets import (
    Gate,
    kill,
    left_in_shm,
    marked,
    names,
    roles,
    script,
    services,
    wait_for_end,
    wait_until,
    write_numbers,
)

NUM_ROWS = 256


TRAINING = """
import os, signal, sys, threading
from torch.utils.data import DataLoader
from shmloader import Options, ShmMultimodalDataset
from shmloader.prefetch.futility import MAX_IDLE_DEATHS
from support_sets import gated, number, wait_until
from pathlib import Path

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored, if nohup started the tests
name, gate, way = sys.argv[1:]
dataset = ShmMultimodalDataset(
    dataset_name=name,
    process=gated(gate, 128, one_waits=way != "waiting"),
    options=Options(ring_bytes="8MiB", prefetchers=2, timeout_s=60),
)
loader = DataLoader(dataset, 16, num_workers=2, shuffle=(way == "waiting"))
batches = iter(loader)
if way != "waiting":
    for _ in range(8):
        next(batches)
# One that is still starting when we are killed never learns of it: torch then takes init for its parent.
wait_until(lambda: dataset.stats().num_workers == 2)
print("ready", flush=True)
if way == "waiting":
    next(batches)
sys.stdin.readline()
if way == "exception":
    raise RuntimeError("as if")
if way == "_exit":
    os._exit(3)
if way == "exit":
    sys.exit(0)
"""


@contextmanager
def training(tmp_path: Path, way: str) -> Iterator[tuple[subprocess.Popen[str], Callable[[], list[int]]]]:
    name, gate = write_numbers(tmp_path / "d", NUM_ROWS), Gate(tmp_path / "gate")
    with marked() as kin, script(tmp_path, TRAINING, name, gate.path, way) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate(timeout=10)
        yield process, kin


def ends_well(process: subprocess.Popen[str], kin: Callable[[], list[int]], end: Callable[[], None]) -> float:
    """Ends the training process; returns after how many seconds its services were gone."""
    assert services(kin())
    pids = kin()
    before = names("/dev/shm") - {name for name in names("/dev/shm") if f"_{process.pid}_" in name}
    begun = time.monotonic()
    end()
    wait_for_end(process.pid)
    wait_until(lambda: services(kin()) == [])
    seconds = time.monotonic() - begun
    wait_until(lambda: kin() == [])  # torch's workers look for their parent every 5 s
    assert left_in_shm(before, pids) == set()
    return seconds


@pytest.mark.parametrize("way", ["reading", "waiting"])
def test_services_are_gone_after_the_training_process_was_killed(
    tmp_path: Path, way: str, record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with training(tmp_path, way) as (process, kin):
        seconds = ends_well(process, kin, process.kill)
        record_property("services_gone_after_s", seconds)
        with capsys.disabled():
            print(f"\n  services gone {seconds:.2f} s after SIGKILL of a training process that was {way}")


@pytest.mark.parametrize("way", ["exit", "exception", "_exit"])
def test_services_are_gone_after_the_training_process_ended_by_itself(tmp_path: Path, way: str) -> None:
    def end() -> None:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()

    with training(tmp_path, way) as (process, kin):
        ends_well(process, kin, end)
        assert process.wait(10) == {"exit": 0, "exception": 1, "_exit": 3}[way]


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_services_are_gone_after_a_signal_ended_the_training_process(tmp_path: Path, sig: signal.Signals) -> None:
    with training(tmp_path, "reading") as (process, kin):
        ends_well(process, kin, lambda: process.send_signal(sig))


def test_services_are_gone_after_the_training_process_was_killed_with_all_its_services_stopped(tmp_path: Path) -> None:
    with training(tmp_path, "reading") as (process, kin):
        pids = services(kin())
        kill(*pids, sig=signal.SIGSTOP)
        process.kill()
        wait_for_end(process.pid)
        kill(*pids, sig=signal.SIGCONT)
        wait_until(lambda: services(kin()) == [])


PLANNING = """
import sys
from shmloader import Options, ShmMultimodalDataset
from shmloader.prefetch.futility import MAX_IDLE_DEATHS

class Slow:
    def __call__(self, row):
        return {"number": row["number"]}
    def __reduce__(self):
        return (wait, (sys.argv[2],))

def wait(gate):
    from support_sets import wait_at
    wait_at(gate)
    return Slow()

ShmMultimodalDataset(dataset_name=sys.argv[1], process=Slow(), options=Options(ring_bytes="1MiB", prefetchers=2))
"""


def planning(tmp_path: Path) -> Any:
    return script(tmp_path, PLANNING, write_numbers(tmp_path / "d", 8), Gate(tmp_path / "gate").path)


def is_planning(kin: Callable[[], list[int]]) -> bool:
    found = roles(kin())
    return "planner" in found and len(found.get("prefetcher", [])) == 2 and len(found.get("supervisor", [])) == 1


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_services_are_gone_after_the_training_process_was_ended_while_it_was_planning(
    tmp_path: Path, sig: signal.Signals
) -> None:
    with marked() as kin, planning(tmp_path) as process:
        wait_until(lambda: is_planning(kin))
        process.send_signal(sig)
        assert process.wait(40) == -sig
        wait_until(lambda: kin() == [])


def test_nothing_stays_of_a_supervisor_that_was_killed_while_it_was_planning(tmp_path: Path) -> None:
    with marked() as kin, planning(tmp_path) as process:
        wait_until(lambda: is_planning(kin))
        kill(roles(kin())["supervisor"][0])
        _, err = process.communicate(timeout=40)
        assert "ServiceError: The supervisor process died while it was starting" in err
        wait_until(lambda: kin() == [])


def test_a_planner_that_is_killed_is_an_error_with_its_exit_status(tmp_path: Path) -> None:
    with marked() as kin, planning(tmp_path) as process:
        wait_until(lambda: is_planning(kin))
        kill(roles(kin())["planner"][0])
        _, err = process.communicate(timeout=40)
        assert "ServiceError: The process that looks up the dataset died: it was killed by signal 9 (SIGKILL)" in err
        wait_until(lambda: kin() == [])


def test_services_end_when_the_training_process_dies_between_the_plan_and_its_first_read(tmp_path: Path) -> None:
    from support_sets import in_child, join, number

    from shmloader.files import RingFiles
    from shmloader.prefetch.launch import SetFiles, start_set
    from shmloader.prefetch.payload import Work, write
    from shmloader.sources.base import SourceRequest

    name = write_numbers(tmp_path / "d", NUM_ROWS)

    def work() -> None:
        files = RingFiles.create()
        sizes = {"ring_bytes": 1 << 20, "in_flight": None, "ahead": None, "window_bytes": 1 << 20}
        head = {
            "uuid": files.uuid,
            "num_prefetchers": 1,
            "log": "WARNING",
            "spill_bytes": 0,
            "spill_dir": "",
            "why_no_spill": "",
            "cache_size": None,
            "verify": False,
            **sizes,
        }
        payload = write(Work((SourceRequest(name, "train", None, True, {}),), None, None, number), head)
        start_set(SetFiles(files, payload, os.memfd_create("plan")))
        os.kill(os.getpid(), signal.SIGKILL)  # it never was a client

    with marked() as kin:
        assert join(in_child(work)) == -signal.SIGKILL
        wait_until(lambda: kin() == [], 8)
