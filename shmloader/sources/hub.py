"""Files of a dataset on the Hub, as pyarrow reads them: only the bytes that are asked for.

Works with the unmodified ``huggingface_hub``, so HF_ENDPOINT and HF_TOKEN hold; what fails is tried again
(patience.py). Imports ``huggingface_hub`` when first used, never ``datasets``.
"""

from __future__ import annotations

import io
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from shmloader.sources.base import SourceRequest
from shmloader.sources.patience import be_patient

SCHEME = "hf://"
_COMMIT = re.compile("[0-9a-f]{40}")

#: Files below this of which all rows are read at once are fetched whole, with one request.
WHOLE_FILE_BYTES = 8 << 20
#: Bytes of such files that are kept, those that were read last: by bytes and not by number, since of a small dataset
#: all should stay, however many files it has and in whichever order they are read.
MOST_KEPT_BYTES = 8 * WHOLE_FILE_BYTES


class NoRanges(OSError):
    """The server gives whole files only, so nothing can be read of one without fetching all of it."""


class TooLarge(OSError):
    """A file has more bytes than may be read of it."""


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
        self._token = request.load.get("token")
        self._fs = HfFileSystem(token=self._token)
        self._whole: OrderedDict[str, pa.Buffer] = OrderedDict()

    def size(self, path: str) -> int:
        """Bytes of the file; the listing of its folder is asked for once."""
        return int(self._fs.info(path)["size"])

    def open(self, path: str, num_bytes: int) -> Any:
        """The file, which has ``num_bytes`` bytes, for pyarrow; each read is one request for exactly its bytes."""
        return _RemoteFile(self, path, num_bytes)

    def open_whole(self, path: str, num_bytes: int) -> pa.BufferReader:
        """The file, fetched whole with one request the first time."""
        buffer = self._whole.pop(path, None)
        if buffer is None:
            with self.open(path, num_bytes) as file:
                buffer = pa.py_buffer(file.read(num_bytes))
        self._whole[path] = buffer
        while sum(kept.size for kept in self._whole.values()) > MOST_KEPT_BYTES:
            self._whole.popitem(last=False)
        return pa.BufferReader(buffer)

    def read_at(self, path: str, num_bytes: int, offset: int, wanted: int) -> bytes:
        """``wanted`` bytes from ``offset`` on, of the file that has ``num_bytes``."""
        if wanted == 0:  # a range has a byte at least
            return b""
        with self._answer(path, f"bytes={offset}-{offset + wanted - 1}") as answer:
            if answer.status_code != 206 and wanted < num_bytes:  # unread: it may be large
                raise NoRanges(
                    f"asked for {wanted} bytes of a file, the server sent all {num_bytes}: it ignores ranges"
                )
            data: bytes = answer.read()
        if len(data) != wanted:
            raise OSError(f"{path}: {wanted} bytes were asked for, and {len(data)} came")
        return data

    def read_whole(self, path: str, most: int) -> bytes:
        """All bytes of the file, with one request, and without asking for its size before.

        Raises TooLarge if these are more than ``most``.
        """
        data = bytearray()
        with self._answer(path) as answer:
            for part in answer.iter_bytes():
                data += part
                if len(data) > most:
                    told = answer.headers.get("content-length", f"more than {most}")
                    raise TooLarge(f"it has {told} bytes; {most} at most can be read")
        return bytes(data)

    @contextmanager
    def _answer(self, path: str, span: str | None = None) -> Iterator[Any]:
        """The Hub's answer to who asks for the file, or for the ``span`` of it, its body not yet read.

        `HfFileSystem` would read the body whatever it is, and ask once more after a `ServerGivenUp`.
        """
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        headers = build_hf_headers(token=self._token) | ({} if span is None else {"Range": span})
        with get_session().stream("GET", self._url(path), headers=headers) as answer:
            if answer.is_error:
                answer.read()
            hf_raise_for_status(answer)
            yield answer

    def _url(self, path: str) -> str:
        from huggingface_hub import hf_hub_url

        parts = parts_of(path)
        if parts is None or not _COMMIT.fullmatch(parts[1]):
            return str(self._fs.url(path))  # asks the Hub what it is
        repo, commit, name = parts
        return hf_hub_url(repo, name, repo_type="dataset", revision=commit, endpoint=self._fs.endpoint)


class _RemoteFile(io.RawIOBase):
    """A file that knows where it is; each read is a request for exactly its bytes."""

    def __init__(self, files: HubFiles, path: str, num_bytes: int) -> None:
        self._files, self._path, self._num_bytes = files, path, num_bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def size(self) -> int:
        """What pyarrow would seek to the end for."""
        return self._num_bytes

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._num_bytes}[whence]
        return self._at

    def read(self, num_bytes: int = -1) -> bytes:
        left = max(self._num_bytes - self._at, 0)
        wanted = left if num_bytes < 0 else min(num_bytes, left)
        data = self._files.read_at(self._path, self._num_bytes, self._at, wanted)
        self._at += wanted
        return data
