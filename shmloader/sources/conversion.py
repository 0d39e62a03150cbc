"""The Parquet copy that the Hub makes of a dataset: random access and a known length, where its own files have neither.

It is the branch ``refs/convert/parquet``, laid out ``{config}/{split}/0000.parquet``. ``{config}/partial-{split}`` is
the beginning of a split that was too large, and not used. Source: Hugging Face, "Dataset viewer: list Parquet files".
Planner only; imports ``datasets``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from shmloader.errors import SourceError
from shmloader.sources.base import SourceRequest
from shmloader.sources.download import remember
from shmloader.sources.hub import SCHEME
from shmloader.sources.hub_cache import CONVERSION, Snapshot
from shmloader.sources.resolve import quiet_datasets, source_name, translated

#: What a request may say in load= for the copy to be of the same rows: which dataset, and how to get at it.
_SAME_ROWS = {"name", "token", "revision", "cache_dir", "download_mode", "download_config"}
#: Files of which the Hub tells at once when they were changed last.
_TOLD_AT_ONCE = 100


@dataclass(frozen=True)
class _Copy:
    """What the branch has: configuration → split → its files' names. root: what they are relative to."""

    root: str
    commit: str
    splits: dict[str, dict[str, tuple[str, ...]]]

    def any_file(self) -> str:
        """The name of one of its files."""
        return next(files[0] for splits in self.splits.values() for files in splits.values())


def converted_script(request: SourceRequest, repo: str) -> tuple[Any, str]:
    """The builder of the copy of what a loading script yields, and a notice. ``datasets`` runs no scripts any more.

    Raises:
        SourceError: there is none, not of this configuration, or only a part of it.
    """
    with translated(request, "list the Parquet copy of"):
        copy = _list(request, repo)
    found = _of_script(request, copy)
    if copy is not None and request.is_downloaded:
        with translated(request, "download"):
            remember(request, repo, CONVERSION, copy.any_file())  # to start without the Hub
    return found


def cached_script(request: SourceRequest, snapshot: Snapshot, listed: list[str] | None) -> tuple[Any, list[str]]:
    """The builder of a copy in the Hub's local cache, and which files of the split it lacks; (None, …): none is there.

    listed: all files that the copy has; None: not known, and what is there is taken for all.
    """
    names = [path.relative_to(snapshot.folder).as_posix() for path in sorted(snapshot.folder.rglob("*.parquet"))]
    if not names:
        return None, []
    copy = _Copy(str(snapshot.folder), snapshot.commit, _sorted_out(names if listed is None else listed))
    config = _configuration(request, copy)
    missing = {split: sorted(set(files).difference(names)) for split, files in copy.splits[config].items()}
    if missing.get(request.split):
        return None, missing[request.split]
    whole = {split: files for split, files in copy.splits[config].items() if not missing[split]}
    return _of_script(request, replace(copy, splits={**copy.splits, config: whole}))[0], []


def converted_data(request: SourceRequest, repo: str, builder: Any) -> tuple[Any, str] | str:
    """The builder of the copy of ``builder``'s split, and a notice; or why it cannot be used instead."""
    if request.load.keys() - _SAME_ROWS or request.load.get("revision") not in (None, "main"):
        return "load= asks for other rows than the Hub's Parquet copy is of"
    with translated(request, "list the Parquet copy of"):
        copy = _list(request, repo)
        if copy is None:
            return "the Hub has no Parquet copy of it"
        config = str(builder.config.name)
        files = copy.splits.get(config, {}).get(request.split)
        if files is None:
            return f"the Hub's Parquet copy has no (complete) {config}/{request.split}"
        if _is_older(request, repo, copy, files, builder):
            return "its files were changed after the Hub made the Parquet copy"
        found = _builder(request, copy, config)
    lacking = _lacking(request, found, builder)
    if lacking:
        return f"the Hub's Parquet copy lacks the columns {', '.join(map(repr, lacking))}"
    return found, _notice(request, copy, "which have random access and a known number of rows, as its own have not")


def _of_script(request: SourceRequest, copy: _Copy | None) -> tuple[Any, str]:
    name = source_name(request)
    remedy = "Give a dataset that has data files: as Parquet, if you can write it once with an older datasets."
    if copy is None:
        raise SourceError(
            f"{name} is a loading script, which datasets does not run any more, and the Hub has no Parquet copy of "
            f"what it yields (branch {CONVERSION}). {remedy}",
            dataset=name,
        )
    config = _configuration(request, copy)
    if not copy.splits[config]:
        raise SourceError(
            f"{name} is a loading script, which datasets does not run any more, and the Hub's Parquet copy of "
            f"{config!r} (commit {copy.commit}) is not complete. {remedy}",
            dataset=name,
        )
    notice = _notice(request, copy, "since it is a loading script, which datasets does not run any more")
    with translated(request, "open the Parquet copy of"):
        return _builder(request, copy, config), notice


def _configuration(request: SourceRequest, copy: _Copy) -> str:
    wanted, name = request.load.get("name"), source_name(request)
    if wanted is None and "default" in copy.splits:
        return "default"
    if wanted is None and len(copy.splits) == 1:
        return next(iter(copy.splits))
    if wanted in copy.splits:
        return str(wanted)
    raise SourceError(
        f"{name} has the configurations {', '.join(map(repr, sorted(copy.splits)))}"
        f'{"" if wanted is None else f", and no {wanted!r}"}. Choose one of them with load={{"name": …}}.',
        dataset=name,
        available=sorted(copy.splits),
    )


def _notice(request: SourceRequest, copy: _Copy, why: str) -> str:
    return (
        f"{source_name(request)}: its rows are read from the Parquet files that the Hub made of it (revision "
        f"{CONVERSION}, commit {copy.commit}), {why}"
    )


def _list(request: SourceRequest, repo: str) -> _Copy | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    api = HfApi(token=request.load.get("token"))
    try:
        commit = api.dataset_info(repo, revision=CONVERSION).sha
    except RevisionNotFoundError:
        return None
    names = [entry.path for entry in api.list_repo_tree(repo, revision=commit, repo_type="dataset", recursive=True)]
    return _Copy(f"{SCHEME}datasets/{repo}@{commit}", str(commit), _sorted_out(names))


def _sorted_out(names: Iterable[str]) -> dict[str, dict[str, tuple[str, ...]]]:
    splits: dict[str, dict[str, tuple[str, ...]]] = {}
    for name in sorted(names):
        parts = name.split("/")
        if len(parts) != 3 or not parts[2].endswith(".parquet"):
            continue
        config, split, _ = parts
        found = splits.setdefault(config, {})  # also if nothing in it is complete
        if not split.startswith("partial-"):
            found[split] = (*found.get(split, ()), name)
    return splits


def _builder(request: SourceRequest, copy: _Copy, config: str) -> Any:
    files = {split: f"{copy.root}/{config}/{split}/*.parquet" for split in copy.splits[config]}
    return quiet_datasets().load_dataset_builder("parquet", data_files=files, token=request.load.get("token"))


def _lacking(request: SourceRequest, found: Any, builder: Any) -> list[str]:
    """The columns that ``builder`` is known to have, and the copy has not."""
    import pyarrow.parquet as pq

    from shmloader.sources.hub import HubFiles

    if builder.info.features is None:
        return []
    hub, path = HubFiles(request), str(found.config.data_files[request.split][0])
    with translated(request, "read the Parquet copy of"), hub.open(path, hub.size(path)) as file:
        names = pq.read_schema(file).names
    return [name for name in builder.info.features if name not in names]


def _is_older(request: SourceRequest, repo: str, copy: _Copy, files: Sequence[str], builder: Any) -> bool:
    """Whether a file of the split was changed after the first of the copy's was written."""
    prefix = f"{SCHEME}datasets/{repo}@"
    paths = [str(path) for path in (builder.config.data_files or {}).get(request.split, ())]
    own = [path.split("@", 1)[1].partition("/") for path in paths if path.startswith(prefix)]
    if not own:
        return True  # they are from elsewhere, and nothing tells
    written = min(_dates(request, repo, copy.commit, files), default=None)
    changed = _dates(request, repo, own[0][0], [name.split("::")[0] for _, _, name in own])
    return written is None or any(date > written for date in changed)


def _dates(request: SourceRequest, repo: str, commit: str, names: Sequence[str]) -> Iterable[datetime]:
    from huggingface_hub import HfApi

    api = HfApi(token=request.load.get("token"))
    for first in range(0, len(names), _TOLD_AT_ONCE):
        part = list(names[first : first + _TOLD_AT_ONCE])
        for info in api.get_paths_info(repo, part, expand=True, revision=commit, repo_type="dataset"):
            if info.last_commit is not None:
                yield info.last_commit.date
