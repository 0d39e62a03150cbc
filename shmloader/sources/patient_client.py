"""The HTTP client of ``huggingface_hub`` and ``datasets`` in a service: it tries again, and goes on where it left off.

::

    send ── a busy server, a connection that fails ──▶ wait, and again          (patience.py says for how long)
      │  ── a signed address that has expired ───────▶ ask for a new one where it came from
      └─▶ body ── cut, reset or stalled ─────────────▶ the rest of it, by its range, behind what came already; all of
                                                       it, if it tells no version (most of /api/)

So no layer above sees anything but whole answers and a `ServerGivenUp`. Imports ``huggingface_hub``.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants, get_session, set_client_factory

if TYPE_CHECKING:
    import httpx2 as httpx
else:
    from huggingface_hub.utils import httpx  # whichever it uses

from shmloader.sources.patience import BUSY, SLOWEST, Attempts, Patience, asked_wait_s

#: HTTP: a signed address (one with a query, to which we were led) that has expired; which of them depends on the store.
_EXPIRED = (400, 401, 403, 410)
#: New addresses are asked for so often, until something comes.
_MOST_RENEWALS = 3
#: Addresses that we were led to are remembered, the newest of them.
_MOST_ORIGINS = 4096
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
#: Not worth another try: the request itself is wrong.
_OURS = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
#: There was no connection.
_UNREACHED = (httpx.ConnectError, httpx.ConnectTimeout)


def install(patience: Patience) -> None:
    """Have the libraries use such a client from now on."""
    hooks = get_session().event_hooks
    set_client_factory(lambda: PatientClient(patience, hooks))


class PatientClient(httpx.Client):
    """See the module's docstring. hooks: as the client that it stands for has them."""

    def __init__(self, patience: Patience, hooks: dict[str, list[Any]]) -> None:
        hooks = hooks | {"request": [*hooks.get("request", ()), self._check]}
        super().__init__(event_hooks=hooks, follow_redirects=True, timeout=None)
        self._patience = patience
        self._hub = _host(httpx.URL(constants.ENDPOINT))
        self._origins: OrderedDict[str, httpx.Request] = OrderedDict()
        self._origins_lock = threading.Lock()

    def send(self, request: httpx.Request, *, stream: bool = False, **options: Any) -> httpx.Response:
        """The answer, as `httpx.Client.send`. Raises ServerGivenUp beside what that raises of a wrong request."""
        if request.method == "GET" and "/resolve/" in request.url.path:
            # What is compressed on the way cannot be gone on with in the middle, and its size is not the file's.
            request.headers["Accept-Encoding"] = "identity"
        host, what = _host(request.url), f"{request.method} {_shown(request.url)}"
        if host != self._hub and str(request.url) not in self._origins:
            # What `datasets` asks of others (its viewer, a counter of downloads) it does without.
            told = request.extensions.get("timeout") or {}
            request.extensions = request.extensions | _limits(self._patience.silence_s, told)
            return super().send(request, stream=stream, **options)
        attempts = self._patience.attempts(host, what)
        while True:
            response = self.answer(request, attempts, options)
            response.stream = _Body(self, response, request, attempts, options)
            if stream:
                return response
            try:
                response.read()
                return response
            except httpx.TransportError as error:  # of what cannot be gone on with
                response.close()
                self._failed(attempts, request, error)

    def answer(self, request: httpx.Request, attempts: Attempts, options: dict[str, Any]) -> httpx.Response:
        """An answer that is not about the server's state, without its body. Raises as `send`."""
        num_renewals = 0
        while True:
            # Whatever who asks would have waited: `huggingface_hub` asks for the same 10 s each time it tries.
            request.extensions = request.extensions | _limits(attempts.silence_s)
            try:
                response = super().send(request, stream=True, **options)
            except _OURS:
                raise
            except httpx.TransportError as error:
                self._failed(attempts, request, error)
                continue
            host = _host(response.request.url)
            for before in response.history:
                self._patience.answered(_host(before.request.url))
            if response.status_code in BUSY:
                wait_s = asked_wait_s(response.headers, time.time())
                response.close()
                attempts.failed(None, host, response.status_code, wait_s)
                continue
            if not _has_body(response) or response.is_error:
                self._patience.answered(host)
            if num_renewals < _MOST_RENEWALS and self._is_expired(response):
                num_renewals += 1
                request = self._renewed(request)
                response.close()
                attempts.failed(None, host, response.status_code)
                continue
            if response.has_redirect_location and response.next_request is not None:  # not followed: by who asked
                self._remember(str(response.next_request.url), request)
            return response

    def _check(self, request: httpx.Request) -> None:
        """A hook: of each request, also where a redirect leads."""
        self._patience.check(_host(request.url))

    def _failed(self, attempts: Attempts, request: httpx.Request, error: httpx.TransportError) -> None:
        """request: the one that failed, if ``error`` does not tell."""
        host = _host(_request_of(error, request).url)
        attempts.failed(error, host, is_unreached=isinstance(error, _UNREACHED))

    def _is_expired(self, response: httpx.Response) -> bool:
        url = response.request.url
        was_led = bool(response.history) or str(url) in self._origins
        return response.status_code in _EXPIRED and bool(url.query) and was_led

    def _remember(self, url: str, origin: httpx.Request) -> None:
        with self._origins_lock:
            self._origins[url] = origin
            if len(self._origins) > _MOST_ORIGINS:
                self._origins.popitem(last=False)

    def _renewed(self, request: httpx.Request) -> httpx.Request:
        """The same asked where its address came from, which leads to a new one."""
        origin = self._origins.get(str(request.url))
        if origin is None:  # it was led there itself
            return request
        headers = origin.headers.copy()
        for name in ("Range", "If-Range", "Accept-Encoding"):
            if name in request.headers:
                headers[name] = request.headers[name]
        return httpx.Request(request.method, origin.url, headers=headers)


class _Body(httpx.SyncByteStream):
    """The body of an answer, which goes on with another one where the first breaks off."""

    def __init__(
        self,
        client: PatientClient,
        response: httpx.Response,
        request: httpx.Request,
        attempts: Attempts,
        options: dict[str, Any],
    ) -> None:
        self._client, self._request, self._attempts, self._options = client, request, attempts, options
        assert isinstance(response.stream, httpx.SyncByteStream)
        self._stream: httpx.SyncByteStream = response.stream
        self._parts = _all(response.stream)
        self._from = response.request  # whose body this is: where ``request`` led to
        self._span = _span(response)
        self._etag = response.headers.get("etag")
        self._num_read = 0

    def __iter__(self) -> Iterator[bytes]:
        while True:
            error: httpx.TransportError
            try:
                for num_bytes, part in self._parts:
                    # What cannot be gone on with has to be fetched again, and an empty part had come already.
                    if not self._attempts.came(num_bytes, is_kept=self._span is not None and bool(part)):
                        raise httpx.ReadTimeout(f"fewer than {SLOWEST} bytes a second came", request=self._from)
                    self._client._patience.answered(_host(self._from.url))
                    self._num_read += len(part)
                    with self._attempts.paused():
                        yield part
                if self._span is None or self._num_read >= self._span[1] - self._span[0]:
                    self._client._patience.answered(_host(self._from.url))
                    return
                error = httpx.RemoteProtocolError(f"it ended after {self._num_read} bytes", request=self._from)
            except httpx.TransportError as failure:
                error = failure
            if self._span is None:
                error.request = _request_of(error, self._from)
                raise error
            self._go_on(error, *self._span)

    def close(self) -> None:
        """Close the connection, or give it back."""
        self._stream.close()

    def _go_on(self, error: httpx.TransportError, first: int, end: int) -> None:
        """Have the rest of the bytes from ``first`` to before ``end``. Raises ServerGivenUp."""
        while True:
            self._stream.close()
            self._client._failed(self._attempts, self._from, error)
            headers = self._request.headers.copy()
            headers["Range"] = f"bytes={first + self._num_read}-{end - 1}"
            request = httpx.Request(self._request.method, self._request.url, headers=headers)
            response = self._client.answer(request, self._attempts, self._options)
            assert isinstance(response.stream, httpx.SyncByteStream)
            self._stream, self._parts = response.stream, _all(response.stream)
            self._from = response.request
            changed, span = self._etag != response.headers.get("etag"), _span(response)
            at = first + self._num_read
            if span == (at, end) and not changed:
                return
            if span is not None and span[0] <= at and end <= span[1] and not changed:  # it ignores ranges
                self._parts = _between(response.stream, at - span[0], end - span[0])
                return
            told = "another version of it" if changed else "not the bytes that were asked for"
            error = httpx.RemoteProtocolError(
                f"HTTP {response.status_code}: {told}, of {_shown(response.request.url)}", request=self._from
            )


def _span(response: httpx.Response) -> tuple[int, int] | None:
    """Which bytes of the file a body holds: the first, and the one behind the last; None: it cannot be gone on with."""
    headers = response.headers
    if response.request.method != "GET" or headers.get("content-encoding", "identity") != "identity":
        return None
    if "etag" not in headers or response.status_code not in (200, 206):
        return None
    if response.status_code == 206:
        told = _RANGE.fullmatch(headers.get("content-range", ""))
        return (int(told[1]), int(told[2]) + 1) if told else None
    length = headers.get("content-length", "")
    return (0, int(length)) if length.isdigit() else None


def _all(parts: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Of each part how many bytes came, and those that are wanted: all."""
    return ((len(part), part) for part in parts)


def _between(parts: Iterable[bytes], first: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The same where only the bytes from ``first`` to before ``end`` are wanted."""
    at = 0
    for part in parts:
        yield len(part), part[max(first - at, 0) : end - at]
        at += len(part)
        if at >= end:
            return


def _has_body(response: httpx.Response) -> bool:
    """Whether more than its head is to come."""
    return response.request.method != "HEAD" and response.headers.get("content-length") != "0"


def _limits(silence_s: float, told: Mapping[str, float] = MappingProxyType({})) -> dict[str, Any]:
    """The extensions of a request that bound a try of it. told: the caller's limits, if these hold too."""
    names = ("connect", "read", "write", "pool")
    return {"timeout": {name: min(silence_s, told.get(name) or silence_s) for name in names}, "trace": _share_time}


def _share_time(event: str, info: dict[str, Any]) -> None:
    """Have all addresses of a host together take the time of a connection, which each of them is given.

    A trace callback of httpcore, which calls it with what it connects with (`socket.create_connection` takes the
    addresses one after the other).
    """
    if not event.endswith("connect_tcp.started") or info.get("timeout") is None:
        return
    try:
        found = socket.getaddrinfo(info["host"], info["port"], type=socket.SOCK_STREAM)
    except OSError:  # the connection fails in the same way
        return
    info["timeout"] /= max(len(found), 1)


def _request_of(error: httpx.TransportError, asked: httpx.Request) -> httpx.Request:
    """The one that failed: ``asked``, or one that it led to."""
    try:
        return error.request
    except RuntimeError:  # it was not noted
        return asked


def _host(url: httpx.URL) -> str:
    return url.host if url.port is None else f"{url.host}:{url.port}"


def _shown(url: httpx.URL) -> str:
    """Without its query, which may be a signature."""
    return str(url.copy_with(query=None, fragment=None))
