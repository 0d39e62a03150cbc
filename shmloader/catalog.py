"""The named datasets: what a short name stands for, as data. Imports nothing but the standard library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Repo:
    """A place where a named dataset lies: a Hub id, or a local folder.

    configuration: of several that it has ("sentences_allagree"). revision: None: the main branch.
    splits: which split, in the syntax of ``datasets`` ("train[95%:]"), is used in the place of one that is asked for
        and that it lacks; one that is not named here is taken as it is.
    columns: role → column, where they are called otherwise than in the dataset's other places; None: as there.
    """

    id: str
    configuration: str | None = None
    revision: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class DatasetConfig:
    """What a short name stands for.

    name: as ``dataset_name=`` and every sample's ``source`` have it. repos: where it lies; the first that exists is
        taken.
    columns: role ("text", "target", "image", "audio", "labels") → column; "target" is the answer to "text".
    task_type: of its samples: "text", "vision", "audio", "vision_text" or "audio_text".
    class_names: of the classes that ``labels`` numbers, where it has them.
    licence: as its card names it, and what to know about it. aliases: further names for it.
    """

    name: str
    repos: tuple[Repo, ...]
    columns: Mapping[str, Any]
    task_type: str
    class_names: tuple[str, ...] = ()
    licence: str = ""
    aliases: tuple[str, ...] = ()
