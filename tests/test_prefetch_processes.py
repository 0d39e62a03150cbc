"""The services as processes: what they load, and where they run."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support_prefetch import make
from support_sets import (
    Gate,
    gated,
    kill,
    marked,
    modules,
    number,
    prefetchers_of,
    run_script,
    script,
    services,
    supervisor_of,
    wait_for_end,
    wait_until,
    write_numbers,
    write_pictures,
)

from shmloader import MultimodalConfig

# ---- what they load ----------------------------------------------------------------------------------


def test_the_supervisor_loads_nothing_large(tmp_path: Path) -> None:
    with make(write_numbers(tmp_path / "d", 64), process=number) as dataset:
        dataset[0]
        loaded = modules(supervisor_of(dataset))
    assert "_native" in loaded
    assert not [name for name in ("numpy", "pyarrow", "torch", "datasets", "pandas") if f"/{name}/" in loaded]


def test_the_supervisor_stays_small(tmp_path: Path) -> None:
    with make(write_numbers(tmp_path / "d", 64), process=number) as dataset:
        dataset[0]
        status = Path(f"/proc/{supervisor_of(dataset)}/status").read_text()
    (anonymous,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    assert anonymous < 30_000  # KiB


def test_a_prefetcher_of_pictures_has_mapped_neither_torch_nor_datasets(tmp_path: Path) -> None:
    name = write_pictures(tmp_path / "d", 2000)
    with make(name, prefetchers=1, config=MultimodalConfig(vision_dim=16)) as dataset:
        victim = wait_until(lambda: prefetchers_of(dataset))[0]
        kill(victim, sig=signal.SIGSTOP)
        loaded = modules(victim)
        kill(victim, sig=signal.SIGCONT)
        dataset[0]
    assert "pyarrow" in loaded
    assert not [name for name in ("torch", "pandas", "multiprocess") if f"/{name}/" in loaded]


def test_a_prefetcher_of_parquet_has_imported_neither_torch_nor_datasets(tmp_path: Path) -> None:
    def process(row: dict[str, Any]) -> dict[str, Any]:
        import sys

        return {"names": " ".join(sorted(name for name in sys.modules if "." not in name))}

    with make(write_numbers(tmp_path / "d", 8), process=process) as dataset:
        found = dataset[0]["names"].split()
    assert "pyarrow" in found
    assert not {"torch", "datasets", "pandas", "fsspec"} & set(found)


# ---- where they run ----------------------------------------------------------------------------------


def test_services_have_sessions_of_their_own(tmp_path: Path) -> None:
    with marked() as kin, make(write_numbers(tmp_path / "d", 64), process=gated(Gate(tmp_path / "gate"), 0)):
        pids = wait_until(lambda: len(services(kin())) == 3 and services(kin()))
        sessions = {os.getsid(pid) for pid in pids}
        assert os.getsid(0) not in sessions
        assert len(sessions) == 3


def test_services_ignore_an_interrupt(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    with marked() as kin, make(write_numbers(tmp_path / "d", 64), process=gated(gate, 0)) as dataset:
        pids = wait_until(lambda: len(services(kin())) == 3 and len(prefetchers_of(dataset)) == 2 and services(kin()))
        kill(*pids, sig=signal.SIGINT)
        gate.open()
        assert [int(s["number"]) for s in dataset.__getitems__(range(64))] == list(range(64))
        assert dataset.stats().restarts == 0


INTERRUPTED = """
import sys, threading
from pathlib import Path
from shmloader import Options, ShmMultimodalDataset
from support_sets import Gate, gated, wait_until

def tell():
    wait_until(lambda: 9 in segment.wanted(16))
    print("waits", flush=True)

name, gate = sys.argv[1], Gate(Path(sys.argv[2]))
options = Options(ring_bytes="1MiB", prefetchers=1, timeout_s=60)
with ShmMultimodalDataset(dataset_name=name, process=gated(gate, 0), options=options) as dataset:
    segment = dataset._reader.attach().segment
    wait_until(lambda: segment.stats()["num_claimed"])  # the prefetcher waits at the gate, with other rows
    thread = threading.Thread(target=tell)
    try:
        thread.start()
        dataset[9]
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    thread.join()
    gate.open()
    print(int(dataset[9]["number"]), dataset.stats().restarts)
"""


def test_an_interrupt_of_the_foreground_group_ends_the_wait_and_no_service(tmp_path: Path) -> None:
    name = write_numbers(tmp_path / "d", 16)
    with script(tmp_path, INTERRUPTED, name, str(tmp_path / "gate"), start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=40)
        assert (process.returncode, out) == (0, "interrupted\n9 0\n"), err


def test_services_find_modules_on_the_sys_path_of_the_training_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "only_here.py").write_text("def process(row):\n    return {'number': row['number'] + 1}\n")
    monkeypatch.syspath_prepend(tmp_path / "mine")
    import only_here  # type: ignore[import-not-found]

    with make(write_numbers(tmp_path / "d", 8), process=only_here.process) as dataset:
        assert int(dataset[4]["number"]) == 5


def test_services_get_the_environment_of_the_training_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def process(row: dict[str, Any]) -> dict[str, Any]:
        return {"number": int(os.environ["SOME_NUMBER"])}

    monkeypatch.setenv("SOME_NUMBER", "77")
    with make(write_numbers(tmp_path / "d", 8), process=process) as dataset:
        assert int(dataset[4]["number"]) == 77


def test_a_relative_name_is_found_by_services_that_start_after_the_folder_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(tmp_path / "gate")
    write_numbers(tmp_path / "d", 64)
    monkeypatch.chdir(tmp_path)
    # One prefetcher: of two, both could be at the gate with later chunks before the first is there.
    with make("d", process=gated(gate, 16), prefetchers=1) as dataset:
        dataset[0]
        monkeypatch.chdir("/")
        victim = supervisor_of(dataset)
        kill(victim)
        wait_for_end(victim)
        gate.open()
        assert int(dataset[63]["number"]) == 63


def test_services_start_in_a_folder_that_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write_numbers(tmp_path / "d", 8)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        with make(name, process=number) as dataset:
            assert int(dataset[7]["number"]) == 7
    finally:
        os.chdir(tmp_path)


def test_services_start_where_the_standard_streams_are_closed(tmp_path: Path) -> None:
    source = """
import os, sys
for fd in (0, 1, 2):
    os.close(fd)
from shmloader import Options, ShmMultimodalDataset
options = Options(ring_bytes="1MiB", prefetchers=1)
process = lambda row: {"x": row["number"]}
with ShmMultimodalDataset(dataset_name=sys.argv[1], process=process, options=options) as dataset:
    os._exit(40 + int(dataset[2]["x"]))
"""
    status, _, _ = run_script(tmp_path, source, write_numbers(tmp_path / "d", 8))
    assert status == 42


def test_what_a_process_prints_goes_to_stderr(tmp_path: Path) -> None:
    source = """
import sys
from shmloader import Options, ShmMultimodalDataset
options = Options(ring_bytes="1MiB", prefetchers=1)
def process(row):
    print("from the service", row["number"], flush=True)
    return {"x": row["number"]}
with ShmMultimodalDataset(dataset_name=sys.argv[1], process=process, options=options) as dataset:
    dataset.__getitems__(range(8))
"""
    status, out, err = run_script(tmp_path, source, write_numbers(tmp_path / "d", 8))
    assert (status, out) == (0, "")
    assert "from the service 7" in err


UNGUARDED = """
import sys
from torch.utils.data import DataLoader
from shmloader import Options, ShmMultimodalDataset

FACTOR = 3

class Adder:
    def __init__(self, n):
        self.n = n
    def __call__(self, x):
        return x + self.n

adder = Adder(5)
options = Options(ring_bytes="1MiB", prefetchers=2)
dataset = ShmMultimodalDataset(
    dataset_name=sys.argv[1],
    process=lambda row: {"number": adder(FACTOR * row["number"])},
    transform=lambda sample: {**sample, "twice": 2 * sample["number"]},
    options=options,
)
total = sum(int(batch["twice"].sum()) for batch in DataLoader(dataset, 16, num_workers=2))
print(total)
"""


def test_a_script_without_a_main_guard_works_with_lambdas_and_objects_of_its_own(tmp_path: Path) -> None:
    status, out, err = run_script(tmp_path, UNGUARDED, write_numbers(tmp_path / "d", 64))
    assert status == 0, err
    assert out == f"{sum(2 * (3 * i + 5) for i in range(64))}\n"
    assert err == ""


def _in_daemon(name: str, answers: Any) -> None:
    with make(name, process=number) as dataset:
        answers.put([int(sample["number"]) for sample in dataset.__getitems__(range(64))])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_set_can_be_made_within_a_daemonic_process(tmp_path: Path, context: str) -> None:
    name, ctx = write_numbers(tmp_path / "d", 64), multiprocessing.get_context(context)
    answers = ctx.Queue()
    process = ctx.Process(target=_in_daemon, args=(name, answers), daemon=True)
    process.start()
    assert answers.get(timeout=40) == list(range(64))
    process.join(30)
    assert process.exitcode == 0
    answers.close()
    answers.join_thread()


def test_services_leave_no_child_of_the_training_process(tmp_path: Path) -> None:
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    before = children()
    with make(write_numbers(tmp_path / "d", 64), process=gated(Gate(tmp_path / "gate"), 0)):
        assert children() == before
