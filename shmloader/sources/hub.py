"""Files of a dataset on the Hub, as pyarrow reads them: only the bytes that are asked for.

Works with the unmodified ``huggingface_hub`` client, so HF_ENDPOINT, HF_TOKEN and its retries hold.
Imports ``huggingface_hub`` when first used, never ``datasets``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

SCHEME = "hf://"

#: Files below this are fetched whole, with one request, and kept (DESIGN.md, decision 18).
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

    token: as ``datasets`` takes it; None: the environment's, or the one that was logged in.
    touch: called after each read, from whichever thread reads.
    """

    def __init__(self, token: str | bool | None = None, touch: Callable[[], None] = lambda: None) -> None:
        from huggingface_hub import HfFileSystem

        self._touch = touch

        self._fs = HfFileSystem(token=token)
        self._whole: OrderedDict[str, pa.Buffer] = OrderedDict()

    def size(self, path: str) -> int:
        """Bytes of the file; the listing of its folder is asked for once."""
        return int(self._fs.info(path)["size"])

    def open(self, path: str, num_bytes: int) -> Any:
        """The file, which has ``num_bytes`` bytes, for pyarrow; each read is one request for exactly its bytes."""
        return _Touching(self._fs.open(path, "rb", size=num_bytes, cache_type="none"), self._touch)

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

    def read_whole(self, path: str) -> bytes:
        """All bytes of the file, with one request, and without asking for its size before."""
        parts = []
        with self._fs.open(path, "rb", block_size=0) as file:
            while part := file.read(WHOLE_FILE_BYTES):
                parts.append(part)
                self._touch()
        return b"".join(parts)


class _Touching:
    """An open file that tells of each read."""

    def __init__(self, file: Any, touch: Callable[[], None]) -> None:
        self._file, self._touch = file, touch

    def read(self, num_bytes: int = -1) -> bytes:
        data: bytes = self._file.read(num_bytes)
        if 0 <= num_bytes < len(data):
            raise NoRanges(f"asked for {num_bytes} bytes of a file, the server sent {len(data)}: it ignores ranges")
        self._touch()
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Touching:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
