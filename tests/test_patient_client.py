"""The client of a service against servers that fail in their own ways, by a clock that does not run."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import httpx
from support_patience import Clock, patience_of

from shmloader.sources.patience import REST_S, STALL_S, ServerGivenUp
from shmloader.sources.patient_client import PatientClient

HUB = constants.ENDPOINT
API, FILE, CDN = f"{HUB}/api/datasets/org/it", f"{HUB}/datasets/org/it/resolve/main/it.bin", "https://cdn.test/it.bin"
CONTENT = bytes(range(256)) * 40
#: More requests than any patience allows: it goes on for ever.
MOST_REQUESTS = 500

#: What a server does with a request; it may let time pass.
Serve = Callable[[Any], Any]


class Body(httpx.SyncByteStream):
    """Parts of a body, and how it ends."""

    def __init__(self, *parts: bytes, end: Callable[[], None] = lambda: None) -> None:
        self._parts, self._end = parts, end

    def __iter__(self) -> Iterator[bytes]:
        yield from self._parts
        self._end()


class Dripping(httpx.SyncByteStream):
    """A body whose parts a function makes."""

    def __init__(self, parts: Callable[[], Iterator[bytes]]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[bytes]:
        return self._parts()


class Servers(httpx.BaseTransport):
    """All servers that there are: what ``serve`` says. Notes what it was asked."""

    def __init__(self, serve: Serve) -> None:
        self.serve = serve
        self.asked: list[str] = []

    def handle_request(self, request: Any) -> Any:
        self.asked.append(str(request.url))
        assert len(self.asked) <= MOST_REQUESTS, "it is asked for ever"
        return self.serve(request)


def client_of(serve: Callable[[Clock], Serve], timeout_s: float = 30.0) -> tuple[PatientClient, Servers, Clock]:
    patience, clock = patience_of(timeout_s)
    client, servers = PatientClient(patience, {}), Servers(serve(clock))
    client._transport, client._mounts = servers, {}
    return client, servers, clock


def stall(clock: Clock, request: Any) -> None:
    """Nothing comes, for as long as the client waits."""
    clock.now += request.extensions["timeout"]["read"]
    raise httpx.ReadTimeout("nothing came", request=request)


def cut(request: Any) -> None:
    raise httpx.RemoteProtocolError("peer closed connection", request=request)


def unreached(clock: Clock, request: Any) -> None:
    clock.now += request.extensions["timeout"]["connect"]
    raise httpx.ConnectTimeout("no route", request=request)


def file_answer(request: Any, end: Callable[[], None], stop: int, is_ranged: bool = True, etag: str = '"1"') -> Any:
    """The file's bytes up to ``stop`` of it, and then ``end``. is_ranged: whether the server knows what a range is."""
    first, last = 0, len(CONTENT) - 1
    wanted = request.headers.get("Range") if is_ranged else None
    if wanted is not None:
        first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
    headers = {"ETag": etag, "Content-Length": str(last + 1 - first)}
    if wanted is not None:
        headers["Content-Range"] = f"bytes {first}-{last}/{len(CONTENT)}"
    data = CONTENT[first : min(stop, last + 1)]
    parts = [data[i : i + 1000] for i in range(0, len(data), 1000)]
    return httpx.Response(200 if wanted is None else 206, headers=headers, stream=Body(*parts, end=end))


@pytest.mark.parametrize("end", ["cut", "stalled"])
def test_body_that_cannot_be_gone_on_with_and_never_comes_whole_is_given_up_in_time(end: str) -> None:
    def serve(clock: Clock) -> Serve:
        def answer(request: Any) -> Any:
            def ending() -> None:
                cut(request) if end == "cut" else stall(clock, request)

            return httpx.Response(200, headers={"Content-Length": "1000"}, stream=Body(b'{"a":', b"1", end=ending))

        return answer

    client, servers, clock = client_of(serve)
    with pytest.raises(ServerGivenUp, match="was given up after"):
        client.get(API)
    assert 20 <= clock.now - 1000 <= 31
    assert len(servers.asked) >= 2


def test_one_address_that_stalls_does_not_shut_a_host_that_answers_for_others() -> None:
    def serve(clock: Clock) -> Serve:
        def answer(request: Any) -> Any:
            if request.url.path.endswith("slow"):
                client._patience.answered(request.url.host)  # what another thread asked came meanwhile
                stall(clock, request)
            return httpx.Response(200)

        return answer

    client, _, _ = client_of(serve)
    with pytest.raises(ServerGivenUp):
        client.get(f"{API}/slow")
    assert client.get(API).status_code == 200


def test_host_that_cannot_be_connected_to_is_left_alone_though_it_did_answer_before() -> None:
    def serve(clock: Clock) -> Serve:
        def answer(request: Any) -> Any:
            client._patience.answered(request.url.host)
            return unreached(clock, request)

        return answer

    client, servers, _ = client_of(serve)
    with pytest.raises(ServerGivenUp):
        client.get(API)
    num_asked = len(servers.asked)
    with pytest.raises(ServerGivenUp, match="ago"):
        client.get(API)
    assert len(servers.asked) == num_asked


def test_slow_host_that_was_given_up_is_taken_back() -> None:
    is_back = False

    def serve(clock: Clock) -> Serve:
        def answer(request: Any) -> Any:
            if not is_back or request.extensions["timeout"]["read"] < 3:
                stall(clock, request)
            clock.now += 3
            return httpx.Response(200)

        return answer

    client, _, clock = client_of(serve)
    with pytest.raises(ServerGivenUp):
        client.get(API)
    clock.now += REST_S
    is_back = True
    assert client.get(API).status_code == 200


def test_dead_storage_that_a_hub_leads_to_takes_the_whole_timeout_once() -> None:
    def serve(clock: Clock) -> Serve:
        def answer(request: Any) -> Any:
            if request.url.host != "cdn.test":
                return httpx.Response(302, headers={"Location": CDN})
            return unreached(clock, request)

        return answer

    client, _, clock = client_of(serve)
    took = []
    for _ in range(3):
        began = clock.now
        with pytest.raises(ServerGivenUp, match=r"cdn\.test"):
            client.get(FILE)
        took.append(clock.now - began)
        clock.now += REST_S
    assert took == [pytest.approx(30, abs=1), STALL_S, STALL_S]


def test_server_that_asks_to_wait_for_longer_than_may_be_is_asked_no_more_until_then() -> None:
    client, servers, clock = client_of(lambda _: lambda _: httpx.Response(429, headers={"Retry-After": "60"}))
    with pytest.raises(ServerGivenUp, match="wait for 60 s") as caught:
        client.get(API)
    for _ in range(5):
        with pytest.raises(ServerGivenUp, match=r"wait for 60 s.* SHMLOADER_SOURCE_TIMEOUT_S") as caught:
            client.get(FILE)
        assert (caught.value.status, caught.value.is_refusal) == (429, True)
    assert len(servers.asked) == 1
    clock.now += 60
    servers.serve = lambda _: httpx.Response(200)
    assert client.get(FILE).status_code == 200


@pytest.mark.parametrize("wanted", [None, "bytes=300-8999"])
def test_body_is_gone_on_with_though_the_server_sends_all_of_it_again(wanted: str | None) -> None:
    def serve(clock: Clock) -> Serve:
        def answer(request: Any) -> Any:
            is_first = len(servers.asked) == 1
            stop = 5500 if is_first else len(CONTENT)
            return file_answer(request, lambda: cut(request) if is_first else None, stop, is_ranged=is_first)

        return answer

    client, servers, _ = client_of(serve)
    found = client.get(FILE, headers={} if wanted is None else {"Range": wanted})
    assert found.content == (CONTENT if wanted is None else CONTENT[300:9000])
    assert len(servers.asked) == 2


def test_body_whose_beginning_alone_comes_each_time_is_given_up() -> None:
    def serve(clock: Clock) -> Serve:
        return lambda request: file_answer(request, lambda: stall(clock, request), 5500, is_ranged=False)

    client, _, clock = client_of(serve)
    with pytest.raises(ServerGivenUp):
        client.get(FILE)
    assert clock.now - 1000 <= 31


def test_another_version_is_not_put_behind_the_beginning_of_the_first() -> None:
    def serve(clock: Clock) -> Serve:
        def answer(request: Any) -> Any:
            is_first = len(servers.asked) == 1
            end = (lambda: cut(request)) if is_first else (lambda: None)
            return file_answer(request, end, 5500 if is_first else len(CONTENT), False, f'"{is_first}"')

        return answer

    client, servers, _ = client_of(serve)
    with pytest.raises(ServerGivenUp, match="another version"):
        client.get(FILE)


def test_time_that_who_reads_takes_is_not_the_servers() -> None:
    def serve(clock: Clock) -> Serve:
        def answer(request: Any) -> Any:
            is_first = len(servers.asked) == 1
            return file_answer(request, lambda: cut(request) if is_first else None, 5500 if is_first else len(CONTENT))

        return answer

    client, _, clock = client_of(serve)
    servers = client._transport
    parts = []
    with client.stream("GET", FILE) as response:
        for part in response.iter_raw():
            parts.append(part)
            clock.now += 1000
    assert b"".join(parts) == CONTENT


@pytest.mark.parametrize("address", [API, FILE])
def test_body_that_drips_is_given_up_in_time(address: str) -> None:
    def serve(clock: Clock) -> Serve:
        def drip() -> Iterator[bytes]:
            while True:
                clock.now += 1
                yield b"x"

        return lambda request: httpx.Response(
            200, headers={"ETag": '"1"', "Content-Length": "100000"} if address == FILE else {}, stream=Dripping(drip)
        )

    client, servers, clock = client_of(serve)
    with pytest.raises(ServerGivenUp, match="fewer than 256 bytes a second"):
        client.get(address)
    assert clock.now - 1000 <= 31
    assert len(servers.asked) == 1


def test_body_that_cannot_be_gone_on_with_may_take_longer_than_the_timeout_if_it_comes() -> None:
    def serve(clock: Clock) -> Serve:
        def flow() -> Iterator[bytes]:
            for _ in range(100):
                clock.now += 1
                yield bytes(1000)

        return lambda request: httpx.Response(200, stream=Dripping(flow))

    client, _, _ = client_of(serve)
    assert len(client.get(API).content) == 100_000


@pytest.mark.parametrize("told_s", [None, 10.0])
def test_answer_that_takes_longer_than_the_caller_would_wait_is_waited_for(told_s: float | None) -> None:
    def serve(clock: Clock) -> Serve:
        def answer(request: Any) -> Any:
            if request.extensions["timeout"]["read"] < 15:
                stall(clock, request)
            clock.now += 15
            return httpx.Response(200)

        return answer

    client, servers, _ = client_of(serve, timeout_s=60)
    assert client.get(API, timeout=told_s).status_code == 200
    assert len(servers.asked) == 2


def test_hub_whose_bodies_stall_takes_the_timeout_once() -> None:
    def serve(clock: Clock) -> Serve:
        return lambda request: file_answer(request, lambda: stall(clock, request), 0)

    client, _, clock = client_of(serve)
    for _ in range(5):
        with pytest.raises(ServerGivenUp):
            client.get(FILE)
    assert clock.now - 1000 <= 31


def test_storage_whose_body_stalls_is_the_host_that_is_named() -> None:
    def serve(clock: Clock) -> Serve:
        def answer(request: Any) -> Any:
            if request.url.host != "cdn.test":
                return httpx.Response(302, headers={"Location": CDN})
            return file_answer(request, lambda: stall(clock, request), 100)

        return answer

    client, _, _ = client_of(serve)
    with pytest.raises(ServerGivenUp, match=r"^cdn\.test was given up after .*/datasets/org/it/"):
        client.get(FILE)
    assert client._patience.given_up() == {"cdn.test"}


def test_all_addresses_of_a_host_share_the_time_of_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    patience, clock = patience_of()
    addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"192.0.2.{i}", 80)) for i in range(6)]

    def create_connection(address: Any, timeout: float, *_: Any, **__: Any) -> None:
        for _ in socket.getaddrinfo(*address):
            clock.now += timeout
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
    monkeypatch.setattr(socket, "create_connection", create_connection)
    with PatientClient(patience, {}) as client, pytest.raises(ServerGivenUp, match="ConnectTimeout"):
        client.get(API)
    assert 25 <= clock.now - 1000 <= 31
