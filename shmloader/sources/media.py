"""Images and audio that a row only names get the bytes of the file: a local one, one of a Hub, or one in an archive."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from shmloader.sources.base import SourceRequest
from shmloader.sources.rows import MEDIA_TYPE

log = logging.getLogger("shmloader.sources")

#: Features that are stored as `MEDIA_TYPE`.
MEDIA_FEATURES = ("Image", "Audio")
#: Files of a Hub that are read at once: reading one is mostly waiting, for a round trip or two (guessed).
REMOTE_READS = 16


def embed_media(
    batch: pa.RecordBatch, features: Mapping[str, Any], request: SourceRequest, touch: Callable[[], None] = lambda: None
) -> pa.RecordBatch:
    """``batch`` with the bytes of every image and clip in it, also inside structs, read from its path where need be.

    A file that is not there, or a local one that cannot be read, leaves its row as it is, so that only this row cannot
    be decoded. What is read keeps the
    file's name as its path, as the features' own ``embed_storage`` does (that of `Audio` is not used: it may want
    torchcodec, and neither reads several files at once).

    touch: called after each file, in this thread.

    Raises:
        OSError: a file that is not local, or lies in an archive, cannot be read; names it.
    """
    for index, field in enumerate(batch.schema):
        column = batch.column(index)
        embedded = _embedded(column, features.get(field.name), request, touch)
        if embedded is not column:
            batch = batch.set_column(index, field, embedded)
    return batch


def _embedded(array: pa.Array, feature: Any, request: SourceRequest, touch: Callable[[], None]) -> pa.Array:
    """``array`` itself where nothing is to be read."""
    if type(feature).__name__ in MEDIA_FEATURES and array.type.equals(MEDIA_TYPE):
        return _with_bytes(array, request, touch)
    if not isinstance(feature, Mapping) or not pa.types.is_struct(array.type):
        return array
    old = [pc.struct_field(array, [i]) for i in range(array.type.num_fields)]
    new = [_embedded(child, feature.get(f.name), request, touch) for f, child in zip(array.type, old, strict=True)]
    if all(one is other for one, other in zip(new, old, strict=True)):
        return array
    return pa.StructArray.from_arrays(new, fields=list(array.type), mask=array.is_null())


def _with_bytes(array: pa.Array, request: SourceRequest, touch: Callable[[], None]) -> pa.Array:
    data, paths = (pc.struct_field(array, [i]) for i in range(2))
    is_missing = pc.and_(pc.is_null(data), pc.is_valid(paths))
    if not pc.any(is_missing).as_py():
        return array
    missing = [path for path in paths.filter(is_missing).to_pylist() if path]
    found = _read_all(dict.fromkeys(missing), request, touch)
    values = data.to_pylist()
    names = paths.to_pylist()
    for i, path in enumerate(names):
        if values[i] is None and path in found:
            values[i], names[i] = found[path], os.path.basename(path)  # noqa: PTH119 - of an URL, too
    children = [pa.array(values, MEDIA_TYPE[0].type), pa.array(names, MEDIA_TYPE[1].type)]
    return pa.StructArray.from_arrays(children, fields=list(MEDIA_TYPE), mask=array.is_null())


def _read_all(paths: Iterable[str], request: SourceRequest, touch: Callable[[], None]) -> dict[str, bytes]:
    """The bytes of each file that is there."""
    from datasets import DownloadConfig
    from datasets.utils.file_utils import is_local_path

    config = DownloadConfig(token=request.load.get("token"), storage_options=request.load.get("storage_options") or {})
    local: list[str] = []
    remote: list[str] = []
    for path in paths:
        (local if is_local_path(path.split("::")[0]) else remote).append(path)
    found: dict[str, bytes] = {}
    for names, reading in ((local, map), (remote, _pool().map)):
        for path, data in zip(names, reading(lambda name: _read(name, config), names), strict=True):
            touch()
            if data is not None:
                found[path] = data
    return found


def _read(path: str, config: Any) -> bytes | None:
    """The bytes of a file; None: there is none, or it is a local one that cannot be read."""
    from datasets.utils.file_utils import is_local_path, xopen

    try:
        with xopen(path, "rb", download_config=config) as file:
            data: bytes = file.read()
            return data
    except FileNotFoundError:
        return None
    except Exception as error:  # of HTTP clients, archives and file systems of many kinds
        if isinstance(error, OSError) and "::" not in path and is_local_path(path):
            log.debug("%s cannot be read: %s", path, error)  # the row's own processor tells it to whoever asks for it
            return None
        raise OSError(f"cannot read the file {path!r}: {type(error).__name__}: {error}") from error


@cache
def _pool() -> ThreadPoolExecutor:
    """Kept for good: the Hub's file system asks for the repository anew in every new thread."""
    return ThreadPoolExecutor(REMOTE_READS, thread_name_prefix="media")
