"""An already loaded ``datasets.Dataset``, or one that ``save_to_disk`` wrote: random access to prepared Arrow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from shmloader.errors import ReadError, SourceError
from shmloader.sources.base import GUESSED_ROW_BYTES, Chunk, SourcePlan, SourceRequest
from shmloader.sources.columns import choose_columns
from shmloader.sources.media_files import MediaFiles, embed_media
from shmloader.sources.resolve import check_split, empty_dataset, quiet_datasets, source_name, translated
from shmloader.sources.rows import BATCH_ROWS, conform, one_batch, plain_schema, stream_bytes


def is_saved(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a folder that ``save_to_disk`` wrote."""
    folder = Path(path).expanduser()
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def prepared(request: SourceRequest, builder: Any) -> Any | None:
    """The requested split as ``load_dataset`` prepared it in the cache, for these very files; None: it did not."""
    if not (Path(builder.cache_dir) / "dataset_info.json").is_file():
        return None
    with translated(request, "load the prepared files of"):
        return builder.as_dataset(split=request.split)


def plan_loaded(request: SourceRequest, prepared_split: Any | None = None) -> SourcePlan:
    """The plan of a loaded (or saved, or prepared) ``Dataset`` or ``DatasetDict``: chunks of 64 rows.

    Raises:
        SplitNotFoundError, EmptyDatasetError, ColumnError. SourceError: it cannot be loaded.
    """
    dataset, name = prepared_split, source_name(request)
    files = () if dataset is None else tuple(str(file["filename"]) for file in dataset.cache_files)
    if dataset is None:
        dataset = _choose(request)
    if len(dataset) == 0:
        raise empty_dataset(request)
    features = _visible(dataset)
    columns, needed, notices = choose_columns(features, request.columns, dataset=name, all_columns=request.all_columns)
    more_notices, warnings = _about_format(name, dataset)
    starts = range(0, len(dataset), BATCH_ROWS)
    chunks = tuple(Chunk(first, min(BATCH_ROWS, len(dataset) - first), 0) for first in starts)
    row_bytes = _row_bytes(dataset, needed)
    schema = plain_schema(dataset.features.arrow_schema, needed)
    more = stream_bytes(schema)
    return SourcePlan(
        name=name,
        split=str(dataset.split or request.split),
        mode="loaded",
        num_rows=len(dataset),
        shards=files or (name,),
        chunks=chunks,
        columns=columns,
        arrow_schema=schema.serialize().to_pybytes(),
        notices=notices + more_notices,
        warnings=warnings,
        units=tuple(range(len(chunks))),
        chunk_bytes=tuple(chunk.num_rows * row_bytes + more for chunk in chunks),
    )


class LoadedReader:
    """Reads the chunks of a loaded dataset. Built and used in one prefetcher, in one thread."""

    def __init__(self, request: SourceRequest, plan: SourcePlan, touch: Callable[[], None] = lambda: None) -> None:
        self._plan, self._files = plan, MediaFiles(request, touch)
        self._schema = plan.schema
        dataset = _choose(request, plan.shards).select_columns(self._schema.names)
        self._features = dataset.features
        self._dataset: Any = dataset.with_format("arrow")

    def read(self, chunk: Chunk) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows of ``chunk``; see `Reader.read`."""
        try:
            table: pa.Table = self._dataset[chunk.first_row : chunk.first_row + chunk.num_rows]
            batch = embed_media(conform(one_batch(table), self._schema, {}), self._features, self._files)
        except (OSError, ValueError, IndexError, pa.ArrowException) as error:
            raise ReadError(
                f"{self._plan.name}: cannot read rows {chunk.first_row} to {chunk.first_row + chunk.num_rows - 1} of "
                f"the loaded dataset: {type(error).__name__}: {error}. Its Arrow files may have been changed or "
                "removed; load it again.",
                dataset=self._plan.name,
                shard=", ".join(self._plan.shards),
                first_row=chunk.first_row,
                num_rows=chunk.num_rows,
            ) from error
        yield chunk.first_row, batch

    def close(self) -> None:
        """Let go of the dataset."""
        self._dataset = None
        self._files.close()


def _visible(dataset: Any) -> Any:
    """The features of the columns that the dataset's format shows: all, or those of ``with_format(columns=…)``."""
    told = dataset.format
    if told["output_all_columns"]:
        return dataset.features
    return type(dataset.features)({name: dataset.features[name] for name in told["columns"]})


def _about_format(name: str, dataset: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Notices and warnings of what the dataset's format would do to its rows, and is not done."""
    kind, hidden = dataset.format["type"], set(dataset.features) - set(_visible(dataset))
    notices: tuple[str, ...] = ()
    if hidden:
        notices = (f"{name}: its format leaves out the columns {', '.join(map(repr, sorted(hidden)))}",)
    if kind == "custom":
        told = f"{name}: the function of its with_transform (or set_transform) is not applied"
        return notices, (f"{told}; give it as process= (once a sample) or transform= (each time it is read)",)
    if kind is not None:
        notices += (f"{name}: its format ({kind!r}) is ignored; use process= or transform= instead",)
    return notices, ()


def _row_bytes(dataset: Any, columns: Sequence[str]) -> int:
    """Mean bytes of the needed columns of a row, as the dataset holds them; a guess where it only names files."""
    table: pa.Table = dataset.data.table.select(columns)
    for column in table.columns:
        names = [field.name for field in column.type] if pa.types.is_struct(column.type) else []
        if "bytes" in names and "path" in names and column.num_chunks and column.chunk(0).field("bytes").null_count:
            return GUESSED_ROW_BYTES
    return int(-(-table.nbytes // max(table.num_rows, 1)))


def _choose(request: SourceRequest, shards: Sequence[str] = ()) -> Any:
    """The ``Dataset`` of the requested split; a bare ``Dataset`` is taken as it is.

    shards: of the plan; the Arrow files of a prepared dataset.
    """
    dataset = request.dataset
    if isinstance(dataset, (str, os.PathLike)):
        datasets = quiet_datasets()
        with translated(request, "load"):
            if shards and not is_saved(dataset):
                return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in shards])
            dataset = datasets.load_from_disk(os.fspath(Path(dataset).expanduser()))
    if isinstance(dataset, Mapping):
        if not dataset:
            raise SourceError("the DatasetDict has no splits", dataset=source_name(request))
        check_split(request, [str(split) for split in dataset])
        return dataset[request.split]
    return dataset
