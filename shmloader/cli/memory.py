"""What the processes of a training job hold in memory, page tables included.

Counted as PSS: a page that n processes share counts for a n-th in each, so that the sum over all of them is
what the machine really holds. Page tables come on top: a process needs its own for the pages that it shares.

Source: proc(5): ``/proc/<pid>/smaps_rollup`` (Pss), ``/proc/<pid>/status`` (VmPTE).
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of one process, in bytes; or of several, summed (``pid`` is 0 then)."""

    pid: int
    pss_bytes: int
    page_table_bytes: int

    @property
    def total_bytes(self) -> int:
        """Pages and page tables."""
        return self.pss_bytes + self.page_table_bytes


@dataclass(frozen=True)
class JobMemory:
    """Memory of a training process, its DataLoader workers and the services of its dataset, at one time."""

    training: ProcessMemory
    workers: tuple[ProcessMemory, ...]
    services: tuple[ProcessMemory, ...]

    @property
    def total(self) -> ProcessMemory:
        """All of them together."""
        return summed((self.training, *self.workers, *self.services))


def process_memory(pid: int) -> ProcessMemory | None:
    """Memory of process ``pid``, or None if it has ended.

    Takes the kernel about a millisecond per GiB that the process has mapped.

    Raises:
        PermissionError: it is another user's.
    """
    folder = Path("/proc") / str(pid)
    try:
        pss = _kibibytes(folder / "smaps_rollup", "Pss:")
        page_tables = _kibibytes(folder / "status", "VmPTE:")
    except (FileNotFoundError, ProcessLookupError):
        return None
    if pss is None or page_tables is None:  # a zombie has neither
        return None
    return ProcessMemory(pid, pss * 1024, page_tables * 1024)


def job_memory(service_pids: Iterable[int] = (), worker_pids: Iterable[int] | None = None) -> JobMemory:
    """Memory of this process and of those that work for it; those that have ended are left out.

    worker_pids: its DataLoader workers; None: every child that was started with `multiprocessing`.
    """
    if worker_pids is None:
        worker_pids = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    training = process_memory(os.getpid())
    assert training is not None
    return JobMemory(training, _all_of(worker_pids), _all_of(service_pids))


def summed(processes: Iterable[ProcessMemory]) -> ProcessMemory:
    """What ``processes`` hold together."""
    pss_bytes = page_table_bytes = 0
    for process in processes:
        pss_bytes += process.pss_bytes
        page_table_bytes += process.page_table_bytes
    return ProcessMemory(0, pss_bytes, page_table_bytes)


def _all_of(pids: Iterable[int]) -> tuple[ProcessMemory, ...]:
    return tuple(memory for memory in map(process_memory, pids) if memory is not None)


def _kibibytes(file: Path, name: str) -> int | None:
    for line in file.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return None
