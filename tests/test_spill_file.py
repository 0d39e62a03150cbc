"""The file on disk for encoded chunks: where it is made, how large it may get, and that it has no name."""

from __future__ import annotations

import fcntl
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import shmloader.spill_file
from shmloader import Options
from shmloader.errors import OptionError
from shmloader.spill_file import MOST_BYTES, SpillFile, is_in_memory, make_spill_file

MOUNTS = """22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 {device} / / rw,relatime shared:1 - {kind} /dev/vda rw,discard
30 25 0:27 / /dev/shm rw,relatime - tmpfs tmpfs rw,size=24684096k
"""


@contextmanager
def made(**options: Any) -> Iterator[SpillFile]:
    file = make_spill_file(Options(**options))
    try:
        yield file
    finally:
        if file.fd is not None:
            os.close(file.fd)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Folders of which "memory" lies in memory; the default ones are "memory", "missing" and "disk"."""
    found = {name: str(tmp_path / name) for name in ("memory", "missing", "disk")}
    for name in ("memory", "disk"):
        Path(found[name]).mkdir()
    monkeypatch.setattr(shmloader.spill_file, "_default_folders", lambda: list(found.values()))
    is_real = is_in_memory
    monkeypatch.setattr(
        shmloader.spill_file, "is_in_memory", lambda folder: is_real(folder) or folder == found["memory"]
    )
    return found


# ---- which folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"), [("tmpfs", True), ("ramfs", True), ("ext4", False), ("xfs", False), ("overlay", False)]
)
def test_a_folder_is_in_memory_by_the_type_of_its_mount(tmp_path: Path, kind: str, expected: bool) -> None:
    device = tmp_path.stat().st_dev
    mounts = MOUNTS.format(device=f"{os.major(device)}:{os.minor(device)}", kind=kind)
    assert is_in_memory(str(tmp_path), mounts) == expected


def test_a_device_that_is_not_mounted_by_its_number_is_a_disk(tmp_path: Path) -> None:
    assert not is_in_memory(str(tmp_path), MOUNTS.format(device="9999:9999", kind="tmpfs"))


def test_a_mount_whose_name_is_no_text_is_read_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path.stat().st_dev
    mounts = MOUNTS.format(device=f"{os.major(device)}:{os.minor(device)}", kind="tmpfs").encode()
    (tmp_path / "mountinfo").write_bytes(b"26 1 9999:9 / /mnt/\xff\xfe rw - ext4 /dev/vdb rw\n" + mounts)
    monkeypatch.setattr(shmloader.spill_file, "_MOUNTS", tmp_path / "mountinfo")
    assert is_in_memory(str(tmp_path))


def test_shared_memory_of_this_machine_is_in_memory() -> None:
    assert is_in_memory("/dev/shm")


def test_the_system_says_which_folders_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/scratch")
    assert shmloader.spill_file._default_folders() == ["/scratch", "/var/tmp", "/tmp"]
    monkeypatch.delenv("TMPDIR")
    assert shmloader.spill_file._default_folders() == ["/var/tmp", "/tmp"]


def test_the_first_folder_on_a_disk_that_can_be_written_to_is_taken(folders: dict[str, str]) -> None:
    with made() as file:
        assert (file.folder, file.why_not) == (folders["disk"], "")


def test_without_any_folder_there_is_no_file_and_why_is_told(folders: dict[str, str]) -> None:
    Path(folders["disk"]).rmdir()
    with made() as file:
        assert (file.fd, file.num_bytes) == (None, 0)
        assert f"{folders['memory']} is in memory" in file.why_not
        assert f"{folders['missing']}: No such file" in file.why_not


def test_a_folder_that_was_asked_for_is_taken_as_it_is(folders: dict[str, str]) -> None:
    with made(spill_dir=folders["memory"]) as file:
        assert file.folder == folders["memory"]


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_folder_that_was_asked_for_and_cannot_be_used_is_an_error_that_names_it(
    folders: dict[str, str], kind: str
) -> None:
    folder = folders["missing"]
    if kind == "file":
        Path(folder).touch()
    with pytest.raises(OptionError) as caught, made(spill_dir=folder):
        pass
    assert all(part in str(caught.value) for part in (folder, "SHMLOADER_SPILL_DIR", "SHMLOADER_SPILL_BYTES=0"))
    assert (caught.value.name, caught.value.value) == ("spill_dir", folder)


def test_what_is_turned_off_needs_no_folder(tmp_path: Path) -> None:
    with made(spill_bytes=0, spill_dir=str(tmp_path / "missing")) as file:
        assert (file.fd, file.num_bytes) == (None, 0)
        assert "SHMLOADER_SPILL_BYTES is 0" in file.why_not


# ---- the file --------------------------------------------------------------------------------------------------


def test_the_file_has_no_name_and_takes_no_room(folders: dict[str, str]) -> None:
    with made(spill_bytes="1GiB") as file:
        assert file.fd is not None
        found = os.fstat(file.fd)
        assert (found.st_nlink, found.st_size) == (0, 1 << 30)
        assert found.st_blocks * 512 <= 1 << 20
        assert list(Path(folders["disk"]).iterdir()) == []
        assert fcntl.fcntl(file.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


@pytest.mark.parametrize(("size", "num_bytes"), [(1, 4096), (4097, 4096), ("1MiB", 1 << 20)])
def test_a_size_in_bytes_is_taken_to_whole_pages(folders: dict[str, str], size: Any, num_bytes: int) -> None:
    with made(spill_bytes=size) as file:
        assert file.num_bytes == num_bytes


def have_disk(monkeypatch: pytest.MonkeyPatch, folder: str, pages: int, free_pages: int) -> None:
    real = os.statvfs(folder)

    def statvfs(path: str) -> Any:
        assert path == folder
        fields = list(real)
        fields[1:5] = 4096, pages, free_pages, free_pages  # f_frsize, f_blocks, f_bfree, f_bavail
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", statvfs)


def test_a_share_is_of_what_is_free_on_that_disk(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    have_disk(monkeypatch, folders["disk"], 5000, 1000)
    with made(spill_bytes="25%") as file:
        assert file.num_bytes == 250 * 4096


@pytest.mark.parametrize(
    ("given_pages", "spill_bytes", "num_pages"),
    [(0, None, 100), (30, None, 70), (90, None, 12), (1000, None, 12), (90, "10%", 100), (90, 4096 * 50, 50)],
)
def test_of_the_default_share_is_what_others_were_not_given(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, given_pages: int, spill_bytes: Any, num_pages: int
) -> None:
    have_disk(monkeypatch, folders["disk"], 5000, 1000)
    given = {Path(folders["disk"]).stat().st_dev: given_pages * 4096}
    file = make_spill_file(Options(spill_bytes=spill_bytes), given.__getitem__)
    assert file.fd is not None
    os.close(file.fd)
    assert (file.num_bytes, file.device) == (num_pages * 4096, *given)


def test_the_largest_size_is_no_more_than_the_disk_has() -> None:
    folder = "/var/tmp"
    space = os.statvfs(folder)
    with made(spill_bytes="64TiB", spill_dir=folder) as file:
        assert file.fd is not None
        assert os.fstat(file.fd).st_size == file.num_bytes
        assert file.num_bytes == min(space.f_blocks * space.f_frsize // 4096 * 4096, MOST_BYTES)


@pytest.mark.parametrize("pages", [0, 1 << 33])
def test_no_file_is_larger_than_a_file_system_takes(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    have_disk(monkeypatch, folders["disk"], pages, 1000)
    assert MOST_BYTES == (16 << 40) - 4096  # of ext4
    sizes = []
    monkeypatch.setattr(os, "ftruncate", lambda fd, size: sizes.append(size))
    monkeypatch.setattr(shmloader.spill_file.mmap, "mmap", lambda *_: io.BytesIO())
    with made(spill_bytes="64TiB") as file:
        assert sizes == [file.num_bytes] == [MOST_BYTES]
