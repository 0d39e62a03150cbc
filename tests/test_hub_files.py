"""Files on a Hub: only what is asked for is read of them, and who cannot give it is not asked for long."""

from __future__ import annotations

import time
from typing import Any

from hub_faults import Fault
from hub_server import _Handler
from support_faults import NAME, TIMEOUT_S, World, ask

NUM_BYTES = 1 << 22


def _file(world: World) -> tuple[Any, str]:
    """A large file, and what opens it."""
    from shmloader.sources.hub import HubFiles

    (world.hub.root / NAME / "large.bin").write_bytes(bytes(NUM_BYTES))
    return HubFiles(world.request()), f"hf://datasets/{NAME}@{world.hub.commit(NAME)}/large.bin"


def ranges(world: World) -> list[Any]:
    files, path = _file(world)
    content = bytes(range(256)) * 4
    (world.hub.root / NAME / "large.bin").write_bytes(content + bytes(NUM_BYTES - len(content)))
    with files.open(path, NUM_BYTES) as file:
        file.seek(100)
        first = file.read(200)
        file.seek(-10, 2)
        last = file.read()
        end = (file.tell(), file.read(5), file.size())
    return [first == content[100:300], last == bytes(10), end == (NUM_BYTES, b"", NUM_BYTES), world.hub.num_bytes]


def test_only_the_bytes_that_are_asked_for_are_fetched(tmp_path):
    assert ask(ranges, tmp_path) == [True, True, True, 210]


def no_ranges(world: World) -> dict[str, Any]:
    from shmloader.sources.hub import NoRanges

    files, path = _file(world)
    parse, written = _Handler.parse_request, []

    def parse_request(self: Any) -> Any:
        parsed = parse(self)
        del self.headers["Range"]
        return parsed

    class Counting:
        """Of a body, how much was sent before the client had enough."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, data: bytes) -> int:
            for first in range(0, len(data), 1 << 14):
                self._file.write(data[first : first + (1 << 14)])
                written.append(len(data[first : first + (1 << 14)]))
            return len(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    setup = _Handler.setup

    def counted(self: Any) -> None:
        setup(self)
        self.wfile = Counting(self.wfile)

    _Handler.parse_request, _Handler.setup = parse_request, counted  # type: ignore[method-assign]
    (world.hub.root / NAME / "large.bin").write_bytes(bytes(1 << 26))
    try:
        files.read_at(path.replace(path.split("@")[1][:40], world.hub.commit(NAME)), 1 << 26, 0, 100)
    except NoRanges as error:
        return {"told": str(error), "sent": sum(written)}
    return {}


def test_whole_file_that_is_sent_for_a_range_is_not_read(tmp_path):
    told = ask(no_ranges, tmp_path)
    assert "it ignores ranges" in told["told"]
    assert told["sent"] < 1 << 25  # what the sockets' buffers took, of 64 MiB


def stalled(world: World) -> dict[str, Any]:
    from shmloader.sources.patience import ServerGivenUp

    files, path = _file(world)
    world.hub.faults.add(Fault(end="stall", after=100, path=r"large\.bin", times=None))
    began = time.monotonic()
    try:
        files.read_whole(path, NUM_BYTES)
    except ServerGivenUp as error:
        took_s = time.monotonic() - began
        return {"took_s": took_s, "told": str(error), "num_asked": len(world.hub.requests)}
    return {}


def test_loose_file_that_stalls_is_given_up_once(tmp_path):
    told = ask(stalled, tmp_path)
    assert "large.bin" in told["told"]
    # The product's own promise, and not the machine's speed: half of a second timeout is more than all else takes.
    assert TIMEOUT_S - 0.1 <= told["took_s"] < 1.5 * TIMEOUT_S + 1


def too_large(world: World) -> list[str]:
    from shmloader.sources.hub import TooLarge

    files, path = _file(world)
    told = []
    for asked, most in ((path, 1000), (f"hf://datasets/{NAME}/large.bin", NUM_BYTES - 1)):
        try:
            files.read_whole(asked, most)
        except TooLarge as error:
            told.append(str(error))
    return told


def test_file_that_is_too_large_is_not_read_to_its_end(tmp_path):
    assert ask(too_large, tmp_path) == [
        f"it has {NUM_BYTES} bytes; {most} at most can be read" for most in (1000, NUM_BYTES - 1)
    ]


def footers(world: World) -> dict[str, Any]:
    from support_parquet import write_texts

    folder = world.hub.root / NAME
    (folder / "README.md").unlink()
    for i in range(64):
        write_texts(folder, [f"more {i}"] * 10, name=f"train-{i + 1:05}.parquet")
    world.hub.faults.add(Fault(end="stall", after=2, path=r"\.parquet$", method="GET", times=None))
    found = world.outcome()
    return {"error": found.error, "took_s": found.took_s}


def test_many_files_of_a_hub_whose_bodies_stall_take_the_timeout_once(tmp_path):
    told = ask(footers, tmp_path)
    assert told["error"]["type"] == "SourceError"
    assert told["took_s"] < 2.5 * TIMEOUT_S + 5  # and not once for each 16 of them


def small_files(world: World) -> list[int]:
    """Twice, in another order each time."""
    files, _ = _file(world)
    names = [f"{i}.bin" for i in range(20)]
    for i, name in enumerate(names):
        (world.hub.root / NAME / name).write_bytes(bytes([i]) * 1000)
    commit = world.hub.commit(NAME)
    for name in (*names, *reversed(names)):
        content = files.open_whole(f"hf://datasets/{NAME}@{commit}/{name}", 1000).read()
        assert content == bytes([int(name.removesuffix(".bin"))]) * 1000
    return [world.hub.num_bytes_of(".bin"), len(files.read_at(f"hf://datasets/{NAME}@{commit}/0.bin", 0, 0, 0))]


def test_small_files_stay_however_many_they_are(tmp_path):
    assert ask(small_files, tmp_path) == [20_000, 0]
