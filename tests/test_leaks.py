"""Nothing stays behind: descriptors, mappings, threads, processes, files in /dev/shm. And /dev/shm is not needed."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support_leaks import Leaks
from support_sets import (
    descriptors,
    kill,
    marked,
    number,
    run_script,
    services,
    supervisor_of,
    wait_for_end,
    wait_until,
    write_numbers,
    write_pictures,
)
from torch.utils.data import DataLoader

from shmloader import MultimodalConfig, Options, ShmMultimodalDataset
from shmloader.errors import ServiceError, ShmloaderError

OPTIONS = Options(ring_bytes="1MiB", prefetchers=1, timeout_s=30)


@pytest.fixture
def leaks(tmp_path: Path) -> Any:
    # The first set of a process opens what stays: the batch ring of the process, modules.
    name = write_numbers(tmp_path / "w", 8)
    with ShmMultimodalDataset(dataset_name=name, process=number, options=OPTIONS) as dataset:
        list(DataLoader(dataset, 4, num_workers=1))
    del dataset
    gc.collect()
    with marked() as kin:
        yield Leaks(kin)


def test_ten_sets_leave_nothing(tmp_path: Path, leaks: Leaks) -> None:
    name = write_numbers(tmp_path / "d", 32)
    for _ in range(10):
        dataset = ShmMultimodalDataset(dataset_name=name, process=number, options=OPTIONS)
        assert int(dataset[31]["number"]) == 31
        dataset.close()
        del dataset
    leaks.check()


def test_an_epoch_with_workers_leaves_nothing(tmp_path: Path, leaks: Leaks) -> None:
    name = write_numbers(tmp_path / "d", 64)
    with ShmMultimodalDataset(dataset_name=name, process=number, options=OPTIONS) as dataset:
        for context in ("fork", "spawn"):
            list(DataLoader(dataset, 8, num_workers=2, multiprocessing_context=context))
    del dataset
    # The resource tracker of multiprocessing is started by spawn, and stays by design. A semaphore that is collected
    # after it was stopped starts it again: the loaders' queues keep theirs until their threads have ended.
    wait_until(lambda: set(threading.enumerate()) <= leaks.threads)
    gc.collect()
    from multiprocessing import resource_tracker

    resource_tracker._resource_tracker._stop()
    leaks.check()


def test_an_abandoned_epoch_leaves_nothing(tmp_path: Path, leaks: Leaks) -> None:
    name = write_numbers(tmp_path / "d", 64)
    with ShmMultimodalDataset(dataset_name=name, process=number, options=OPTIONS) as dataset:
        batches = iter(DataLoader(dataset, 4, num_workers=2))
        next(batches)
        del batches
    del dataset
    leaks.check()


def test_a_set_that_is_forgotten_leaves_nothing(tmp_path: Path, leaks: Leaks) -> None:
    dataset = ShmMultimodalDataset(dataset_name=write_numbers(tmp_path / "d", 32), process=number, options=OPTIONS)
    assert int(dataset[31]["number"]) == 31
    del dataset
    leaks.check()


def test_a_set_whose_supervisor_was_started_again_leaves_nothing(tmp_path: Path, leaks: Leaks) -> None:
    from support_sets import Gate, gated

    gate, name = Gate(tmp_path / "gate"), write_numbers(tmp_path / "d", 64)
    with ShmMultimodalDataset(dataset_name=name, process=gated(gate, 16), options=OPTIONS) as dataset:
        victim = supervisor_of(dataset)
        kill(victim)
        wait_for_end(victim)
        gate.open()
        assert int(dataset[63]["number"]) == 63
    del dataset
    gate.close()
    leaks.check()


def test_a_sample_that_outlives_its_set_keeps_the_mapping_and_nothing_else(tmp_path: Path, leaks: Leaks) -> None:
    name = write_pictures(tmp_path / "d", 8)
    config = MultimodalConfig(vision_dim=16)
    with ShmMultimodalDataset(config, dataset_name=name, options=OPTIONS) as dataset:
        sample = dataset[3]
    del dataset
    gc.collect()
    wait_until(lambda: leaks.kin() == [])
    assert {fd: what for fd, what in descriptors().items() if fd not in leaks.descriptors} == {}
    assert int(sample["labels"]) == 3
    del sample
    leaks.check()


def bad_process(row: dict[str, Any]) -> dict[str, Any]:
    return {}


class Unloadable:
    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return row

    def __reduce__(self) -> Any:
        return (int, ("not a number",))


ERRORS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "unknown dataset": lambda path: {"dataset_name": str(path / "missing")},
    "unknown split": lambda path: {"dataset_name": write_numbers(path / "d", 8), "split": "nope", "process": number},
    "empty": lambda path: {"dataset_name": write_numbers(path / "d", 0), "process": number},
    "columns": lambda path: {"dataset_name": write_numbers(path / "d", 8)},
    "too large": lambda path: {
        "dataset_name": write_pictures(path / "d", 64),
        "options": Options(ring_bytes=16384, prefetchers=1),
    },
    "unpicklable": lambda path: {
        "dataset_name": write_numbers(path / "d", 8),
        "process": lambda row, lock=threading.Lock(): row,  # noqa: B008
    },
    "unloadable": lambda path: {"dataset_name": write_numbers(path / "d", 8), "process": Unloadable()},
    "option": lambda path: {"dataset_name": write_numbers(path / "d", 8), "process": 3},
}


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_at_construction_leaves_nothing(tmp_path: Path, leaks: Leaks, kind: str) -> None:
    arguments = ERRORS[kind](tmp_path)
    for _ in range(2):
        with pytest.raises(ShmloaderError):
            ShmMultimodalDataset(**{"options": OPTIONS, **arguments})
    leaks.check()


def test_an_interrupted_constructor_leaves_nothing(
    tmp_path: Path, leaks: Leaks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(fd: int, log: Any) -> bytes:
        wait_until(lambda: services(leaks.kin()))
        raise KeyboardInterrupt

    monkeypatch.setattr("shmloader.prefetch.launch._read_line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ShmMultimodalDataset(dataset_name=write_numbers(tmp_path / "d", 8), process=number, options=OPTIONS)
    leaks.check()


def test_a_service_that_cannot_be_started_leaves_nothing(
    tmp_path: Path, leaks: Leaks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ServiceError, match="/nowhere/python"):
        ShmMultimodalDataset(dataset_name=write_numbers(tmp_path / "d", 8), process=number, options=OPTIONS)
    leaks.check()


def test_a_read_that_fails_leaves_nothing(tmp_path: Path, leaks: Leaks) -> None:
    name = write_numbers(tmp_path / "d", 8)
    with (
        ShmMultimodalDataset(dataset_name=name, process=bad_process, options=OPTIONS) as dataset,
        pytest.raises(ShmloaderError),
    ):
        dataset[0]
    del dataset
    leaks.check()


# ---- /dev/shm ----------------------------------------------------------------------------------------

EPOCH = """
import os, sys
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory
from shmloader import MultimodalConfig, Options, ShmMultimodalDataset

def main(name, way, context):
    options = Options(ring_bytes="64MiB", prefetchers=1, timeout_s=40)
    with ShmMultimodalDataset(MultimodalConfig(vision_dim=64), dataset_name=name, options=options) as dataset:
        size = None if way == "samples" else 16
        loader = DataLoader(dataset, size, shuffle=True, num_workers=2, multiprocessing_context=context)
        if way == "pinned":
            torch.Tensor.pin_memory = lambda tensor, *device: tensor.clone()
            batches = [pin_memory(batch) for batch in loader]
        elif way == "list":
            batches = list(loader)
        else:
            return sorted(label for batch in loader for label in batch["labels"].reshape(-1).tolist())
        return sorted(label for batch in batches for label in batch["labels"].reshape(-1).tolist())

if __name__ == "__main__":
    print(main(*sys.argv[1:]) == list(range(256)))
    print([name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")])
"""


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.parametrize("way", ["batches", "list", "samples", "pinned"])
def test_an_epoch_with_a_tiny_dev_shm(tmp_path: Path, way: str, context: str) -> None:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, timeout=20, check=False).returncode:
        pytest.skip("this process may not make a mount namespace (unshare --mount)")
    name = write_pictures(tmp_path / "d", 256)
    (tmp_path / "epoch.py").write_text(EPOCH)
    inner = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", inner, "sh", sys.executable, str(tmp_path / "epoch.py")]
    done = subprocess.run(
        [*command, name, way, context], capture_output=True, text=True, timeout=55, check=False, env=os.environ
    )
    assert (done.returncode, done.stdout) == (0, "True\n[]\n"), done.stderr
    assert "Bus error" not in done.stderr


# ---- warnings ----------------------------------------------------------------------------------------

QUIET = """
import sys
from torch.utils.data import DataLoader
from shmloader import MultimodalConfig, Options, ShmMultimodalDataset

if __name__ == "__main__":
    options = Options(ring_bytes="64MiB", prefetchers=2, timeout_s=40)
    with ShmMultimodalDataset(MultimodalConfig(vision_dim=16), dataset_name=sys.argv[1], options=options) as dataset:
        sample = dataset[0]
        for context in ("fork", "spawn"):
            for batch in DataLoader(dataset, 16, shuffle=True, num_workers=2, multiprocessing_context=context):
                pass
    print("done")
"""


def test_the_main_path_gives_no_warning(tmp_path: Path) -> None:
    name = write_pictures(tmp_path / "d", 64)
    status, out, err = run_script(tmp_path, QUIET, name, flags=["-W", "error", "-X", "dev"])
    assert (status, out, err) == (0, "done\n", "")
