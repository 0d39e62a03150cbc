"""Every setting of shmloader: the ``SHMLOADER_*`` environment variables and their defaults.

An explicit argument (``ShmMultimodalDataset(options=Options(...))``) beats the environment, which beats
the default.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from shmloader.errors import OptionError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
#: Least, most, and how that is told.
_PREFETCHERS = (1, 64, "a whole number from 1 to 64")
_SAMPLES = (1, 1 << 30, "a whole number of samples from 1 up")
_TIMEOUT_S = (1e-3, 1e9, "a number of seconds from 0.001 to 1e9")
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_TRUTHS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}

#: A process can map 128 TiB, and maps more than a ring.
MAX_BYTES = 64 << 40
#: Share of the smallest memory limit that all datasets of a process may take together (guessed: it leaves
#: room for the model, the workers and the page cache).
DEFAULT_RING_SHARE = 0.25
#: A reader gives up after this long without any progress of the prefetchers (guessed: longer than the
#: slowest request of a Hub that still answers).
DEFAULT_TIMEOUT_S = 120.0
#: A server that gives no answer is tried for this long (guessed: a Hub's hiccup is over by then, and nobody waits
#: longer for a dataset that is not to be had).
DEFAULT_SOURCE_TIMEOUT_S = 30.0
#: Encoded bytes of the chunks that are shuffled among one another where the data does not fit the ring: 2,600 JPEGs
#: of 100 KB, which mix as well as a shuffle buffer of 1,000 samples does (measured: `python -m bench order`).
DEFAULT_WINDOW = "256MiB"
#: Of the free space of the disk, for encoded chunks that would be fetched again (guessed: checkpoints need it too).
DEFAULT_SPILL = "10%"
#: More prefetchers than this rarely help: decoding saturates the memory bandwidth first (guessed).
MAX_DEFAULT_PREFETCHERS = 8

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class ByteSize:
    """An amount: absolute (``num_bytes``) or a share (``share``) of the smallest memory limit, or of a disk."""

    num_bytes: int | None = None
    share: float | None = None

    def resolve(self, limit_bytes: int) -> int:
        """The amount in bytes, where there are ``limit_bytes``."""
        if self.num_bytes is not None:
            return self.num_bytes
        assert self.share is not None
        return int(limit_bytes * self.share)


@dataclass(frozen=True)
class SizeKind:
    """Which sizes make sense. share_of: what a percentage is of; None: there are none. least: in bytes."""

    share_of: str | None
    least: int = 1
    why_no_share: str = ""

    @property
    def allowed(self) -> str:
        """In words."""
        share = f", not a share of memory: {self.why_no_share}"
        if self.share_of:
            share = f', or a share of {self.share_of} ("25%")'
        return f'bytes, or a number with a unit ("512MiB", "2GB"){share}; from {self.least} to 64 TiB'


_MEMORY = SizeKind("memory")
_WINDOW = SizeKind(None, why_no_share="the order would differ from machine to machine")
_SPILL = SizeKind("the free disk space", least=0)


def parse_size(text: str | int, name: str = "size", kind: SizeKind = _MEMORY) -> ByteSize:
    """The amount that ``text`` names: an int or "1073741824", "512MiB", "2GB", "25%".

    Raises:
        OptionError: it is none of these, or not positive; names ``name``.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*|%)\s*", str(text), re.ASCII)
    if match and not isinstance(text, float | bool):
        number, unit = float(match[1]), match[2].upper()
        if unit == "%" and 0 < number <= 100 and kind.share_of is not None:
            return ByteSize(share=number / 100)
        if unit in _UNITS and kind.least <= number * _UNITS[unit] <= MAX_BYTES:
            return ByteSize(num_bytes=int(number * _UNITS[unit]))
    raise _bad(name, text, kind.allowed)


def size_text(num_bytes: float) -> str:
    """For messages: in a unit of which there is at least one ("12.5 MiB"), as a whole number below 1 KiB."""
    if num_bytes < 1024:
        return f"{num_bytes:.0f} bytes"
    power = 1
    while power < 4 and round(num_bytes / 1024**power, 1) >= 1024:
        power += 1
    return f"{num_bytes / 1024**power:,.1f} {' KMGT'[power]}iB"


_ENV_PREFETCHERS = ("SHMLOADER_PREFETCHERS", int, _PREFETCHERS)
_ENV_IN_FLIGHT = ("SHMLOADER_IN_FLIGHT", int, _SAMPLES)
_ENV_AHEAD = ("SHMLOADER_AHEAD", int, _SAMPLES)
_ENV_TIMEOUT = ("SHMLOADER_TIMEOUT_S", float, _TIMEOUT_S)
_ENV_SOURCE_TIMEOUT = ("SHMLOADER_SOURCE_TIMEOUT_S", float, _TIMEOUT_S)


@dataclass(frozen=True)
class Options:
    """The settings of one dataset; what is not given is as the environment says.

    ring_bytes: size of the ring; None: a quarter of the smallest memory limit, for all datasets of the
        process together. ``SHMLOADER_RING_BYTES``
    in_flight: samples that all readers together work on at once: workers × batch size; None: 512, less where
        the ring is small. ``SHMLOADER_IN_FLIGHT``
    ahead: samples that are decoded ahead of the readers where the data does not fit the ring; None: 256.
        ``SHMLOADER_AHEAD``
    window_bytes: encoded bytes of the chunks that are shuffled among one another where the data does not fit the
        ring; twice that is kept in memory. Another value is another order. ``SHMLOADER_WINDOW_BYTES``
    spill_bytes: encoded chunks of data that do not fit the ring are kept on local disk up to this size, where fetching
        them again would cost: those of a Hub, or of what can only be read front to back and tells its length, and
        those that are read in an order that is not known. Bytes, or a share of what is free on that disk ("10%");
        0: none; None: 10 %, for all datasets of the process together (each process has its own, as each rank). No
        more than the disk is large. ``SHMLOADER_SPILL_BYTES``
    spill_dir: the folder of their file, which has no name in it and ends with the processes; None: ``TMPDIR``, else
        /var/tmp, else /tmp, the first that can be written to and is not in memory. One that is given is tried when
        the dataset is made, whether it will be needed or not. ``SHMLOADER_SPILL_DIR``
    batch_bytes: of the batches that the workers of this process have ready, and that its training loop holds, in shared
        memory: bytes, or a share of memory; beyond, batches cross the workers' pipes. None: a sixteenth of the smallest
        memory limit, 4 GiB at most; never more than that limit. A process has one batch ring, for all of its datasets,
        made with the first of them: a later one that asks for another size gets a warning. ``SHMLOADER_BATCH_BYTES``
    verify: seal each sample, and all encoded rows, with a checksum when they are written, and compare it whenever a
        sample is read or encoded rows are opened: what was written to from elsewhere raises `ChecksumError`. For when
        samples look wrong: 0.1 ms for 150 kB, each time. ``SHMLOADER_VERIFY``
    prefetchers: number of prefetch processes; None: one a core, 8 at most. ``SHMLOADER_PREFETCHERS``
    timeout_s: a reader that waits this long without any progress of the prefetchers raises
        `WaitTimeoutError`; to be longer than ``source_timeout_s``, or it does before a Hub is given up.
        ``SHMLOADER_TIMEOUT_S``
    source_timeout_s: a server that cannot be reached, or that does not answer, is given up after this long; what it
        answers to go on with (429, 503) is waited for within it. ``SHMLOADER_SOURCE_TIMEOUT_S``
    log: the least level that the services log, into the loggers ``shmloader.*`` of the process that made the dataset.
        ``SHMLOADER_LOG``
    """

    ring_bytes: int | str | None = field(default_factory=lambda: _env_size(os.environ, "SHMLOADER_RING_BYTES"))
    in_flight: int | None = field(default_factory=lambda: _number(os.environ, *_ENV_IN_FLIGHT))
    ahead: int | None = field(default_factory=lambda: _number(os.environ, *_ENV_AHEAD))
    window_bytes: int | str = field(
        default_factory=lambda: _env_size(os.environ, "SHMLOADER_WINDOW_BYTES", _WINDOW) or DEFAULT_WINDOW
    )
    spill_bytes: int | str | None = field(
        default_factory=lambda: _env_size(os.environ, "SHMLOADER_SPILL_BYTES", _SPILL)
    )
    spill_dir: str | None = field(default_factory=lambda: os.environ.get("SHMLOADER_SPILL_DIR") or None)
    batch_bytes: int | str | None = field(default_factory=lambda: _env_size(os.environ, "SHMLOADER_BATCH_BYTES"))
    verify: bool = field(default_factory=lambda: _env_truth(os.environ, "SHMLOADER_VERIFY"))
    prefetchers: int | None = field(default_factory=lambda: _number(os.environ, *_ENV_PREFETCHERS))
    timeout_s: float = field(default_factory=lambda: _number(os.environ, *_ENV_TIMEOUT) or DEFAULT_TIMEOUT_S)
    source_timeout_s: float = field(
        default_factory=lambda: _number(os.environ, *_ENV_SOURCE_TIMEOUT) or DEFAULT_SOURCE_TIMEOUT_S
    )
    log: str = field(default_factory=lambda: _env_log(os.environ))

    def __post_init__(self) -> None:
        if self.ring_bytes is not None:
            parse_size(self.ring_bytes, "ring_bytes")
        parse_size(self.window_bytes, "window_bytes", _WINDOW)
        self.spill_size()
        if self.spill_dir is not None and not (isinstance(self.spill_dir, str) and self.spill_dir):
            raise _bad("spill_dir", self.spill_dir, "the name of a folder")
        if self.batch_bytes is not None:
            parse_size(self.batch_bytes, "batch_bytes")
        if not isinstance(self.verify, bool):
            raise _bad("verify", self.verify, "True or False")
        for name in ("in_flight", "ahead"):
            value = getattr(self, name)
            _check(name, 1 if value is None else value, int, _SAMPLES)
        _check("prefetchers", 1 if self.prefetchers is None else self.prefetchers, int, _PREFETCHERS)
        _check("timeout_s", self.timeout_s, int | float, _TIMEOUT_S)
        _check("source_timeout_s", self.source_timeout_s, int | float, _TIMEOUT_S)
        if self.log not in _LOG_LEVELS:
            raise _bad("log", self.log, f"one of {', '.join(_LOG_LEVELS)}")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Options:
        """The settings that ``environ`` (``os.environ``) gives.

        Raises:
            OptionError: a variable has a bad value; the message names the variable, the value and what is
                allowed.
        """
        env = os.environ if environ is None else environ
        return cls(
            ring_bytes=_env_size(env, "SHMLOADER_RING_BYTES"),
            in_flight=_number(env, *_ENV_IN_FLIGHT),
            ahead=_number(env, *_ENV_AHEAD),
            window_bytes=_env_size(env, "SHMLOADER_WINDOW_BYTES", _WINDOW) or DEFAULT_WINDOW,
            spill_bytes=_env_size(env, "SHMLOADER_SPILL_BYTES", _SPILL),
            spill_dir=env.get("SHMLOADER_SPILL_DIR") or None,
            batch_bytes=_env_size(env, "SHMLOADER_BATCH_BYTES"),
            verify=_env_truth(env, "SHMLOADER_VERIFY"),
            prefetchers=_number(env, *_ENV_PREFETCHERS),
            timeout_s=_number(env, *_ENV_TIMEOUT) or DEFAULT_TIMEOUT_S,
            source_timeout_s=_number(env, *_ENV_SOURCE_TIMEOUT) or DEFAULT_SOURCE_TIMEOUT_S,
            log=_env_log(env),
        )

    def spill_size(self) -> ByteSize:
        """What `spill_bytes` says, in bytes (0: none) or as a share of the disk."""
        return parse_size(DEFAULT_SPILL if self.spill_bytes is None else self.spill_bytes, "spill_bytes", _SPILL)

    def num_prefetchers(self) -> int:
        """How many prefetchers to start: what was asked for, else one a core, at most 8."""
        if self.prefetchers is not None:
            return self.prefetchers
        return max(1, min(len(os.sched_getaffinity(0)), MAX_DEFAULT_PREFETCHERS))


def _env_size(env: Mapping[str, str], name: str, kind: SizeKind | None = None) -> str | None:
    text = env.get(name) or None
    if text is not None:
        parse_size(text, name, kind or _MEMORY)
    return text


def _env_truth(env: Mapping[str, str], name: str) -> bool:
    text = env.get(name) or "0"
    if text.strip().lower() not in _TRUTHS:
        raise _bad(name, text, "1, true, yes or on; or 0, false, no or off")
    return _TRUTHS[text.strip().lower()]


def _env_log(env: Mapping[str, str]) -> str:
    log = (env.get("SHMLOADER_LOG") or "WARNING").upper()
    if log not in _LOG_LEVELS:
        raise _bad("SHMLOADER_LOG", env["SHMLOADER_LOG"], f"one of {', '.join(_LOG_LEVELS)}")
    return log


def _number(env: Mapping[str, str], name: str, kind: type[Number], bounds: tuple[float, float, str]) -> Number | None:
    text = env.get(name)
    if not text:
        return None
    try:
        value = kind(text)
    except ValueError:
        raise _bad(name, text, bounds[2]) from None
    if not bounds[0] <= value <= bounds[1]:
        raise _bad(name, text, bounds[2])
    return value


def _check(name: str, value: Any, kind: Any, bounds: tuple[float, float, str]) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not bounds[0] <= value <= bounds[1]:
        raise _bad(name, value, bounds[2])


def _bad(name: str, value: object, allowed: str) -> OptionError:
    message = f"{name}={value!r} is not valid: it must be {allowed}"
    return OptionError(message, name=name, value=str(value), allowed=allowed)
