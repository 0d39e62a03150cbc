"""Slices and sums of splits, in the syntax of ``datasets``: "train[:95%]", "train[10:20]+validation". Planner only."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from shmloader.errors import ColumnError, OptionError, SourceError, SplitNotFoundError
from shmloader.sources.base import SourcePlan, SourceRequest
from shmloader.sources.resolve import empty_dataset, source_name
from shmloader.sources.several import Piece, joined

#: Stands for all splits there are, as for ``datasets``.
ALL = "all"
#: In the name of no split.
_SIGNS = re.compile(r"[\[\]+()]")
_FRONT = re.compile(r"(?P<name>[^\[\]+()]+)\[(?P<first>[\d_]+)?:(?P<stop>[\d_]+)?\](\([^)]*\))?")


def is_expression(request: SourceRequest) -> bool:
    """Whether ``split`` is more than a name."""
    if isinstance(request.dataset, Mapping) and request.split in request.dataset:
        return False
    return _SIGNS.search(str(request.split)) is not None


def plan_expression(request: SourceRequest, plan_split: Callable[[SourceRequest], SourcePlan]) -> SourcePlan:
    """The plan of the rows that ``split`` stands for, as ``datasets`` rounds and orders them.

    plan_split: the plan of a split by its name.

    Raises:
        OptionError: it is no such expression. SplitNotFoundError: there is no split of a name in it.
        EmptyDatasetError: it stands for no rows. SourceError: a split has no known length. What ``plan_split`` raises.
    """
    plans = {name: _planned(request, name, plan_split) for name in _names(_parsed(request))}
    for name, plan in plans.items():
        if plan.is_open:
            if front_of(request.split) is None:
                raise _no_length(request, name)
            return replace(plan, split=request.split, resolved={**plan.resolved, "split": request.split})
    pieces = [Piece(plans[name], *rows) for name, *rows in ranges(request, lambda name: plans[name].num_rows)]
    if not pieces:
        raise empty_dataset(request)
    first = pieces[0].plan
    for piece in pieces[1:]:
        _check_alike(request, first, piece.plan)
    return joined(pieces, replace(first, split=request.split, resolved={}))


def ranges(request: SourceRequest, num_rows: Callable[[str], int | None]) -> list[tuple[str, int, int]]:
    """(split, first row, end) of what the requested split is the sum of, without empty ones.

    num_rows: of a split by its name.

    Raises:
        OptionError: it is no split, and no slice or sum of splits.
    """
    parsed = _parsed(request)
    try:
        absolute = parsed.to_absolute({name: num_rows(name) for name in _names(parsed)})
    except ValueError as error:  # a rounding that leaves nothing of so few rows
        raise _bad_split(request, str(error)) from error
    return [(one.splitname, one.from_, one.to) for one in absolute if one.from_ < one.to]


def front_of(split: str) -> tuple[str, int, int | None] | None:
    """(name, first, stop) of a slice that counts rows from the front only, so that no length is needed; else None.

    A name alone is all of it: (name, 0, None).
    """
    if _SIGNS.search(split) is None:
        return split, 0, None
    found = _FRONT.fullmatch(split)
    if found is None:
        return None
    return found["name"], int(found["first"] or 0), None if found["stop"] is None else int(found["stop"])


def plan_all(request: SourceRequest, plan_split: Callable[[SourceRequest], SourcePlan]) -> SourcePlan:
    """The plan of the split ``all``: where no split has that name, of all there are, one behind the other."""
    try:
        return plan_split(request)
    except SplitNotFoundError as error:
        available = error.data["available"]
        if any(_SIGNS.search(name) for name in available):  # they cannot be summed
            raise
    plan = plan_expression(replace(request, split="+".join(available)), plan_split)
    return replace(plan, split=ALL)


def _parsed(request: SourceRequest) -> Any:
    from datasets import ReadInstruction

    try:
        return ReadInstruction.from_spec(request.split)
    except (ValueError, AssertionError) as error:
        raise _bad_split(request, str(error)) from error


def _names(parsed: Any) -> dict[str, None]:
    return dict.fromkeys(one.splitname for one in parsed._relative_instructions)


def _planned(request: SourceRequest, name: str, plan_split: Callable[[SourceRequest], SourcePlan]) -> SourcePlan:
    plan = plan_split(replace(request, split=name))
    return replace(plan, resolved={"split": name, **plan.resolved})


def _bad_split(request: SourceRequest, why: str) -> OptionError:
    allowed = "the name of a split, or splits of the form name, name[from:to], name[from%:to%], with + between them"
    return OptionError(
        f"split={request.split!r} of {source_name(request)!r} is not valid: {why.strip()}. It must be {allowed}; from "
        "and to are whole numbers, each may be left out, and negative ones count from the end",
        name="split",
        value=request.split,
        allowed=allowed,
    )


def _no_length(request: SourceRequest, name: str) -> SourceError:
    return SourceError(
        f"split={request.split!r}: nobody knows how many rows the split {name!r} of {source_name(request)!r} has, so "
        "no part of it can be taken. Have it counted, by use_streaming=False (it is downloaded) or by "
        "ShmMultimodalDataset. Without a length there can be one slice that counts rows from the front: "
        f"'{name}[100:]', '{name}[:1000]'.",
        dataset=source_name(request),
    )


def _check_alike(request: SourceRequest, first: SourcePlan, other: SourcePlan) -> None:
    """Raise unless samples are made of the same columns in two splits."""
    if first.columns == other.columns:
        return
    told = [{k: v for k, v in vars(plan.columns).items() if v is not None} for plan in (first, other)]
    raise ColumnError(
        f"{source_name(request)}: samples of split={request.split!r} would be made of other columns in the split "
        f"{other.split!r} ({told[1]}) than in {first.split!r} ({told[0]}). Choose columns that both have with "
        "columns=, or make two datasets of them.",
        dataset=source_name(request),
        columns=list(told[1].values()),
    )
