"""The file on local disk that holds encoded chunks: made by the process that opens a set, unlinked, of a bounded size.

It is sparse: what is written takes room of the disk, and is given back when the last process of the set is gone.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from shmloader.errors import OptionError
from shmloader.options import Options

PAGE = 4096
#: As many bytes as the core can tell places of (SHML_MAX_SPILL_BYTES).
MOST_BYTES = 1 << 44
#: File systems that keep their files in memory, which is what must not be filled.
_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}


@dataclass(frozen=True)
class SpillFile:
    """fd: of the file, closed by its user; None: there is none. why_not: in words, where there is none.

    num_bytes: most that is written; 0 where there is none. folder: where it lies, for messages.
    """

    fd: int | None
    num_bytes: int
    folder: str = ""
    why_not: str = ""


def make_spill_file(options: Options) -> SpillFile:
    """The file that ``options`` say, empty.

    Raises:
        OptionError: there is none in the folder that was asked for.
    """
    if options.spill_size().num_bytes == 0:
        return SpillFile(None, 0, why_not="that is turned off (SHMLOADER_SPILL_BYTES is 0)")
    if options.spill_dir is not None:
        try:
            return _make(options.spill_dir, options)
        except OSError as error:
            raise OptionError(
                f"spill_dir={options.spill_dir!r} cannot hold encoded chunks (spill_bytes: {options.spill_bytes}): "
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
                return _make(folder, options)
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
        mountinfo = Path("/proc/self/mountinfo").read_text()
    for line in mountinfo.splitlines():
        mount, _, system = line.partition(" - ")
        if mount.split()[2] == name:
            return system.split()[0] in _IN_MEMORY
    return False


def _make(folder: str, options: Options) -> SpillFile:
    """Raises an OSError: it cannot be made, be as large, or be mapped."""
    space = os.statvfs(folder)
    num_bytes = options.spill_size().resolve(space.f_bavail * space.f_frsize)
    num_bytes = min(max(num_bytes // PAGE * PAGE, PAGE), MOST_BYTES)
    with tempfile.TemporaryFile(prefix="shmloader-", dir=folder, buffering=0) as file:  # O_TMPFILE, else unlinked
        os.ftruncate(file.fileno(), num_bytes)
        mmap.mmap(file.fileno(), PAGE, mmap.MAP_SHARED, mmap.PROT_READ).close()  # some network file systems cannot
        # A descriptor of its own; not below 3, where a standard stream is closed.
        fd = fcntl.fcntl(file.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
    return SpillFile(fd, num_bytes, folder)
