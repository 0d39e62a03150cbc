"""Where the files of a dataset given by name come from: this machine, the Hub, or what the caches have of it.

==============================  ======================================================================
the name is                     and its files are
==============================  ======================================================================
a local folder or file          those
on a Hub that answers           those of the commit that it is at now
on a Hub that does not answer,  the first of these that the caches have: what ``datasets`` prepared of the
or offline mode is on           commit that the Hub's cache knows; that commit's snapshot; the newest that
                                ``datasets`` prepared
a loading script on the Hub     the Parquet copy that the Hub made of what the script yields
==============================  ======================================================================

Planner only; imports ``datasets``.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shmloader.errors import ShmloaderError, SourceError, SplitNotFoundError
from shmloader.sources.answers import state_of, what_to_do
from shmloader.sources.base import SourceRequest
from shmloader.sources.conversion import cached_script, converted_script
from shmloader.sources.hub_cache import (
    CONVERSION,
    Snapshot,
    absent,
    cached_commit,
    cached_snapshot,
    gaps,
    listed_files,
    repo_of,
)
from shmloader.sources.resolve import (
    check_split,
    commit_of,
    is_answered,
    is_offline,
    is_script,
    resolve_builder,
    source_name,
    split_names,
)

#: What a snapshot has beside data: how ``datasets`` is to read it.
_TOLD = ("README.md", ".huggingface.yaml", "dataset_infos.json")
#: So many names of missing files are shown.
_SHOWN = 5


@dataclass(frozen=True)
class Origin:
    """Files, as a builder of ``datasets`` names them, and what the user should know of where they are from.

    root: the local folder that stands for a Hub dataset. revision: the commit, where it is not in the files' names.
    load: what is to be said beside the request's ``load``, to find the same files again.
    """

    builder: Any
    root: str | None = None
    revision: str | None = None
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    load: dict[str, Any] = field(default_factory=dict)


def find_origin(request: SourceRequest) -> Origin:
    """Where the files of the requested dataset, given by name, are.

    Raises:
        DatasetNotFoundError, EmptyDatasetError: as `resolve_builder`.
        SourceError: the same; or the Hub does not answer, and no cache has the dataset, or not all of it.
    """
    name = source_name(request)
    repo = repo_of(name)
    if repo is None or Path(name).expanduser().exists():
        return Origin(resolve_builder(request))
    if is_offline():
        return _cached(request, repo, "offline mode is on (HF_HUB_OFFLINE)")
    try:
        builder = resolve_builder(request)
    except SourceError as error:
        if is_script(error):
            builder, notice = converted_script(request, repo)
            return Origin(builder, notices=(notice,))
        if is_answered(error):
            raise
        return _cached(request, repo, f"the Hub {state_of(error.data.get('status'))}", error)
    if _is_prepared_only(builder):  # `datasets` takes these whenever the Hub does not give it the dataset
        return _cached(request, repo, "the Hub did not give it (not reached, or not there, or no access)")
    return Origin(builder, revision=commit_of(builder))


def _cached(request: SourceRequest, repo: str, why: str, error: SourceError | None = None) -> Origin:
    """What the caches have of ``repo``.

    error: why the Hub gave nothing; it is raised where they have nothing either. None: `datasets` is asked first.
    """
    revision: str | None = request.load.get("revision")
    builder = None
    if error is None:
        try:
            builder = resolve_builder(request)  # finds what it prepared, without a request in offline mode
        except SourceError as not_prepared:
            error = not_prepared
    if builder is not None and not _is_prepared_only(builder):  # one of its formats, with local files
        return Origin(builder)
    commit = cached_commit(repo, revision)
    prepared = None if builder is None else Path(builder.cache_dir).name
    if builder is not None and prepared == commit:
        return _told(request, why, Origin(builder, revision=commit), f"what datasets prepared in {builder.cache_dir}")
    for branch in (revision, CONVERSION) if revision is None else (revision,):
        snapshot = cached_snapshot(repo, branch)
        found = None if snapshot is None else _whole(request, repo, snapshot, is_last=builder is None)
        if snapshot is not None and found is not None:
            builder, load = found
            origin = Origin(builder, root=str(snapshot.folder), revision=snapshot.commit, load=load)
            return _told(request, why, origin, f"the Hub's cache, {snapshot.folder}")
    if builder is not None and revision in (None, "main"):
        origin = Origin(builder, revision=prepared)
        return _told(request, why, origin, f"the newest that datasets prepared, {builder.cache_dir}")
    raise _nowhere(request, repo, why, error) from error


def _told(request: SourceRequest, why: str, origin: Origin, place: str) -> Origin:
    text = f"{source_name(request)}: {why}; its files are those of commit {origin.revision}, from {place}"
    notices, warnings = ((text,), ()) if is_offline() else ((), (text,))
    return replace(origin, notices=notices, warnings=warnings)


def _whole(request: SourceRequest, repo: str, snapshot: Snapshot, is_last: bool) -> tuple[Any, dict[str, Any]] | None:
    """The builder of a snapshot, and what ``load`` is to say for it.

    None: it has no data files at all (only what was asked of the dataset before).

    is_last: nothing else could be taken.

    Raises:
        SourceError: files of the split are missing. SplitNotFoundError: all are there, and it has no such split.
    """
    if snapshot.commit == cached_commit(repo, CONVERSION):
        script, missing = cached_script(request, snapshot, listed_files(repo, snapshot.commit))
        if missing and is_last:
            raise _incomplete(request, repo, snapshot, None, missing)
        return None if script is None else (script, {})
    listed = listed_files(repo, snapshot.commit)
    lacking = [] if listed is None else absent(snapshot, listed)
    try:
        builder = resolve_builder(request, root=str(snapshot.folder))
    except ShmloaderError:  # none of a known format, or what the card names is not all there
        return _split_alone(request, repo, snapshot, listed or [], is_last) if lacking else None
    splits = _listed_splits(request, snapshot, listed or []) if lacking else {}
    needed = None if splits is None else splits.get(request.split, [])
    missing = [name for name in lacking if needed is None or name in needed]
    if listed is None and "data_files" not in request.load:
        missing = gaps(_names(builder, request.split, snapshot.folder))
    is_there = request.split in split_names(builder)
    if not missing and (is_there or (listed is not None and not lacking)):
        return builder, {}
    if not is_last:
        return None
    raise _incomplete(request, repo, snapshot, builder, missing)


def _split_alone(
    request: SourceRequest, repo: str, snapshot: Snapshot, listed: list[str], is_last: bool
) -> tuple[Any, dict[str, Any]] | None:
    """As `_whole`, where the card names files of other splits that are not there, which makes `datasets` refuse."""
    splits = _listed_splits(request, snapshot, listed)
    if not splits or "data_files" in request.load:
        return None
    names = splits.get(request.split, [])
    missing = absent(snapshot, names)
    if names and not missing:
        load = {"data_files": {request.split: names}}
        asked = replace(request, load={**request.load, **load})
        return resolve_builder(asked, root=str(snapshot.folder)), load
    if not is_last:
        return None
    if not names:
        check_split(request, list(splits))
    raise _incomplete(request, repo, snapshot, None, missing)


def _listed_splits(request: SourceRequest, snapshot: Snapshot, listed: list[str]) -> dict[str, list[str]] | None:
    """The files of each split, if all of ``listed`` were there; None: that cannot be told.

    Found by asking ``datasets`` about a folder of empty files with these names.
    """
    with tempfile.TemporaryDirectory(prefix="shmloader-") as made:
        folder = Path(made)
        for name in listed:
            path, kept = folder / name, snapshot.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(kept.read_bytes() if name in _TOLD and kept.is_file() else b"")
        try:
            builder = resolve_builder(request, root=str(folder))
        except ShmloaderError:  # their names alone do not say what they are
            return None
        return {split: _names(builder, split, folder) for split in split_names(builder)}


def _names(builder: Any, split: str, folder: Path) -> list[str]:
    """The data files of ``split``, relative to ``folder``, as far as they lie in it."""
    files = [Path(file) for file in (builder.config.data_files or {}).get(split, ())]
    roots = {folder, folder.resolve()}
    return [file.relative_to(root).as_posix() for file in files for root in roots if file.is_relative_to(root)]


def _is_prepared_only(builder: Any) -> bool:
    """Whether this is the builder of what ``datasets`` has in its own cache."""
    return bool(type(builder).__module__ == "datasets.packaged_modules.cache.cache")


def _incomplete(
    request: SourceRequest, repo: str, snapshot: Snapshot, builder: Any | None, missing: list[str]
) -> SourceError:
    name, available = source_name(request), [] if builder is None else list(split_names(builder))
    fill = f"Fetch the rest while the Hub can be reached: hf download {repo} --repo-type dataset"
    if not missing:
        return SplitNotFoundError(
            f"{name}: the Hub's cache has no files of split {request.split!r} of commit {snapshot.commit} "
            f"({snapshot.folder}), only of {', '.join(map(repr, available))}. {fill}; or choose one of these with "
            "split=.",
            dataset=name,
            split=request.split,
            available=available,
        )
    shown = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
    return SourceError(
        f"{name}, split {request.split!r}: the Hub's cache has only part of commit {snapshot.commit}: {shown} "
        f"{'is' if len(missing) == 1 else 'are'} missing in {snapshot.folder}. {fill}; or name the files that are to "
        "be used with data_files= in load=.",
        dataset=name,
        split=request.split,
        missing=missing[:100],
        folder=str(snapshot.folder),
    )


def _nowhere(request: SourceRequest, repo: str, why: str, error: SourceError | None) -> SourceError:
    import datasets
    from huggingface_hub import constants

    name, revision = source_name(request), request.load.get("revision") or "main"
    data = {} if error is None or is_offline() else {k: error.data.get(k) for k in ("status", "detail")}
    told = f" {what_to_do(data['status'])} ({data['detail']})" if data.get("detail") else ""
    return SourceError(
        f"Cannot find {name!r}: {why}; the Hub at {constants.ENDPOINT} cannot be reached, so it is not known whether "
        f"the dataset exists. Looked for a local folder or file {str(Path(name).absolute())!r}, for files of revision "
        f"{revision!r} in the Hub's cache ({constants.HF_HUB_CACHE}), and for what datasets prepared "
        f"({datasets.config.HF_DATASETS_CACHE}). Fill the cache while the Hub can be reached: hf download {repo} "
        "--repo-type dataset, or open the dataset once with use_streaming=False; or check "
        f"{'HF_HUB_OFFLINE' if is_offline() else 'the network, HF_ENDPOINT'} and HF_HOME.{told}",
        dataset=name,
        endpoint=constants.ENDPOINT,
        **data,
    )
