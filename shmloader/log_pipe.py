"""What the services of a set log, shown by the logging of the training process.

::

    supervisor, planner, prefetchers ──write──▶ pipe ──read──▶ the process that made the set ──▶ logging.getLogger(name)
    (prefetch/service_log.py)              whole records           (here, in passing)            the user's handlers

A record is one line of JSON, written at once and no longer than PIPE_BUF, so that those of several writers never mix
and a writer that is killed leaves all of it or nothing (pipe(7)). Both ends are non-blocking: no service waits for
whoever reads. Where nobody does (the pipe is full, or its reader is gone) a service writes the record to its stderr
instead, so each is shown once, in one place or the other.

No thread reads. The process that made the set looks in whenever it enters this package anyway: while it waits, when it
reads samples, receives a batch, asks for `stats`, closes, and at exit. Other processes of the set have the writing end
alone, for a supervisor that they may have to start.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import logging
import os
import threading
import time
from typing import Any

log = logging.getLogger("shmloader")

#: What a pipe holds where the kernel lets it (what an unprivileged process may ask for: pipe(7), pipe-max-size): some
#: 3,000 records. It takes memory only for what is in it.
PIPE_BYTES = 1 << 20
#: How often a process that reads sample after sample looks in (guessed: 10 looks a second cost nothing).
LOOK_S = 0.1
#: Most bytes that one look shows: writers that never cease must not keep a reader.
MOST_BYTES = 1 << 20

#: Those that this process reads.
_pipes: list[LogPipe] = []
_look_at = 0.0
#: The process that has asked to look in when it ends.
_ends_with = -1


class LogPipe:
    """This process's ends of a set's log pipe. Thread-safe.

    write_fd: what services inherit. read_fd: of the process that made the set, -1 elsewhere.
    """

    def __init__(self, write_fd: int, read_fd: int = -1) -> None:
        self.write_fd, self._read_fd = write_fd, read_fd
        self._lock = threading.RLock()
        self._is_busy = self._is_closing = False
        self._rest = b""
        if read_fd >= 0:
            _pipes.append(self)

    @classmethod
    def make(cls) -> LogPipe:
        """A new pipe, read by this process."""
        reader, writer = _apart(os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
        try:
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError as error:  # this user's pipes have all that they may: the usual 64 KiB hold 200 records
            log.debug("the log pipe stays small: %s", error)
        _look_in_at_the_end()
        return cls(writer, reader)

    @property
    def read_fd(self) -> int:
        """To be polled for records; -1: this process does not read them."""
        return self._read_fd

    def show(self) -> bool:
        """Hand what has come to this process's loggers. False: it did not, since another thread, or a handler, does."""
        if self._read_fd < 0 or not self._lock.acquire(blocking=False):
            return False
        is_first = not self._is_busy  # else a handler, called by us, came here
        try:
            if is_first:
                self._is_busy = True
                try:
                    self._show()
                finally:
                    self._is_busy = False
        finally:
            self._lock.release()
            if is_first and self._is_closing:  # by a handler, or by another thread while it found us here
                self._end()
        return is_first

    def _show(self) -> None:
        shown = 0
        while self._read_fd >= 0 and shown < MOST_BYTES:
            try:
                data = os.read(self._read_fd, 1 << 16)
            except BlockingIOError:
                return
            shown += len(data)
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                _handle(line)

    def close(self) -> None:
        """Show what has come, and close the ends of this process: services use their stderr from now on.

        Where another thread, or a handler that calls this, is showing records, it closes them once it has shown all.
        """
        if self in _pipes:
            _pipes.remove(self)
        self._is_closing = True  # before it is seen whether somebody shows: who does looks at this after
        self._end()

    def _end(self) -> None:
        """Close the ends, unless somebody reads, who will come here."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._is_busy:
                return
            if self._read_fd >= 0:
                self._is_busy = True
                try:
                    self._show()
                finally:
                    self._is_busy = False
            ends, self.write_fd, self._read_fd = (self.write_fd, self._read_fd), -1, -1
            for fd in ends:
                if fd >= 0:
                    os.close(fd)
        finally:
            self._lock.release()

    def leave_to_parent(self) -> None:
        """In a forked child: what comes is its parent's to show, and services are to notice when that is gone."""
        reader, self._read_fd = self._read_fd, -1
        self._lock = threading.RLock()  # another thread of the parent may have held it
        if reader >= 0:
            os.close(reader)


def show() -> None:
    """Show what the services of all sets that this process made have logged."""
    for pipe in list(_pipes):
        pipe.show()


def show_if_due() -> None:
    """`show`, if the last time is `LOOK_S` ago; for where samples are read: costs a look at the clock."""
    global _look_at
    if _pipes and (now := time.monotonic()) >= _look_at:
        _look_at = now + LOOK_S
        show()


def _handle(line: bytes) -> None:
    try:
        told: dict[str, Any] = json.loads(line)
        record = logging.makeLogRecord(told)
        logger = logging.getLogger(record.name)
        is_enabled = logger.isEnabledFor(record.levelno)
    except (ValueError, TypeError) as error:  # nobody writes such a line; a loop that trains must not end for it
        log.warning("what came through the log pipe is no record (%s): %.200r", error, line)
        return
    if is_enabled:
        logger.handle(record)


def _apart(ends: tuple[int, int]) -> tuple[int, int]:
    """``ends``, not in the place of a standard stream that is closed."""
    moved = [fd if fd > 2 else fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in ends]
    for old, new in zip(ends, moved, strict=True):
        if new != old:
            os.close(old)
    return moved[0], moved[1]


def _look_in_at_the_end() -> None:
    """Have the end of this process show what is left, as long as its handlers work."""
    global _ends_with
    if _ends_with == os.getpid():
        return
    if _ends_with < 0:
        atexit.register(show)  # after `logging` has, so it comes before the handlers are closed
    _ends_with = os.getpid()
    from multiprocessing import util

    # A child of multiprocessing ends without `atexit`; what it inherited of this kind was taken from it.
    util.Finalize(None, show, exitpriority=0)


def _after_fork() -> None:
    for pipe in _pipes:
        pipe.leave_to_parent()
    _pipes.clear()


os.register_at_fork(after_in_child=_after_fork)
