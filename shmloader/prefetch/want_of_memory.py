"""What a prefetcher does when Python has no memory: it ends, as if the kernel had ended it.

That gives back what it has, others try again what it was at, and only what fails three times, alone, is set aside: for
the row that was being decoded when memory ran out need not be the one that takes it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from typing import NoReturn

from shmloader.deaths import Deaths
from shmloader.errors import ShmloaderError
from shmloader.ring import Ring

log = logging.getLogger("shmloader.prefetcher")

#: Exit status of a prefetcher that ended so; its note (deaths.py) tells it for sure.
STATUS = errno.ENOMEM


def is_want_of_memory(error: BaseException) -> bool:
    """Whether Python, or a library, found no memory; not the ring, which tells by errors of its own."""
    return isinstance(error, MemoryError) and not isinstance(error, ShmloaderError)


def end_process(ring: Ring, error: BaseException) -> NoReturn:
    """End this process, with all that it has claimed, for others to do. From any thread."""
    Deaths(ring.files.deaths_fd).note_memory(ring.slot)
    with contextlib.suppress(MemoryError):
        log.error("ends for want of memory: %s: %s", type(error).__name__, error, exc_info=error)
        sys.stderr.flush()
    os._exit(STATUS)
