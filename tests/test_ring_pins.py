"""What a look-up leaves behind: no pin that nobody uses, no stamp of another thread ended, no lock of another file."""

from __future__ import annotations

import fcntl
import gc
import os
from array import array
from pathlib import Path

import pytest
from support_sets import in_child, join
from support_transit import block, is_there, transit, write

import shmloader._native as native
from shmloader.errors import DecodeError
from shmloader.ring import Ring


def test_errors_that_are_kept_pin_nothing() -> None:
    """Their tracebacks hold the frames of the look-up."""
    with transit() as (_, writer, reader):
        write(writer, 0, 1, 2)
        writer.put_error(3, DecodeError("no picture"))
        with pytest.raises(DecodeError) as caught:
            reader.get_many([0, 1, 2, 3], 30)
        assert caught.value.__traceback__ is not None
        assert reader.segment.pinned_bytes() == 0


def test_another_thread_s_look_up_leaves_what_a_waiting_one_has_found() -> None:
    with transit(4) as (_, writer, reader):
        write(writer, 0, 1, 2)
        reader.segment.get_many(array("Q", [0, 1, 9]), native.GET_POST, None)
        reader.get_many([2], 30)
        write(writer, 10, 11)
        assert [is_there(writer, row) for row in (0, 1)] == [True, True]


def test_a_client_that_left_with_views_keeps_its_slot_until_the_last_is_gone() -> None:
    """Else whoever has the slot next gives its pins back, or is taken for dead because of the free byte."""
    with transit() as (files, writer, reader):
        write(writer, 0)
        view = reader.get_many([0], 30).record(0)
        reader.leave()
        parent = os.getpid()

        def must_be_held() -> None:
            assert native.byte_holder(files.lock_fd, reader.slot) == parent

        assert join(in_child(must_be_held)) == 0
        assert Ring(files, native.OWNER).slot != reader.slot
        assert bytes(view) == block(0)
        del view
        assert Ring(files, native.OWNER).slot == reader.slot


def test_the_last_pin_of_a_closed_set_unlocks_nothing_of_other_files(tmp_path: Path) -> None:
    """The set's descriptors are closed before its last view dies, and their numbers are other files' then."""
    with transit() as (files, writer, reader):
        write(writer, 0)
        refs = reader.get_many([0], 30)
        lock_fd = os.dup(files.lock_fd)  # as `Reader.close` would have it: the number that the ring knows is reused
        reader.leave()
        path = tmp_path / "other"
        path.write_bytes(bytes(4096))
        other = os.open(path, os.O_RDWR)
        os.dup2(other, files.lock_fd)
        fcntl.lockf(files.lock_fd, fcntl.LOCK_EX, 512, 0)
        del refs
        gc.collect()
        try:
            assert join(in_child(lambda: _must_be_locked(path))) == 0
        finally:
            os.dup2(lock_fd, files.lock_fd)
            os.close(lock_fd)
            os.close(other)


def _must_be_locked(path: Path) -> None:
    with path.open("r+b") as file:
        for byte in range(512):
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            except OSError:
                continue
            raise AssertionError(f"byte {byte} is not locked")
