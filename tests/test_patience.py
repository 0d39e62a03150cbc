"""How long a server is tried, by a clock that does not run."""

from __future__ import annotations

import pickle

import pytest
from support_patience import patience_of

from shmloader.sources.patience import (
    LONGEST_WAIT_S,
    REST_S,
    STALL_S,
    Patience,
    ServerGivenUp,
    asked_wait_s,
)

HOST = "hub"


def give_up(patience: Patience, status: int | None = None, host: str = HOST) -> ServerGivenUp:
    attempts = patience.attempts(host, "GET /it")
    while True:
        try:
            attempts.failed(None if status else OSError("refused"), host, status)
        except ServerGivenUp as error:
            return error


def test_waits_grow_and_end_with_the_timeout():
    patience, clock = patience_of()
    error = give_up(patience)
    assert clock.now == pytest.approx(1030)
    assert all(before < after for before, after in zip(clock.slept[:3], clock.slept[1:4], strict=True))
    assert max(clock.slept) <= 1.25 * LONGEST_WAIT_S
    assert f"tried {len(clock.slept) + 1} times" in str(error)
    assert "OSError: refused" in str(error)
    assert (error.host, error.status) == (HOST, None)


def test_what_comes_begins_the_time_anew():
    patience, clock = patience_of()
    attempts = patience.attempts(HOST, "GET /it")
    for _ in range(5):
        clock.now += 29
        assert attempts.came(10_000, is_kept=True)
    attempts.failed(OSError("reset"))
    assert clock.slept == [pytest.approx(0.25, rel=0.26)]


def test_time_that_the_caller_took_is_not_the_servers():
    patience, clock = patience_of()
    attempts = patience.attempts(HOST, "GET /it")
    clock.now += 20
    with attempts.paused():
        clock.now += 1000
    assert attempts.left_s == pytest.approx(10)
    attempts.failed(OSError("idle for too long"))


def test_what_comes_to_no_use_does_not_begin_the_time_anew():
    patience, clock = patience_of()
    attempts = patience.attempts(HOST, "GET /it")
    for _ in range(10):
        clock.now += 2.9
        assert attempts.came(10_000, is_kept=False)
        with attempts.paused():
            clock.now += 1
    assert attempts.left_s == pytest.approx(1)


def test_what_the_server_asks_to_wait_is_waited():
    patience, clock = patience_of()
    attempts = patience.attempts(HOST, "GET /it")
    attempts.failed(None, HOST, 429, 12.0)
    assert clock.slept == [12.0]


def test_what_the_server_asks_to_wait_beyond_the_timeout_ends_at_once():
    patience, clock = patience_of()
    with pytest.raises(
        ServerGivenUp, match=r"wait for 120 s, which is longer than .* SHMLOADER_SOURCE_TIMEOUT_S"
    ) as caught:
        patience.attempts(HOST, "GET /it").failed(None, HOST, 429, 120.0)
    assert clock.slept == []
    assert caught.value.is_refusal


def test_silence_is_waited_for_longer_each_time_and_never_beyond_the_timeout():
    patience, clock = patience_of()
    attempts = patience.attempts(HOST, "GET /it")
    assert attempts.silence_s == STALL_S
    clock.now += STALL_S
    attempts.failed(OSError("stalled"))
    assert attempts.silence_s == pytest.approx(attempts.left_s)
    assert patience_of(3.0)[0].attempts(HOST, "").silence_s == pytest.approx(1)


def test_server_that_asked_to_wait_beyond_the_timeout_is_left_alone_until_then():
    patience, clock = patience_of()
    with pytest.raises(ServerGivenUp):
        patience.attempts(HOST, "GET /it").failed(None, HOST, 429, 120.0)
    clock.now += 119
    with pytest.raises(ServerGivenUp, match=r"119\.0 s ago .*wait for 120 s.*not asked for another 1 s") as caught:
        patience.attempts(HOST, "GET /other")
    assert (caught.value.status, caught.value.is_refusal) == (429, True)
    clock.now += 1
    patience.attempts(HOST, "GET /other")


def test_what_is_left_alone_for_long_is_so_though_another_request_ends_meanwhile():
    patience, clock = patience_of()
    first, other = patience.attempts(HOST, "GET /it"), patience.attempts(HOST, "GET /other")
    with pytest.raises(ServerGivenUp):
        first.failed(None, HOST, 429, 120.0)
    clock.now += 30
    with pytest.raises(ServerGivenUp):
        other.failed(OSError("reset"))
    clock.now += REST_S
    with pytest.raises(ServerGivenUp, match="wait for 120 s"):
        patience.check(HOST)


def test_host_that_was_not_reached_is_left_alone_then_tried_once_until_it_answers():
    patience, clock = patience_of()
    give_up(patience)
    with pytest.raises(ServerGivenUp, match=r"given up 0\.0 s ago"):
        patience.attempts(HOST, "GET /other")
    patience.attempts("another", "GET /it")
    clock.now += REST_S
    began, attempts = clock.now, patience.attempts(HOST, "GET /other")
    assert attempts.silence_s == STALL_S
    with pytest.raises(ServerGivenUp, match=r"once.* had been given up before"):
        attempts.failed(OSError("refused"))
    assert clock.now == began
    patience.answered(HOST)
    give_up(patience)
    assert clock.now == pytest.approx(began + 30)


def test_host_that_answers_with_errors_is_tried_once_for_other_things():
    patience, _ = patience_of()
    assert give_up(patience, 503).status == 503
    with pytest.raises(ServerGivenUp, match="had been given up before"):
        patience.attempts(HOST, "GET /other").failed(None, HOST, 503)


def test_request_that_began_before_its_host_was_given_up_has_its_time():
    patience, clock = patience_of()
    attempts = patience.attempts(HOST, "GET /it")
    patience.gave_up(HOST, "HTTP 503", 503)
    attempts.failed(None, HOST, 503)
    assert len(clock.slept) == 1


def test_host_that_answered_others_meanwhile_is_not_left_alone():
    patience, clock = patience_of()
    attempts = patience.attempts(HOST, "GET /slow")
    clock.now += 20
    patience.answered(HOST)
    clock.now += 10
    with pytest.raises(ServerGivenUp):
        attempts.failed(TimeoutError("stalled"))
    patience.check(HOST)


def test_host_that_others_cannot_connect_to_is_left_alone_whatever_it_answered_before():
    patience, clock = patience_of()
    attempts = patience.attempts(HOST, "GET /it")
    clock.now += 20
    patience.answered(HOST)
    clock.now += 10
    with pytest.raises(ServerGivenUp):
        attempts.failed(OSError("refused"), is_unreached=True)
    with pytest.raises(ServerGivenUp, match="ago"):
        patience.check(HOST)


def test_nine_datasets_of_a_dead_hub_take_one_timeout():
    patience, clock = patience_of()
    give_up(patience)
    for _ in range(8):
        with pytest.raises(ServerGivenUp):
            patience.attempts(HOST, "GET /it")
    assert clock.now == pytest.approx(1030)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 60),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
        ({"retry-after": "soon"}, 0),
        ({"ratelimit": '"api";r=0;t=55'}, 55),
        ({"ratelimit": '"api";r=12;t=55'}, 0),
    ],
)
def test_both_ways_to_ask_for_a_wait_are_understood(headers, seconds):
    assert asked_wait_s(headers, 40.0) == seconds


def test_error_travels_between_processes():
    error = ServerGivenUp("it was given up", HOST, 503, True)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.host, copy.status, copy.is_refusal) == ("it was given up", HOST, 503, True)


def test_error_is_of_no_kind_that_libraries_take_for_an_answer_or_try_again():
    assert not issubclass(ServerGivenUp, OSError)


def test_drip_is_as_nothing():
    patience, clock = patience_of()
    attempts = patience.attempts(HOST, "GET /it")
    flows = []
    for _ in range(4):
        clock.now += 9
        flows.append(attempts.came(1, is_kept=True))
    assert flows == [True, True, True, False]
    with pytest.raises(ServerGivenUp):
        attempts.failed(OSError("it drips"))


def test_drip_counts_no_time_that_the_caller_took():
    patience, clock = patience_of()
    attempts = patience.attempts(HOST, "GET /it")
    for _ in range(4):
        with attempts.paused():
            clock.now += 1000
        assert attempts.came(1, is_kept=True)


def test_small_body_that_comes_after_long_waits_does_not_drip():
    patience, clock = patience_of()
    attempts = patience.attempts(HOST, "GET /it")
    clock.now += 29
    attempts.failed(OSError("busy"))
    clock.now += 2
    assert attempts.came(10, is_kept=False)


def test_few_bytes_of_each_try_are_no_progress():
    patience, clock = patience_of()
    attempts = patience.attempts(HOST, "GET /it")

    def stall_for_ever() -> None:
        for _ in range(100):
            assert attempts.came(100, is_kept=True)
            clock.now += attempts.silence_s
            attempts.failed(OSError("stalled"))

    with pytest.raises(ServerGivenUp):
        stall_for_ever()
    assert clock.now - 1000 <= 45
