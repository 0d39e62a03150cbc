"""Plans of local Parquet, kept from run to run: a second start then needs no ``datasets`` (0.7–1 s of importing).

A plan is found again by everything that it depends on: the request, the versions of this package and of
``datasets``, and path, size and modification time of every file. Anything else makes another plan. Lies in
``$XDG_CACHE_HOME/shmloader/plans``, one JSON file each; a cache that cannot be read or written is left out.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
from pathlib import Path

import shmloader
from shmloader.sources.base import PLAN_VERSION, SourcePlan, SourceRequest

log = logging.getLogger("shmloader.sources")

#: The newest plans that are kept; some hundred bytes a chunk each.
MAX_PLANS = 64
#: A folder with more files than this is planned anew: looking at all of them takes as long (guessed).
MAX_FILES = 10_000


def load(request: SourceRequest) -> SourcePlan | None:
    """The plan that `store` kept for the same request over the same files; None if there is none."""
    path = _path_of(request)
    if path is None:
        return None
    try:
        plan = SourcePlan.from_json(path.read_text())
        path.touch()  # it is among the newest again
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.debug("the kept plan %s cannot be used: %s", path, error)
        return None
    log.debug("the plan was made by an earlier run: %s", path)
    return plan


def store(request: SourceRequest, plan: SourcePlan) -> None:
    """Keep ``plan``, if it is of local Parquet; the oldest beyond `MAX_PLANS` go."""
    path = _path_of(request) if plan.mode == "local" else None
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.write_text(plan.to_json())
        fresh.replace(path)
        kept = sorted(path.parent.iterdir(), key=lambda p: p.stat().st_mtime)
        for old in kept[:-MAX_PLANS]:
            old.unlink(missing_ok=True)
    except OSError as error:
        log.debug("the plan cannot be kept: %s", error)


def _path_of(request: SourceRequest) -> Path | None:
    """Where the plan of ``request`` lies; None if it is not of local files, or depends on more than can be told."""
    if request.entry is not None:
        return None  # where it lies is not known yet
    if not isinstance(request.dataset, (str, Path)) or {"data_files", "data_dir"} & request.load.keys():
        return None  # with these it may be other files than those below
    root = Path(request.dataset).expanduser()
    files = _files(root)
    if files is None:
        return None
    facts = {
        "shmloader": shmloader.__version__,
        "plan": PLAN_VERSION,
        "datasets": importlib.metadata.version("datasets"),
        "root": str(root.resolve()),
        "split": request.split,
        "columns": request.columns,
        "all_columns": request.all_columns,
        "load": request.load,
        "files": files,
    }
    try:
        text = json.dumps(facts, sort_keys=True)
    except TypeError:  # something in load= that is not plain data
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "shmloader" / "plans" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _files(root: Path) -> list[tuple[str, int, int]] | None:
    """(path, bytes, modification time in ns) of all files under ``root``; None: too many, or not local."""
    if not os.path.exists(root):  # noqa: PTH110 - nor does it raise for a name that no file can have
        return None
    found: list[tuple[str, int, int]] = []
    pending = [root]
    try:
        while pending:
            path = pending.pop()
            if path.is_dir():
                pending.extend(path.iterdir())
            else:
                status = path.stat()
                found.append((str(path.relative_to(root)), status.st_size, status.st_mtime_ns))
            if len(found) + len(pending) > MAX_FILES:
                return None
    except OSError:
        return None
    return sorted(found)
