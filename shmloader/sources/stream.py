"""A stream, read front to back by one reader: an ``IterableDataset``, or files that have no random access."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from shmloader.errors import ReadError, ShmloaderError, SourceError
from shmloader.sources.answers import is_unreachable, remedy, told_of
from shmloader.sources.base import GUESSED_ROW_BYTES, Chunk, SourcePlan, SourceRequest
from shmloader.sources.blame import why_failed
from shmloader.sources.columns import cheapest, choose_columns
from shmloader.sources.media_files import MediaFiles, embed_media
from shmloader.sources.patience import be_patient
from shmloader.sources.resolve import (
    check_split,
    commit_of,
    empty_dataset,
    has_secret,
    quiet_datasets,
    resolve_builder,
    source_name,
    translated,
    without_secrets,
)
from shmloader.sources.rows import BATCH_ROWS, conform, one_batch, plain_schema, stream_bytes
from shmloader.sources.splits import front_of
from shmloader.sources.stream_features import check_formats, features_of
from shmloader.sources.stream_rows import StreamTables, count_rows
from shmloader.sources.webdataset import archives_of, count_samples, is_webdataset

#: What ``datasets`` calls the example iterables that read files or a generator, without any transformation.
_UNTRANSFORMED = {"ArrowExamplesIterable", "ExamplesIterable"}
_UNSTEADY = "Check that it gives the same rows each time it is read, and all of them the same columns."


def plan_stream(request: SourceRequest, builder: Any | None) -> SourcePlan:
    """The plan of a stream: chunks of 64 rows, to be read in order.

    builder: of files that are not Parquet; None: the request holds an ``IterableDataset`` or a dict of them.
    Unless the dataset's card says the number of rows, the plan is open if the request is iterable; else they are
    counted by one pass, with a notice.

    Raises:
        SplitNotFoundError, EmptyDatasetError, ColumnError. ReadError: the stream fails while it is counted.
        SourceError: it cannot be opened, or never ends.
    """
    name = source_name(request)
    tars, warnings = archives_of(request, builder) if builder is not None and is_webdataset(builder) else ([], ())
    with translated(request, "open"):
        stream = _open_stream(request, builder)
        check_formats(request, stream)
        features = features_of(request, stream)
    columns, needed, notices = choose_columns(features, request.columns, dataset=name, all_columns=request.all_columns)
    schema = plain_schema(features.arrow_schema, needed)
    num_rows = _told_rows(request, stream, builder)
    row_bytes, more = _told_row_bytes(stream, builder) or GUESSED_ROW_BYTES, stream_bytes(schema)
    if num_rows is None and request.is_iterable:
        return SourcePlan(
            name=name,
            split=str(stream.split or request.split),
            mode="sequential",
            num_rows=None,
            shards=(name,),
            chunks=(),
            columns=columns,
            arrow_schema=schema.serialize().to_pybytes(),
            revision=commit_of(builder),
            notices=notices,
            warnings=warnings,
            row_bytes=row_bytes,
        )
    if num_rows is None:
        if _repeats_forever(stream):
            raise SourceError(
                f"{name}: this stream repeats for ever, so it has no length. Give the stream before repeat(), "
                "end it with take(n), or iterate over it with ShmMultimodalIterableDataset, which needs no length.",
                dataset=name,
            )
        if tars:
            num_rows, how = count_samples(request, tars), "by the headers of its archives"
            row_bytes = -(-sum(Path(path).stat().st_size for path in tars) // max(num_rows, 1))
        else:
            num_rows = _count(request, stream, features, cheapest(columns, needed))
            how = f"by reading the stream once, since {_why_counted(stream, builder)}"
        notices += (f"{name}: {num_rows} rows, counted {how}",)
    if num_rows == 0:
        raise empty_dataset(request)
    starts = range(0, num_rows, BATCH_ROWS)
    chunks = tuple(Chunk(first, min(BATCH_ROWS, num_rows - first), 0) for first in starts)
    return SourcePlan(
        name=name,
        split=str(stream.split or request.split),
        mode="sequential",
        num_rows=num_rows,
        shards=(name,),
        chunks=chunks,
        columns=columns,
        arrow_schema=schema.serialize().to_pybytes(),
        revision=commit_of(builder),
        notices=notices,
        warnings=warnings,
        units=(0,) * len(chunks),
        chunk_bytes=tuple(chunk.num_rows * row_bytes + more for chunk in chunks),
    )


class StreamReader:
    """Reads the chunks of a stream in order; a jump backwards opens it again. One prefetcher, one thread."""

    def __init__(self, request: SourceRequest, plan: SourcePlan, touch: Callable[[], None]) -> None:
        self._request, self._plan, self._touch = request, plan, touch
        self._files = MediaFiles(request, touch)
        self._schema = plan.schema
        self._stream: Any = None
        self._features: Any = None
        self._batches: StreamTables | None = None
        self._next_row = 0
        self._failed: tuple[int, str] | None = None  # the first row of the chunk that could not be read, and why

    def read(self, chunk: Chunk) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows of ``chunk``; see `Reader.read`. Rows before it that were not read yet are skipped over."""
        if self._failed is not None and chunk.first_row >= self._failed[0]:
            raise self._read_error(chunk, f"it ended before them: {self._failed[1]}")  # not all of it again
        try:
            batch = self._read(chunk)
        except (ShmloaderError, MemoryError):
            raise
        except Exception as error:
            why = why_failed(error) if self._batches is None else self._batches.told(error)
            failure = self._read_error(chunk, why, error)
            if not is_unreachable(error):  # that is read again once it is asked for
                self._failed = (chunk.first_row, why)
            self._batches = None
            if has_secret(self._request, str(error)):
                raise failure from None
            raise failure from error
        yield chunk.first_row, batch

    def close(self) -> None:
        """Close the stream."""
        self._batches = self._stream = None
        self._files.close()

    def _read(self, chunk: Chunk) -> pa.RecordBatch:
        if self._batches is None or chunk.first_row < self._next_row:
            self._batches, self._next_row = self._open(), 0
        while True:
            table = next(self._batches, None)
            if table is None:
                raise self._count_error(chunk, self._next_row)
            self._touch()
            first, self._next_row = self._next_row, self._next_row + table.num_rows
            if first == chunk.first_row:
                break
        is_last = chunk.first_row + chunk.num_rows == self._plan.num_rows
        if is_last and self._plan.num_rows == self._request.max_samples:
            table = table.slice(0, chunk.num_rows)  # the others are not asked for
        elif is_last and next(self._batches, None) is not None:
            raise self._count_error(chunk, None)
        if table.num_rows != chunk.num_rows:
            raise self._count_error(chunk, self._next_row)
        return plain_rows(table, self._schema, self._features, self._files)

    def _open(self) -> StreamTables:
        if self._stream is None:
            self._stream, self._features = open_planned(self._request, self._plan)
        return StreamTables(self._stream, self._features, self._schema.names, BATCH_ROWS)

    def _count_error(self, chunk: Chunk, have: int | None) -> ReadError:
        found = "more" if have is None else f"{have}"
        return self._read_error(
            chunk,
            f"it holds {found} rows, where {self._plan.num_rows} were told by its card or counted when it was opened",
        )

    def _read_error(self, chunk: Chunk, why: str, error: Exception | None = None) -> ReadError:
        """error: what was raised; None: nothing, its rows are not those that were promised."""
        name = self._plan.name
        advice = _UNSTEADY if error is None else remedy(error, _UNSTEADY)
        return ReadError(
            f"{name}, split {self._plan.split!r}: cannot read rows {chunk.first_row} to "
            f"{chunk.first_row + chunk.num_rows - 1} of the stream: {without_secrets(self._request, why)}. {advice}",
            dataset=name,
            shard=self._plan.shards[0],
            first_row=chunk.first_row,
            num_rows=chunk.num_rows,
            **({} if error is None else told_of(error)),
        )


def open_planned(request: SourceRequest, plan: SourcePlan) -> tuple[Any, Any]:
    """The ``IterableDataset`` of a plan, and its features. Prefetcher only."""
    be_patient(request.source_timeout_s)
    builder = None
    if not hasattr(request.dataset, "features") and not isinstance(request.dataset, Mapping):
        builder = resolve_builder(request, plan.revision, plan.root)
    with translated(request, "open"):
        stream = _open_stream(request, builder)
        return stream, features_of(request, stream)


def plain_rows(table: pa.Table, schema: pa.Schema, features: Any, files: MediaFiles) -> pa.RecordBatch:
    """What a stream gave, as a plan promises it."""
    return embed_media(conform(one_batch(table.combine_chunks()), schema, {}), features, files)


def _open_stream(request: SourceRequest, builder: Any | None) -> Any:
    """The ``IterableDataset`` of the requested split, or its slice; a bare one is taken whatever the split's name."""
    quiet_datasets()
    whole = isinstance(request.dataset, Mapping) and request.split in request.dataset
    name, first, stop = (None if whole else front_of(request.split)) or (request.split, 0, None)
    if builder is not None:
        stream = in_order(builder.as_streaming_dataset(split=name))
    elif isinstance(request.dataset, Mapping):
        check_split(replace(request, split=name), [str(split) for split in request.dataset])
        stream = request.dataset[name]
    else:
        stream = request.dataset
    stream = stream if not first else stream.skip(first)
    return stream if stop is None else stream.take(max(stop - first, 0))


def reading_step(stream: Any) -> Any:
    """The step of a stream that reads: the first one."""
    step = stream._ex_iterable
    while hasattr(step, "ex_iterable"):
        step = step.ex_iterable
    return step


def in_order(stream: Any) -> Any:
    """A builder's stream, which gives its rows in the same sequence in each process.

    ``datasets`` keeps the metadata files of a folder in a set, whose sequence differs from process to process.
    """
    kwargs = getattr(reading_step(stream), "kwargs", {})
    if isinstance(kwargs.get("metadata_files"), set):
        kwargs["metadata_files"] = tuple(sorted(kwargs["metadata_files"], key=str))
    return stream


def _told_rows(request: SourceRequest, stream: Any, builder: Any | None) -> int | None:
    """The number of rows that the card tells, where it is about this very stream."""
    if builder is None and _is_transformed(stream):
        return None
    return getattr(_told_split(stream, builder, request.split), "num_examples", None) or None


def _told_row_bytes(stream: Any, builder: Any | None) -> int | None:
    """Mean bytes of a row by the card, of all columns."""
    told = _told_split(stream, builder, "")
    num_rows, num_bytes = getattr(told, "num_examples", None), getattr(told, "num_bytes", None)
    return -(-num_bytes // num_rows) if num_rows and num_bytes else None


def _told_split(stream: Any, builder: Any | None, split: str) -> Any | None:
    """What the card says of the stream's split."""
    splits = (stream.info if builder is None else builder.info).splits or {}
    return splits.get(str(stream.split or split))


def _is_transformed(stream: Any) -> bool:
    return type(stream._ex_iterable).__name__ not in _UNTRANSFORMED or stream._distributed is not None


def _why_counted(stream: Any, builder: Any | None) -> str:
    if builder is None and _is_transformed(stream):
        return "it is transformed, and what it then yields is known by reading it only"
    return "no card tells their number; Parquet files would, and can be read in any order"


def _count(request: SourceRequest, stream: Any, features: Any, column: str) -> int:
    with translated(request, "count the rows of"):
        return count_rows(stream, features, column)


def _repeats_forever(stream: Any) -> bool:
    """Whether a ``repeat(None)`` is among the stream's transformations."""
    iterable = stream._ex_iterable
    while iterable is not None:
        if type(iterable).__name__ == "RepeatExamplesIterable" and iterable.num_times is None:
            return True
        iterable = getattr(iterable, "ex_iterable", None)
    return False
