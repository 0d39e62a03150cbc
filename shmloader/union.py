"""The schema of several sources in one set: the fields of all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shmloader.errors import ColumnError
from shmloader.sample import Field, Schema

#: Stands for a class that there is none of: losses ignore it. Source: torch.nn.CrossEntropyLoss, ``ignore_index``.
IGNORED_LABEL = -100

_ORDER = ("text", "image", "audio", "labels")

#: What all sources must agree in, and what there is to say of each.
_SAME = {
    "dtype": "are of other types",
    "scale": "are not normalised alike",
    "shift": "are not normalised alike",
    "is_text": "are of other types",
    "mask": "are not both tokens",
}


def union(schemas: Sequence[Schema]) -> Schema:
    """The schema of a set whose sources have these schemas, in order.

    A field that a source lacks is optional. Where ``labels`` are of tokens in one source and a class in another, the
    class is stored as one label, [1]. Where samples lack a class that those of another source have, a batch has -100.

    Raises:
        ColumnError: fields of one name cannot lie in one batch.
    """
    if len(schemas) == 1:
        return schemas[0]
    # As processors order them (text before labels, which may share its bytes), then as they come.
    found = dict.fromkeys(field.name for schema in schemas for field in schema.fields)
    names = tuple(dict.fromkeys([name for name in _ORDER if name in found] + list(found)))
    owns: list[dict[str, Field]] = [{field.name: field for field in schema.fields} for schema in schemas]
    sources = tuple(schema.sources[0] for schema in schemas)
    fields = []
    for name in names:
        _promote_labels(name, owns)
        have = [(source, own[name]) for source, own in zip(sources, owns, strict=True) if name in own]
        fields.append(_common(have, is_lacking=len(have) < len(owns)))
    return Schema(
        tuple(fields),
        tuple(schema.task_types[0] for schema in schemas),
        sources,
        tuple(tuple(own.values()) for own in owns),
    )


def _promote_labels(name: str, owns: list[dict[str, Field]]) -> None:
    """Where some have labels of tokens, a class of the others is stored as [1]."""
    have = [own[name] for own in owns if name in own]
    if name != "labels" or {len(field.shape) for field in have} != {0, 1}:
        return
    pad = next(field.pad for field in have if field.shape)
    for own in owns:
        if name in own and not own[name].shape:
            own[name] = replace(own[name], shape=(1,), pad=pad)


def _common(have: Sequence[tuple[str, Field]], is_lacking: bool) -> Field:
    """One field of a name. have: (source, its field). is_lacking: of some sources, samples have none."""
    (first_source, first), *others = have
    for source, field in others:
        _check(first_source, first, source, field)
    fields = [field for _, field in have]
    most = None if any(_most(field) is None for field in fields) else [_most(field) or () for field in fields]
    shape = tuple(dims[0] if len(set(dims)) == 1 else None for dims in zip(*(f.shape for f in fields), strict=True))
    same_as = {field.same_as for field in fields}
    is_class = first.name == "labels" and not shape and first.pad is None
    return replace(
        first,
        shape=shape,
        most=None if most is None or None not in shape else tuple(map(max, zip(*most, strict=True))),
        same_as=same_as.pop() if len(same_as) == 1 else None,
        optional=is_lacking or any(field.optional for field in fields),
        multiple_of=math.lcm(*(field.multiple_of for field in fields)),
        pad=IGNORED_LABEL if is_class and is_lacking else first.pad,
    )


def _most(field: Field) -> tuple[int, ...] | None:
    shape = field.shape if field.most is None else field.most
    known = tuple(n for n in shape if n is not None)
    return known if len(known) == len(shape) else None


def _check(first_source: str, first: Field, source: str, field: Field) -> None:
    for what, told in _SAME.items():
        if getattr(first, what) != getattr(field, what):
            raise _mismatch(first_source, first, source, field, told)
    if len(first.shape) != len(field.shape):
        raise _mismatch(first_source, first, source, field, "have another number of dimensions")
    is_ragged = first.shape != field.shape
    if is_ragged and (first.shape[1:] != field.shape[1:] or None in (first.pad, field.pad)):
        raise _mismatch(first_source, first, source, field, "have other shapes")
    if first.pad != field.pad:
        raise _mismatch(first_source, first, source, field, f"are padded with {first.pad} and {field.pad}")


def _mismatch(first_source: str, first: Field, source: str, field: Field, told: str) -> ColumnError:
    return ColumnError(
        f"{first_source!r} and {source!r} cannot be one dataset: {first.name!r} {told} ({_told(first)} and "
        f"{_told(field)}). Leave the column out of one with columns=, make the same of both with process=, or make two "
        "datasets of them.",
        dataset=source,
        columns=[first.name],
        sources=[first_source, source],
    )


def _told(field: Field) -> str:
    dims: list[Any] = ["any" if n is None else n for n in field.shape]
    return f"{field.dtype} {dims}".replace("'", "")
