"""The plan of a table whose rows name files: a CSV or JSON with the paths of images or clips. Planner only.

The table is read once, by ``datasets``, and becomes a listing (listing.py), so that its files are read as those of a
folder are: any chunk by any prefetcher, many files at once. A path is relative to the folder of the file that it is
written in. Imports ``datasets``.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from shmloader.errors import ReadError
from shmloader.sources import features as kinds
from shmloader.sources.base import SourcePlan, SourceRequest
from shmloader.sources.columns import choose_columns
from shmloader.sources.download import can_download, download
from shmloader.sources.hub import SCHEME, is_remote, parts_of
from shmloader.sources.listing_plan import Listed, plan_rows
from shmloader.sources.media_files import is_media, paths_of
from shmloader.sources.resolve import translated
from shmloader.sources.rows import MEDIA_TYPE, conform, plain_schema
from shmloader.sources.stream import in_order, reading_step
from shmloader.sources.stream_features import features_of

#: The roles whose column may be of paths.
_MEDIA_ROLES = ("image", "audio")
#: A repository's files in the Hub's local cache. Source: huggingface_hub, "Understand caching".
_IN_CACHE = re.compile(r".*/datasets--([^/]+)/snapshots/[^/]+/")


def plan_table(request: SourceRequest, builder: Any) -> SourcePlan | None:
    """The plan of a split of a table whose ``columns=`` name a column of strings as image or audio; None: it is none.

    Where the request is downloaded, all files that the rows name are, before.

    Raises:
        EmptyDatasetError, ColumnError. SourceError: the table cannot be read.
    """
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json

    named = {role: request.columns.get(role) for role in _MEDIA_ROLES} if isinstance(request.columns, Mapping) else {}
    if not isinstance(builder, Csv | Json) or not any(isinstance(name, str) for name in named.values()):
        return None
    with translated(request, "read the list of files of"):
        stream = in_order(builder.as_streaming_dataset(split=request.split))
        features = features_of(request, stream)
        paths = {
            name: role for role, name in named.items() if name in features and kinds.is_string(features[str(name)])
        }
        if not paths or not stream._ex_iterable.iter_arrow:
            return None
        typed = _with_media(features, paths)
        columns, needed, notices = choose_columns(
            typed, request.columns, dataset=str(request.dataset), all_columns=request.all_columns
        )
        schema = plain_schema(typed.arrow_schema, needed)
        files = [str(file) for file in builder.config.data_files[request.split]]
        batches = [batch for table in _tables(stream, files, tuple(paths)) for batch in _batches(table, schema)]
    media = tuple(name for name in needed if is_media(typed[name]))
    told = (
        f"{{}} rows from {', '.join(posixpath.basename(file) for file in files[:3])}, whose files are read when needed"
    )
    listed = Listed(columns, schema, media, batches, (*notices, told))
    if not request.is_downloaded:
        return plan_rows(request, builder, listed)
    remote = [path for batch in batches for name in media for path in paths_of(batch.column(name))[0] if "://" in path]
    if not can_download(remote):
        return plan_rows(request, builder, listed)
    download(request, [*files, *remote])  # the table too: for a start without the Hub
    return plan_rows(request, builder, listed, lambda wanted: download(request, wanted))


def _with_media(features: Any, paths: Mapping[Any, str]) -> Any:
    """``features`` with the columns of paths as what their files are."""
    import datasets

    made = {"image": datasets.Image, "audio": datasets.Audio}
    return datasets.Features({n: made[paths[n]]() if n in paths else feature for n, feature in features.items()})


def _tables(stream: Any, files: list[str], columns: tuple[Any, ...]) -> Iterator[pa.Table]:
    """The rows as the table has them, but for the paths, which are whole."""
    step = reading_step(stream)
    base, readable = step.kwargs["base_files"], step.kwargs["files_iterables"]
    for i, file in enumerate(files):
        folder = file.rpartition("/")[0]
        kwargs = {**step.kwargs, "base_files": base[i : i + 1], "files_iterables": readable[i : i + 1]}
        for _, table in step.generate_tables_fn(**kwargs):
            for name in columns:
                index = table.schema.get_field_index(name)
                whole = [_whole(folder, path) for path in table.column(index).to_pylist()]
                _check_inside(file, whole)
                media = pa.array([None if p is None else {"bytes": None, "path": p} for p in whole], MEDIA_TYPE)
                table = table.set_column(index, name, media)
            yield table


def _whole(folder: str, path: str | None) -> str | None:
    """Where a path lies that is written in a file of ``folder``, itself a path or an address."""
    if path is None or not path or "://" in path or path.startswith("/"):
        return path or None
    scheme, sign, rest = folder.rpartition("://")
    return f"{scheme}{sign}{posixpath.normpath(posixpath.join(rest, path))}"


def _check_inside(file: str, paths: Sequence[str | None]) -> None:
    """Raise if a table on a Hub names files that are not of its repository: nobody has looked at what it may say."""
    cached = _IN_CACHE.match(file)
    if is_remote(file):
        repo, commit, _ = parts_of(file) or ("", "", "")
        root = f"{SCHEME}datasets/{repo}@{commit}/"
    elif cached is not None:  # in the Hub's local cache
        repo, root = cached[1], cached[0]
    else:
        return
    for path in paths:
        if path is not None and not path.startswith(root):
            raise ReadError(
                f"{file} names {path!r}, which is no file of its repository. Only those are read of what a table on a "
                "Hub names; download it, look at it, and give its folder.",
                dataset=repo,
                shard=file,
                first_row=None,
                num_rows=None,
            )


def _batches(table: pa.Table, schema: pa.Schema) -> list[pa.RecordBatch]:
    return [conform(batch.select(schema.names), schema, {}) for batch in table.combine_chunks().to_batches()]
