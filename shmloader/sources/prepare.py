"""Files without random access, prepared as Arrow by ``datasets``, in its own cache: every later start finds them there.

Planner only; imports ``datasets``.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from shmloader.options import size_text
from shmloader.sources.base import SourceRequest
from shmloader.sources.download import Progress, disk_needed, download
from shmloader.sources.loaded import prepared
from shmloader.sources.resolve import source_name, translated

log = logging.getLogger("shmloader.sources")


def prepare(request: SourceRequest, builder: Any) -> tuple[Any, str]:
    """The requested split, prepared, and a notice that says where it lies.

    All splits are prepared, as ``load_dataset`` would do, which finds them too. What is on the Hub is fetched first.

    Raises:
        SourceError: a file cannot be fetched or read, or the disk is full.
    """
    from shmloader.sources.undecoded import encode_undecoded

    name, folder = source_name(request), Path(builder.cache_dir)
    download(request, [str(path) for files in (builder.config.data_files or {}).values() for path in files])
    log.info("%s: preparing it in %s", name, folder)
    with (
        translated(request, "prepare"),
        disk_needed(request, folder, None, "HF_DATASETS_CACHE (or cache_dir in load=)"),
        Progress(f"{name}: prepared", None, lambda: _written_bytes(folder)),
    ):
        encode_undecoded(builder).download_and_prepare()
    split = prepared(request, builder)
    assert split is not None
    size = size_text(_written_bytes(folder))
    return split, f"{name}: prepared as Arrow in {folder} ({size}), which has random access; load_dataset finds it too"


def _written_bytes(folder: Path) -> int:
    """Bytes of what is prepared in ``folder``, or is being prepared beside it."""
    total = 0
    for path in (*folder.glob("*.arrow"), *folder.parent.glob(f"{folder.name}*.incomplete/*.arrow")):
        with contextlib.suppress(FileNotFoundError):  # it was moved to its place
            total += path.stat().st_size
    return total
