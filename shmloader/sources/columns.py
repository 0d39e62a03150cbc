"""Which columns of a dataset make a sample: recognised from its features, or as the user says."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from shmloader.catalog import ROLES
from shmloader.column_path import choice_of
from shmloader.errors import ColumnError
from shmloader.sources import features as kinds
from shmloader.sources.base import Columns
from shmloader.sources.features import describe

log = logging.getLogger("shmloader.sources")

#: The usual names of the column to read as text, best first; names of one line are equally good
#: (collected from the dataset cards of the catalogue and of the Hub's most used text datasets).
TEXT_NAMES: tuple[tuple[str, ...], ...] = (
    ("text",),
    ("txt",),  # a member of a WebDataset
    ("sentence", "content", "document", "article", "passage", "review", "body"),
    ("prompt", "instruction", "question", "query"),
    ("caption", "transcription", "transcript", "utterance", "description"),
)
#: The usual names of a column of conversations.
CHAT_NAMES = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
#: Of which an example is shown: a target is not told from text.
_SHOWN_ROLES = tuple(role for role in ROLES if role != "target")
LABEL_NAMES = ("labels", "label")
#: The same in a WebDataset.
OTHER_LABEL_NAME = "cls"


def choose_columns(
    features: Mapping[str, Any],
    columns: Mapping[str, Any] | None = None,
    *,
    dataset: str,
    all_columns: bool = False,
) -> tuple[Columns, tuple[str, ...], tuple[str, ...]]:
    """The columns of each role, the names of all columns to read, and notices of what was chosen.

    features: ``datasets.Features`` (or any mapping of column → feature). columns: role → column or path
    ("answers.text"), of text several in a list; exactly what to use; None: recognise them. all_columns: read every
    column and choose none.

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
    paths = [path for role in ROLES for path in _paths(chosen, role)]
    needed = tuple(dict.fromkeys(column for path in paths for column in kinds.columns_of(features, path)))
    notices = (_notice(chosen, dataset), *_unused_notice(features, needed, dataset))
    for notice in notices:
        log.info(notice)
    return chosen, needed, notices


def cheapest(chosen: Columns, needed: Sequence[str]) -> str:
    """The column of ``needed`` with the fewest bytes, as far as can be told: to count rows by."""
    for role in ("labels", "text"):
        for path in _paths(chosen, role):
            return kinds.columns_of(needed, path)[0]
    return needed[0]


def _paths(chosen: Columns, role: str) -> tuple[str, ...]:
    path = getattr(chosen, role)
    if path is None:
        return ()
    return path if isinstance(path, tuple) else (path,)


def _recognised(features: Mapping[str, Any], dataset: str) -> Columns:
    labels = _one_of(features, "labels", _label_candidates(features, dataset), dataset)
    images = [name for name in features if kinds.kind_of(features[name]) == "Image"]
    image = _one_of(features, "image", images, dataset)
    audio = _one_of(features, "audio", [name for name in features if kinds.is_audio(features[name])], dataset)
    text = _one_of(features, "text", _text_candidates(features), dataset)
    if text is None and image is None and audio is None:
        for is_text in (kinds.is_string, kinds.is_strings):
            # WebDatasets have columns that say which sample it is and where it comes from.
            strings = [name for name in features if is_text(features[name]) and not name.startswith("__")]
            text = text or _one_of(features, "text", strings, dataset)
    if text is None and image is None and audio is None:
        raise _column_error(features, dataset, "no column was recognised as text, image or audio")
    return _columns(features, {"text": text, "image": image, "audio": audio, "labels": labels})


def _given(features: Mapping[str, Any], columns: Mapping[str, Any], dataset: str) -> Columns:
    said = f"columns={dict(columns)!r}"
    for role, given in columns.items():
        if role not in ROLES:
            raise _column_error(features, dataset, f"{said}: {role!r} is no role; the roles are {', '.join(ROLES)}")
        is_several = role == "text" and isinstance(given, list | tuple)
        if is_several and not given:
            raise _column_error(features, dataset, f"{said}: the list of {role} columns is empty")
        for path in given if is_several else (given,):
            _check_given(features, role, path, said, dataset)
    if "target" in columns and "text" not in columns:
        raise _column_error(features, dataset, f"{said} names a target, but no text that it is the answer to")
    if {"target", "labels"} <= set(columns):
        raise _column_error(
            features, dataset, f"{said} names target and labels, but the labels of a prompt's answer are its tokens"
        )
    if not {"text", "image", "audio"} & set(columns):
        raise _column_error(features, dataset, f"{said} names neither text nor image nor audio")
    chosen = {role: tuple(given) if isinstance(given, list) else given for role, given in columns.items()}
    return _columns(features, chosen)


def _check_given(features: Mapping[str, Any], role: str, path: Any, said: str, dataset: str) -> None:
    if not isinstance(path, str):
        several = ", or a list of such" if role == "text" else ""
        what = f"{said}: {role} must be the name of a column{several}, but is {path!r}"
        raise _column_error(features, dataset, what)
    found = kinds.find(features, path)
    if found is None:
        near = difflib.get_close_matches(path, list(kinds.all_paths(features)), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        if choice_of(path) is not None:
            hint += "; list[number] takes the item of a list whose number is in an integer column"
        raise _column_error(features, dataset, f"{said}: there is no column {path!r}{hint}")
    feature, through_list = found
    if not kinds.fits(role, feature, through_list):
        inside = ", which lies inside a list," if through_list else ""
        what = f"column {path!r} ({describe(feature)}){inside} cannot be used as {role}"
        raise _column_error(features, dataset, what)


def _columns(features: Mapping[str, Any], chosen: Mapping[str, Any]) -> Columns:
    names = None
    if chosen.get("labels") is not None:
        found = kinds.find(features, chosen["labels"])
        assert found is not None
        if kinds.kind_of(found[0]) == "ClassLabel":
            names = tuple(str(name) for name in found[0].names or ())
    return Columns(**chosen, class_names=names)


def _label_candidates(features: Mapping[str, Any], dataset: str) -> list[str]:
    classes = [name for name in features if kinds.kind_of(features[name]) == "ClassLabel"]
    usual = [name for name in LABEL_NAMES if name in features]
    if classes:
        return [name for name in classes if name in usual] or classes
    integers = [name for name in usual if kinds.is_integer(features[name])]
    if usual and not integers:
        what = (
            f"column {usual[0]!r} ({describe(features[usual[0]])}) looks like labels, but is neither class nor integer"
        )
        raise _column_error(features, dataset, what)
    if not usual and OTHER_LABEL_NAME in features and kinds.is_integer(features[OTHER_LABEL_NAME]):
        return [OTHER_LABEL_NAME]
    return integers


def _text_candidates(features: Mapping[str, Any]) -> list[str]:
    """Columns that are text by their names, or else conversations by what they hold."""
    strings = {name: feature for name, feature in features.items() if kinds.is_string(feature)}
    for names in TEXT_NAMES:
        found = kinds.named(strings, names)
        if found:
            return found
    chats = {name: feature for name, feature in features.items() if kinds.is_chat(feature)}
    turns = {name: feature for name, feature in features.items() if kinds.is_strings(feature)}
    return kinds.named(chats, CHAT_NAMES)[:1] or list(chats) or kinds.named(turns, CHAT_NAMES)


def _one_of(features: Mapping[str, Any], role: str, candidates: Sequence[str], dataset: str) -> str | None:
    if len(candidates) > 1:
        names = ", ".join(map(repr, candidates))
        raise _column_error(features, dataset, f"{len(candidates)} columns could be the {role}: {names}")
    return candidates[0] if candidates else None


def _column_error(features: Mapping[str, Any], dataset: str, what: str) -> ColumnError:
    listed = "\n".join(f"    {name}: {describe(feature)}" for name, feature in features.items()) or "    (none)"
    example = {role: path for role in _SHOWN_ROLES if (path := _example(features, role)) is not None}
    remedy = "Take whole rows with process=."
    if set(example) - {"labels"}:
        remedy = f"Say which to use with columns=, for example columns={example!r}, or take whole rows with process=."
    return ColumnError(
        f"{dataset}: {what}. Its columns are:\n{listed}\n{remedy}", dataset=dataset, columns=list(features)
    )


def _example(features: Mapping[str, Any], role: str) -> str | None:
    """A path that could be used as ``role``; bytes that are not said to be audio are rather an image."""
    for path in kinds.all_paths(features):
        feature, through_list = kinds.find(features, path) or (None, True)
        if kinds.fits(role, feature, through_list) and (role != "audio" or kinds.is_audio(feature)):
            return path
    return None


def _notice(chosen: Columns, dataset: str) -> str:
    parts = []
    for role in ROLES:
        paths = _paths(chosen, role)
        if paths:
            classes = f", {len(chosen.class_names)} classes" if role == "labels" and chosen.class_names else ""
            columns = "column" if len(paths) == 1 else "columns"
            parts.append(f"{role} from {columns} {', '.join(map(repr, paths))}{classes}")
    return f"{dataset}: {', '.join(parts)}"


def _unused_notice(features: Mapping[str, Any], needed: Sequence[str], dataset: str) -> tuple[str, ...]:
    """That there are images or audio of which no sample has anything, be they inside other columns or in lists."""
    unused = [name for name in features if name not in needed and kinds.has_media(features[name])]
    if not unused:
        return ()
    listed = ", ".join(f"{name!r} ({describe(features[name])})" for name in unused)
    return (f"{dataset}: not used, although it holds images, audio or the like: {listed}",)
