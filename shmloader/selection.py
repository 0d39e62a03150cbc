"""What is asked for by ``dataset_name`` and ``task_type``: one request for each dataset.

A name is looked for in this order: "auto" and "all"; a short name as it is written; a local folder or file; a short
name in another spelling. So a short name means the same whatever lies in the working folder, where "./beans" is the
folder. Whatever has a "/" is a Hub id or a path, as it always was.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shmloader import registry
from shmloader.catalog import BY_TASK, ROLES, DatasetConfig
from shmloader.errors import DatasetNotFoundError, OptionError
from shmloader.sources.base import SourceRequest

#: What ``load=`` says of one dataset, so that several cannot share it.
_OF_ONE = ("name", "revision", "data_files", "data_dir", "features")
#: What the samples of a ``task_type`` have, by the words in their own ("vision_text").
_NEEDED = {"vision": "vision", "audio": "audio"}


def select(dataset_name: Any, task_type: str | None, request: SourceRequest) -> tuple[SourceRequest, ...]:
    """The requests that ``dataset_name`` stands for, in order.

    request: all that they have alike; its ``columns`` and ``load`` may say it for each of several, by its name.

    Raises:
        OptionError: no dataset, the same one twice, a task_type that there is not or that a named dataset cannot have,
            or ``columns`` and ``load`` that cannot be those of several.
        DatasetNotFoundError: there is no short name like it, and no file.
    """
    _check_task(task_type)
    if isinstance(dataset_name, str) and dataset_name.strip() == "auto":
        dataset_name = BY_TASK[task_type]
    if isinstance(dataset_name, str) and dataset_name.strip() == "all":
        found: list[tuple[Any, DatasetConfig | None]] = [(entry.name, entry) for entry in registry.built_in()]
    else:
        listed = list(dataset_name) if isinstance(dataset_name, list | tuple) else [dataset_name]
        if not listed:
            raise _bad("dataset_name", dataset_name, "at least one dataset")
        found = [_found(name, request, is_of_several=isinstance(dataset_name, list | tuple)) for name in listed]
        for _, entry in found:
            _check_fits(entry, task_type)
    names = [_shown(dataset) for dataset, _ in found]
    _check_different([dataset for dataset, _ in found])
    loads = _shares("load", request.load, names, set())
    columns = _shares("columns", request.columns, names, set(ROLES))
    if not request.all_columns:
        _check_process([entry for (_, entry), column in zip(found, columns, strict=True) if column is None], len(found))
    return tuple(
        replace(
            request,
            dataset=dataset,
            entry=entry,
            load=load or {},
            columns=column,
            all_columns=request.all_columns or bool(entry and entry.process and column is None),
        )
        for (dataset, entry), load, column in zip(found, loads, columns, strict=True)
    )


def _found(name: Any, request: SourceRequest, is_of_several: bool) -> tuple[Any, DatasetConfig | None]:
    """One dataset, and its entry in the catalog if that is what its name says."""
    if name is None or (isinstance(name, str) and not name.strip()):
        raise OptionError(
            "dataset_name= is needed: a short name (shmloader datasets lists them), a Hub id, a local folder or file, "
            "or a loaded `datasets` object",
            name="dataset_name",
            value=repr(name),
            allowed="a dataset",
        )
    if isinstance(name, list | tuple | set | frozenset):
        raise _bad("dataset_name", name, "names and datasets in one list, not lists in lists")
    if not isinstance(name, str):
        return name, None
    if is_of_several and name.strip() in ("auto", "all"):
        raise _bad("dataset_name", name, "said alone, not in a list")
    word = name.strip()
    entry = registry.find(word)
    if entry is not None and (word in (entry.name, *entry.aliases) or not _is_there(name)):
        return entry.name, entry
    if _is_there(name) or "/" in name or os.sep in name or {"data_files", "data_dir"} & request.load.keys():
        return name, None
    raise _unknown(name)


def _is_there(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # no file can have this name
        return False


def _unknown(name: str) -> DatasetNotFoundError:
    try:
        local = [path.name for path in Path().iterdir()]
    except OSError:  # it is gone, or not ours to look into
        local = []
    near = registry.near(name, local)
    shown = name if len(name) <= 100 else f"{name[:60]}…{name[-20:]}"
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return DatasetNotFoundError(
        f"There is no dataset {shown!r}: no short name, and no local folder or file.{hint} Short names are "
        f"{', '.join(entry.name for entry in registry.known())}; what the Hub has is named with its owner: "
        f"'owner/{shown}'.",
        dataset=name,
        near=near,
    )


def _check_task(task_type: Any) -> None:
    if task_type not in BY_TASK:
        raise _bad("task_type", task_type, f"None or one of {', '.join(repr(task) for task in BY_TASK if task)}")


def _check_fits(entry: DatasetConfig | None, task_type: str | None) -> None:
    """Raise if the samples of a named dataset cannot be what ``task_type`` says; of others nobody knows yet."""
    if entry is None or entry.task_type is None or task_type is None:
        return
    needed = _NEEDED.get(task_type, "text")
    if needed not in entry.task_type.split("_"):
        raise OptionError(
            f"task_type={task_type!r} asks for samples with {needed}, which {entry.name!r} has not: they are "
            f"{entry.task_type!r}. Leave task_type out: it chooses a dataset where dataset_name= does not.",
            name="task_type",
            value=task_type,
            allowed=f"None, or one that samples of {entry.task_type!r} can have",
        )


def _check_process(entries: Sequence[DatasetConfig | None], num_datasets: int) -> None:
    """Raise if one of several has a ``process`` of its own: what it returns is known too late to lie beside others."""
    own = [entry.name for entry in entries if entry is not None and entry.process is not None]
    if own and num_datasets > 1:
        raise OptionError(
            f"{own[0]!r} was registered with a process= of its own, so it cannot be one of several datasets: they need "
            "one for all. Give process= to the constructor.",
            name="dataset_name",
            value=own[0],
            allowed="one dataset, or process= for all",
        )


def _check_different(datasets: Sequence[Any]) -> None:
    """Raise if one of ``datasets`` comes twice: the same name, or the very same object."""
    keys = [_shown(one) if isinstance(one, str | os.PathLike) else id(one) for one in datasets]
    twice = [_shown(one) for i, one in enumerate(datasets) if keys[i] in keys[:i]]
    if twice:
        raise _bad("dataset_name", list(map(_shown, datasets)), f"without {twice[0]!r} twice")


def _shares(argument: str, value: Any, names: Sequence[str], common: set[str]) -> list[dict[str, Any] | None]:
    """What ``value`` says to each dataset: the same to all, or to each by its name.

    common: the keys that it has where it is said to all; none: whatever is not a dataset's name.
    """
    is_by_name = isinstance(value, Mapping) and bool(value) and not set(value) <= common
    if len(names) == 1:  # a list of one, say
        is_by_name = is_by_name and set(value) == set(names) and isinstance(value[names[0]], Mapping)
    if not is_by_name or not (common or set(value) & set(names)):
        if argument == "load" and len(names) > 1:
            _check_common(value)
        return [value] * len(names)
    strange = sorted(str(key) for key in set(value) - set(names))
    wrong = [name for name, told in value.items() if not isinstance(told, Mapping)]
    if strange or wrong:
        raise _bad(
            argument,
            value if argument == "columns" else dict.fromkeys(value, ...),  # load= may hold a token
            f"of all datasets alike, or a dict for each that is named: {{{names[0]!r}: {{…}}}}; the datasets are "
            f"{', '.join(map(repr, names))}",
        )
    return [dict(value[name]) if name in value else None for name in names]


def _check_common(load: Mapping[str, Any]) -> None:
    found = [key for key in _OF_ONE if key in load]
    if found:
        raise _bad(
            "load",
            dict.fromkeys(load, ...),
            f"told for one of the datasets, as {found[0]!r} is of one: "
            f"load={{name of the dataset: {{{found[0]!r}: …}}}}",
        )


def _shown(dataset: Any) -> str:
    return os.fspath(dataset) if isinstance(dataset, str | os.PathLike) else type(dataset).__name__


def _bad(name: str, value: Any, allowed: str) -> OptionError:
    return OptionError(
        f"{name}={value!r:.200} is not valid: it must be {allowed}", name=name, value=repr(value), allowed=allowed
    )
