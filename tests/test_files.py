"""The files of a set: made, laid out, sealed, attached to."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from typing import Any

import pytest
from support_sets import descriptors, in_child, join, put, read, ring_files

import shmloader._native as native
from shmloader.errors import PoisonedError
from shmloader.files import RingFiles, memory_limits
from shmloader.ring import Ring

PAGE = 4096


def test_the_ring_has_room_for_all_regions_and_takes_no_memory_yet() -> None:
    with ring_files(resident_bytes=5 * PAGE, transit_bytes=3 * PAGE, raw_bytes=2 * PAGE) as files:
        assert files.file_bytes == 10 * PAGE
        assert os.fstat(files.ring_fd).st_blocks == 0


@pytest.mark.parametrize("transit_bytes", [0, 2 * PAGE])
def test_a_process_that_attaches_finds_the_sizes(transit_bytes: int) -> None:
    with ring_files(num_rows=9, resident_bytes=5 * PAGE, transit_bytes=transit_bytes, raw_bytes=PAGE) as files:
        ring = Ring(files, native.OWNER)
        stats = ring.segment.stats()
        names = ("resident_bytes", "transit_bytes", "raw_bytes", "num_records", "chunks_todo")
        assert [stats[name] for name in names] == [5 * PAGE, transit_bytes, PAGE, 9, 3]
        assert ring.has_transit == (transit_bytes > 0)
        assert ring.segment.check() is None


def test_sizes_of_ring_and_control_are_sealed() -> None:
    with ring_files() as files:
        for fd in (files.ring_fd, files.control_fd):
            assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & (fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK) == 6


def test_attaching_before_the_control_is_laid_out_is_an_error() -> None:
    files = RingFiles.create()
    try:
        with pytest.raises((OSError, ValueError, PoisonedError)):
            Ring(files, native.OWNER)
    finally:
        files.close()


@pytest.mark.parametrize("num_made", [0, 1, 2])
def test_files_that_cannot_be_made_leave_no_descriptor(monkeypatch: pytest.MonkeyPatch, num_made: int) -> None:
    make, made = os.memfd_create, []

    def refusing(*args: Any) -> int:
        if len(made) == num_made:
            raise OSError(errno.EMFILE, "Too many open files")
        made.append(make(*args))
        return made[-1]

    before = descriptors()
    monkeypatch.setattr(os, "memfd_create", refusing)
    with pytest.raises(OSError, match="Too many open files"):
        RingFiles.create()
    assert len(made) == num_made
    assert descriptors() == before


def test_closed_files_leave_no_descriptor() -> None:
    before = descriptors()
    with ring_files() as files:
        assert len(descriptors()) == len(before) + len(files.fds)
    assert descriptors() == before


def test_files_never_take_the_place_of_a_closed_standard_stream() -> None:
    def work() -> None:
        for fd in (0, 1, 2):
            os.close(fd)
        assert min(RingFiles.create().fds) > 2

    assert join(in_child(work)) == 0


def test_sets_have_different_names() -> None:
    with ring_files() as one, ring_files() as other:
        assert one.uuid != other.uuid


# ---- attachments ---------------------------------------------------------------------------------------


def test_a_reader_cannot_make_its_mapping_writable() -> None:
    with ring_files() as files:
        reader = Ring(files, native.OWNER)
        view = memoryview(reader.mapping.view(0, 4096))
        with open("/proc/self/maps") as maps:  # noqa: PTH123
            lines = [line for line in maps if "memfd:shmloader-ring-" + files.uuid[:8] in line]
        assert [line.split()[1] for line in lines] == ["r--s"]
        address = int(lines[0].split("-")[0], 16)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == -1
        del view


def test_a_forked_child_knows_that_the_attachment_is_not_its_own() -> None:
    with ring_files() as files:
        ring = Ring(files, native.OWNER)
        assert ring.is_home
        assert join(in_child(lambda: os._exit(3 if not ring.is_home else 4))) == 3


def test_a_client_that_left_is_not_counted() -> None:
    with ring_files() as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)
        assert service.segment.count(native.OWNER) == 1
        reader.leave()
        assert service.segment.count(native.OWNER) == 0


@pytest.mark.parametrize("transit_bytes", [0, PAGE])
def test_views_outlive_the_files_and_the_attachment(transit_bytes: int) -> None:
    with ring_files(resident_bytes=PAGE, transit_bytes=transit_bytes) as files:
        service, reader = Ring(files, native.SERVICE), Ring(files, native.OWNER)
        put(service, 3, b"three")
        assert read(reader, 3, 5) == b"three"
        view = reader.get_many([3], 30).record(0)
        reader.leave()
    del service, reader
    assert bytes(view[:5]) == b"three"


def test_memory_limits_name_what_limits() -> None:
    limit, available, what = memory_limits()
    assert limit >= available > 0
    assert what
