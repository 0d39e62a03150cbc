"""Reads Parquet by row group, from local files or from the Hub. Prefetcher only; never imports ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shmloader.errors import ReadError, ShmloaderError
from shmloader.sources.base import Chunk, SourcePlan, SourceRequest
from shmloader.sources.hub import WHOLE_FILE_BYTES, HubFiles, is_remote
from shmloader.sources.resolve import without_secrets
from shmloader.sources.rows import BATCH_ROWS, KEPT_TABLE_BYTES, conform, split_batch, table_batches

#: Above this (compressed, needed columns), a row group is not fetched at once but through a small buffer.
PRE_BUFFER_BYTES = 128 << 20
#: That buffer; there is one a column, each filled by one request (guessed: a request costs the time of 4 MiB).
STREAM_BUFFER_BYTES = 4 << 20


class ParquetReader:
    """Reads the chunks of a Parquet plan. Built and used in one prefetcher, in one thread."""

    def __init__(self, request: SourceRequest, plan: SourcePlan) -> None:
        self._plan = plan
        self._request = request
        self._schema = plan.schema
        names = plan.columns.class_names
        self._class_names = {plan.columns.labels: names} if plan.columns.labels and names else {}
        self._hub: HubFiles | None = None
        self._file: tuple[int, bool, pq.ParquetFile, Any] | None = None
        self._table: tuple[int, int, pa.Table] | None = None

    def read(self, chunk: Chunk, wanted: Sequence[int] | None = None) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows of ``chunk``; see `Reader.read`.

        Wanted rows come first in row groups of at most 64 MiB; larger ones are streamed in order.
        """
        batches = self._batches(chunk, wanted)
        while True:
            try:
                found = next(batches, None)
            except (ShmloaderError, MemoryError):
                raise
            except Exception as error:
                raise self._read_error(chunk, error) from error
            if found is None:
                return
            yield found

    def close(self) -> None:
        """Close its files."""
        self._table = None
        self._close_file()

    def _batches(self, chunk: Chunk, wanted: Sequence[int] | None) -> Iterator[tuple[int, pa.RecordBatch]]:
        group, start, num_bytes = chunk.piece
        if num_bytes <= KEPT_TABLE_BYTES:
            table = self._row_group(chunk.shard, group)
            parts = table_batches(table.slice(start, chunk.num_rows), chunk.first_row, wanted)
        else:
            parts = self._streamed(chunk, group, start)
        num_rows = 0
        for first_row, batch in parts:
            num_rows += batch.num_rows
            yield first_row, conform(batch, self._schema, self._class_names)
        if num_rows != chunk.num_rows:
            raise pa.ArrowInvalid(f"the row group has {num_rows} rows of the {chunk.num_rows} planned")

    def _row_group(self, shard: int, group: int) -> pa.Table:
        if self._table is None or self._table[:2] != (shard, group):
            self._table = None
            table = self._open(shard, group).read_row_group(group, columns=self._schema.names, use_threads=False)
            self._table = (shard, group, table)
        return self._table[2]

    def _streamed(self, chunk: Chunk, group: int, start: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Rows ``start`` and on of a row group, which is decompressed up to the chunk's end, in bounded memory."""
        row, end = 0, start + chunk.num_rows
        file = self._open(chunk.shard, group)
        batches = file.iter_batches(BATCH_ROWS, row_groups=[group], columns=self._schema.names, use_threads=False)
        for batch in batches:
            before = max(start - row, 0)
            part = batch.slice(before, end - row - before) if before < batch.num_rows else batch.slice(0, 0)
            at = chunk.first_row + max(row - start, 0)
            for piece in split_batch(part):
                yield at, piece
                at += piece.num_rows
            row += batch.num_rows
            if row >= end:
                return

    def _open(self, shard: int, group: int) -> pq.ParquetFile:
        """The shard's file, kept open until another one is needed, or a row group that wants other buffers."""
        metadata = None
        if self._file is not None and self._file[0] == shard:
            is_small, file = self._file[1:3]
            if is_small == self._is_small(file.metadata, group):
                return file
            metadata = file.metadata
        self._close_file()
        source = self._source(shard)
        if metadata is None:
            metadata = pq.read_metadata(source)
        is_small = self._is_small(metadata, group)
        pre_buffer = is_small and is_remote(self._plan.shards[shard])
        buffer_bytes = 0 if is_small else STREAM_BUFFER_BYTES
        file = pq.ParquetFile(source, metadata=metadata, pre_buffer=pre_buffer, buffer_size=buffer_bytes)
        self._file = (shard, is_small, file, source)
        return file

    def _source(self, shard: int) -> Any:
        """The shard's bytes. Local files are not mapped: one cut short meanwhile would be a SIGBUS, not an error."""
        path = self._plan.shards[shard]
        if not is_remote(path):
            return pa.OSFile(path)
        if self._hub is None:
            self._hub = HubFiles(self._request.load.get("token"))
        num_bytes = self._plan.shard_bytes[shard]
        if num_bytes < WHOLE_FILE_BYTES:
            return self._hub.open_whole(path, num_bytes)
        return self._hub.open(path, num_bytes)

    def _is_small(self, metadata: pq.FileMetaData, group: int) -> bool:
        """Whether the needed columns of a row group may lie in memory as they are in the file."""
        wanted = set(self._schema.names)
        row_group = metadata.row_group(group)
        parts = (row_group.column(i) for i in range(row_group.num_columns))
        size = sum(p.total_compressed_size for p in parts if p.path_in_schema.split(".")[0] in wanted)
        return bool(size <= PRE_BUFFER_BYTES)

    def _close_file(self) -> None:
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
            f"{chunk.piece[0]}): {why}. The file may be damaged or have changed since the "
            "dataset was opened; fetch it again, or leave it out with data_files= in load=.",
            dataset=self._plan.name,
            shard=shard,
            first_row=chunk.first_row,
            num_rows=chunk.num_rows,
        )
