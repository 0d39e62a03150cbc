"""Which columns of a dataset make a sample: recognised from its features, or as the user says."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from shmloader.errors import ColumnError
from shmloader.sources.base import Columns

log = logging.getLogger("shmloader.sources")

ROLES = ("text", "image", "labels")

#: The usual names of the column to read as text, best first; names of one line are equally good
#: (collected from the dataset cards of the catalogue and of the Hub's most used text datasets).
TEXT_NAMES: tuple[tuple[str, ...], ...] = (
    ("text",),
    ("sentence", "content", "document", "article", "passage", "review", "body"),
    ("prompt", "instruction", "question", "query"),
    ("caption", "transcription", "transcript", "utterance", "description"),
)
LABEL_NAMES = ("labels", "label")

_STRING_TYPES = ("string", "large_string", "string_view")
_IMAGE_STORAGE = ("binary", "large_binary")


def choose_columns(
    features: Mapping[str, Any],
    columns: Mapping[str, str] | None = None,
    *,
    dataset: str,
    all_columns: bool = False,
) -> tuple[Columns, tuple[str, ...], tuple[str, ...]]:
    """The columns of each role, the names of all columns to read, and notices of what was chosen.

    features: ``datasets.Features`` (or any mapping of column → feature). columns: role → column, exactly
    what to use; None: recognise them. all_columns: read every column and choose none.

    Raises:
        ColumnError: the user named a role or a column that there is not, no column is usable, or
            several are equally good.
    """
    if all_columns:
        return Columns(), tuple(features), (f"{dataset}: every column is read ({', '.join(features)})",)
    if columns is not None:
        chosen = _given(features, columns, dataset)
    else:
        chosen = _recognised(features, dataset)
    needed = tuple(name for name in (chosen.text, chosen.image, chosen.labels) if name is not None)
    notice = _notice(features, chosen, dataset)
    log.info(notice)
    return chosen, needed, (notice,)


def _recognised(features: Mapping[str, Any], dataset: str) -> Columns:
    labels = _one_of(features, "labels", _label_candidates(features, dataset), dataset)
    image = _one_of(features, "image", [name for name in features if _kind(features[name]) == "Image"], dataset)
    text = _one_of(features, "text", _text_candidates(features), dataset)
    if text is None and image is None:
        if _audio(features):
            raise _column_error(
                features, dataset, "audio columns are not supported yet, and no column was recognised as text or image"
            )
        strings = [name for name in features if _is_string(features[name])]
        text = _one_of(features, "text", strings, dataset)
    if text is None and image is None:
        raise _column_error(features, dataset, "no column was recognised as text or image")
    return _columns(features, text, image, labels)


def _given(features: Mapping[str, Any], columns: Mapping[str, str], dataset: str) -> Columns:
    for role, name in columns.items():
        if role == "audio":
            raise _column_error(features, dataset, f"columns={dict(columns)!r}: audio columns are not supported yet")
        if role not in ROLES:
            raise _column_error(
                features, dataset, f"columns={dict(columns)!r}: {role!r} is no role; the roles are {', '.join(ROLES)}"
            )
        if name not in features:
            raise _column_error(features, dataset, f"columns={dict(columns)!r}: there is no column {name!r}")
        if not _fits(role, features[name]):
            raise _column_error(
                features, dataset, f"column {name!r} ({describe(features[name])}) cannot be used as {role}"
            )
    if "text" not in columns and "image" not in columns:
        raise _column_error(features, dataset, f"columns={dict(columns)!r} names neither text nor image")
    return _columns(features, columns.get("text"), columns.get("image"), columns.get("labels"))


def _columns(features: Mapping[str, Any], text: str | None, image: str | None, labels: str | None) -> Columns:
    names = None
    if labels is not None and _kind(features[labels]) == "ClassLabel":
        names = tuple(str(name) for name in features[labels].names or ())
    return Columns(text=text, image=image, labels=labels, class_names=names)


def _label_candidates(features: Mapping[str, Any], dataset: str) -> list[str]:
    classes = [name for name in features if _kind(features[name]) == "ClassLabel"]
    usual = [name for name in LABEL_NAMES if name in features]
    if classes:
        return [name for name in classes if name in usual] or classes
    integers = [name for name in usual if _is_integer(features[name])]
    if usual and not integers:
        what = (
            f"column {usual[0]!r} ({describe(features[usual[0]])}) looks like labels, but is neither class nor integer"
        )
        raise _column_error(features, dataset, what)
    return integers


def _text_candidates(features: Mapping[str, Any]) -> list[str]:
    folded: dict[str, list[str]] = {}
    for name in features:
        if _is_string(features[name]):
            folded.setdefault(name.lower(), []).append(name)
    for names in TEXT_NAMES:
        found = [name for usual in names for name in folded.get(usual, ())]
        if found:
            return found
    return []


def _one_of(features: Mapping[str, Any], role: str, candidates: Sequence[str], dataset: str) -> str | None:
    if len(candidates) > 1:
        names = ", ".join(map(repr, candidates))
        raise _column_error(features, dataset, f"{len(candidates)} columns could be the {role}: {names}")
    return candidates[0] if candidates else None


def _column_error(features: Mapping[str, Any], dataset: str, what: str) -> ColumnError:
    listed = "\n".join(f"    {name}: {describe(feature)}" for name, feature in features.items()) or "    (none)"
    fitting = {r: next((n for n, feature in features.items() if _fits(r, feature)), None) for r in ROLES}
    example = {r: name for r, name in fitting.items() if name is not None}
    remedy = "Take whole rows with process=."
    if "text" in example or "image" in example:
        remedy = f"Say which to use with columns=, for example columns={example!r}, or take whole rows with process=."
    return ColumnError(
        f"{dataset}: {what}. Its columns are:\n{listed}\n{remedy}", dataset=dataset, columns=list(features)
    )


def _notice(features: Mapping[str, Any], chosen: Columns, dataset: str) -> str:
    parts = []
    for role in ROLES:
        name = getattr(chosen, role)
        if name is not None:
            classes = f", {len(chosen.class_names)} classes" if role == "labels" and chosen.class_names else ""
            parts.append(f"{role} from column {name!r}{classes}")
    unused = f"; audio columns are not supported yet: {', '.join(_audio(features))}" if _audio(features) else ""
    return f"{dataset}: {', '.join(parts)}{unused}"


def describe(feature: Any) -> str:
    """A short name of a feature: "string", "Image", "ClassLabel(3)", "List(string)"."""
    kind = _kind(feature)
    if kind == "Value":
        return str(feature.dtype)
    if kind == "ClassLabel":
        return f"ClassLabel({feature.num_classes})"
    if kind in ("List", "LargeList", "Sequence"):
        return f"{kind}({describe(feature.feature)})"
    if isinstance(feature, Mapping):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in feature.items()) + "}"
    return kind


def _kind(feature: Any) -> str:
    return type(feature).__name__


def _audio(features: Mapping[str, Any]) -> list[str]:
    return [name for name in features if _kind(features[name]) == "Audio"]


def _is_string(feature: Any) -> bool:
    return _kind(feature) == "Value" and feature.dtype in _STRING_TYPES


def _is_integer(feature: Any) -> bool:
    return _kind(feature) == "Value" and feature.dtype.lstrip("u").startswith("int")


def _fits(role: str, feature: Any) -> bool:
    """Whether a column of this feature can be used as ``role`` when the user says so."""
    if role == "text":
        return _is_string(feature)
    if role == "image":
        return _kind(feature) == "Image" or (_kind(feature) == "Value" and feature.dtype in _IMAGE_STORAGE)
    return _kind(feature) == "ClassLabel" or _is_integer(feature) or describe(feature) == "bool"
