"""A Hub that fails, at every request and in every way: all rows come, or the promised error, in time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub_faults import Fault
from support_faults import NAME, TIMEOUT_S, World, ask

#: What the timeout is exceeded by at most: by what is done besides waiting, on a busy machine.
SPARE_S = 5.0
BUSY = {"Retry-After": "0"}
PARQUET = r"\.parquet$"


def _hurry() -> None:
    """Wait for little between two tries, and for what stalls; though for long if need be."""
    from shmloader.sources import patience

    patience.FIRST_WAIT_S, patience.STALL_S = 0.01, 0.1


def each_request(world: World) -> list[Any]:
    """Each request in its turn fails in all ways, one after the other; streaming and downloaded."""
    _hurry()
    told = []
    for asked in ({"source_timeout_s": 60.0}, {"source_timeout_s": 60.0, "is_downloaded": True}):
        first = world.outcome(**asked)
        for i in range(len(world.hub.requests)):
            world.forget()
            ways = (Fault(end="stall"), Fault(503), Fault(429, BUSY), Fault(end="reset"), Fault(end="cut", after=20))
            for fault in ways:
                fault.first = i
            world.hub.faults.add(*ways)
            found = world.outcome(**asked)
            told.append((found.mode == first.mode, found.texts == list(world.texts), found.error))
    return told


def test_no_request_is_lost_whatever_befalls_it(tmp_path):
    told = ask(each_request, tmp_path)
    assert len(told) > 15
    assert all(outcome == [True, True, None] for outcome in told), told


def dead_from_each_request_on(world: World) -> list[Any]:
    world.outcome()
    told = []
    for i in range(len(world.hub.requests)):
        world.forget()
        world.hub.faults.add(Fault(end="reset", first=i, times=None))
        found = world.outcome(source_timeout_s=0.4)
        told.append((found.texts == list(world.texts), found.error, found.took_s))
    return told


def test_hub_that_is_dead_from_any_request_on_is_said_to_be_so_in_time(tmp_path):
    told = ask(dead_from_each_request_on, tmp_path)
    for is_whole, error, took_s in told:
        assert is_whole or error["data"]["endpoint"].startswith("http://127.0.0.1"), error
        assert took_s < 0.4 + SPARE_S
    assert sum(is_whole for is_whole, *_ in told) <= 1
    kinds = {error["type"] for _, error, _ in told if error}
    assert kinds == {"SourceError", "ReadError"}


def broken_bodies(world: World) -> dict[str, Any]:
    _hurry()
    plan, told = world.plan(), {}
    for end in ("cut", "reset", "stall"):
        world.forget()
        world.hub.faults.add(*(Fault(end=end, after=n, path=PARQUET) for n in (5000, 1, 0, 3000)))
        found = world.outcome(plan, source_timeout_s=60.0)
        told[end] = (found.texts == list(world.texts), world.hub.num_bytes_of(".parquet"), found.error)
    return told | {"size": plan.shard_bytes[0]}


def test_body_that_breaks_off_is_gone_on_with_and_no_byte_comes_twice(tmp_path):
    told = ask(broken_bodies, tmp_path)
    for end in ("cut", "stall"):
        assert told[end] == [True, told["size"], None]
    assert told["reset"][0]  # what was on its way is lost with the connection
    assert told["reset"][1] <= told["size"] + 8001


def listings_never_whole(world: World) -> list[Any]:
    """What tells no version cannot be gone on with, and is asked for again as a whole."""
    told = []
    for end in ("cut", "reset", "stall"):
        world.forget()
        world.hub.faults.add(Fault(end=end, after=10, path="^/api/", times=None))
        told.append(world.outcome(source_timeout_s=0.4).error)
    world.forget()
    world.hub.faults.add(Fault(429, {"Retry-After": "3600"}, times=None))
    for _ in range(3):
        told.append(world.outcome().error)
    return [*told, len(world.hub.requests)]


def test_listing_that_never_comes_whole_is_given_up_and_who_asks_to_wait_is_asked_once(tmp_path):
    *errors, num_requests = ask(listings_never_whole, tmp_path)
    assert all(error["data"]["endpoint"].startswith("http://127.0.0.1") for error in errors), errors
    assert [error["data"]["status"] for error in errors[3:]] == [429] * 3
    assert num_requests == 1


def expired_addresses(world: World) -> list[Any]:
    _hurry()
    world.hub.is_signed = True
    told = []
    for asked in ({"source_timeout_s": 60.0}, {"source_timeout_s": 60.0, "is_downloaded": True}):
        for faults in (
            (),
            (Fault(403, path="^/cdn/.*parquet"), Fault(400, path="^/cdn/.*parquet")),
            (Fault(end="cut", after=1000, path="^/cdn/.*parquet"), Fault(403, path="^/cdn/.*parquet")),
        ):
            world.forget()
            world.hub.faults.add(*faults)
            found = world.outcome(**asked)
            told.append((found.texts == list(world.texts), found.error))
    return told


def test_address_that_has_expired_is_asked_for_again(tmp_path):
    assert ask(expired_addresses, tmp_path) == [[True, None]] * 6


def refused_for_ever(world: World) -> dict[str, Any]:
    world.hub.is_signed = True
    world.hub.faults.add(Fault(403, path="^/cdn/.*parquet", times=None))
    forbidden = world.outcome()
    world.forget()
    world.hub.faults.add(Fault(429, {"Retry-After": "3600"}, times=None))
    told_to_wait = world.outcome(source_timeout_s=30.0)
    world.forget()
    world.hub.faults.add(Fault(429, {"Retry-After": "1"}, path="resolve/main/README.md"))
    waited = world.outcome(source_timeout_s=10.0)
    world.forget()
    world.hub.faults.add(Fault(500, path=PARQUET, times=None))
    broken = world.outcome()
    return {
        "forbidden": forbidden.error,
        "told_to_wait": (told_to_wait.error, told_to_wait.took_s),
        "waited": (waited.texts == list(world.texts), waited.took_s),
        "broken": (broken.error, broken.took_s),
    }


def test_what_is_refused_for_ever_ends_and_what_is_asked_to_wait_waits(tmp_path):
    told = ask(refused_for_ever, tmp_path)
    assert told["forbidden"]["type"] == "AccessError"
    error, took_s = told["told_to_wait"]
    assert error["data"]["status"] == 429
    assert "3600 s" in error["message"]
    assert "SHMLOADER_SOURCE_TIMEOUT_S" in error["message"]
    assert took_s < 20
    is_whole, took_s = told["waited"]
    assert is_whole
    assert took_s >= 1
    error, took_s = told["broken"]
    assert error["data"]["status"] == 500
    assert took_s < TIMEOUT_S + SPARE_S


def death_and_return(world: World) -> dict[str, Any]:
    plan = world.plan()
    world.hub.die()
    dead = world.outcome(plan)
    again = world.outcome(plan)
    world.hub.live()
    from shmloader.sources import patience

    assert patience._patience is not None
    began, clock = patience.REST_S, patience._patience.clock
    patience._patience.clock = lambda: clock() + began
    back = world.outcome(plan)
    return {"dead": dead.error, "again": (again.error, again.took_s), "back": back.texts == list(world.texts)}


def test_server_that_dies_is_given_up_left_alone_and_asked_again_later(tmp_path):
    told = ask(death_and_return, tmp_path)
    assert told["dead"]["type"] == "ReadError"
    assert told["dead"]["data"]["shard"].endswith("train-00000.parquet")
    assert "was given up after" in told["dead"]["message"]
    error, took_s = told["again"]
    assert "ago" in error["message"]
    assert took_s < TIMEOUT_S
    assert told["back"]


def gates(world: World) -> dict[str, Any]:
    told = {}
    world.hub.gated = {NAME: {"hf_a_reader"}}
    for name, load in (("none", {}), ("other", {"token": "hf_not_a_reader"}), ("reader", {"token": "hf_a_reader"})):
        for way in ("streaming", "downloaded"):
            world.forget()
            found = world.outcome(load=load, is_downloaded=way == "downloaded")
            told[f"{name} {way}"] = (found.texts == list(world.texts), found.error)
    return told


def test_gated_dataset_says_how_to_log_in_and_where_to_ask(tmp_path):
    told = ask(gates, tmp_path)
    for way in ("streaming", "downloaded"):
        assert told[f"reader {way}"] == [True, None]
        for who in ("none", "other"):
            error = told[f"{who} {way}"][1]
            assert error["type"] == "AccessError"
            for part in ("hf auth login", "HF_TOKEN", 'load={"token"', f"/datasets/{NAME}"):
                assert part in error["message"], error["message"]
            assert error["data"]["page"].endswith(f"/datasets/{NAME}")
            assert "endpoint" not in error["data"]
            assert "hf_not_a_reader" not in json.dumps(error)


def streams(world: World) -> list[Any]:
    """What is read front to back, and files that rows name, through faults at random."""
    from support_hub import json_rows, write_json
    from support_parquet import jpeg

    from shmloader.sources import make_plan, open_reader
    from shmloader.sources.base import SourceRequest

    _hurry()
    write_json(world.hub.root / "org" / "lines" / "train.jsonl", 0, 300)
    (world.hub.root / "org" / "lines" / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype: int64\n"
        "  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: 300\n---\n"
    )
    for i in range(12):
        path = world.hub.root / "org" / "loose" / "train" / ("cat" if i % 2 else "dog") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    kinds = [Fault(s, times=None) for s in (500, 503)] + [
        Fault(429, BUSY, times=None),
        *(Fault(end=end, after=after, times=None) for end in ("cut", "reset") for after in (None, 10, 300)),
    ]
    told = []
    for name in ("org/lines", "org/loose"):
        world.forget()
        world.hub.faults.at_random(7, 0.4, *kinds)
        request = SourceRequest(name, "train", source_timeout_s=60.0)
        plan = make_plan(request)
        reader = open_reader(request, plan)
        rows = [row for chunk in plan.chunks for _, part in reader.read(chunk) for row in part.to_pylist()]
        told.append((plan.mode, len(rows)))
        if name == "org/lines":
            assert rows == json_rows(0, 300)
        else:
            assert sorted(row["image"]["bytes"] for row in rows) == sorted(jpeg(i) for i in range(12))
    return told


def test_streams_and_loose_files_come_whole_through_faults_at_random(tmp_path):
    assert ask(streams, tmp_path) == [["sequential", 300], ["remote files", 12]]


def downloads(world: World) -> dict[str, Any]:
    """The second file cannot be had, while the first one stalls for longer than anybody waits."""
    from support_parquet import write_texts

    folder = world.hub.root / NAME
    (folder / "README.md").unlink()
    write_texts(folder, ["more"] * 10, name="train-00001.parquet")
    world.hub.faults.add(
        Fault(end="stall", after=100, path=r"00000\.parquet", method="GET", times=None),
        Fault(404, path=r"00001\.parquet", method="GET", times=None),
    )
    found = world.outcome(is_downloaded=True, source_timeout_s=60.0)
    return {"error": found.error, "took_s": found.took_s}


def test_download_that_fails_waits_for_no_other(tmp_path):
    told = ask(downloads, tmp_path)
    assert told["error"] is not None
    assert told["took_s"] < 20  # not those 60 s


def test_host_that_does_not_resolve_is_given_up_in_time(tmp_path: Path):
    from hub import Hub
    from support_hub import ask as ask_hub

    hub = Hub(tmp_path, endpoint="http://no-such-host.invalid")
    found = ask_hub(hub, "org/texts", tmp_path, source_timeout_s=0.5)
    assert found.error["data"]["endpoint"] == "http://no-such-host.invalid"
    assert "cannot be reached" in found.message


@pytest.mark.parametrize("status", [401, 404])
def test_answer_that_no_other_try_changes_is_asked_for_once(tmp_path, status):
    told = ask({401: unknown_token, 404: unknown_name}[status], tmp_path)
    assert told["type"] == "DatasetNotFoundError"
    assert told["count"] == 1


def unknown_token(world: World) -> dict[str, Any]:
    world.hub.token = "hf_right"
    return _refused(world, load={"token": "hf_wrong"})


def unknown_name(world: World) -> dict[str, Any]:
    import shutil

    shutil.rmtree(world.hub.root / NAME)
    return _refused(world)


def _refused(world: World, **asked: Any) -> dict[str, Any]:
    found = world.outcome(**asked)
    assert found.error is not None
    heads = [path for method, path, _ in world.hub.requests if method == "HEAD" and path.endswith("README.md")]
    return {"type": found.error["type"], "count": len(heads)}
