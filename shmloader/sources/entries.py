"""A short name's place, split and columns, as the catalog says them; planner only.

Other requests pass through. The places are tried in their order: the next one only where the one before does not
exist. A Hub that cannot be reached does not say that, so its error stays as it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shmloader.catalog import DatasetConfig, Repo
from shmloader.errors import DatasetNotFoundError, SplitNotFoundError
from shmloader.sources.base import SourcePlan, SourceRequest
from shmloader.sources.planning import plan_source

log = logging.getLogger("shmloader.sources")

#: A term of a sum of splits: its name, and its slice if it has one. Source: datasets, "Slice splits".
_TERM = re.compile(r"(?P<name>\w+(?:\.\w+)*)(?P<slice>\[[^\]]*\](?:\([^)]*\))?)?")


def plan_entry(request: SourceRequest) -> SourcePlan:
    """The plan of a request, be it for a short name or for a dataset whose place is known.

    Of a short name: ``name`` is it, and ``resolved`` says where it was found.

    Raises:
        DatasetNotFoundError: none of its places exists. SplitNotFoundError: it lacks the split, and the catalog knows
            of nothing in its place. Others: see `shmloader.sources.make_plan`.
    """
    entry = request.entry
    if entry is None:
        return plan_source(request)
    missing: list[DatasetNotFoundError] = []
    for repo in entry.repos:
        try:
            plan = _plan_repo(request, entry, repo)
        except DatasetNotFoundError as error:
            log.info("%s: %s", entry.name, error)
            missing.append(error)
            continue
        notices = (*_shadow_notice(entry), *(_next_notice(entry, repo, missing) if missing else ()))
        return replace(plan, name=entry.name, notices=(*notices, *plan.notices))
    if len(missing) == 1:
        raise missing[0]
    raise DatasetNotFoundError(
        f"{entry.name}: none of the places where it lies exists: " + "; ".join(map(str, missing)),
        dataset=entry.name,
        tried=[repo.id for repo in entry.repos],
    ) from missing[0]


def _plan_repo(request: SourceRequest, entry: DatasetConfig, repo: Repo) -> SourcePlan:
    columns = request.columns
    if columns is None:
        columns = dict(entry.columns if repo.columns is None else repo.columns) or None
    load = {**repo.load, **request.load}
    asked = replace(request, dataset=repo.id, load=load, columns=columns, entry=None)
    notices: tuple[str, ...] = ()
    try:
        plan = plan_source(asked)
    except SplitNotFoundError as error:
        split = mapped_split(entry, repo, request.split, error.data.get("available") or ())
        if split == request.split:
            raise
        plan = plan_source(replace(asked, split=split))
        notices = (_split_notice(entry, request.split, split),)
        asked = replace(asked, split=split)
    found = {"dataset": repo.id, "entry": None, "split": asked.split, "columns": columns}
    told = {key: value for key, value in repo.load.items() if key not in request.load}
    told |= plan.resolved.get("load", {})
    plan = replace(plan, notices=(*notices, *plan.notices), resolved={**found, **plan.resolved, "load": told})
    if plan.columns.labels is not None and plan.columns.class_names is None and entry.class_names:
        plan = replace(plan, columns=replace(plan.columns, class_names=entry.class_names))
    return plan


def mapped_split(entry: DatasetConfig, repo: Repo, split: str, available: Sequence[str]) -> str:
    """``split`` with what the catalog puts in the place of the splits that are not ``available``.

    Raises:
        SplitNotFoundError: of what is a slice already, a slice is asked for.
    """

    def changed(term: re.Match[str]) -> str:
        name, part = term["name"], term["slice"] or ""
        found, seen = name, {name}
        while found not in available and found in repo.splits:
            found = repo.splits[found]
            if found in seen:
                break
            seen.add(found)
        if found == name or not part:
            return found + (part if found == name else "")
        if re.fullmatch(r"\w+(\.\w+)*", found):
            return found + part
        raise SplitNotFoundError(
            f"{entry.name} has no split {name!r}: {found!r} is used in its place, of which no part can be taken by "
            f"{split!r}. Say it of the splits that there are ({', '.join(map(repr, available))}), as in {found!r}.",
            dataset=entry.name,
            split=split,
            available=list(available),
        )

    # What stands in brackets is no name.
    return _TERM.sub(changed, split)


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


def _next_notice(entry: DatasetConfig, repo: Repo, missing: list[DatasetNotFoundError]) -> tuple[str, ...]:
    gone = ", ".join(str(error.data.get("dataset")) for error in missing)
    return (f"{entry.name}: it is read from {repo.id}, since there is no {gone}",)
