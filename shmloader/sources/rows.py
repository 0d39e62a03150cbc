"""Rows as a plan promises them: the needed columns, with the plan's types."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

#: Rows of a chunk of what is not Parquet: enough for a tokenizer to work by the batch, little enough to be read
#: soon (guessed).
BATCH_ROWS = 64

#: A Parquet row group whose needed columns are at most this large once decompressed is one chunk, decompressed at
#: once; a larger one is cut into chunks of about this size (guessed: times the prefetchers, it is what reading holds).
KEPT_TABLE_BYTES = 64 << 20

#: What `datasets` stores images and audio as.
MEDIA_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def plain_schema(schema: pa.Schema, columns: Sequence[str]) -> pa.Schema:
    """The fields of ``columns``, without metadata and extension types, which need their library to be read."""
    return pa.schema([pa.field(name, _plain_type(schema.field(name).type)) for name in columns])


def stream_bytes(schema: pa.Schema) -> int:
    """What an Arrow IPC stream of a chunk has beside the bytes of its rows: its messages, and what pads the buffers."""
    sink = pa.MockOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_batch(pa.RecordBatch.from_pylist([], schema=schema))
    return int(sink.size()) + 64 * len(schema)


def conform(batch: pa.RecordBatch, schema: pa.Schema, class_names: dict[str, tuple[str, ...]]) -> pa.RecordBatch:
    """``batch`` with exactly the columns and types of ``schema``.

    Images and audio stored as bare bytes or paths become struct<bytes, path>; class names become their index.
    class_names: of the columns that are ClassLabels.

    Raises:
        pa.ArrowInvalid, pa.ArrowNotImplementedError, KeyError: the stored values cannot be converted.
    """
    if batch.schema.equals(schema):
        return batch
    arrays = [_converted(batch.column(f.name), f.type, class_names.get(f.name)) for f in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def one_batch(table: pa.Table) -> pa.RecordBatch:
    """The rows of ``table`` as one batch; no copy where they lie in one piece."""
    batches = table.to_batches()
    if len(batches) == 1:
        return batches[0]
    return pa.concat_batches(batches) if batches else pa.RecordBatch.from_pylist([], schema=table.schema)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    while isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return kind


def _converted(array: pa.Array, kind: pa.DataType, names: tuple[str, ...] | None) -> pa.Array:
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if array.type.equals(kind):
        return array
    if kind.equals(MEDIA_TYPE) and not pa.types.is_struct(array.type):
        return _media_struct(array)
    if names is not None and (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        index = pc.index_in(array, value_set=pa.array(names, array.type)).cast(kind)
        unknown = pc.and_(pc.is_null(index), pc.is_valid(array))
        if pc.any(unknown).as_py():
            raise pa.ArrowInvalid(f"{array.filter(unknown)[0].as_py()!r} is not one of the class names")
        return index
    return array.cast(kind)


def _media_struct(array: pa.Array) -> pa.Array:
    is_path = pa.types.is_string(array.type) or pa.types.is_large_string(array.type)
    nulls = pa.nulls(len(array), pa.binary() if is_path else pa.string())
    children = [nulls, array.cast(pa.string())] if is_path else [array.cast(pa.binary()), nulls]
    return pa.StructArray.from_arrays(children, fields=list(MEDIA_TYPE), mask=array.is_null())
