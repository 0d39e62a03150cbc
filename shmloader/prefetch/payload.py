"""What the services of a set are told, in a sealed memfd: a JSON head, and what only Python can carry.

The head is read by every service with nothing but the standard library; the user's objects (request, tokenizer,
``process``) are cloudpickled, so that lambdas and things of ``__main__`` travel, and are loaded only by the
services that use them. A token of the Hub is in the pickled part only.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shmloader.errors import OptionError
from shmloader.sources.base import SourceRequest

#: What a user calls a part, where that is not its name.
_ARGUMENTS = {"request": "dataset_name"}


@dataclass(frozen=True)
class Work:
    """What is to be made of which rows: the pickled part of a payload."""

    request: SourceRequest
    config: Any
    tokenizer: Any
    process: Any


def write(work: Work, head: dict[str, Any]) -> int:
    """A new memfd with ``work`` and the JSON-able ``head``; returns its descriptor.

    Raises:
        OptionError: ``work`` holds something that cannot be pickled; names the culprit.
    """
    import cloudpickle

    parts = {}
    for name in ("request", "config", "tokenizer", "process"):
        try:
            parts[name] = cloudpickle.dumps(getattr(work, name))
        except Exception as error:
            argument = _ARGUMENTS.get(name, name)
            raise OptionError(
                f"{argument}= cannot be sent to the prefetch processes: {type(error).__name__}: {error}. It must be "
                "picklable by cloudpickle: leave open files, locks, connections and generators out of it, or make them "
                "on first use.",
                name=argument,
                value=type(getattr(work, name)).__name__,
                allowed="a picklable object",
            ) from error
    body = cloudpickle.dumps(parts)
    cwd = _folder()
    text = json.dumps({**head, "cwd": cwd, "sys_path": [str(path) or cwd for path in sys.path]}).encode()
    fd = os.memfd_create("shmloader-payload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text + body)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _folder() -> str:
    try:
        return str(Path.cwd())
    except FileNotFoundError:  # it was removed
        return "/"


def read_work(fd: int) -> Work:
    """The pickled part of the payload in ``fd``; imports whatever the user's objects need.

    Raises:
        OptionError: one of them cannot be made here; names it.
    """
    import mmap
    import pickle

    head = 8 + int.from_bytes(os.pread(fd, 8, 0), "little")
    # Mapped, since one read gives 2 GiB at most; private, since a sealed file can be mapped so in any kernel.
    with mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as payload, memoryview(payload) as view:
        parts = pickle.loads(view[head:])
    loaded = {}
    for name, data in parts.items():
        try:
            loaded[name] = pickle.loads(data)
        except (Exception, SystemExit) as error:
            argument = _ARGUMENTS.get(name, name)
            raise OptionError(
                f"{argument}= cannot be loaded in the prefetch processes: {type(error).__name__}: {error}. What it "
                "imports must be importable in a fresh interpreter with the same sys.path.",
                name=argument,
                value=type(error).__name__,
                allowed="an object that can be unpickled in another process",
            ) from error
    return Work(**loaded)
