"""Warnings of the services, which readers show."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from conftest import opened
from support_sets import in_child, join, write_table

import shmloader._native as native


@pytest.mark.parametrize("which", [native.TEXT_MEMORY, native.TEXT_REFETCH])
def test_a_warning_is_shown_once_though_the_worker_that_showed_it_is_gone(tmp_path: Path, which: int) -> None:
    with opened(write_table(tmp_path, {"text": ["a", "b"]})) as dataset:
        reader = dataset._reader
        reader.attach().segment.text_put(which, json.dumps({"message": "a warning"}).encode())

        def work() -> None:
            reader.attach()
            with pytest.warns(UserWarning, match="a warning"):
                reader._tick()

        assert join(in_child(work)) == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reader._tick()
