"""The plan of Arrow files on this machine. Planner only; imports ``datasets``."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from shmloader.sources.arrow import open_arrow, read_error
from shmloader.sources.base import Chunk, SourcePlan, SourceRequest
from shmloader.sources.columns import choose_columns
from shmloader.sources.resolve import empty_dataset, source_name, translated
from shmloader.sources.rows import BATCH_ROWS, plain_schema, stream_bytes


def is_arrow(builder: Any) -> bool:
    """Whether it is of Arrow files."""
    from datasets.packaged_modules.arrow.arrow import Arrow

    return isinstance(builder, Arrow)


def plan_arrow(request: SourceRequest, builder: Any) -> SourcePlan | None:
    """The plan of the split's Arrow files, in chunks of 64 rows.

    None: they are not on this machine, compressed, or ``datasets`` makes other types of theirs: it has to read them.

    Raises:
        EmptyDatasetError, ColumnError. ReadError: a file cannot be read; names it. SourceError: features do not fit.
    """
    name = source_name(request)
    files = [str(path) for path in builder.config.data_files[request.split]]
    if any("://" in path for path in files):
        return None
    tables = []
    for path in files:
        try:
            table, is_mapped = open_arrow(path)
        except (OSError, pa.ArrowException) as error:
            raise read_error(name, path, error) from error
        if not is_mapped:
            return None
        tables.append(table)
    with translated(request, "open"):
        features = builder.as_streaming_dataset(split=request.split).features
    columns, needed, notices = choose_columns(features, request.columns, dataset=name, all_columns=request.all_columns)
    schema = plain_schema(features.arrow_schema, needed)
    if not all(_is_as_promised(table.schema, schema) for table in tables):
        return None
    chunks, chunk_bytes = _cut(tables, schema)
    if not chunks:
        raise empty_dataset(request)
    return SourcePlan(
        name=name,
        split=request.split,
        mode="arrow",
        num_rows=chunks[-1].first_row + chunks[-1].num_rows,
        shards=tuple(files),
        chunks=chunks,
        columns=columns,
        arrow_schema=schema.serialize().to_pybytes(),
        num_bytes=sum(table.nbytes for table in tables),
        notices=notices,
        units=tuple(range(len(chunks))),
        chunk_bytes=chunk_bytes,
    )


def _is_as_promised(schema: pa.Schema, promised: pa.Schema) -> bool:
    """Whether rows of ``schema`` need no conversion but to storage types, which is no work, and lack no column."""
    is_there = set(promised.names) <= set(schema.names)
    return is_there and bool(plain_schema(schema, promised.names).equals(promised))


def _cut(tables: list[pa.Table], schema: pa.Schema) -> tuple[tuple[Chunk, ...], tuple[int, ...]]:
    chunks, chunk_bytes = [], []
    first, more = 0, stream_bytes(schema)
    for shard, table in enumerate(tables):
        row_bytes = -(-table.select(schema.names).nbytes // max(table.num_rows, 1))
        for start in range(0, table.num_rows, BATCH_ROWS):
            num = min(BATCH_ROWS, table.num_rows - start)
            chunks.append(Chunk(first, num, shard, (start,)))
            chunk_bytes.append(num * row_bytes + more)
            first += num
    return tuple(chunks), tuple(chunk_bytes)
