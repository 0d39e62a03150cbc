"""The datasets that have a short name: the built-in ones, and those that the user's program has named."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Iterable

from shmloader.catalog import BUILT_IN, DatasetConfig, key_of
from shmloader.errors import OptionError

_lock = threading.Lock()
_registered: dict[str, DatasetConfig] = {}


def register_dataset(config: DatasetConfig, *, replace: bool = False) -> DatasetConfig:
    """Have ``dataset_name=config.name`` stand for what ``config`` says, in this process; returns it.

    It is taken as a built-in one is, but that "all" means the built-in ones alone. A dataset takes it along to its
    services and workers, which need not register it.

    replace: it takes the place of those that have one of its names now, built-in ones included.

    Raises:
        OptionError: one of its names is taken.
    """
    if not isinstance(config, DatasetConfig):
        raise OptionError(
            f"register_dataset takes a DatasetConfig, but got {type(config).__name__}",
            name="config",
            value=repr(config),
            allowed="a DatasetConfig",
        )
    with _lock:
        taken = [other for other in {id(c): c for c in map(find, config.keys) if c is not None}.values()]
        if taken and not replace:
            names = " and ".join(repr(other.name) for other in taken)
            raise OptionError(
                f"register_dataset: the name {config.name!r} (or an alias of it) is that of {names}. Give it another "
                "one, or replace=True to take its place.",
                name="name",
                value=config.name,
                allowed="a name that is not taken",
            )
        gone = {other.name for other in taken}
        for key in [key for key, other in _registered.items() if other.name in gone]:
            del _registered[key]
        _registered.update(dict.fromkeys(config.keys, config))
    return config


def find(name: str) -> DatasetConfig | None:
    """What a short name or an alias stands for; None: nothing. Case does not matter, nor "-" for "_"."""
    key = key_of(name)
    return _registered.get(key) or next((config for config in BUILT_IN if key in config.keys), None)


def known() -> tuple[DatasetConfig, ...]:
    """All that have a short name, by name; of the built-in ones those whose name is still theirs."""
    own = {config.name: config for config in _registered.values()}
    return tuple(sorted((*own.values(), *built_in()), key=lambda config: config.name))


def built_in() -> tuple[DatasetConfig, ...]:
    """The built-in ones whose name is still theirs."""
    return tuple(config for config in BUILT_IN if find(config.name) is config)


def near(name: str, others: Iterable[str] = ()) -> list[str]:
    """The short names that ``name`` may have been meant for, best first."""
    keys = {key: config.name for config in known() for key in config.keys}
    found = difflib.get_close_matches(key_of(name), [*keys, *others], n=3)
    return list(dict.fromkeys(keys.get(each, each) for each in found))
