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
