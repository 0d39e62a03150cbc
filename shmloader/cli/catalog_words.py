"""The catalog in words: what ``shmloader datasets`` shows, and what docs/datasets.md is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shmloader.catalog import BY_TASK, DatasetConfig, Repo

#: The names of what a sample has, in the order that they are shown.
FIELDS = ("text", "labels", "image", "audio")


def fields_of(config: DatasetConfig, columns: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What each field of a sample is, by its columns. columns: of one of its places; None: of the first."""
    if columns is None:
        columns = config.repos[0].columns or config.columns
    if config.process is not None:
        return {"…": "what its process= returns"}
    if not columns:
        return {"…": "as its columns are recognised"}
    found: dict[str, str] = {}
    text = _joined(columns.get("text"))
    if "target" in columns:
        found["text"] = f"{text} → {columns['target']}"
        found["labels"] = f"the tokens of {columns['target']}, -100 before them"
    elif text:
        found["text"] = text
        found["labels"] = "the tokens of text"
    if "labels" in columns:
        names = f": {', '.join(f'{i} {name}' for i, name in enumerate(config.class_names))}"
        found["labels"] = f"the class in {columns['labels']}{names if config.class_names else ''}"
    for name in ("image", "audio"):
        if name in columns:
            found[name] = str(columns[name])
    return found


def splits_of(repo: Repo) -> str:
    """Its splits, and what stands for those that it lacks."""
    own = ", ".join(repo.has) or "not known"
    mapped = ", ".join(f"{split} → {_end(repo, split)}" for split in repo.splits if split not in repo.has)
    return f"{own} ({mapped})" if mapped else own


def tasks_of(config: DatasetConfig) -> str:
    """The task types that choose it."""
    return ", ".join(repr(task) if task else "none" for task, name in BY_TASK.items() if name == config.name)


def as_json(config: DatasetConfig) -> dict[str, Any]:
    """All that is known of it, as plain data."""
    return {
        "name": config.name,
        "aliases": list(config.aliases),
        "about": config.about,
        "task_type": config.task_type,
        "chosen_by": [task for task, name in BY_TASK.items() if name == config.name],
        "sample": fields_of(config),
        "class_names": list(config.class_names),
        "licence": config.licence,
        "repos": [
            {
                "id": repo.id,
                "configuration": repo.configuration,
                "revision": repo.revision,
                "data_files": repo.data_files,
                "splits": list(repo.has),
                "mapped_splits": {split: _end(repo, split) for split in repo.splits if split not in repo.has},
                "columns": _plain(repo.columns or config.columns),
            }
            for repo in config.repos
        ],
    }


def rows_of(config: DatasetConfig) -> list[tuple[str, str]]:
    """All that is known of it, as lines of two."""
    rows = [("what", config.about), ("task type", config.task_type or "not known before it is read")]
    if config.aliases:
        rows.append(("also named", ", ".join(config.aliases)))
    if tasks_of(config):
        rows.append(("task_type=", tasks_of(config)))
    rows += list(fields_of(config).items())
    for repo in config.repos:
        place = repo.id
        place += f", configuration {repo.configuration}" if repo.configuration else ""
        place += f", files {repo.data_files}" if repo.data_files else ""
        place += f", revision {repo.revision}" if repo.revision else ""
        rows += [("from" if repo is config.repos[0] else "else from", place), ("splits", splits_of(repo))]
        if repo.columns is not None and repo is not config.repos[0]:
            rows += [(f"{name} there", what) for name, what in fields_of(config, repo.columns).items()]
    rows.append(("licence", config.licence or "not known"))
    return [(head, what) for head, what in rows if what]


def _end(repo: Repo, split: str) -> str:
    """What stands for ``split`` in the end, by the splits that it is known to have."""
    seen = set()
    while split in repo.splits and split not in repo.has and split not in seen:
        seen.add(split)
        split = repo.splits[split]
    return split


def _joined(text: Any) -> str:
    return " + ".join(text) if isinstance(text, list | tuple) else str(text or "")


def _plain(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {role: list(column) if isinstance(column, list | tuple) else column for role, column in columns.items()}
