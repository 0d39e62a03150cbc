"""What the Hub's local cache has of a dataset. Nothing here makes a request; never imports ``datasets``.

The cache keeps, of each repository, ``refs/{revision}`` (the commit that a branch or tag was at when it was last asked
for), ``snapshots/{commit}/…`` (such files of that commit as were fetched, under their names) and, where a snapshot was
asked for, a listing of all files of the commit. Source: huggingface_hub, "Understand caching".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from shmloader.sources.hub import SCHEME

#: The branch on which the Hub keeps a dataset's copy as Parquet.
CONVERSION = "refs/convert/parquet"

_NUMBERED = re.compile(r"^(.*?)(\d{5,6})-of-(\d{5,6})(.*)$")


@dataclass(frozen=True)
class Snapshot:
    """The files that the cache has of one commit. folder: where they lie, under their names in the repository."""

    folder: Path
    commit: str


def repo_of(name: str) -> str | None:
    """The repository of a dataset's name; None: no repository is called so."""
    name = name.removeprefix(f"{SCHEME}datasets/")
    is_id = re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name, re.ASCII)
    return name if is_id else None


def folder_of(repo: str) -> Path:
    """Where the cache keeps the files of ``repo``; it need not exist."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"datasets--{repo.replace('/', '--')}"


def cached_commit(repo: str, revision: str | None) -> str | None:
    """The commit that ``revision`` (None: the main branch) was at when the Hub was last asked; None: it never was."""
    revision = revision or "main"
    ref = folder_of(repo) / "refs" / revision
    if ref.is_file():
        return ref.read_text().strip()
    return revision if re.fullmatch(r"[0-9a-f]{40}", revision) else None


def cached_snapshot(repo: str, revision: str | None) -> Snapshot | None:
    """The files of ``revision`` in the cache; None: there are none."""
    commit = cached_commit(repo, revision)
    folder = folder_of(repo) / "snapshots" / (commit or "-")
    return Snapshot(folder, commit) if commit and folder.is_dir() else None


def listed_files(repo: str, commit: str) -> list[str] | None:
    """The names of all files that the commit has, as the cache tells; None: it does not (an older client wrote it)."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:  # before 2.0 the client kept no such listing
        return None
    try:
        return [file.path for file in get_cached_repo_tree(repo, repo_type="dataset", revision=commit)]
    except CachedRepoTreeNotFoundError:
        return None


def remember_files(repo: str, revision: str | None, name: str, token: str | bool | None) -> None:
    """Have the cache tell which commit ``revision`` is at, and which files that has, though it may have few of them.

    name: of a file that is to be fetched anyway: the client keeps a listing only if it fetches something.
    """
    from huggingface_hub import snapshot_download

    snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=[escape(name)], token=token)


def absent(snapshot: Snapshot, names: Iterable[str]) -> list[str]:
    """Which of ``names`` the snapshot lacks, in order."""
    return sorted(name for name in names if not (snapshot.folder / name).is_file())


def gaps(names: Sequence[str]) -> list[str]:
    """What ``names`` lack of files that are numbered ("…-00001-of-00004…"), in order."""
    found: dict[tuple[str, str, str], set[int]] = {}
    for name in names:
        numbered = _NUMBERED.match(name)
        if numbered:
            found.setdefault((numbered[1], numbered[3], numbered[4]), set()).add(int(numbered[2]))
    missing: list[str] = []
    for (before, total, after), numbers in found.items():
        width = len(total)
        first = 1 if int(total) in numbers else 0  # some count from one
        lacking = set(range(first, int(total) + first)) - numbers
        missing += [f"{before}{number:0{width}}-of-{total}{after}" for number in sorted(lacking)]
    return sorted(missing)
