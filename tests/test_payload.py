"""What services are told: the user's objects, and the memory of datasets beside them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from shmloader.prefetch.payload import Work, read_work, write
from shmloader.sources.base import SourceRequest


def sent(dataset: Any, process: Any = None) -> tuple[Work, int]:
    """What a service gets, and the bytes that it was sent."""
    fd = write(Work((SourceRequest(dataset, "train"),), None, None, process), {})
    try:
        return read_work(fd), os.fstat(fd).st_size
    finally:
        os.close(fd)


def test_a_dataset_in_memory_is_read_in_place_from_what_was_sent():
    table = pa.table({"text": ["x" * 1000] * 5000, "n": list(range(5000))})
    before = pa.total_allocated_bytes()
    work, num_bytes = sent(Dataset(table).select(range(4000)))
    assert pa.total_allocated_bytes() - before < 1 << 20
    assert table.nbytes < num_bytes < table.nbytes + (1 << 20)
    found = work.requests[0].dataset
    assert len(found) == 4000
    assert found[3999] == {"text": "x" * 1000, "n": 3999}
    buffers = found.data.table.column("text").chunk(0).buffers()
    large = [buffer for buffer in buffers if buffer is not None and buffer.size >= 1 << 20]  # small ones are copied
    assert large
    assert all(buffer.address % 64 == 0 for buffer in large)


def test_an_array_of_the_user_can_be_written_to_and_others_do_not_see_it():
    array = np.zeros(1 << 20)
    strided = np.asfortranarray(np.arange(1 << 18, dtype=np.float64).reshape(512, 512))[::2]

    def process(row: dict[str, Any]) -> dict[str, Any]:
        array[0] += 1
        return {"n": array[0], "sum": strided.sum()}

    fd = write(Work((SourceRequest("x", "train"),), None, None, process), {})
    for _ in range(2):  # two services
        found = read_work(fd).process
        assert [found({}), found({})] == [{"n": n, "sum": strided.sum()} for n in (1, 2)]
    os.close(fd)
    assert array[0] == 0
