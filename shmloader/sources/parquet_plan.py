"""How a Parquet dataset is cut into chunks: from the footers of its files, which are read in parallel."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shmloader.errors import ColumnError, ReadError, SourceError
from shmloader.sources.answers import is_unreachable
from shmloader.sources.base import Chunk, SourcePlan, SourceRequest
from shmloader.sources.columns import choose_columns
from shmloader.sources.hub import HubFiles, NoRanges, cached_copy, is_remote
from shmloader.sources.parquet_footer import read_footer
from shmloader.sources.resolve import empty_dataset, source_name, translated
from shmloader.sources.rows import KEPT_TABLE_BYTES, plain_schema, stream_bytes

log = logging.getLogger("shmloader.sources")

#: Footers read at once: one costs a round trip or two, so it is waiting, not work (guessed).
FOOTER_THREADS = 16


@dataclass(frozen=True)
class _Footer:
    """What one file's footer says."""

    path: str
    num_bytes: int
    metadata: pq.FileMetaData
    footer_bytes: int = 0


def can_plan(builder: Any) -> bool:
    """Whether this builder's rows can be read by row group: Parquet files, all of their rows, no custom storage."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    if not isinstance(builder, Parquet):
        return False
    config = builder.config
    plain = (
        config.filters is None and config.on_bad_files == "error" and not set(builder.storage_options or ()) - {"hf"}
    )
    paths = [path for files in (config.data_files or {}).values() for path in files]
    return plain and all("::" not in path and (is_remote(path) or "://" not in path) for path in paths)


def is_on_hub(builder: Any) -> bool:
    """Whether a file of this builder is on the Hub."""
    return any(is_remote(str(path)) for files in (builder.config.data_files or {}).values() for path in files)


def plan_parquet(request: SourceRequest, builder: Any) -> SourcePlan:
    """The plan of a Parquet dataset; ``builder`` comes from `resolve_builder`, and has the split.

    Raises:
        ReadError: a file cannot be read, or lacks a column. EmptyDatasetError, ColumnError.
        SourceError: the card's number of rows is not the files'.
    """
    name = source_name(request)
    files = [str(path) for path in builder.config.data_files[request.split]]
    revision = _revision(files)
    with translated(request, "list the files of"):
        footers = _read_footers(request, [cached_copy(f) or f if is_remote(f) else f for f in files])
    num_rows = sum(footer.metadata.num_rows for footer in footers)
    _check_count(request, builder, num_rows, len(footers))
    if num_rows == 0:
        raise empty_dataset(request)
    features = _features(builder, footers)
    columns, needed, notices = choose_columns(features, request.columns, dataset=name, all_columns=request.all_columns)
    schema = plain_schema(features.arrow_schema, needed)
    _check_columns(name, footers, needed)
    chunks, units, chunk_bytes = _cut(footers, schema)
    return SourcePlan(
        name=name,
        split=request.split,
        mode=_mode(request, builder, footers),
        num_rows=num_rows,
        shards=tuple(footer.path for footer in footers),
        chunks=chunks,
        columns=columns,
        arrow_schema=schema.serialize().to_pybytes(),
        revision=revision,
        num_bytes=sum(footer.num_bytes for footer in footers),
        notices=notices,
        shard_bytes=tuple(footer.num_bytes for footer in footers),
        footer_bytes=tuple(footer.footer_bytes for footer in footers),
        units=units,
        chunk_bytes=chunk_bytes,
    )


def _mode(request: SourceRequest, builder: Any, footers: Sequence[_Footer]) -> str:
    if any(is_remote(footer.path) for footer in footers):
        return "streaming"
    return "downloaded" if request.is_downloaded and is_on_hub(builder) else "local"


def _read_footers(request: SourceRequest, paths: Sequence[str]) -> list[_Footer]:
    hub = HubFiles(request) if any(map(is_remote, paths)) else None
    sizes = [hub.size(p) if hub is not None and is_remote(p) else Path(p).stat().st_size for p in paths]
    with ThreadPoolExecutor(min(FOOTER_THREADS, len(paths))) as pool:
        reading = [
            pool.submit(_read_footer, source_name(request), p, n, hub) for p, n in zip(paths, sizes, strict=True)
        ]
        if wait(reading, return_when=FIRST_EXCEPTION).not_done:
            pool.shutdown(cancel_futures=True)  # of those that were not begun none may be waited for
        for future in reading:
            if not future.cancelled() and (error := future.exception()) is not None:
                raise error  # of the first file that has one
        return [future.result() for future in reading]


def _read_footer(name: str, path: str, num_bytes: int, hub: HubFiles | None) -> _Footer:
    try:
        if hub is not None and is_remote(path):
            return _Footer(path, num_bytes, *read_footer(partial(hub.read_at, path, num_bytes), num_bytes))
        return _Footer(path, num_bytes, pq.read_metadata(path))
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, NoRanges) or is_unreachable(error) or type(error).__module__.startswith("huggingface_hub"):
            raise
        raise ReadError(
            f"{name}: {path} is not a whole Parquet file ({num_bytes} bytes): {error}. It may be truncated, or "
            "damaged on the way; fetch it again, or leave it out with data_files= in load=.",
            dataset=name,
            shard=path,
            first_row=None,
            num_rows=None,
        ) from error


def _check_count(request: SourceRequest, builder: Any, num_rows: int, num_files: int) -> None:
    info = (builder.info.splits or {}).get(request.split)
    expected = getattr(info, "num_examples", None)
    if expected and expected != num_rows:
        name = source_name(request)
        raise SourceError(
            f"{name}, split {request.split!r}: its card says {expected} rows, its {num_files} files hold {num_rows}. "
            "Files are missing, or the card is out of date: fetch the dataset again, correct num_examples in its "
            "README.md, or name the files with data_files= in load=.",
            dataset=name,
            split=request.split,
            expected_rows=expected,
            num_rows=num_rows,
        )


def _features(builder: Any, footers: Sequence[_Footer]) -> Any:
    from datasets import Features

    if builder.info.features is not None:
        features = builder.info.features
    else:
        features = Features.from_arrow_schema(footers[0].metadata.schema.to_arrow_schema())
    only: list[str] | None = builder.config.columns
    return Features({k: v for k, v in features.items() if only is None or k in only})


def _check_columns(name: str, footers: Sequence[_Footer], needed: Sequence[str]) -> None:
    for footer in footers:
        names = footer.metadata.schema.to_arrow_schema().names
        missing = [column for column in needed if column not in names]
        if missing:
            raise ColumnError(
                f"{name}: {footer.path} lacks the columns {', '.join(map(repr, missing))}; it has "
                f"{', '.join(map(repr, names))}. Leave the file out with data_files= in load=, or choose other "
                "columns with columns=.",
                dataset=name,
                columns=names,
                shard=footer.path,
            )


def _cut(footers: Sequence[_Footer], schema: pa.Schema) -> tuple[tuple[Chunk, ...], tuple[int, ...], tuple[int, ...]]:
    """The chunks, the index of the first one of each one's unit, and the bytes of each."""
    chunks: list[Chunk] = []
    units: list[int] = []
    sizes: list[int] = []
    row, more = 0, stream_bytes(schema)
    for shard, footer in enumerate(footers):
        for group in range(footer.metadata.num_row_groups):
            num_rows = footer.metadata.row_group(group).num_rows
            num_bytes = group_bytes(footer.metadata, group, schema)
            step = -(-num_rows // -(-num_bytes // KEPT_TABLE_BYTES)) if num_bytes else num_rows
            unit = len(chunks)
            for start in range(0, num_rows, max(step, 1)):
                rows = min(step, num_rows - start)
                chunks.append(Chunk(row + start, rows, shard, (group, start, num_rows, num_bytes)))
                units.append(unit)
                sizes.append(-(-num_bytes * rows // num_rows) + more)
            row += num_rows
    return tuple(chunks), tuple(units), tuple(sizes)


def group_bytes(metadata: pq.FileMetaData, row_group: int, schema: pa.Schema) -> int:
    """Bytes of the columns of ``schema`` in a row group, as Arrow holds them once it is decompressed.

    An estimate: of strings of which many are the same, the file has (and tells) one each only.
    """
    group = metadata.row_group(row_group)
    in_file: dict[str, int] = {}
    for i in range(group.num_columns):
        column = group.column(i)
        name = column.path_in_schema.split(".")[0]
        in_file[name] = in_file.get(name, 0) + column.total_uncompressed_size
    return sum(max(in_file.get(field.name, 0), group.num_rows * _item_bytes(field.type)) for field in schema)


def _item_bytes(kind: pa.DataType) -> int:
    """Bytes that Arrow needs for a value at least."""
    try:
        return int(-(-kind.bit_width // 8))
    except ValueError:  # it has none: strings, lists, structs
        return 4


def _revision(files: Sequence[str]) -> str | None:
    """The commit in the path of a file on the Hub."""
    for path in files:
        found = re.match(r"hf://datasets/[^@]+@([^/]+)/", path)
        if found:
            return found[1]
    return None
