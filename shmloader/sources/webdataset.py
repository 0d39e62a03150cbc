"""WebDataset archives: what their headers tell before any sample is read. Planner only; imports ``datasets``."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from shmloader.errors import ReadError, SourceError
from shmloader.sources.base import SourceRequest
from shmloader.sources.resolve import source_name

#: What a tar ends with: two blocks of zeros. Source: POSIX.1-2017, pax, "ustar Interchange Format".
_END = bytes(1024)
#: How many samples ``datasets`` takes the columns from.
_LOOK_SAMPLES = 5


def is_webdataset(builder: Any) -> bool:
    """Whether it is of tar archives, as WebDataset has them."""
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    return isinstance(builder, WebDataset)


def archives_of(request: SourceRequest, builder: Any) -> tuple[list[str], tuple[str, ...]]:
    """The split's archives, if all of them are on this machine and not compressed, else none; and warnings.

    There is one of each archive without an end: what was cut off cannot be known.

    Raises:
        ReadError: one is no tar archive. SourceError: the first samples do not tell the columns, and nobody else does.
    """
    paths = [str(path) for path in builder.config.data_files[request.split]]
    if any("://" in path or not path.endswith(".tar") for path in paths):
        return [], ()
    name, told = source_name(request), []
    for path in paths:
        try:
            with tarfile.open(path, "r:") as archive:
                archive.next()
            if not _has_end(path):
                told.append(f"{name}: {path} has no end, as a tar that was cut short: what it holds is all there is")
            if path == paths[0] and builder.info.features is None:
                _check_members(name, path)
        except (OSError, tarfile.TarError) as error:
            raise _read_error(name, path, error) from error
    return paths, tuple(told)


def count_samples(request: SourceRequest, paths: Sequence[str]) -> int:
    """The samples in archives on this machine, by their headers alone: contiguous members with one key.

    Raises:
        ReadError: an archive cannot be read, or ends in the middle of a member; names it.
    """
    name, num = source_name(request), 0
    for path in paths:
        try:
            num += sum(1 for _ in _keys(path))
        except (OSError, tarfile.TarError) as error:
            raise _read_error(name, path, error) from error
    return num


def _has_end(path: str) -> bool:
    with Path(path).open("rb") as file:
        file.seek(max(0, Path(path).stat().st_size - len(_END)))
        return file.read() == _END


def _check_members(name: str, path: str) -> None:
    """Raise unless the first samples have the same members, from which ``datasets`` takes the columns."""
    samples = list(islice(_samples(path), _LOOK_SAMPLES))
    if all(set(members) == set(samples[0][1]) for _, members in samples):
        return
    listed = "".join(f"\n    {key}: {', '.join(members)}" for key, members in samples)
    raise SourceError(
        f"{name}: the first {_LOOK_SAMPLES} samples, which tell the columns, must all have the same members. In {path}:"
        f'{listed}\nGive each the same ones, or say which columns there are with load={{"features": …}}: then they may '
        "be missing.",
        dataset=name,
        shard=path,
    )


def _samples(path: str) -> Iterator[tuple[str, list[str]]]:
    """(key, its members) of each sample."""
    from datasets.packaged_modules.webdataset.webdataset import base_plus_ext

    key: str | None = None
    names: list[str] = []
    with tarfile.open(path, "r:") as archive:
        size = Path(path).stat().st_size
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # of millions they take much memory
            if member.offset_data + member.size > size:
                raise tarfile.ReadError(f"it ends in the middle of {member.name!r}")
            base, ending = base_plus_ext(member.name) if _is_read(member) else (None, None)
            if base is None or ending is None:
                continue
            if key is not None and base != key:
                yield key, names
                names = []
            key = base
            names.append(ending)
    if key is not None:
        yield key, names


def _keys(path: str) -> Iterator[str]:
    return (key for key, _ in _samples(path))


def _is_read(member: tarfile.TarInfo) -> bool:
    """Whether ``datasets`` takes a member for one of a sample."""
    name = member.name
    return member.isreg() and not Path(name).name.startswith((".", "__"))


def _read_error(name: str, path: str, error: Exception) -> ReadError:
    return ReadError(
        f"{name}: cannot read the tar archive {path}: {type(error).__name__}: {error}. It may be cut short or damaged; "
        "fetch it again, or leave it out with data_files= in load=.",
        dataset=name,
        shard=path,
        first_row=0,
        num_rows=0,
    )
