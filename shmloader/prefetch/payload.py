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
            argument = "dataset_name" if name == "request" else name
            raise OptionError(
                f"{argument}= cannot be sent to the prefetch processes: {type(error).__name__}: {error}. It must be "
                "picklable by cloudpickle: leave open files, locks, connections and generators out of it, or make them "
                "on first use.",
                name=argument,
                value=type(getattr(work, name)).__name__,
                allowed="a picklable object",
            ) from error
    body = cloudpickle.dumps(parts)
    text = json.dumps({**head, "sys_path": [path or str(Path.cwd()) for path in sys.path]}).encode()
    fd = os.memfd_create("shmloader-payload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + body)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def read_work(fd: int) -> Work:
    """The pickled part of the payload in ``fd``; imports whatever the user's objects need."""
    import pickle

    size = os.fstat(fd).st_size
    head = 8 + int.from_bytes(os.pread(fd, 8, 0), "little")
    parts = pickle.loads(os.pread(fd, size - head, head))
    return Work(**{name: pickle.loads(data) for name, data in parts.items()})
