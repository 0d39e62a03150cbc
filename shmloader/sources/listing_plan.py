"""The plan of a dataset of loose files: its rows come from listing them. Planner only; imports ``datasets``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from shmloader.sources.base import Chunk, Columns, SourcePlan, SourceRequest
from shmloader.sources.columns import choose_columns
from shmloader.sources.hub import SCHEME, cached_copy, is_remote
from shmloader.sources.listing import write_listing
from shmloader.sources.media_files import is_media, paths_of, with_paths
from shmloader.sources.resolve import commit_of, empty_dataset, source_name, translated
from shmloader.sources.rows import BATCH_ROWS, KEPT_TABLE_BYTES, conform, plain_schema, stream_bytes
from shmloader.sources.stream import in_order, reading_step

#: Rows of the listing that are made at once (guessed: large against what a batch costs, small against a listing).
_LISTED_ROWS = 16_384
#: Of a file whose size nobody tells (guessed: a photograph).
_GUESSED_FILE_BYTES = 256 << 10

#: The paths of the same files on this machine, in the same order.
Locate = Callable[[Sequence[str]], Sequence[str]]


def is_folder(builder: Any) -> bool:
    """Whether it is of loose files: an ``imagefolder``, ``audiofolder``, …"""
    from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder

    return isinstance(builder, FolderBasedBuilder)


def plan_listing(request: SourceRequest, builder: Any, locate: Locate | None = None) -> SourcePlan | None:
    """The plan of the split's files, in chunks of 64 rows, fewer where they are large; None: some are in archives.

    Rows, their order, labels and metadata are those that ``datasets`` finds. No file of theirs is opened.

    locate: has files of a Hub on this machine (downloads them); None: those that the Hub's local cache has are read
    from there, the others from the Hub, when they are needed.

    Raises:
        EmptyDatasetError, ColumnError. SourceError: the files cannot be listed, or their metadata not be read.
    """
    name = source_name(request)
    with translated(request, "list the files of"):
        step = reading_step(in_order(builder.as_streaming_dataset(split=request.split)))
        if _has_archives(step.kwargs):
            return None
        features = builder.info.features
        columns, needed, notices = choose_columns(
            features, request.columns, dataset=name, all_columns=request.all_columns
        )
        schema = plain_schema(features.arrow_schema, needed)
        media = tuple(column for column in needed if is_media(features[column]))
        rows = (row for _, row in step.generate_examples_fn(**step.kwargs))
        batches = [
            conform(batch, schema, {}) for batch in _batches(rows, {column: features[column] for column in needed})
        ]
    notices = (*notices, "{} rows from the listing of its files, which are read when needed")
    return plan_rows(request, builder, Listed(columns, schema, media, batches, notices), locate)


@dataclass(frozen=True)
class Listed:
    """The rows of a listing, before it is known where their files are read from.

    media: the columns that name files. notices: in the last one {} stands for the number of rows.
    """

    columns: Columns
    schema: pa.Schema
    media: tuple[str, ...]
    batches: list[pa.RecordBatch]
    notices: tuple[str, ...]


def plan_rows(request: SourceRequest, builder: Any, listed: Listed, locate: Locate | None = None) -> SourcePlan:
    """The plan of rows that name their files; see `plan_listing`."""
    name, schema, media = source_name(request), listed.schema, listed.media
    with translated(request, "list the files of"):
        batches, is_local = _relocated(listed.batches, media, locate or _cached)
        sizes = _row_sizes(batches, media, request.load.get("token"))
    num_rows = len(sizes)
    if num_rows == 0:
        raise empty_dataset(request)
    row_bytes = -(-sum(batch.nbytes for batch in batches) // num_rows)
    chunks, chunk_bytes = _cut([size + row_bytes for size in sizes], stream_bytes(schema))
    *notices, told = listed.notices
    return SourcePlan(
        name=name,
        split=request.split,
        mode="files" if is_local else "remote files",
        num_rows=num_rows,
        shards=(name,),
        chunks=chunks,
        columns=listed.columns,
        arrow_schema=schema.serialize().to_pybytes(),
        revision=commit_of(builder),
        num_bytes=sum(sizes),
        notices=(*notices, f"{name}: {told.format(num_rows)}"),
        units=tuple(range(len(chunks))),
        chunk_bytes=chunk_bytes,
        listing=write_listing(batches, schema, media),
    )


def _has_archives(found: Mapping[str, Any]) -> bool:
    """Whether rows come from within archives, of which ``datasets`` tells the folder that it would unpack into."""
    entries = found["metadata_files"] if found["add_metadata"] else found["files"]
    return any(folder is not None for _, folder, _ in entries)


def _batches(rows: Iterable[Mapping[str, Any]], features: Mapping[str, Any]) -> Iterator[pa.RecordBatch]:
    """The rows as Arrow, with the storage types of ``features``."""
    from datasets.table import cast_array_to_feature

    rows = iter(rows)
    while some := list(islice(rows, _LISTED_ROWS)):
        arrays = [cast_array_to_feature(pa.array([row.get(c) for row in some]), f) for c, f in features.items()]
        yield pa.RecordBatch.from_arrays(arrays, names=list(features))


def _relocated(
    batches: list[pa.RecordBatch], media: Sequence[str], locate: Locate
) -> tuple[list[pa.RecordBatch], bool]:
    """The rows with the paths to read from, and whether all of these are on this machine."""
    remote = [path for batch in batches for path in _paths(batch, media)[0] if "://" in path]
    places = dict(zip(remote, locate(remote), strict=True)) if remote else {}
    places = {old: new for old, new in places.items() if old != new}
    if places:
        for name in media:
            index = batches[0].schema.get_field_index(name)
            field = batches[0].schema.field(index)
            batches = [batch.set_column(index, field, with_paths(batch.column(index), places)) for batch in batches]
    return batches, len(places) == len(set(remote))


def _paths(batch: pa.RecordBatch, media: Sequence[str]) -> tuple[list[str], list[int]]:
    """All files of a batch, and for each the row that it is of."""
    paths: list[str] = []
    rows: list[int] = []
    for name in media:
        found = paths_of(batch.column(name))
        paths += found[0]
        rows += found[1]
    return paths, rows


def _cached(paths: Sequence[str]) -> list[str]:
    """Where the Hub's local cache has them; those that it lacks stay."""
    return [(cached_copy(path) if is_remote(path) else None) or path for path in paths]


def _row_sizes(batches: Iterable[pa.RecordBatch], media: Sequence[str], token: str | bool | None) -> list[int]:
    """The bytes of each row's files, as far as they are known without asking for each of a server's."""
    sizes: list[int] = []
    hub = _HubSizes(token)
    for batch in batches:
        here = [0] * batch.num_rows
        for path, row in zip(*_paths(batch, media), strict=True):
            if is_remote(path):
                here[row] += hub.of(path)
            else:
                here[row] += _GUESSED_FILE_BYTES if "://" in path else _local_size(path)
        sizes += here
    return sizes


def _local_size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116  # a million times, and a Path takes longer than the call
    except OSError:  # told when the row is read
        return 0


class _HubSizes:
    """The bytes of files on the Hub, by the listing of their repository, which is asked for once."""

    def __init__(self, token: str | bool | None) -> None:
        self._token = token
        self._repos: dict[str, dict[str, Any]] = {}

    def of(self, path: str) -> int:
        from datasets import config
        from huggingface_hub import HfFileSystem

        repo, _, rest = path.partition("@")
        root = f"{repo}@{rest.partition('/')[0]}"
        if root not in self._repos:
            # With what `datasets` makes its own with, which has this listing already.
            fs = HfFileSystem(endpoint=config.HF_ENDPOINT, token=self._token)
            found: Any = fs.find(root, detail=True)
            self._repos[root] = found
        told = self._repos[root].get(path.removeprefix(SCHEME))
        return int(told["size"]) if told else _GUESSED_FILE_BYTES


def _cut(row_bytes: Sequence[int], more: int) -> tuple[tuple[Chunk, ...], tuple[int, ...]]:
    """Chunks of at most 64 rows and, but for a single larger row, `KEPT_TABLE_BYTES`; and the bytes of each."""
    chunks, chunk_bytes = [], []
    first = num_bytes = 0
    for row, size in enumerate((*row_bytes, None)):
        num = row - first
        if size is None or num == BATCH_ROWS or (num and num_bytes + size > KEPT_TABLE_BYTES):
            chunks.append(Chunk(first, num, 0))
            chunk_bytes.append(num_bytes + more)
            first, num_bytes = row, 0
        num_bytes += size or 0
    return tuple(chunks), tuple(chunk_bytes)
