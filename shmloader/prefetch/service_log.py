"""What a service logs: one record after the other into the set's log pipe (log_pipe.py), else to stderr."""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import threading
from typing import Any

#: No longer than what a pipe takes at once: pipe(7), PIPE_BUF.
MOST_BYTES = select.PIPE_BUF
#: Libraries that, below WARNING, log the addresses they ask for, in which a Hub's signatures are; their names without a
#: number at the end (urllib3, httpx2).
_QUIET = ("urllib", "requests", "httpx", "httpcore", "huggingface_hub", "datasets", "fsspec", "filelock", "aiohttp")
#: Of a record, what crosses as it is.
_WHEN = ("levelno", "levelname", "created", "msecs", "process", "thread")
_WHERE = ("threadName", "pathname", "filename", "module", "lineno", "funcName")


class PipeHandler(logging.Handler):
    """Writes records into the pipe, and never waits: one that cannot be had there goes to ``other``."""

    def __init__(self, fd: int, role: str, other: logging.Handler) -> None:
        super().__init__()
        self._fd, self._role, self._other = fd, role, other

    def emit(self, record: logging.LogRecord) -> None:
        """As `logging.Handler.emit`: what is wrong with the record itself is told on stderr."""
        try:
            data = encode(record, self._role)
        except Exception:  # as every handler does: arguments that do not fit the message, for one
            self.handleError(record)
            return
        try:
            os.write(self._fd, data)  # all of it or nothing, as short as it is
        except (BlockingIOError, BrokenPipeError):  # nobody has read for long, or ever will
            self._other.handle(record)


def encode(record: logging.LogRecord, role: str) -> bytes:
    """``record`` as a line of JSON of at most `MOST_BYTES`: what is too long is cut.

    Its logger is one of ours: those of other libraries, and of the user's functions, are below that of the ``role``.
    """
    told: dict[str, Any] = {name: getattr(record, name) for name in (*_WHEN, *_WHERE)}
    told |= {"name": _name(record.name, role), "role": role, "processName": f"shmloader {role}"}
    text, trace = record.getMessage(), _trace(record)
    for keep in (MOST_BYTES, 1500, 500):
        told["msg"] = text if len(text) <= keep else text[: keep - 4] + " […]"
        told["exc_text"] = trace if trace is None or len(trace) <= keep else "[…] " + trace[4 - keep :]
        if len(line := _line(told)) <= MOST_BYTES:
            return line
    # Names as long as that, or characters that take six bytes each.
    short = {name: told[name] for name in (*_WHEN, "role", "processName")}
    return _line({**short, "name": told["name"][:100], "msg": text[:200]})


def _line(told: dict[str, Any]) -> bytes:
    # What has no form in UTF-8 (undecodable bytes of a file's name) is written as JSON's escape of it.
    return json.dumps(told, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _name(name: str, role: str) -> str:
    if name == "shmloader" or name.startswith("shmloader."):
        return name
    return f"shmloader.{role}" if name == "root" else f"shmloader.{role}.{name}"


def _trace(record: logging.LogRecord) -> str | None:
    parts = []
    if record.exc_info:
        parts.append(record.exc_text or logging.Formatter().formatException(record.exc_info))
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(parts) or None


def may_be_told(record: logging.LogRecord) -> bool:
    """Whether ``record`` is for others to see."""
    return record.levelno >= logging.WARNING or record.name.split(".")[0].rstrip("0123456789") not in _QUIET


def set_up(role: str, level: str, fd: int | None) -> None:
    """Have this service log from ``level`` on, into the pipe ``fd`` (None: to stderr); also what nobody catches."""
    stderr = logging.StreamHandler(sys.stderr)
    stderr.setFormatter(
        logging.Formatter(f"%(asctime)s shmloader {role} %(process)d %(levelname)s %(name)s: %(message)s")
    )
    handler = stderr if fd is None else PipeHandler(fd, role, stderr)
    handler.addFilter(may_be_told)
    logging.basicConfig(level=level, handlers=[handler])
    log = logging.getLogger(f"shmloader.{role}")
    sys.excepthook = lambda kind, error, trace: log.critical(
        "%s: %s", kind.__name__, error, exc_info=(kind, error, trace)
    )
    threading.excepthook = lambda told: log.critical(
        "thread %s: %s: %s",
        told.thread and told.thread.name,
        told.exc_type.__name__,
        told.exc_value,
        exc_info=(told.exc_type, told.exc_value or told.exc_type(), told.exc_traceback),
    )
