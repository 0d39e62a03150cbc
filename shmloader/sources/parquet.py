"""Reads Parquet by row group, from local files or from the Hub. Prefetcher only; never imports ``datasets``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shmloader.errors import ReadError, ShmloaderError
from shmloader.sources.answers import remedy, told_of
from shmloader.sources.base import Chunk, SourcePlan, SourceRequest
from shmloader.sources.hub import WHOLE_FILE_BYTES, HubFiles, is_remote
from shmloader.sources.parquet_footer import Footers, read_footer
from shmloader.sources.resolve import without_secrets
from shmloader.sources.rows import conform

#: A row group that is cut into chunks is fetched through a buffer of this size, one a column, each filled by one
#: request (guessed: a request costs the time of 4 MiB).
STREAM_BUFFER_BYTES = 4 << 20
#: Bytes of a batch of such a row group, and its most rows (guessed: few batches, and little that is held twice).
STREAM_BATCH_BYTES = 4 << 20
STREAM_BATCH_ROWS = 8192


_DAMAGED = (
    "The file may be damaged or have changed since the dataset was opened; fetch it again, or leave it out with "
    "data_files= in load=."
)


@dataclass
class _Stream:
    """A row group that is being read front to back: its batches, and what is left of the last one."""

    shard: int
    group: int
    batches: Iterator[pa.RecordBatch]
    row: int = 0
    rest: pa.RecordBatch | None = None


class ParquetReader:
    """Reads the chunks of a Parquet plan. Built and used in one prefetcher, in one thread."""

    def __init__(self, request: SourceRequest, plan: SourcePlan, touch: Callable[[], None] = lambda: None) -> None:
        self._plan, self._request, self._touch = plan, request, touch
        self._schema = plan.schema
        self._num_chunks = Counter(chunk.shard for chunk in plan.chunks)
        names = plan.columns.class_names
        self._class_names = {plan.columns.labels: names} if plan.columns.labels and names else {}
        self._hub: HubFiles | None = None
        self._footers = Footers()
        self._file: tuple[int, bool, pq.ParquetFile, Any] | None = None
        self._stream: _Stream | None = None

    def read(self, chunk: Chunk) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows of ``chunk``; see `Reader.read`."""
        row, end = chunk.first_row, chunk.first_row + chunk.num_rows
        batches = self._batches(chunk)
        while True:
            try:
                batch = next(batches, None)
                if batch is None:
                    if row != end:
                        raise pa.ArrowInvalid(f"{row - chunk.first_row} rows are there of the {chunk.num_rows} planned")
                    return
                found = conform(batch, self._schema, self._class_names)
            except (ShmloaderError, MemoryError):
                self._stream = None
                raise
            except Exception as error:
                self._stream = None
                raise self._read_error(chunk, error) from error
            yield row, found
            row += found.num_rows

    def close(self) -> None:
        """Close its files."""
        self._close_file()

    def _batches(self, chunk: Chunk) -> Iterator[pa.RecordBatch]:
        _, start, group_rows, _ = chunk.piece
        if (start, chunk.num_rows) != (0, group_rows):
            yield from self._streamed(chunk)
            return
        file = self._open(chunk.shard, True)
        table = file.read_row_group(chunk.piece[0], columns=self._schema.names, use_threads=False)
        self._touch()
        yield from table.to_batches()

    def _streamed(self, chunk: Chunk) -> Iterator[pa.RecordBatch]:
        """Rows of a row group that is read front to back: from where the last ones ended, if these come after them."""
        group, start, group_rows, num_bytes = chunk.piece
        stream = self._stream
        if stream is None or (stream.shard, stream.group) != (chunk.shard, group) or stream.row > start:
            rows = STREAM_BATCH_BYTES * group_rows // max(num_bytes, 1)
            file = self._open(chunk.shard, False)
            batches = file.iter_batches(
                min(max(rows, 1), STREAM_BATCH_ROWS),
                row_groups=[group],
                columns=self._schema.names,
                use_threads=False,
            )
            self._stream = stream = _Stream(chunk.shard, group, batches)
        end = start + chunk.num_rows
        while stream.row < end:
            batch = stream.rest if stream.rest is not None else next(stream.batches, None)
            if batch is None:
                return
            self._touch()
            before = min(max(start - stream.row, 0), batch.num_rows)
            used = min(end - stream.row, batch.num_rows)
            stream.rest = batch.slice(used) if used < batch.num_rows else None
            stream.row += used
            if before < used:
                yield batch.slice(before, used - before)

    def _open(self, shard: int, is_whole: bool) -> pq.ParquetFile:
        """The shard's file, kept open until another one is needed.

        is_whole: for row groups that are read at once; the others go through a small buffer.
        """
        if self._file is not None and self._file[:2] == (shard, is_whole):
            return self._file[2]
        self._close_file()
        source = self._source(shard)
        metadata = self._footer(shard, source)
        pre_buffer = is_whole and is_remote(self._plan.shards[shard])
        buffer_bytes = 0 if is_whole else STREAM_BUFFER_BYTES
        file = pq.ParquetFile(source, metadata=metadata, pre_buffer=pre_buffer, buffer_size=buffer_bytes)
        self._file = (shard, is_whole, file, source)
        return file

    def _source(self, shard: int) -> Any:
        """The shard's bytes. Local files are not mapped: one cut short meanwhile would be a SIGBUS, not an error."""
        path = self._plan.shards[shard]
        if not is_remote(path):
            return pa.OSFile(path)
        if self._hub is None:
            self._hub = HubFiles(self._request, self._touch)
        num_bytes = self._plan.shard_bytes[shard]
        # Of more chunks each prefetcher would fetch it all, which is little of a small dataset, and saves requests.
        is_alone = self._num_chunks[shard] == 1 or sum(self._plan.shard_bytes) < WHOLE_FILE_BYTES
        if num_bytes < WHOLE_FILE_BYTES and is_alone:
            return self._hub.open_whole(path, num_bytes)
        return self._hub.open(path, num_bytes)

    def _footer(self, shard: int, source: Any) -> pq.FileMetaData:
        """The footer of the shard's file; those of files on a Hub are kept, since chunks come from any of them."""
        found = self._footers.get(shard)
        if found is not None:
            return found
        path = self._plan.shards[shard]
        if not is_remote(path) or isinstance(source, pa.BufferReader):
            return pq.read_metadata(source)
        assert self._hub is not None
        sizes = self._plan.shard_bytes[shard], self._plan.footer_bytes[shard]
        found, num_bytes = read_footer(partial(self._hub.read_at, path, sizes[0]), *sizes)
        self._footers.keep(shard, found, num_bytes)
        return found

    def _close_file(self) -> None:
        self._stream = None
        if self._file is not None:
            file, source = self._file[2:]
            self._file = None
            file.close()
            source.close()

    def _read_error(self, chunk: Chunk, error: Exception) -> ReadError:
        shard = self._plan.shards[chunk.shard]
        why = without_secrets(self._request, f"{type(error).__name__}: {error}")
        last = chunk.first_row + chunk.num_rows - 1
        return ReadError(
            f"{self._plan.name}: cannot read rows {chunk.first_row} to {last} from {shard} (row group "
            f"{chunk.piece[0]}): {why}. {remedy(error, _DAMAGED)}",
            dataset=self._plan.name,
            shard=shard,
            first_row=chunk.first_row,
            num_rows=chunk.num_rows,
            **told_of(error),
        )
