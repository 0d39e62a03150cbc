"""Workers without a slot in the table of clients that iterate: they can where all stays, and say why not elsewhere."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from conftest import opened
from support_guests import full_table
from support_sets import wait_until, write_table
from support_streams import counted, numbers, open_stream, stream_of
from torch.utils.data import DataLoader

from shmloader import ShmMultimodalIterableDataset
from shmloader.errors import RingError

pytestmark = pytest.mark.timeout(100)


def test_workers_without_a_slot_share_out_what_is_all_in_the_ring(tmp_path: Path) -> None:
    table = {"text": [f"text {i}" for i in range(200)], "label": list(range(200))}
    with opened(write_table(tmp_path, table), ShmMultimodalIterableDataset) as dataset:
        wait_until(lambda: dataset.stats().samples_ready == 200 and not dataset.stats().prefetchers)
        with full_table(dataset._reader.files.ring):
            loader = DataLoader(dataset, 8, num_workers=2, multiprocessing_context="fork")
            assert sorted(itertools.chain(*(batch["labels"].tolist() for batch in loader))) == list(range(200))
            assert dataset.stats().guest_reads == 200


def test_a_worker_without_a_slot_says_why_it_cannot_take_part_in_a_stream() -> None:
    with open_stream(stream_of(counted, num=100)) as dataset:
        assert next(iter(dataset)) is not None
        with full_table(dataset._reader.files.ring):
            loader = DataLoader(dataset, None, num_workers=1, multiprocessing_context="fork")
            with pytest.raises(RingError, match=r"all slots of its set's table of clients .* Use fewer workers"):
                next(iter(loader))
        assert sorted(numbers(DataLoader(dataset, None, num_workers=2, multiprocessing_context="fork"))) == list(
            range(100)
        )
