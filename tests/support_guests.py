"""A set's table of clients without a slot for another worker."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from support_sets import in_child, join

import shmloader._native as native
from shmloader.files import RingFiles, boot_id, pid_namespace


@contextmanager
def full_table(files: RingFiles, role: int = native.WORKER) -> Iterator[Callable[[], int]]:
    """Another process has all slots that ``role`` can get; gives a function that has it leave one, once."""
    ready, is_ready = os.pipe()
    go_on, going_on = os.pipe()

    def occupy() -> None:
        os.close(going_on)
        control = native.Mapping(files.control_fd, os.fstat(files.control_fd).st_size, True, "control")
        ring = native.Mapping(files.ring_fd, files.file_bytes, False, "ring")
        segments = []
        while True:
            segment = native.Segment(control, ring, files.lock_fd, boot_id(), pid_namespace())
            if segment.register(role, -1, 0) == native.CLIENTS:
                break
            segments.append(segment)
        os.write(is_ready, b"1")
        if os.read(go_on, 1):
            segments.pop().unregister()
            os.read(go_on, 1)

    child = in_child(occupy)
    os.close(is_ready)
    os.close(go_on)
    try:
        assert os.read(ready, 1) == b"1"
        yield lambda: os.write(going_on, b"1")
    finally:
        os.write(going_on, b"12")  # closing it does not do: workers that were forked meanwhile have it, too
        os.close(ready)
        os.close(going_on)
        assert join(child) == 0


class Waiting:
    """A thread that reads; `result` gives what it got, or raises what it raised."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._results: list[Any] = []
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(work,))
        self._thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self._results.append(work())
        except BaseException as error:
            self._errors.append(error)

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self._errors:
            raise self._errors[0]
        return self._results[0]
