"""The footer of a Parquet file on a Hub, by no more bytes than it has.

Read as pyarrow does it, each file costs its last 64 KiB, which is much of a small one; and each prefetcher would pay it
again. The file's last eight bytes are the footer's length and "PAR1". Source: Apache Parquet, "File Format".
"""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

#: Of a file so much is asked for at first, in the hope that the footer is in it: no more than pyarrow does, and of a
#: small file little (guessed: footers are mostly below 1 % of their file).
FIRST_SHARE, LEAST_FIRST_BYTES, MOST_FIRST_BYTES = 100, 2 << 10, 64 << 10
_MAGIC = b"PAR1"
_END_BYTES = 8

#: Footers that a prefetcher keeps, by the bytes that they have in their files (guessed: some thousand of small ones; in
#: memory they take several times that).
MOST_KEPT_BYTES = 8 << 20

#: Gives the bytes of a file from an offset on, as many as are asked for.
ReadAt = Callable[[int, int], bytes]


def read_footer(read_at: ReadAt, num_bytes: int, footer_bytes: int = 0) -> tuple[pq.FileMetaData, int]:
    """The footer of a file of ``num_bytes``, and its bytes, by one request if ``footer_bytes`` tells them; else by two.

    Raises:
        pyarrow.ArrowInvalid: it is no Parquet file. What ``read_at`` raises.
    """
    hoped = min(max(num_bytes // FIRST_SHARE, LEAST_FIRST_BYTES), MOST_FIRST_BYTES)
    tail_bytes = min(footer_bytes or hoped, num_bytes)
    tail = read_at(num_bytes - tail_bytes, tail_bytes)
    if tail[-4:] != _MAGIC:
        raise pa.ArrowInvalid("it does not end as a Parquet file does")
    needed = int.from_bytes(tail[-_END_BYTES:-4], "little") + _END_BYTES
    if needed > num_bytes:
        raise pa.ArrowInvalid(f"its footer should have {needed} bytes, and the file has {num_bytes}")
    if needed > tail_bytes:
        tail = read_at(num_bytes - needed, needed - tail_bytes) + tail
    return pq.read_metadata(pa.BufferReader(_MAGIC + tail[-needed:])), needed


class Footers:
    """Those of the files that were read last, by the file's number. For one thread."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[pq.FileMetaData, int]] = {}  # the one that was asked for last is the last
        self._num_bytes = 0

    def get(self, shard: int) -> pq.FileMetaData | None:
        """The footer of file ``shard``; None: it is not kept."""
        found = self._kept.pop(shard, None)
        if found is None:
            return None
        self._kept[shard] = found
        return found[0]

    def keep(self, shard: int, footer: pq.FileMetaData, num_bytes: int) -> None:
        """Keep it, in the place of those that were not asked for longest, if it may be. num_bytes: in its file."""
        if num_bytes > MOST_KEPT_BYTES:
            return
        self._kept[shard] = footer, num_bytes
        self._num_bytes += num_bytes
        while self._num_bytes > MOST_KEPT_BYTES:
            oldest = next(iter(self._kept))
            self._num_bytes -= self._kept.pop(oldest)[1]
