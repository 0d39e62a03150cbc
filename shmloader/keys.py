"""The names under which a dataset's fields are seen: the argument ``keys=``, and what it makes of a schema.

In the ring everything keeps the schema's names. Only who reads knows of others: a `Face` has the schema's fields at
the same indices, renamed, and tells which of them are not shown at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from shmloader.errors import OptionError
from shmloader.sample import Field, Schema

#: ``keys="hf"``: what transformers' models take, and nothing else.
HF_NAMES: dict[str, str | None] = {
    "text": "input_ids",
    "image": "pixel_values",
    "audio": "input_values",
    "labels": "labels",
    "attention_mask": "attention_mask",
}
STYLES = ("shmloader", "hf")
_ALLOWED = (*STYLES, "a dict of field → new name, or None to drop it")


@dataclass(frozen=True)
class Face:
    """A schema as its user sees it.

    fields: at the schema's indices, under their new names (`masks` has those of their masks).
    is_shown: of each field, whether samples and batches have it.
    masks: of each field, the name of the batch's int64 [B, L] that is 1 where it holds a value; None: there is none.
    presences: of each field, the name of the bool [B] that tells which samples of a batch have it, where not all do;
        None: there is to be none.
    strings: what all samples of a source have alike, as (name, value of each source): their ``task_type`` and
        ``source``, as far as shown.
    sources: the names of the sources. source_name: under which name samples have theirs; None: they have not.
    is_strict: a batch in which a field is lacking is an error, since no field of it could tell.
    labels: under which name samples have their labels, or class; None: they have none.
    """

    fields: tuple[Field, ...]
    is_shown: tuple[bool, ...]
    masks: tuple[str | None, ...]
    presences: tuple[str | None, ...]
    strings: tuple[tuple[str, tuple[str, ...]], ...]
    sources: tuple[str, ...]
    source_name: str | None
    is_strict: bool
    labels: str | None

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Every batch looks into caches by it.
        return hash((self.fields, self.is_shown, self.masks, self.presences, self.strings, self.is_strict))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The keys of a sample that has all fields, in order."""
        return (*self.index, *(name for name, _ in self.strings))

    @cached_property
    def index(self) -> dict[str, int]:
        """Where each field that is shown lies in a record, by its name."""
        return {field.name: i for i, field in enumerate(self.fields) if self.is_shown[i]}

    @cached_property
    def values(self) -> tuple[dict[str, str], ...]:
        """`strings` of each source."""
        return tuple({name: of[source] for name, of in self.strings} for source in range(len(self.sources)))

    @cached_property
    def by_source(self) -> dict[str, tuple[str, ...]]:
        """`strings` as a dict."""
        return dict(self.strings)

    @cached_property
    def optional(self) -> frozenset[str]:
        """Names of the fields that a sample may lack."""
        return frozenset(name for name, i in self.index.items() if self.fields[i].optional)

    @cached_property
    def places(self) -> tuple[tuple[int, ...] | None, ...] | None:
        """Of each field the shape of its values, None if not shown; None: it must be seen what the records hold."""
        if self.is_strict and self.optional:
            return None
        places: list[tuple[int, ...] | None] = []
        for field, is_shown in zip(self.fields, self.is_shown, strict=True):
            known = tuple(n for n in field.shape if n is not None)
            if is_shown and len(known) != len(field.shape):
                return None
            places.append(known if is_shown else None)
        return tuple(places)

    def field(self, name: str) -> Field | None:
        """The field that is shown under ``name``; None: there is none."""
        index = self.index.get(name)
        return None if index is None else self.fields[index]

    def mask(self, name: str) -> str | None:
        """The name of the mask of the field ``name``; None: there is none."""
        return self.masks[self.index[name]]

    def presence(self, name: str) -> str | None:
        """The name of the batch's bool [B] that tells which samples have the field ``name``; None: there is none."""
        return self.presences[self.index[name]]

    def rounded(self, multiples: Mapping[str, int]) -> Face:
        """The same, but the padded lengths of these fields are rounded up to multiples of these."""
        return replace(
            self,
            fields=tuple(
                replace(field, multiple_of=multiples.get(field.name, field.multiple_of)) for field in self.fields
            ),
        )


@dataclass(frozen=True)
class Keys:
    """The argument ``keys=``, checked as far as it can be without a schema.

    given: (name, new name or None for a field that is dropped). is_all: fields that are not given are dropped too.
    """

    given: tuple[tuple[str, str | None], ...] = ()
    is_all: bool = False

    @classmethod
    def parse(cls, keys: str | Mapping[str, str | None]) -> Keys:
        """What the argument asks for.

        Raises:
            OptionError: it is no style that there is, and no dict of names.
        """
        if keys == "shmloader":
            return cls()
        if keys == "hf":
            return cls(tuple(HF_NAMES.items()), is_all=True)
        if not isinstance(keys, Mapping):
            raise _error(keys, f"keys={keys!r:.80} must be one of {', '.join(STYLES)}, or {_ALLOWED[-1]}")
        for name, new in keys.items():
            if not isinstance(name, str) or not (new is None or (isinstance(new, str) and new)):
                raise _error(
                    keys, f"keys= must map the name of a field to another, or to None, but got {name!r}: {new!r}"
                )
        return cls(tuple(keys.items()))

    def face(self, schema: Schema) -> Face:
        """``schema`` under these names.

        Raises:
            OptionError: the schema has no such field, two would have the same name, or none is left.
        """
        given = dict(self.given)
        if not self.is_all:
            _check_known(given, schema)
        # A `process` may give text as it is, which is no `input_ids`.
        names = [None if self.is_all and field.is_text else self._new_name(field.name) for field in schema.fields]
        fields, masks, presences = [], [], []
        for field, name in zip(schema.fields, names, strict=True):
            masks.append(None if name is None or field.mask is None else given.get(field.mask, field.mask))
            presence = None if name is None or self.is_all else f"{name}_mask"
            presences.append(given.get(f"{field.name}_mask", presence))
            fields.append(replace(field, name=name or field.name))
        if self.is_all:
            _check_all_have(fields, names, schema)
        told = (("task_type", schema.task_types), ("source", schema.sources))
        strings = [(self._new_name(name), of) for name, of in told]
        face = Face(
            fields=tuple(fields),
            is_shown=tuple(name is not None for name in names),
            masks=tuple(masks),
            presences=tuple(presences),
            strings=tuple((name, of) for name, of in strings if name is not None),
            sources=schema.sources,
            source_name=strings[1][0],
            is_strict=self.is_all,
            labels=next(
                (name for name, field in zip(names, schema.fields, strict=True) if field.name == "labels"), None
            ),
        )
        _check_names(given, face)
        return face

    def _new_name(self, name: str) -> str | None:
        given = dict(self.given)
        if name in given:
            return given[name]
        # What a `process` has named as the style does is meant.
        return None if self.is_all and name not in given.values() else name


def _check_all_have(fields: Sequence[Field], names: Sequence[str | None], schema: Schema) -> None:
    """Where no field can tell which samples have one, those of all sources have it."""
    for field, old, name in zip(fields, schema.fields, names, strict=True):
        lacking = [
            source
            for i, source in enumerate(schema.sources)
            if all(own.name != old.name for own in schema.fields_of(i))
        ]
        if name is not None and lacking:
            raise _error(
                "hf",
                f"keys='hf' has no field that could tell which samples of a batch have {field.name!r}: those of "
                f"{', '.join(map(repr, lacking))} have none. Give a dict, as keys={{'text': 'input_ids', 'image': "
                "'pixel_values', …}: then masks tell",
            )


def _check_known(given: Mapping[str, str | None], schema: Schema) -> None:
    """Each name that is given is one of the schema's, and not only of a field that is dropped."""
    masks = {mask: field.name for field in schema.fields for mask in (field.mask, f"{field.name}_mask") if mask}
    always = [mask for field in schema.fields for mask in (field.mask, field.presence) if mask]
    for name in given:
        if name not in schema.names and name not in masks:
            have = ", ".join((*schema.names, *always))
            raise _error(given, f"keys= names {name!r}, which the dataset does not have: it has {have}")
        if name not in schema.names and given.get(masks[name], "") is None and given[name] is not None:
            raise _error(given, f"keys= names {name!r}, but drops {masks[name]!r}, whose mask it is")


def _check_names(given: Mapping[str, str | None], face: Face) -> None:
    """Each name stands for one thing, and there is something left."""
    if not face.index:
        names = ", ".join(field.name for field in face.fields)
        raise _error(given, f"keys= leaves no field of the dataset, which has {names}")
    shown = [i for i, is_shown in enumerate(face.is_shown) if is_shown]
    masks = [face.masks[i] for i in shown]
    presences = [face.presences[i] for i in shown if face.fields[i].optional]
    count = Counter([*(face.fields[i].name for i in shown), *(name for name, _ in face.strings)])
    # A field takes the place of a mask of the same name, as one that `process` or `transform` makes does, unless the
    # name was asked for.
    asked = set(given.values())
    count.update(mask for mask in (*masks, *presences) if mask and (mask not in count or mask in asked))
    if twice := [name for name, n in count.items() if n > 1]:
        raise _error(given, f"keys= gives the name {twice[0]!r} to two fields of a sample or a batch")


def _error(keys: Any, message: str) -> OptionError:
    return OptionError(message, name="keys", value=repr(keys), allowed=_ALLOWED)
