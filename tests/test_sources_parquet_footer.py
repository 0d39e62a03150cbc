"""The footers of Parquet files on a Hub: no more of the file than they have, and no file that is none."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shmloader.sources import parquet_footer
from shmloader.sources.parquet_footer import read_footer


class File:
    """A file that is read by ranges, which it keeps."""

    def __init__(self, num_columns: int = 2, num_rows: int = 20_000, group: int = 1000) -> None:
        out = io.BytesIO()
        pq.write_table(
            pa.table({f"column {i}": range(num_rows) for i in range(num_columns)}), out, row_group_size=group
        )
        self.data, self.ranges = out.getvalue(), []
        self.metadata = pq.read_metadata(pa.BufferReader(self.data))

    def read_at(self, offset: int, wanted: int) -> bytes:
        self.ranges.append((offset, wanted))
        return self.data[offset : offset + wanted]


@pytest.mark.parametrize("group", [100, 20_000])
def test_a_footer_is_read_by_two_requests_at_most_and_by_one_where_its_size_is_known(group):
    file = File(group=group)
    metadata, num_bytes = read_footer(file.read_at, len(file.data))
    assert metadata.equals(file.metadata)
    assert 0 < len(file.ranges) <= 2
    assert sum(wanted for _, wanted in file.ranges) <= max(num_bytes, len(file.data) // 100 + 8)
    file.ranges.clear()
    again, same = read_footer(file.read_at, len(file.data), num_bytes)
    assert again.equals(file.metadata)
    assert (same, file.ranges) == (num_bytes, [(len(file.data) - num_bytes, num_bytes)])


def test_a_file_that_is_no_parquet_or_cut_is_an_error():
    file = File()
    for data, told in (
        (b"", "does not end"),
        (b"PAR1", "should have|does not end"),
        (file.data[:-1], "does not end"),
        (b"PAR1" + file.data[-8:], "should have"),
    ):
        with pytest.raises(pa.ArrowInvalid, match=told):
            read_footer(lambda offset, wanted, data=data: data[offset : offset + wanted], len(data))


def test_footers_that_were_not_asked_for_longest_make_way(monkeypatch):
    monkeypatch.setattr(parquet_footer, "MOST_KEPT_BYTES", 100)
    footers = parquet_footer.Footers()
    metadata = File().metadata
    for shard in range(3):
        footers.keep(shard, metadata, 33)
    assert footers.get(0) is metadata
    footers.keep(3, metadata, 33)
    assert [footers.get(shard) is not None for shard in range(4)] == [True, False, True, True]
    footers.keep(4, metadata, 101)  # larger than all that may be kept
    assert [footers.get(shard) is not None for shard in range(5)] == [True, False, True, True, False]
    footers.keep(1, metadata, 100)
    assert [footers.get(shard) is not None for shard in range(5)] == [False, True, False, False, False]
