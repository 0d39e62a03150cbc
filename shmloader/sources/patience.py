"""How long a server is tried: the pace of retries, and which hosts were given up.

Holds for every request that a service makes, whichever library makes it (patient_client.py): a request is tried until
`SourceRequest.source_timeout_s` have passed in which nothing came, and then ends in a `ServerGivenUp`, which no library
takes for an answer or tries again.

A host that was not even reached is left alone for `REST_S` by this process, and one that asks to wait for longer than
may be waited, until then: what is asked of it meanwhile fails at once, so that several datasets of a dead Hub take one
timeout and not one each. After that, and where it answered with nothing but errors, a request is tried once, until one
succeeds. Whether a host is one that the request began with, or one that it was led to, is all the same.

Imports neither ``huggingface_hub`` nor its HTTP library.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

#: The first wait between two tries, and the longest; each is twice the one before, a quarter more or less (guessed: a
#: hiccup costs little, and a server that comes back is not overrun).
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 4.0
_JITTER = 0.25
#: A server that is silent for this long is asked again, or for a third of the time there is (guessed: the Hub answers
#: in less than a second). Each further try waits twice as long, for one that is only slow.
STALL_S = 10.0
#: A body that comes more slowly than this, in bytes a second, is as one that does not come (guessed: less than any line
#: that one would train over).
SLOWEST = 256
#: A host that was not reached is not tried again for so long (guessed).
REST_S = 5.0
#: HTTP: the server is there, and may do it later.
BUSY = frozenset((408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524))
_RATE_LIMIT = re.compile(r"\br\s*=\s*0\b.*?\bt\s*=\s*(\d+)")


class ServerGivenUp(Exception):
    """A server was tried for as long as may be.

    No OSError, since libraries take that of a file for "it is not there", and none that they retry.

    host: which one. status: the last answer's; None: it did not answer. is_refusal: it asked to wait for longer than
    may be waited.
    """

    def __init__(self, message: str, host: str, status: int | None = None, is_refusal: bool = False) -> None:
        super().__init__(message)
        self.host, self.status, self.is_refusal = host, status, is_refusal

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (str(self), self.host, self.status, self.is_refusal))


@dataclass(frozen=True)
class _Host:
    """A host that was given up, and has done no work since. until: it is not asked before."""

    since: float
    until: float
    why: str
    status: int | None


class Patience:
    """How long the servers that a process asks are tried. Thread-safe.

    timeout_s: without anything coming. touch: called with whatever comes. clock, sleep: for tests.
    came_at: when something last came, by the clock; -inf: nothing has.
    """

    def __init__(
        self,
        timeout_s: float,
        touch: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.timeout_s, self.touch, self.clock, self.sleep = timeout_s, touch, clock, sleep
        self.came_at = float("-inf")
        self._hosts: dict[str, _Host] = {}
        self._heard_at: dict[str, float] = {}
        self._lock = threading.Lock()

    def check(self, host: str) -> None:
        """Raise `ServerGivenUp` if ``host`` is left alone now."""
        found, now = self._hosts.get(host), self.clock()
        if found is not None and now < found.until:
            raise ServerGivenUp(
                f"{host} was given up {now - found.since:.1f} s ago ({found.why}), and is not asked for another "
                f"{found.until - now:.0f} s",
                host,
                found.status,
                found.status is not None,
            )

    @property
    def silence_s(self) -> float:
        """How long the first try of a request may wait for anything to come."""
        return min(STALL_S, self.timeout_s / 3)

    def attempts(self, host: str, what: str) -> Attempts:
        """The tries of one request. what: the request, in words. Raises as `check`."""
        self.check(host)
        return Attempts(self, host, what)

    def given_up(self) -> frozenset[str]:
        """The hosts that were given up, and have done no work since."""
        with self._lock:
            return frozenset(self._hosts)

    def came(self) -> None:
        """Something came."""
        self.came_at = self.clock()
        self.touch()

    def heard(self, host: str) -> None:
        """``host`` gave an answer, be it that it cannot do its work."""
        self._heard_at[host] = self.clock()

    def was_heard(self, host: str, since: float) -> bool:
        """Whether ``host`` gave anybody an answer after ``since``."""
        return self._heard_at.get(host, since) > since

    def answered(self, host: str) -> None:
        """``host`` does its work: it gave all of an answer, or bytes of a body."""
        self.came_at = self._heard_at[host] = self.clock()
        if host in self._hosts:
            with self._lock:
                self._hosts.pop(host, None)

    def gave_up(self, host: str, why: str, status: int | None, rest_s: float = 0.0) -> None:
        """``host`` was tried for as long as may be. rest_s: it is not to be asked for so long."""
        now = self.clock()
        with self._lock:
            found = self._hosts.get(host)
            if found is None or found.until <= now + rest_s:
                self._hosts[host] = _Host(now, now + rest_s, why, status)


class _Flow:
    """What comes. since: when it last was as much as `SLOWEST` asks for, or when it began."""

    def __init__(self, now: float) -> None:
        self.since, self._num_bytes = now, 0

    def came(self, num_bytes: int, now: float) -> bool:
        """Count ``num_bytes`` more. True: they are enough."""
        self._num_bytes += num_bytes
        if self._num_bytes < SLOWEST * (now - self.since):
            return False
        self.since, self._num_bytes = now, 0
        return True


class Attempts:
    """The tries of one request, with what is fetched of its body. For one thread."""

    def __init__(self, patience: Patience, host: str, what: str) -> None:
        self._patience, self._host, self._what, self._timeout_s = patience, host, what, patience.timeout_s
        self._doubted = patience.given_up()
        self._began = patience.clock()
        self._kept, self._flow = _Flow(self._began), _Flow(self._began)  # of all tries; of this one, of use or not
        self._num_tries = 0
        self._wait_s = FIRST_WAIT_S

    @property
    def left_s(self) -> float:
        """What is left of the time."""
        return self._timeout_s - (self._patience.clock() - self._kept.since)

    @property
    def silence_s(self) -> float:
        """How long the next try may wait for anything to come."""
        most: float = min(STALL_S, self._timeout_s / 3) * 2.0**self._num_tries
        return max(min(most, self.left_s), min(0.5, self._timeout_s))

    def came(self, num_bytes: int, is_kept: bool) -> bool:
        """``num_bytes`` of a body came. is_kept: whatever becomes of the rest; then the time begins anew.

        False: the body drips (`SLOWEST`), and has for as long as may be.
        """
        self._patience.came()
        now = self._patience.clock()
        if is_kept and self._kept.came(num_bytes, now):
            self._began = now
            self._num_tries, self._wait_s = 0, FIRST_WAIT_S
        self._flow.came(num_bytes, now)
        return now - self._flow.since < self._timeout_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what is done while nothing is asked for: it is not the server's doing, and takes none of the time."""
        began = self._patience.clock()
        try:
            yield
        finally:
            spent_s = self._patience.clock() - began
            self._kept.since += spent_s
            self._flow.since += spent_s

    def failed(
        self,
        error: Exception | None,
        host: str | None = None,
        status: int | None = None,
        wait_s: float = 0.0,
        is_unreached: bool = False,
    ) -> None:
        """A try failed: return when the next may begin.

        error: why; None: ``status`` says so. host: which one failed, of several that were led to. wait_s: what the
        server asked to wait. is_unreached: there was no connection to it.

        Raises:
            ServerGivenUp: the time is over, or will be before the server may be asked again; or the host had been given
                up before the request began, and has done no work since.
        """
        self._num_tries += 1
        host = host or self._host
        if status is not None:
            self._patience.heard(host)
        why = f"HTTP {status}" if error is None else f"{type(error).__name__}: {error}".rstrip(": ")
        left_s = self.left_s
        is_refusal = left_s > 0 and wait_s > left_s
        is_doubted = host in self._doubted and host in self._patience.given_up()
        if left_s <= 0 or is_refusal or is_doubted:
            if is_refusal:
                why += (
                    f", and asks to wait for {wait_s:.0f} s, which is longer than is left of the {self._timeout_s:g} s "
                    "of SHMLOADER_SOURCE_TIMEOUT_S"
                )
            elif is_doubted:
                why += ", and it had been given up before"
            is_silent = status is None and (is_unreached or not self._patience.was_heard(host, self._began))
            self._patience.gave_up(host, why, status, REST_S if is_silent else wait_s)
            raise self._given_up(host, why, status, is_refusal) from error
        pace_s = self._wait_s * random.uniform(1 - _JITTER, 1 + _JITTER)
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
        self._patience.sleep(min(max(wait_s, pace_s), left_s))
        self._flow = _Flow(self._patience.clock())

    def _given_up(self, host: str, why: str, status: int | None, is_refusal: bool) -> ServerGivenUp:
        spent_s = self._timeout_s - self.left_s
        times = "once" if self._num_tries == 1 else f"{self._num_tries} times"
        text = f"{host} was given up after {spent_s:.1f} s: {self._what}, tried {times}: {why}"
        return ServerGivenUp(text, host, status, is_refusal)


def asked_wait_s(headers: Mapping[str, str], now_s: float) -> float:
    """How long a busy server asks to wait, in seconds; 0: it does not say. now_s: seconds since 1970.

    Source: RFC 9110, 10.2.3 (Retry-After: seconds, or a date); draft-ietf-httpapi-ratelimit-headers-09 (RateLimit).
    """
    told = headers.get("retry-after", "").strip()
    if told.isdigit():
        return float(told)
    if told:
        try:
            return max(parsedate_to_datetime(told).timestamp() - now_s, 0.0)
        except ValueError:  # neither: as if it did not say
            return 0.0
    limit = _RATE_LIMIT.search(headers.get("ratelimit", ""))
    return float(limit[1]) if limit else 0.0


_patience: Patience | None = None
_lock = threading.Lock()


def be_patient(timeout_s: float, touch: Callable[[], None] | None = None) -> None:
    """Have every request that this process makes of a Hub be patient, and be given up in time. Services only.

    Imports ``huggingface_hub``. The last call's arguments hold. touch: see `Patience`; None: as it was.
    """
    global _patience
    with _lock:
        if _patience is None:
            from shmloader.sources.patient_client import install

            patience = Patience(timeout_s)
            install(patience)
            _patience = patience
        _patience.timeout_s = timeout_s
        if touch is not None:
            _patience.touch = touch


def last_came() -> float:
    """When something last came of a Hub to this process, by `time.monotonic`; -inf: nothing has."""
    return float("-inf") if _patience is None else _patience.came_at
