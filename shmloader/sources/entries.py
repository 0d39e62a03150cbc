"""A short name's place, split and columns, as the catalog says them; planner only.

Other requests pass through. The places are tried in their order: the next one only where the one before does not
exist. A Hub that cannot be reached does not say that, so its error stays as it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from shmloader.catalog import DatasetConfig, Repo
from shmloader.errors import DatasetNotFoundError, SourceError, SplitNotFoundError
from shmloader.sources.base import SourcePlan, SourceRequest
from shmloader.sources.hub_cache import CONVERSION, cached_snapshot, repo_of
from shmloader.sources.planning import plan_source
from shmloader.sources.resolve import is_answered
from shmloader.sources.splits import is_expression, plan_expression

log = logging.getLogger("shmloader.sources")


def plan_entry(request: SourceRequest) -> SourcePlan:
    """The plan of a request, be it for a short name or for a dataset whose place is known.

    Of a short name: ``name`` is it, and ``resolved`` says where it was found. Where one of its places cannot be asked
    for, those behind it are taken from the Hub's local cache or not at all.

    Raises:
        DatasetNotFoundError: none of its places exists. SplitNotFoundError: it lacks the split, and the catalog knows
            of nothing in its place; or it would have rows twice. Others: see `shmloader.sources.make_plan`.
    """
    entry = request.entry
    if entry is None:
        return plan_source(request)
    missing: list[DatasetNotFoundError] = []
    unreached: SourceError | None = None
    for repo in entry.repos:
        if unreached is not None and not _is_cached(repo):
            continue
        try:
            plan = _plan_repo(request, entry, repo)
        except DatasetNotFoundError as error:
            log.info("%s: %s", entry.name, error)
            missing.append(error)
            continue
        except SourceError as error:
            if is_answered(error):
                raise
            unreached = unreached or error
            continue
        notices = (*_shadow_notice(entry), *_next_notice(entry, repo, missing, unreached))
        return replace(plan.named(entry.name), notices=(*notices, *plan.notices))
    if unreached is not None:
        raise unreached
    if len(missing) == 1:
        raise missing[0]
    raise DatasetNotFoundError(
        f"{entry.name}: none of the places where it lies exists: " + "; ".join(map(str, missing)),
        dataset=entry.name,
        tried=[repo.id for repo in entry.repos],
    ) from missing[0]


def _is_cached(repo: Repo) -> bool:
    """Whether the Hub's local cache has something of it; asks nobody."""
    name = repo_of(repo.id)
    return name is not None and any(cached_snapshot(name, revision) for revision in (repo.revision, CONVERSION))


def _plan_repo(request: SourceRequest, entry: DatasetConfig, repo: Repo) -> SourcePlan:
    columns = request.columns
    if columns is None:
        columns = dict(entry.columns if repo.columns is None else repo.columns) or None
    load = {**repo.load, **request.load}
    asked = replace(request, dataset=repo.id, load=load, columns=columns, entry=None)
    notices: list[str] = []

    def plan_split(one: SourceRequest) -> SourcePlan:
        try:
            return plan_source(one)
        except SplitNotFoundError as error:
            used = mapped_split(repo, one.split, error.data.get("available") or ())
            if used == one.split:
                raise
            notices.append(_split_notice(entry, one.split, used))
            plan = plan_source(replace(one, split=used))
            return replace(plan, resolved={"split": used, **plan.resolved})

    plan = plan_expression(asked, plan_split) if is_expression(asked) else plan_split(asked)
    if notices:
        _check_once(entry, asked.split, plan, notices)
    found = {"dataset": repo.id, "entry": None, "split": asked.split, "columns": columns}
    told = {key: value for key, value in repo.load.items() if key not in request.load}
    told |= plan.resolved.get("load", {})
    plan = replace(plan, notices=(*notices, *plan.notices), resolved={**found, **plan.resolved, "load": told})
    if plan.columns.labels is not None and plan.columns.class_names is None and entry.class_names:
        plan = replace(plan, columns=replace(plan.columns, class_names=entry.class_names))
    return plan


def mapped_split(repo: Repo, split: str, available: Sequence[str]) -> str:
    """What the catalog puts in the place of ``split``, where only splits that are ``available`` will do."""
    seen = {split}
    while split not in available and split in repo.splits:
        split = repo.splits[split]
        if split in seen:
            break
        seen.add(split)
    return split


def _check_once(entry: DatasetConfig, split: str, plan: SourcePlan, notices: Sequence[str]) -> None:
    """Raise if rows would come twice because of what stands for a split that is lacking."""
    spans: dict[tuple[str, tuple[str, ...]], list[tuple[int, int]]] = {}
    for chunk in plan.chunks:
        leaf, first = plan.origin(chunk.first_row)
        spans.setdefault((leaf.split, leaf.shards), []).append((first, first + chunk.num_rows))
    for (name, _), some in spans.items():
        some.sort()
        if any(end > first for (_, end), (first, _) in pairwise(some)):
            raise SplitNotFoundError(
                f"{entry.name}: split={split!r} would have rows of {name!r} twice, since {'; '.join(notices)}. Say "
                f"which rows of {name!r} you want.",
                dataset=entry.name,
                split=split,
                available=[name],
            )


def _split_notice(entry: DatasetConfig, asked: str, used: str) -> str:
    notice = f"{entry.name} has no split {asked!r}: {used!r} is used in its place"
    tail = re.fullmatch(r"(\w+)\[(\d+%?):\]", used)
    if tail:
        return f"{notice}, which {tail[1]!r} holds too: train on split='{tail[1]}[:{tail[2]}]'"
    if asked == "train":
        return f"{notice}; so train on no more than split='{used}[:95%]' if you evaluate on the rest of it"
    return f"{notice}; train on another split than that"


def _shadow_notice(entry: DatasetConfig) -> tuple[str, ...]:
    """That a file of the same name is not what is read."""
    if entry.repos[0].id == entry.name or not Path(entry.name).exists():
        return ()
    return (
        f"{entry.name} is the dataset {entry.repos[0].id}, not the local {str(Path(entry.name).absolute())!r}: "
        f"that is './{entry.name}'",
    )


def _next_notice(
    entry: DatasetConfig, repo: Repo, missing: Sequence[DatasetNotFoundError], unreached: SourceError | None
) -> tuple[str, ...]:
    if unreached is not None:
        return (
            f"{entry.name}: it is read from {repo.id}, which the Hub's cache has; {unreached.data['dataset']} comes "
            "before it, but cannot be asked for now",
        )
    if not missing:
        return ()
    gone = ", ".join(str(error.data.get("dataset")) for error in missing)
    return (f"{entry.name}: it is read from {repo.id}, since there is no {gone}",)
