"""Arrow files on this machine, mapped: rows are read in any order and in place. Never imports ``datasets``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from shmloader.errors import ReadError
from shmloader.sources.base import Chunk, SourcePlan, SourceRequest
from shmloader.sources.media_files import MediaFiles, with_bytes
from shmloader.sources.rows import conform, one_batch


def open_arrow(path: str) -> tuple[pa.Table, bool]:
    """All rows of an Arrow file, IPC file or stream format, in place; and whether they are: not if it is compressed.

    Of what is compressed only the schema is read: an empty table.

    Raises:
        OSError, pa.ArrowInvalid: it cannot be read, or ends in the middle of something.
    """
    file = pa.memory_map(path)
    whole = file.read_buffer()
    try:
        source = pa.ipc.open_file(whole)
    except pa.ArrowInvalid:  # it is in stream format, or nothing of the kind: then this tells so
        stream = pa.ipc.open_stream(whole)
        batches: Iterator[pa.RecordBatch] = iter(stream)
        schema = stream.schema
    else:
        batches = (source.get_batch(i) for i in range(source.num_record_batches))
        schema = source.schema
    found = []
    for batch in batches:
        if not _lies_in(batch, whole):
            return schema.empty_table(), False
        found.append(batch)
    return pa.Table.from_batches(found, schema), True


class ArrowReader:
    """Reads the chunks of mapped Arrow files. Built and used in one prefetcher, in one thread."""

    def __init__(self, request: SourceRequest, plan: SourcePlan, touch: Callable[[], None] = lambda: None) -> None:
        self._plan, self._schema = plan, plan.schema
        self._tables: dict[int, pa.Table] = {}
        self._files = MediaFiles(request, touch)

    def read(self, chunk: Chunk) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows of ``chunk``; see `Reader.read`."""
        start = chunk.piece[0]
        try:
            rows = self._table(chunk.shard).slice(start, chunk.num_rows)
            if rows.num_rows != chunk.num_rows:
                raise pa.ArrowInvalid(f"{rows.num_rows} rows are there of the {chunk.num_rows} planned")
            for column in rows.columns:
                for part in column.chunks:
                    check_offsets(part)
            batch = conform(one_batch(rows.combine_chunks()), self._schema, {})
            for name in self._media(rows.schema):
                index = batch.schema.get_field_index(name)
                filled = with_bytes(batch.column(index), self._files)
                batch = batch.set_column(index, batch.schema.field(index), filled)
        except (OSError, KeyError, pa.ArrowException) as error:
            raise read_error(self._plan.name, self._plan.shards[chunk.shard], error, chunk) from error
        yield chunk.first_row, batch

    def close(self) -> None:
        """Let go of its files."""
        self._tables = {}
        self._files.close()

    def _media(self, schema: pa.Schema) -> list[str]:
        """The columns that may name files: the chosen ones, and what ``datasets`` told beside the schema."""
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info") or {}
        features = told.get("features") or {}
        chosen = (self._plan.columns.image, self._plan.columns.audio)
        return [name for name in self._schema.names if name in chosen or _names_media(features.get(name))]

    def _table(self, shard: int) -> pa.Table:
        """The needed columns of a file; its size is that of its schema and batches, not of its rows."""
        if shard not in self._tables:
            self._tables[shard] = open_arrow(self._plan.shards[shard])[0].select(self._schema.names)
        return self._tables[shard]


def check_offsets(array: pa.Array) -> None:
    """Raise if rows say that they lie outside their column: what reads them would end the process.

    As ``validate(full=True)``, which looks at all of a record batch whenever a part of it is nested.

    Raises:
        pa.ArrowInvalid: they do.
    """
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        check_offsets(array.storage)
    elif pa.types.is_struct(kind):
        for i in range(kind.num_fields):
            check_offsets(array.field(i))
    elif pa.types.is_fixed_size_list(kind):
        check_offsets(array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size))
    elif _is_of(kind, pa.types.is_binary, pa.types.is_string, pa.types.is_large_binary, pa.types.is_large_string):
        data = array.buffers()[2]
        _check_range(array, 0 if data is None else data.size)
    elif _is_of(kind, pa.types.is_list, pa.types.is_large_list):
        first, last = _check_range(array, len(array.values))
        check_offsets(array.values.slice(first, last - first))
    elif not pa.types.is_primitive(kind):
        array.validate(full=True)


def read_error(name: str, path: str, error: Exception, chunk: Chunk | None = None) -> ReadError:
    """The error for an Arrow file that cannot be read. chunk: of whose rows; None: of all."""
    first, num = (0, 0) if chunk is None else (chunk.first_row, chunk.num_rows)
    rows = f"rows {first} to {first + num - 1}" if num else "the rows"
    return ReadError(
        f"{name}: cannot read {rows} from the Arrow file {path}: {type(error).__name__}: {error}. It may be cut short, "
        "damaged, or not be an Arrow file; write it again, or leave it out with data_files= in load=.",
        dataset=name,
        shard=path,
        first_row=first,
        num_rows=num,
    )


def _names_media(feature: Any) -> bool:
    """Whether a feature, as JSON, is or holds an image or a clip."""
    if isinstance(feature, dict):
        return feature.get("_type") in ("Image", "Audio") or any(_names_media(inner) for inner in feature.values())
    return isinstance(feature, list) and any(_names_media(inner) for inner in feature)


def _lies_in(batch: pa.RecordBatch, whole: pa.Buffer) -> bool:
    """Whether all of a batch's memory is in the file itself."""
    first, end = whole.address, whole.address + whole.size
    buffers = (buffer for column in batch.columns for buffer in column.buffers() if buffer is not None)
    return all(first <= buffer.address and buffer.address + buffer.size <= end for buffer in buffers if buffer.size)


def _is_of(kind: pa.DataType, *tests: Callable[[pa.DataType], bool]) -> bool:
    return any(test(kind) for test in tests)


def _check_range(array: pa.Array, size: int) -> tuple[int, int]:
    """The first and the last offset of an array whose rows lie in something of ``size``."""
    if not len(array):
        return 0, 0
    is_large = _is_of(array.type, pa.types.is_large_binary, pa.types.is_large_string, pa.types.is_large_list)
    item = np.dtype(np.int64 if is_large else np.int32)
    buffer = array.buffers()[1]
    if buffer is None or buffer.size < (array.offset + len(array) + 1) * item.itemsize:
        raise pa.ArrowInvalid(f"the offsets of a column of {array.type} are cut short")
    offsets = np.frombuffer(buffer, item, len(array) + 1, array.offset * item.itemsize)
    if offsets[0] < 0 or offsets[-1] > size or np.any(np.diff(offsets) < 0):
        raise pa.ArrowInvalid(f"the offsets of a column of {array.type} point outside it")
    return int(offsets[0]), int(offsets[-1])
