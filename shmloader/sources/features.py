"""What the features of a dataset are: their kinds, what lies inside them, and what each could be used as.

Looks at the names of their classes only, so that ``datasets`` is not imported for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shmloader.column_path import choice_of

_STRING_TYPES = ("string", "large_string", "string_view")
_BINARY_TYPES = ("binary", "large_binary", "binary_view")
_MEDIA = ("Image", "Audio", "Video", "Pdf")
_LISTS = ("List", "LargeList", "Sequence", "list")


def kind_of(feature: Any) -> str:
    """The name of a feature's class."""
    return type(feature).__name__


def describe(feature: Any) -> str:
    """A short name of a feature: "string", "Image", "ClassLabel(3)", "List(string)", "{id: string}"."""
    kind = kind_of(feature)
    if kind == "Value":
        return str(feature.dtype)
    if kind == "ClassLabel":
        return f"ClassLabel({feature.num_classes})"
    inner = item_of(feature)
    if inner is not None:
        return f"{kind.capitalize() if kind == 'list' else kind}({describe(inner)})"
    if isinstance(feature, Mapping):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in feature.items()) + "}"
    return kind


def item_of(feature: Any) -> Any | None:
    """The feature of a list's items; None: it is no list."""
    if kind_of(feature) not in _LISTS:
        return None
    if isinstance(feature, list):
        return feature[0] if feature else None
    return feature.feature


def find(features: Mapping[str, Any], path: str) -> tuple[Any, bool] | None:
    """The feature at ``path``, and whether the way there goes through a list; None: there is none.

    A column of that name comes before what lies inside a column. Of "options[correct]" it is that of an item.
    """
    if path in features:
        return features[path], False
    choice = choice_of(path)
    if choice is not None:
        items, number = (find(features, part) for part in choice)
        item = None if items is None or items[1] else item_of(items[0])
        return None if item is None or number is None or number[1] or not _is_number(number[0]) else (item, False)
    inside: Any = features
    through_list = False
    for name in path.split("."):
        while (item := item_of(inside)) is not None:
            inside, through_list = item, True
        if not isinstance(inside, Mapping) or name not in inside:
            return None
        inside = inside[name]
    return inside, through_list


def columns_of(features: Mapping[str, Any] | Sequence[str], path: str) -> tuple[str, ...]:
    """The columns that ``path`` needs: the one that it lies in, or both of "options[correct]"."""
    if path in features:
        return (path,)
    choice = choice_of(path)
    if choice is not None:
        return tuple(dict.fromkeys(column for part in choice for column in columns_of(features, part)))
    return (path.split(".")[0],)


def all_paths(features: Mapping[str, Any]) -> Iterator[str]:
    """The paths of all columns, then of all that lies inside them."""
    yield from features
    for name, feature in features.items():
        while (item := item_of(feature)) is not None:
            feature = item
        if isinstance(feature, Mapping):
            yield from (f"{name}.{path}" for path in all_paths(feature))


def fits(role: str, feature: Any, through_list: bool = False) -> bool:
    """Whether what has this feature can be used as ``role`` when the user says so."""
    if role == "text":
        return is_string(feature) or is_chat(feature) or is_strings(feature)
    if role == "target":
        return is_string(feature) or is_strings(feature)
    if through_list:
        return False
    if role == "labels":
        return kind_of(feature) == "ClassLabel" or is_integer(feature) or describe(feature) == "bool"
    if kind_of(feature) == "Value" and feature.dtype in _BINARY_TYPES:
        return True
    return kind_of(feature) == "Image" if role == "image" else is_audio(feature)


def is_string(feature: Any) -> bool:
    """Is it a string."""
    return kind_of(feature) == "Value" and feature.dtype in _STRING_TYPES


def _is_number(feature: Any) -> bool:
    """Whether it can say which item of a list is meant: an integer, a class, or a string (a digit or a letter)."""
    return is_integer(feature) or kind_of(feature) == "ClassLabel" or is_string(feature)


def is_strings(feature: Any) -> bool:
    """Is it a list of strings, or of such lists."""
    item = item_of(feature)
    return item is not None and (is_string(item) or is_strings(item))


def is_chat(feature: Any) -> bool:
    """Is it a conversation: a list of {role, content} or {from, value}, or a struct of such lists."""
    if isinstance(feature, Mapping):
        items: Any = {name: item_of(inside) for name, inside in feature.items()}
        return None not in items.values() and _is_message(items)
    return _is_message(item_of(feature))


def _is_message(feature: Any) -> bool:
    """What a message holds may be more than a string: parts of it, or its text beside pictures."""
    if not isinstance(feature, Mapping):
        return False
    pairs = (("role", "content"), ("from", "value"))
    sender = next((name for name, other in pairs if {name, other} <= set(feature)), "")
    return bool(sender) and is_string(feature[sender])


def is_audio(feature: Any) -> bool:
    """Is it audio, encoded or decoded (a struct of ``array`` and ``sampling_rate``)."""
    if isinstance(feature, Mapping):
        return {"array", "sampling_rate"} <= set(feature) and _is_floats(item_of(feature["array"]))
    return kind_of(feature) == "Audio"


def has_media(feature: Any) -> bool:
    """Is it, or is somewhere inside it, an image, audio, video or PDF."""
    item = item_of(feature)
    if item is not None:
        return has_media(item)
    if isinstance(feature, Mapping):
        return is_audio(feature) or any(map(has_media, feature.values()))
    return kind_of(feature) in _MEDIA


def _is_floats(feature: Any) -> bool:
    item = item_of(feature)
    if item is not None:
        feature = item  # a list for each channel
    return kind_of(feature) == "Value" and str(feature.dtype).startswith(("float", "double"))


def is_integer(feature: Any) -> bool:
    """Is it an integer."""
    return kind_of(feature) == "Value" and feature.dtype.lstrip("u").startswith("int")


def named(features: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The columns with one of these ``names``, in any case, in the order of ``names``."""
    return [name for usual in names for name in features if name.lower() == usual]
