"""The file on local disk that holds encoded chunks: made by the process that opens a set, unlinked, of a bounded size.

It is sparse: what is written takes room of the disk, and is given back when the last process of the set is gone.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shmloader.errors import OptionError
from shmloader.options import DEFAULT_SPILL, Options

PAGE = 4096
#: The largest file of ext4, which has 32 bits for its blocks (kernel.org, ext4, "Blocks"): a page less than what the
#: core can tell places of (SHML_MAX_SPILL_BYTES).
MOST_BYTES = (1 << 44) - PAGE
_MOUNTS = Path("/proc/self/mountinfo")
#: File systems that keep their files in memory, which is what must not be filled.
_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}


@dataclass(frozen=True)
class SpillFile:
    """fd: of the file, closed by its user; None: there is none. why_not: in words, where there is none.

    num_bytes: most that is written; 0 where there is none. folder: where it lies, for messages. device: the disk's.
    """

    fd: int | None
    num_bytes: int
    folder: str = ""
    device: int = 0
    why_not: str = ""


def make_spill_file(options: Options, given_bytes: Callable[[int], int] = lambda device: 0) -> SpillFile:
    """The file that ``options`` say, empty.

    given_bytes: of the default share of that disk, what others have been given already.

    Raises:
        OptionError: there is none in the folder that was asked for.
    """
    if options.spill_size().num_bytes == 0:
        return SpillFile(None, 0, why_not="that is turned off (SHMLOADER_SPILL_BYTES is 0)")
    if options.spill_dir is not None:
        try:
            return _make(options.spill_dir, options, given_bytes)
        except OSError as error:
            size = DEFAULT_SPILL if options.spill_bytes is None else options.spill_bytes
            raise OptionError(
                f"spill_dir={options.spill_dir!r} cannot hold encoded chunks (spill_bytes: {size}): "
                f"{error.strerror}. Set SHMLOADER_SPILL_DIR (or Options.spill_dir) to a folder on a local disk that "
                "can be written to, or SHMLOADER_SPILL_BYTES=0 to do without.",
                name="spill_dir",
                value=options.spill_dir,
                allowed="a folder on a local disk that can be written to",
            ) from error
    reasons = []
    for folder in _default_folders():
        try:
            if is_in_memory(folder):
                reasons.append(f"{folder} is in memory")
            else:
                return _make(folder, options, given_bytes)
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
    return SpillFile(None, 0, why_not=f"no folder was found for them ({'; '.join(reasons)})")


def _default_folders() -> list[str]:
    """Those that are tried when nobody said which, best first."""
    return [folder for folder in (os.environ.get("TMPDIR"), "/var/tmp", "/tmp") if folder]


def is_in_memory(folder: str, mountinfo: str | None = None) -> bool:
    """Whether the files of ``folder`` lie in memory, by the type of the file system that it is mounted from.

    mountinfo: what /proc/self/mountinfo says (proc(5): major:minor is the third field; the type follows the hyphen). A
    device that is not in it, as of a subvolume of btrfs, is on a disk.

    Raises:
        OSError: there is no such folder.
    """
    device = Path(folder).stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    if mountinfo is None:
        mountinfo = _MOUNTS.read_text(errors="surrogateescape")  # names of folders are bytes
    for line in mountinfo.splitlines():
        mount, _, system = line.partition(" - ")
        if mount.split()[2] == name:
            return system.split()[0] in _IN_MEMORY
    return False


def _make(folder: str, options: Options, given_bytes: Callable[[int], int]) -> SpillFile:
    """Raises an OSError: it cannot be made, be as large, or be mapped."""
    device = Path(folder).stat().st_dev
    num_bytes = _num_bytes(os.statvfs(folder), options, given_bytes(device))
    with tempfile.TemporaryFile(prefix="shmloader-", dir=folder, buffering=0) as file:  # O_TMPFILE, else unlinked
        os.ftruncate(file.fileno(), num_bytes)
        mmap.mmap(file.fileno(), PAGE, mmap.MAP_SHARED, mmap.PROT_READ).close()  # some network file systems cannot
        # A descriptor of its own; not below 3, where a standard stream is closed.
        fd = fcntl.fcntl(file.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
    return SpillFile(fd, num_bytes, folder, device)


def _num_bytes(space: os.statvfs_result, options: Options, given_bytes: int) -> int:
    """What was asked for, else what is left of the default share; no more than the disk is large, which is more than
    can ever be written, while many file systems refuse a sparse file that is larger.
    """
    num_bytes = options.spill_size().resolve(space.f_bavail * space.f_frsize)
    if options.spill_bytes is None:
        num_bytes = max(num_bytes - given_bytes, num_bytes // 8)
    disk_bytes = space.f_blocks * space.f_frsize or MOST_BYTES  # 0: it does not tell
    return max(min(num_bytes, disk_bytes, MOST_BYTES) // PAGE * PAGE, PAGE)
