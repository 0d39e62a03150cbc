"""What a process has open, before and after."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from support_sets import descriptors, left_in_shm, names, wait_until


class Leaks:
    """What this process has open, compared with when the object was made."""

    def __init__(self, kin: Callable[[], list[int]]) -> None:
        self.kin = kin
        self.descriptors = descriptors()
        self.mappings = mapped()
        self.threads = set(threading.enumerate())
        self.children = children()
        self.shm = names("/dev/shm")

    def check(self) -> None:
        pids = self.kin()
        gc.collect()
        try:
            wait_until(lambda: self.kin() == [])
        except AssertionError as error:
            left = {pid: command_of(pid) for pid in self.kin()}
            raise AssertionError(f"processes are left: {left}") from error
        assert {fd: what for fd, what in descriptors().items() if fd not in self.descriptors} == {}
        assert mapped() - self.mappings == set()
        assert set(threading.enumerate()) - self.threads == set()
        assert children() - self.children == set()
        assert left_in_shm(self.shm, [os.getpid(), *pids]) == set()


def command_of(pid: int) -> str:
    """What a process was started as; empty if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def mapped() -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if "memfd:shmloader" in line}


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
