"""Starting one service: a fresh interpreter that inherits the set's descriptors and nothing else.

It is told its role, the descriptors by their names, and who its parent is.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

_BOOT = str(Path(__file__).with_name("boot.py"))
#: What a service must not do: load torch, use more threads than its share, draw progress bars.
ENVIRONMENT = {
    "USE_TORCH": "0",
    "USE_TF": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # A decoder's temporaries are some 750 kB each. By default glibc gives them back to the kernel after every image
    # (568 page faults an image: 2.8-3.6 ms instead of 1.2-1.7, measured); with both set it keeps them. mallopt(3)
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}


def spawn(role: str, fds: dict[str, int]) -> subprocess.Popen[bytes]:
    """Start the service ``role``; it finds ``fds`` by their names, and writes to this process's stderr."""
    # Where this process was started with its standard streams closed, files of the set may lie in their places.
    moved = {name: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for name, fd in fds.items() if fd < 3}
    fds = fds | moved
    has_stderr = _is_inherited(2)
    try:
        return subprocess.Popen(
            [sys.executable, _BOOT, role, json.dumps(fds), str(os.getpid())],
            pass_fds=tuple(fds.values()),
            stdin=subprocess.DEVNULL,
            stdout=2 if has_stderr else subprocess.DEVNULL,
            stderr=None if has_stderr else subprocess.DEVNULL,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
    finally:
        for fd in moved.values():
            os.close(fd)


def _is_inherited(fd: int) -> bool:
    """Whether a child gets ``fd``: it is open, and not a file of ours in the place of a stream that was closed."""
    try:
        return not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    except OSError:
        return False
