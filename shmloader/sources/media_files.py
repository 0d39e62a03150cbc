"""The bytes of files that rows only name: of this machine, of the Hub, or of whatever else ``datasets`` can open."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from shmloader.sources.base import SourceRequest
from shmloader.sources.hub import HubFiles, TooLarge, is_remote
from shmloader.sources.rows import MEDIA_TYPE

log = logging.getLogger("shmloader.sources")

#: Features whose files are read; other files (videos, …) are left to `process`, which gets their paths.
_MEDIA_FEATURES = ("Image", "Audio")
#: Files of a Hub that are fetched at the same time by one prefetcher: a request costs a round trip (guessed: half of
#: what ``datasets`` takes for a process, of which there are several here).
REMOTE_THREADS = 16
#: HTTP: this file is not to be had. Of the Hub that would concern the whole repository, and so a token.
_REFUSED = (401, 403, 404, 410)
#: The same of the Hub's client, which only hub.py may import.
_NOT_THERE = ("RemoteEntryNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError")
#: What Arrow's binary columns hold at most.
_MOST_BYTES = (1 << 31) - 1


class FileFailure(OSError):
    """A file was not read because of what its cause (``__cause__``) says, which may concern all of them."""

    def __init__(self, path: str, why: Exception) -> None:
        super().__init__(f"cannot read the file {path!r}: {type(why).__name__}: {why}")
        self.path = path


class MediaFiles:
    """Reads whole files, in any thread. One per reader; its own threads only fetch what is remote.

    touch: called after each file, and while a large one comes, from whichever thread reads.
    """

    def __init__(self, request: SourceRequest, touch: Callable[[], None] = lambda: None) -> None:
        self._request, self._touch = request, touch
        self._hub: HubFiles | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()  # guards the making of these two

    def read(self, paths: Sequence[str]) -> list[bytes | None]:
        """The bytes of each; None: that file cannot be read (it is not there, not readable, too large).

        Raises:
            FileFailure: of whatever a server that cannot be reached makes its client raise.
        """
        if not any("://" in path for path in paths):
            return [self._local(path) for path in paths]
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(REMOTE_THREADS, "files")
            if self._hub is None and any(is_remote(path) for path in paths):
                self._hub = HubFiles(self._request, self._touch)
            threads = self._threads
        return list(threads.map(self._any, paths))

    def close(self) -> None:
        """End its threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    def _any(self, path: str) -> bytes | None:
        if "://" not in path:
            return self._local(path)
        try:
            hub = self._hub if is_remote(path) else None
            data = self._other(path) if hub is None else hub.read_whole(path, _MOST_BYTES)
        except (FileNotFoundError, TooLarge) as error:
            self._tell(path, error)
            return None
        except OSError as error:
            if type(error).__name__ not in _NOT_THERE:
                raise FileFailure(path, error) from error
            self._tell(path, error)
            return None
        except Exception as error:  # of HTTP clients, archives and file systems of many kinds
            if is_remote(path) or getattr(error, "status", None) not in _REFUSED:
                raise FileFailure(path, error) from error
            self._tell(path, error)
            return None
        self._touch()
        return self._checked(path, data)

    def _local(self, path: str) -> bytes | None:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            self._tell(path, error)
            return None
        self._touch()
        return self._checked(path, data)

    def _other(self, path: str) -> bytes:
        """What only ``datasets`` knows to open: another server, a file in an archive."""
        from datasets import DownloadConfig
        from datasets.utils.file_utils import xopen

        load = self._request.load
        config = DownloadConfig(token=load.get("token"), storage_options=load.get("storage_options") or {})
        with xopen(path, "rb", download_config=config) as file:
            data: bytes = file.read()
        return data

    def _checked(self, path: str, data: bytes) -> bytes | None:
        if len(data) > _MOST_BYTES:
            self._tell(path, OSError(f"it has {len(data):,} bytes; {_MOST_BYTES:,} at most can be read"))
            return None
        return data

    def _tell(self, path: str, error: Exception) -> None:
        """The row's own processor tells it to whoever asks for the row."""
        log.debug("%s cannot be read: %s", path, error)


def is_media(feature: Any) -> bool:
    """Whether a column of this feature (of ``datasets``) holds images or clips, also inside structs and lists."""
    if isinstance(feature, Mapping):
        return any(map(is_media, feature.values()))
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return type(feature).__name__ in _MEDIA_FEATURES or (inner is not None and is_media(inner))


def embed_media(batch: pa.RecordBatch, features: Mapping[str, Any], files: MediaFiles) -> pa.RecordBatch:
    """``batch`` with the bytes of every image and clip in it, as `with_bytes`; itself if it has no such column."""
    for index, field in enumerate(batch.schema):
        if not is_media(features.get(field.name)):
            continue
        column = batch.column(index)
        filled = with_bytes(column, files)
        if filled is not column:
            batch = batch.set_column(index, field, filled)
    return batch


def paths_of(array: pa.Array) -> tuple[list[str], list[int]]:
    """All paths of media in a column, also nested, and for each the row that it is of."""
    paths: list[str] = []
    rows: list[int] = []
    if not _has_media(array.type):
        return paths, rows
    for row, value in enumerate(array.to_pylist()):
        before = len(paths)
        _collect(value, array.type, paths)
        rows += [row] * (len(paths) - before)
    return paths, rows


def with_bytes(array: pa.Array, files: MediaFiles) -> pa.Array:
    """``array`` with the bytes of all media in it that only have a path, also nested.

    What has bytes then has the file's bare name for a path, as ``datasets`` does it; what could not be read keeps its
    path.

    Raises:
        pa.ArrowInvalid: more than 2 GiB in one chunk. Others: see `MediaFiles.read`.
    """
    return _changed(array, lambda media: _filled(media, files))


def with_paths(array: pa.Array, places: Mapping[str, str]) -> pa.Array:
    """``array`` whose media are to be found elsewhere: old path → new one; those without a new one stay."""
    return _changed(array, lambda media: _moved(media, places))


def _changed(array: pa.Array, change: Callable[[pa.StructArray], pa.StructArray]) -> pa.Array:
    """``array`` with what ``change`` makes of the media in it."""
    kind = array.type
    if not _has_media(kind):
        return array
    if kind.equals(MEDIA_TYPE):
        return change(array)
    if pa.types.is_struct(kind):
        children = [_changed(array.field(i), change) for i in range(kind.num_fields)]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=array.is_null())
    array = pa.concat_arrays([array])  # its own values only: ``values`` knows nothing of a slice
    values, mask = _changed(array.values, change), array.is_null()
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(values, type=kind, mask=mask)
    made = pa.LargeListArray if pa.types.is_large_list(kind) else pa.ListArray
    return made.from_arrays(array.offsets, values, type=kind, mask=mask)


def _filled(media: pa.StructArray, files: MediaFiles) -> pa.StructArray:
    data, paths = media.field(0), media.field(1)
    is_missing = pc.and_(media.is_valid(), pc.and_(data.is_null(), paths.is_valid()))
    if not pc.any(is_missing).as_py():
        return media
    values, names, num_bytes = data.to_pylist(), paths.to_pylist(), 0
    missing = [i for i, missing in enumerate(is_missing.to_pylist()) if missing]
    for i, found in zip(missing, files.read([names[i] for i in missing]), strict=True):
        if found is not None:
            values[i], names[i] = found, names[i].rpartition("/")[2]
            num_bytes += len(found)
    if num_bytes > _MOST_BYTES:
        raise pa.ArrowInvalid(f"the files of these rows have {num_bytes:,} bytes together; {_MOST_BYTES:,} at most fit")
    return _media(values, names, media.is_null())


def _moved(media: pa.StructArray, places: Mapping[str, str]) -> pa.StructArray:
    names = [places.get(path, path) for path in media.field(1).to_pylist()]
    return _media(media.field(0), names, media.is_null())


def _media(data: Any, paths: Any, mask: pa.BooleanArray) -> pa.StructArray:
    children = [pa.array(data, pa.binary()), pa.array(paths, pa.string())]
    return pa.StructArray.from_arrays(children, fields=list(MEDIA_TYPE), mask=mask)


def _has_media(kind: pa.DataType) -> bool:
    if kind.equals(MEDIA_TYPE):
        return True
    return any(_has_media(kind.field(i).type) for i in range(kind.num_fields))


def _collect(value: Any, kind: pa.DataType, paths: list[str]) -> None:
    if value is None:
        return
    if kind.equals(MEDIA_TYPE):
        if value["path"] is not None:
            paths.append(value["path"])
    elif pa.types.is_struct(kind):
        for field in kind:
            _collect(value[field.name], field.type, paths)
    elif kind.num_fields:
        for item in value:
            _collect(item, kind.field(0).type, paths)
