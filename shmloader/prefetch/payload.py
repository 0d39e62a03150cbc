"""What the services of a set are told, in a sealed memfd: a JSON head, and what only Python can carry.

=======  ==============================================================================
bytes    what
=======  ==============================================================================
0        bytes of the head
8        the head: JSON
…        what is pickled, by its name, and where the buffers of each lie
a page's the buffers: the memory of a dataset that is held in memory, which services map
=======  ==============================================================================

The head is read by every service with nothing but the standard library; the user's objects (request, tokenizer,
``process``) are cloudpickled, so that lambdas and things of ``__main__`` travel, and are loaded only by the
services that use them. A token of the Hub is in the pickled part only.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shmloader.errors import OptionError
from shmloader.sources.base import SourceRequest

#: Buffers of at least this many bytes lie beside what is pickled: once, however many services there are (guessed).
_LARGE_BYTES = 1 << 20
#: Of each of these buffers; what Arrow wants. Source: Arrow Columnar Format, "Buffer Alignment and Padding".
_ALIGNMENT = 64
#: What a user calls a part, where that is not its name.
_ARGUMENTS = {"requests": "dataset_name"}


@dataclass(frozen=True)
class Work:
    """What is to be made of which rows: the pickled part of a payload."""

    requests: tuple[SourceRequest, ...]
    config: Any
    tokenizer: Any
    process: Any
    train_on_prompt: bool = False

    def process_of(self) -> Any:
        """The function that takes whole rows: the user's, or the one registered with the name of a single dataset."""
        request = self.requests[0]
        if self.process is not None or request.entry is None or request.columns is not None:
            return self.process
        return request.entry.process


def write(work: Work, head: dict[str, Any]) -> int:
    """A new memfd with ``work`` and the JSON-able ``head``; returns its descriptor.

    Raises:
        OptionError: ``work`` holds something that cannot be pickled; names the culprit.
    """
    import cloudpickle

    parts, buffers = {}, _Buffers()
    for name in ("requests", "config", "tokenizer", "process", "train_on_prompt"):
        first = len(buffers.places)
        try:
            data = cloudpickle.dumps(getattr(work, name), protocol=5, buffer_callback=buffers.take)
            parts[name] = data, buffers.places[first:]
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
            file.write(len(text).to_bytes(8, "little") + text + len(body).to_bytes(8, "little") + body)
            start = _buffers_start(8 + len(text) + 8 + len(body))
            for (offset, _), buffer in zip(buffers.places, buffers.buffers, strict=True):
                file.seek(start + offset)
                file.write(buffer)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


class _Buffers:
    """The large buffers of what is pickled. places: (offset from where they begin, bytes) of each."""

    def __init__(self) -> None:
        self.buffers: list[memoryview] = []
        self.places: list[tuple[int, int]] = []
        self._end = 0

    def take(self, buffer: pickle.PickleBuffer) -> bool:
        """As ``pickle`` calls it; True: it is to be pickled with the rest."""
        with memoryview(buffer) as view:
            if view.nbytes < _LARGE_BYTES or not (view.c_contiguous or view.f_contiguous):
                return True
        raw = buffer.raw()
        self.buffers.append(raw)
        self.places.append((self._end, raw.nbytes))
        self._end += -(-raw.nbytes // _ALIGNMENT) * _ALIGNMENT
        return False


def _buffers_start(end: int) -> int:
    return -(-end // mmap.PAGESIZE) * mmap.PAGESIZE


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
    head = 8 + int.from_bytes(os.pread(fd, 8, 0), "little")
    # Mapped, since one read gives 2 GiB at most, and large buffers are used in place, for as long as somebody needs
    # them. Private: a sealed file can be mapped so in any kernel, and what writes to a buffer gets its own copy.
    view = memoryview(mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE))
    begin = head + 8
    end = begin + int.from_bytes(view[head:begin], "little")
    parts = pickle.loads(view[begin:end])
    start = _buffers_start(end)
    loaded = {}
    for name, (data, places) in parts.items():
        try:
            buffers = [view[start + offset : start + offset + size] for offset, size in places]
            loaded[name] = pickle.loads(data, buffers=buffers)
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
