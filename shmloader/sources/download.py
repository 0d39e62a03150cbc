"""Files of the Hub, fetched into its local cache, where every later start finds them.

Planner only; imports ``huggingface_hub``, never ``datasets``.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shmloader.errors import SourceError
from shmloader.options import size_text
from shmloader.sources.base import SourceRequest
from shmloader.sources.blame import chain
from shmloader.sources.hub import HubFiles, cached_copy, is_remote, parts_of
from shmloader.sources.hub_cache import CONVERSION, cached_commit, folder_of, remember_files, repo_of
from shmloader.sources.patience import STALL_S, ServerGivenUp, last_came
from shmloader.sources.resolve import source_name, translated

log = logging.getLogger("shmloader.sources")

#: Files fetched at once: enough for the network to be the limit, few enough for the Hub (guessed).
DOWNLOADS_AT_ONCE = 4
#: What is under way is told this often, or whenever another tenth is there.
PROGRESS_S = 10.0
_LOOK_S = 0.5
#: A file that does not come whole is fetched so often.
_TRIES = 3
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def can_download(paths: Sequence[str]) -> bool:
    """Whether the Hub's cache can hold these files: those of repositories, not of buckets."""
    return all(parts_of(path) is not None for path in paths if is_remote(path))


def download(request: SourceRequest, paths: Sequence[str]) -> list[str]:
    """Where the files ``hf://datasets/{id}@{commit}/…`` lie on this machine, once all of them do; others stay.

    What the cache has already is not asked for. Raises `SourceError`: they cannot be fetched, or the disk is full.
    """
    wanted = [path for path in dict.fromkeys(paths) if is_remote(path) and parts_of(path) is not None]
    missing = [path for path in wanted if cached_copy(path) is None]
    if missing:
        with translated(request, "download"):
            _fetch(request, missing)
    return [cached_copy(path) or path for path in paths]


def remember(request: SourceRequest, repo: str, revision: str | None, name: str) -> None:
    """As `remember_files`, given up as a download is."""
    job = partial(remember_files, repo, revision, name, request.load.get("token"))
    _at_once([job], lambda: _blob_bytes(repo, "*.incomplete"), request.source_timeout_s)


@contextlib.contextmanager
def disk_needed(request: SourceRequest, folder: Path, num_bytes: int | None, variable: str) -> Iterator[None]:
    """Turn a disk that gets full inside into an error that says which, and how to take another one.

    num_bytes: how much will be written, None: not known. variable: which names ``folder``'s place.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if num_bytes is not None and num_bytes > free:
        raise _no_room(request, folder, num_bytes, free, variable)
    try:
        yield
    except Exception as error:
        if not any(is_full(e) for e in chain(error)):
            raise
        free = shutil.disk_usage(_existing(folder)).free
        raise _no_room(request, folder, num_bytes, free, variable) from error


def is_full(error: BaseException) -> bool:
    """Whether ``error`` says that a disk (or a quota) is full; libraries do not always pass the number on."""
    return isinstance(error, OSError) and (error.errno in _NO_SPACE or "No space left on device" in str(error))


class Progress:
    """Tells at INFO how many bytes are there, while a block is at work. ``count`` may be called from any thread."""

    def __init__(self, what: str, num_bytes: int | None, written: Any) -> None:
        """``written``: a function that says how many bytes are there. num_bytes: how many it will be, if known."""
        self._what, self._num_bytes, self._written = what, num_bytes, written
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True, name="shmloader-progress")

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _tell(self) -> None:
        waited, told = 0.0, 0
        while not self._ended.wait(_LOOK_S):
            waited += _LOOK_S
            now = self._written()
            step = self._num_bytes / 10 if self._num_bytes else float("inf")
            if waited >= PROGRESS_S or now - told >= step:
                log.info("%s: %s", self._what, _of(now, self._num_bytes))
                waited, told = 0.0, now


def _fetch(request: SourceRequest, paths: Sequence[str]) -> None:
    from huggingface_hub import constants, hf_hub_download

    token, name = request.load.get("token"), source_name(request)
    hub, places = HubFiles(request), {path: parts_of(path) for path in paths}
    sizes = {path: hub.size(path) for path in paths}
    num_bytes, cache = sum(sizes.values()), Path(constants.HF_HUB_CACHE)
    repos = {place[0] for place in places.values() if place is not None}
    have = sum(_blob_bytes(repo, "*") for repo in repos)  # of other commits: files may be the same there
    done: list[int] = []

    def fetch(path: str) -> None:
        repo, commit, file = places[path] or ("", "", "")

        def fetch_it() -> Path:
            return Path(hf_hub_download(repo, file, repo_type="dataset", revision=commit, token=token))

        _whole(fetch_it, path, sizes[path])
        done.append(sizes[path])

    def written() -> int:
        return sum(done) + sum(_blob_bytes(repo, "*.incomplete") for repo in repos)

    log.info("%s: downloading %d files, %s, to %s", name, len(paths), size_text(num_bytes), cache)
    with (
        disk_needed(request, cache, max(num_bytes - have, 0), "HF_HOME (or HF_HUB_CACHE)"),
        Progress(f"{name}: downloaded", num_bytes, written),
    ):
        repo = repo_of(name)
        copied = None if repo is None else cached_commit(repo, CONVERSION)  # conversion.py has that branch remembered
        own = [path for path, place in places.items() if place is not None and place[0] == repo and place[1] != copied]
        if own:  # for a start without the Hub
            smallest = places[min(own, key=sizes.__getitem__)]
            assert smallest is not None
            remember(request, smallest[0], request.load.get("revision"), smallest[2])
        _at_once([partial(fetch, path) for path in paths], written, request.source_timeout_s)
    log.info("%s: downloaded %s", name, size_text(num_bytes))


def _whole(fetch: Callable[[], Path], path: str, num_bytes: int) -> None:
    """Have ``fetch`` bring the file into the cache, again if it is not whole there."""
    for num_left in reversed(range(_TRIES)):
        try:
            found = fetch()
            have = found.stat().st_size
            if have == num_bytes:
                return
            found.resolve().unlink()  # else it would be found again
            found.unlink(missing_ok=True)
            raise OSError(f"{path}: {num_bytes:,} bytes were told, and {have:,} came")
        except OSError as error:
            is_answer = getattr(error, "response", None) is not None  # which another try would not change
            if is_answer or is_full(error) or not num_left:
                raise


def _at_once(jobs: Sequence[Callable[[], None]], written: Callable[[], int], timeout_s: float) -> None:
    """Have threads do ``jobs``. Raises what the first that fails did, and waits for no other then.

    written, timeout_s: see `_Watch`.
    """
    waiting, failures = deque(jobs), []
    moved = threading.Condition()
    num_left = len(jobs)

    def work() -> None:
        nonlocal num_left
        while True:
            try:
                job = waiting.popleft()
            except IndexError:
                return
            try:
                job()
            except Exception as error:
                failures.append(error)
                waiting.clear()
            with moved:
                num_left -= 1
                moved.notify()

    # Daemons: what is under way when one fails may take any time, and nobody waits for it.
    for _ in range(min(DOWNLOADS_AT_ONCE, len(jobs))):
        threading.Thread(target=work, daemon=True, name="shmloader-download").start()
    watch = _Watch(written, timeout_s)
    with moved:
        while num_left and not failures:
            moved.wait(_LOOK_S)
            watch.look()
    if failures:
        raise failures[0]


class _Watch:
    """Whether a download goes on: its bytes grow, or something comes to our client, which some fetch without.

    written: how many bytes are there; it is not asked more often than each `_LOOK_S`, since that looks at many files.
    """

    def __init__(self, written: Callable[[], int], timeout_s: float) -> None:
        self._written, self._timeout_s = written, timeout_s
        self._last = written()
        self._looked = self._since = time.monotonic()

    def look(self) -> None:
        """Raise `ServerGivenUp` if nothing came for too long."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        num_bytes, self._looked = self._written(), now
        self._since = now if num_bytes != self._last else max(self._since, last_came())
        self._last = num_bytes
        if (silent_s := now - self._since) > self._timeout_s + STALL_S:
            raise ServerGivenUp(f"the download was given up: nothing came for {silent_s:.0f} s", "the Hub's storage")


def _blob_bytes(repo: str, pattern: str) -> int:
    """Bytes of the files that the cache has of ``repo``, whole or as far as they were fetched."""
    total = 0
    for path in (folder_of(repo) / "blobs").glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # it is whole now, and has another name
            total += path.stat().st_size
    return total


def _existing(folder: Path) -> Path:
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _no_room(request: SourceRequest, folder: Path, needed: int | None, free: int, variable: str) -> SourceError:
    name = source_name(request)
    amount = "" if needed is None else f" {size_text(needed)} are needed,"
    return SourceError(
        f"{name}: the disk of {folder} is full:{amount} {size_text(free)} are free. Make room there, name a folder on "
        f"another disk with {variable}, or leave out use_streaming=False, so that it is read from the Hub.",
        dataset=name,
        folder=str(folder),
        needed_bytes=needed,
        have_bytes=free,
    )


def _of(now: int, num_bytes: int | None) -> str:
    return size_text(now) if num_bytes is None else f"{size_text(now)} of {size_text(num_bytes)}"
