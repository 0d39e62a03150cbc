"""Memory as the kernel counts it."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection

from shmloader.cli.memory import ProcessMemory, job_memory, process_memory, summed

_MIB = 1 << 20


def test_own_memory_grows_by_what_is_touched() -> None:
    """64 MiB of private pages show in PSS, and their page tables (8 bytes a page) beside it."""
    before = process_memory(os.getpid())
    with mmap.mmap(-1, 64 * _MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        pages[:] = b"x" * len(pages)
        after = process_memory(os.getpid())
        assert before is not None
        assert after is not None
        assert after.pss_bytes - before.pss_bytes > 60 * _MIB
        assert after.page_table_bytes > 0
        assert after.total_bytes == after.pss_bytes + after.page_table_bytes


def test_ended_process_has_none() -> None:
    """A process that is gone, and one that nobody has waited for yet."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_memory(child.pid) is None
    child.wait()
    assert process_memory(child.pid) is None


def test_job_counts_shared_pages_once() -> None:
    """Pages that a worker shares with this process are halved in each, so that the sum has them once."""
    with mmap.mmap(-1, 64 * _MIB, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) as pages:
        pages[:] = b"x" * len(pages)
        alone = job_memory().training
        ours, theirs = multiprocessing.Pipe()
        worker = multiprocessing.get_context("fork").Process(target=_touch, args=(pages, theirs))
        worker.start()
        ours.recv()
        job = job_memory(service_pids=[os.getpid()])
        ours.send(None)
        worker.join()
    assert [memory.pid for memory in job.workers] == [worker.pid]
    assert [memory.pid for memory in job.services] == [os.getpid()]
    assert job.training.pss_bytes < alone.pss_bytes - 20 * _MIB
    assert job.workers[0].pss_bytes > 30 * _MIB
    assert job.total == summed([job.training, *job.workers, *job.services])


def test_nothing_sums_to_nothing() -> None:
    """No processes, no memory."""
    assert summed([]) == ProcessMemory(0, 0, 0)


def _touch(pages: mmap.mmap, parent: Connection) -> None:
    pages.seek(0)
    assert len(pages.read()) == len(pages)
    parent.send("ready")
    parent.recv()
