"""Files of a dataset on the Hub, as pyarrow reads them: only the bytes that are asked for.

Works with the unmodified ``huggingface_hub``, so HF_ENDPOINT and HF_TOKEN hold; what fails is tried again
(patience.py). Imports ``huggingface_hub`` when first used, never ``datasets``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from shmloader.sources.base import SourceRequest
from shmloader.sources.patience import be_patient

SCHEME = "hf://"

#: Files below this of which all rows are read at once are fetched whole, with one request.
WHOLE_FILE_BYTES = 8 << 20
#: Most such files kept at a time, so at most 64 MiB.
MAX_WHOLE_FILES = 8


class NoRanges(OSError):
    """The server gives whole files only, so nothing can be read of one without fetching all of it."""


def is_remote(path: str) -> bool:
    """Whether ``path`` is on the Hub."""
    return path.startswith(SCHEME)


def parts_of(path: str) -> tuple[str, str, str] | None:
    """Repository, commit and name of a file ``hf://datasets/{id}@{commit}/…``; None: it is something else."""
    prefix = f"{SCHEME}datasets/"
    repo, _, rest = path.removeprefix(prefix).partition("@")
    commit, _, name = rest.partition("/")
    return (repo, commit, name) if path.startswith(prefix) and name and "::" not in path else None


def cached_copy(path: str) -> str | None:
    """Where the Hub's local cache has this very version of the file ``hf://datasets/{id}@{commit}/…``, if it has it."""
    from huggingface_hub import try_to_load_from_cache

    parts = parts_of(path)
    if parts is None:
        return None
    repo, commit, name = parts
    found = try_to_load_from_cache(repo, name, revision=commit, repo_type="dataset")
    return found if isinstance(found, str) and Path(found).is_file() else None


class HubFiles:
    """Opens files on the Hub. One per reader; `open` may be called from several threads.

    request: whose token and timeout hold. touch: called whenever something came, from whichever thread reads; None: of
    no matter.

    All raise whatever the Hub's client makes of an answer; `ServerGivenUp`: there was none.
    """

    def __init__(self, request: SourceRequest, touch: Callable[[], None] | None = None) -> None:
        be_patient(request.source_timeout_s, touch)
        from huggingface_hub import HfFileSystem

        # A token of None: the environment's, or the one that was logged in.
        self._fs = HfFileSystem(token=request.load.get("token"))
        self._whole: OrderedDict[str, pa.Buffer] = OrderedDict()

    def size(self, path: str) -> int:
        """Bytes of the file; the listing of its folder is asked for once."""
        return int(self._fs.info(path)["size"])

    def open(self, path: str, num_bytes: int) -> Any:
        """The file, which has ``num_bytes`` bytes, for pyarrow; each read is one request for exactly its bytes."""
        return _Exact(self._fs.open(path, "rb", size=num_bytes, cache_type="none"), path, num_bytes)

    def open_whole(self, path: str, num_bytes: int) -> pa.BufferReader:
        """The file, fetched whole with one request the first time."""
        buffer = self._whole.pop(path, None)
        if buffer is None:
            with self.open(path, num_bytes) as file:
                buffer = pa.py_buffer(file.read(num_bytes))
        self._whole[path] = buffer
        while len(self._whole) > MAX_WHOLE_FILES:
            self._whole.popitem(last=False)
        return pa.BufferReader(buffer)

    def read_at(self, path: str, num_bytes: int, offset: int, wanted: int) -> bytes:
        """``wanted`` bytes from ``offset`` on, of the file that has ``num_bytes``."""
        with self.open(path, num_bytes) as file:
            file.seek(offset)
            return bytes(file.read(wanted))

    def read_whole(self, path: str) -> bytes:
        """All bytes of the file, with one request, and without asking for its size before."""
        parts = []
        with self._fs.open(path, "rb", block_size=0) as file:
            while part := file.read(WHOLE_FILE_BYTES):
                parts.append(part)
        return b"".join(parts)


class _Exact:
    """An open file of which a read gives as many bytes as were asked for, or fails."""

    def __init__(self, file: Any, path: str, num_bytes: int) -> None:
        self._file, self._path, self._num_bytes = file, path, num_bytes

    def read(self, num_bytes: int = -1) -> bytes:
        left = self._num_bytes - self._file.tell()
        wanted = left if num_bytes < 0 else min(num_bytes, left)
        data: bytes = self._file.read(num_bytes)
        if len(data) > wanted:
            raise NoRanges(f"asked for {wanted} bytes of a file, the server sent {len(data)}: it ignores ranges")
        if len(data) != wanted:
            raise OSError(f"{self._path}: {wanted} bytes were asked for, and {len(data)} came")
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Exact:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
