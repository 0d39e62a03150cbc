"""The exceptions of shmloader, one tree.

Every exception carries what it is about as attributes (``error.data``), so that a program need not parse
the message. All of them can be built from a message alone: torch rebuilds a worker's exception in the
training process as ``type(error)(text)``, and only then does its type survive the trip.

Tree::

    ShmloaderError
    ├── OptionError            a setting, an argument or an environment variable has a bad value
    ├── SourceError            where the rows come from
    │   ├── DatasetNotFoundError, SplitNotFoundError, EmptyDatasetError, ColumnError
    │   ├── AccessError        the Hub does not give it to this user
    │   └── ReadError          a shard cannot be read
    ├── SampleError            one row: source, shard, row, field
    │   ├── DecodeError        its bytes are not what they should be
    │   └── ProcessError       the user's ``process`` failed or returned nonsense
    ├── RingError              the shared memory
    │   ├── RingTooSmallError, RecordTooLargeError, MemoryLimitError
    │   ├── ChecksumError      what lies there is not what was written (SHMLOADER_VERIFY)
    │   └── PoisonedError      its state cannot be trusted any more
    ├── TooManyBadRowsError    more rows are bad than ``max_bad=`` allows
    ├── ServiceError           a supervisor or prefetcher cannot do its work
    ├── WaitTimeoutError       a reader waited and nothing moved
    ├── StaleTokenError        a batch whose place in the batch ring was given to another one
    └── ClosedError            use after ``close()``
"""

from __future__ import annotations

import json
import re
import traceback
from typing import Any

#: Before the data of an error, in a line of its own of a traceback (`carry_data`).
_CARRIES = "shmloader.data: "
_CARRIED = re.compile(rf"^{re.escape(_CARRIES)}(\{{.*\}})\n?", re.MULTILINE)


class ShmloaderError(Exception):
    """Base of all exceptions of this package.

    ``data`` holds what the error is about (dataset, shard, row, bytes, …); its items are attributes too.
    ``remote_traceback`` is the traceback of the process in which it happened, if that was another one.
    """

    def __init__(self, message: str = "", **data: Any) -> None:
        if not data:  # torch may have made the message: see carry_data
            message, data = _without_data(message)
        super().__init__(message)
        self.data = data
        self.remote_traceback: str | None = None
        #: Where a reader has met it: the record's id, and its chunk if that is what cannot be read.
        self.at: tuple[int, int | None] | None = None

    def __getattr__(self, name: str) -> Any:
        data = self.__dict__.get("data", {})
        if name in data:
            return data[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), str(self), self.data, self.remote_traceback))


class OptionError(ShmloaderError, ValueError):
    """A setting has a bad value. Attributes: name, value, allowed."""


class SourceError(ShmloaderError):
    """Rows cannot be had from a source.

    Attributes: dataset, and those of the subclass; endpoint: of the Hub, where that is because it was not reached.
    """


class DatasetNotFoundError(SourceError):
    """There is no such dataset. Attributes: dataset."""


class AccessError(SourceError):
    """The Hub does not give a dataset to this user: it is gated, or the token is wrong.

    Attributes: dataset, page (where to ask for it), status.
    """


class SplitNotFoundError(SourceError, ValueError):
    """The dataset has no such split. Attributes: dataset, split, available."""


class EmptyDatasetError(SourceError):
    """The dataset has no rows. Attributes: dataset, split."""


class ColumnError(SourceError, ValueError):
    """It cannot be decided which columns to use. Attributes: dataset, columns."""


class ReadError(SourceError):
    """A shard cannot be read. Attributes: dataset, shard, first_row, num_rows."""


class SampleError(ShmloaderError):
    """One row cannot become a sample. Attributes: source, shard, row, field."""


class DecodeError(SampleError):
    """The bytes of a row are not what its column says. Attributes: source, shard, row, field."""


class ProcessError(SampleError):
    """The user's ``process`` failed or returned nonsense. Attributes: source, shard, row, field, expected, got."""


class TooManyBadRowsError(ShmloaderError):
    """More rows are bad than ``max_bad=`` allows. Attributes: source, num_bad, num_rows, max_bad, examples."""


class RingError(ShmloaderError):
    """The shared memory cannot do what was asked."""


class RingTooSmallError(RingError):
    """The ring cannot hold what is worked on at once. Attributes: needed_bytes, have_bytes, variable."""


class RecordTooLargeError(RingError):
    """One sample is larger than the room for it. Attributes: needed_bytes, have_bytes, variable."""


class MemoryLimitError(RingError, MemoryError):
    """The machine or the container has not enough memory. Attributes: needed_bytes, have_bytes, limit."""


class ChecksumError(RingError):
    """A sample, or the encoded rows that it is made of, is not what was written.

    Attributes: source, shard, row, place, expected (None: the checksum itself is gone), found.
    """


class PoisonedError(RingError):
    """The shared state is damaged; the dataset must be built again. Attributes: reason."""


class ServiceError(ShmloaderError):
    """A supervisor or prefetcher could not start or go on. Attributes: role; pid, status (its exit status).

    Where prefetchers died over a row or a chunk: source, shard, row, chunk, deaths (how each ended, in words),
    of_memory (whether for want of it).
    """


class WaitTimeoutError(ShmloaderError, TimeoutError):
    """Nothing moved while a reader waited. Attributes: source, shard, row, waited_s."""


class StaleTokenError(ShmloaderError):
    """A batch came too late: its slot was given to another one. Attributes: slot, generation."""


class ClosedError(ShmloaderError):
    """The dataset was closed. Attributes: dataset."""


def _without_data(message: str) -> tuple[str, dict[str, Any]]:
    """``message`` without what `carry_data` put into it, and that; nothing if that is not what the line holds."""
    carried = _CARRIED.findall(message)
    try:
        data = json.loads(carried[-1]) if carried else None
    except ValueError:  # somebody else's text
        return message, {}
    return (_CARRIED.sub("", message), data) if isinstance(data, dict) else (message, {})


def carry_data(error: ShmloaderError) -> None:
    """Have the data of ``error`` survive a DataLoader worker's queue; call it in the worker before it is raised.

    What torch sends is the traceback's text, of which it makes the message of a new error of the same class. So the
    data goes as a note, a line of JSON, into that text, and `ShmloaderError` takes it out again.
    """
    data = {name: value for name, value in error.data.items() if _is_plain(value)}
    if data and not any(note.startswith(_CARRIES) for note in getattr(error, "__notes__", ())):
        error.add_note(f"{_CARRIES}{json.dumps(data)}")


class RemoteTraceback(Exception):
    """The traceback of another process, shown as the cause of the error that it ends in."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0].rstrip()}\n"""'


def _rebuild(kind: type[ShmloaderError], message: str, data: dict[str, Any], remote: str | None) -> ShmloaderError:
    error = kind(message)
    error.data = data
    error.remote_traceback = remote
    if remote:
        error.__cause__ = RemoteTraceback(remote)
    return error


def to_wire(error: BaseException) -> dict[str, Any]:
    """A JSON-able form of ``error`` for another process: type, message, data and traceback.

    An error that is not of this tree crosses as a `ServiceError` that names its type: what is read from
    shared memory is never unpickled.
    """
    remote = "".join(traceback.format_exception(error))
    if isinstance(error, ShmloaderError):
        data = {k: list(v) if isinstance(v, tuple) else v for k, v in error.data.items() if _is_plain(v)}
        return {"type": type(error).__name__, "message": str(error), "data": data, "traceback": remote}
    return {"type": "ServiceError", "message": f"{type(error).__name__}: {error}", "data": {}, "traceback": remote}


def to_json(error: BaseException, most_bytes: int) -> bytes:
    """`to_wire` as JSON of at most ``most_bytes`` (at least 4096): what is too long is cut."""
    wire = to_wire(error)
    for keep in (8000, 2000, 250):
        wire["traceback"] = wire["traceback"][-keep:]
        wire["message"] = _cut(wire["message"], keep)
        wire["data"] = {k: _cut(v, keep) if isinstance(v, str) else v for k, v in wire["data"].items()}
        text = json.dumps(wire).encode()
        if len(text) <= most_bytes:
            return text
    return json.dumps(wire | {"traceback": "", "data": {}}).encode()


def _cut(text: str, keep: int) -> str:
    return text if len(text) <= keep else text[: keep - 4] + " […]"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (str, int, float, bool, type(None)))


def from_wire(wire: dict[str, Any]) -> ShmloaderError:
    """The error that `to_wire` described, with the other process's traceback as its cause."""
    kind = globals().get(wire["type"], ServiceError)
    if not (isinstance(kind, type) and issubclass(kind, ShmloaderError)):
        kind = ServiceError
    return _rebuild(kind, wire["message"], wire["data"], wire.get("traceback"))
