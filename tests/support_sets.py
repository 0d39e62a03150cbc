"""For tests of whole sets: small data, scripts, and what is to be seen of the processes of a set."""

from __future__ import annotations

import fcntl
import io
import os
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from shmloader.files import RingFiles, format_set
from shmloader.ring import Ring
from shmloader.sizes import Sizes
from shmloader.writer import Stamp, Writer

TESTS = Path(__file__).parent

# ---- data --------------------------------------------------------------------------------------------


def write_numbers(folder: Path, num_rows: int, rows_per_chunk: int = 16) -> str:
    """A dataset with the column ``number``: 0, 1, 2, …, in chunks of ``rows_per_chunk``."""
    return write_table(folder, {"number": list(range(num_rows))}, rows_per_chunk)


def write_table(folder: Path, columns: dict[str, Any], rows_per_chunk: int = 16) -> str:
    """A dataset of one Parquet file, its row groups of ``rows_per_chunk`` rows; returns the folder's name."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "train-00000-of-00001.parquet", row_group_size=rows_per_chunk)
    return str(folder)


def write_pictures(folder: Path, num_rows: int, bad: Sequence[int] = (), rows_per_chunk: int = 16) -> str:
    """A dataset of PNGs and labels; those of the rows ``bad`` are not images."""
    images = [b"not an image" if i in bad else png(i) for i in range(num_rows)]
    features = '{"info": {"features": {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}}}'
    rows = [{"bytes": data, "path": None} for data in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind), "label": list(range(num_rows))})
    folder.mkdir(parents=True, exist_ok=True)
    table = table.replace_schema_metadata({"huggingface": features})
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=rows_per_chunk)
    return str(folder)


def png(seed: int) -> bytes:
    """A small picture of one colour."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), seed % 256, np.uint8)).save(file, "PNG")
    return file.getvalue()


def number(row: dict[str, Any]) -> dict[str, Any]:
    """A `process`: the number."""
    return {"number": row["number"]}


class Gate:
    """A place where any number of processes wait until it is opened, once: a FIFO that has no writer before.

    It stays open as long as this object lives, or until `close`.
    """

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._fd = -1
        os.mkfifo(path)

    def open(self) -> None:
        """Let all pass, those that wait and those that come later."""
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        """Those that come later wait for ever."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()


def wait_at(gate: str) -> None:
    """Return once the `Gate` with this path is open."""
    os.close(os.open(gate, os.O_RDONLY))


def gated(gate: Gate | str, first_row: int, one_waits: bool = False) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A `process`: the number; rows from ``first_row`` on only once the gate is open.

    one_waits: only one prefetcher at a time waits there, so that the others go on with all rows but what that one has.
    """
    path = gate if isinstance(gate, str) else gate.path

    def process(row: dict[str, Any]) -> dict[str, Any]:
        if row["number"] >= first_row:
            with open(path + ".turn", "a") as turn:  # noqa: PTH123
                try:
                    fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB if one_waits else fcntl.LOCK_SH)
                except BlockingIOError:
                    return {"number": row["number"]}
                wait_at(path)
        return {"number": row["number"]}

    return process


# ---- waiting -----------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], Any], seconds: float = 40) -> Any:
    """The first true value of ``condition``; fails when there was none for ``seconds``, which are only a watchdog."""
    until = time.monotonic() + seconds
    pause = threading.Event()
    while not (value := condition()):
        if time.monotonic() > until:
            raise AssertionError(f"waited {seconds} s in vain for {condition}")
        pause.wait(0.005)
    return value


def wait_for_end(pid: int, seconds: float = 40) -> None:
    """Return once process ``pid`` has ended."""
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            assert select.select([fd], [], [], seconds)[0], f"process {pid} did not end in {seconds} s"
        finally:
            os.close(fd)


# ---- processes ---------------------------------------------------------------------------------------


@contextmanager
def marked() -> Iterator[Callable[[], list[int]]]:
    """A function that tells the living processes that were started in this block, by whomever."""
    name, value = "SHMLOADER_TEST_MARK", uuid.uuid4().hex
    before = os.environ.get(name)
    os.environ[name] = value
    mark = f"{name}={value}".encode()
    try:
        yield lambda: [pid for pid in _pids() if mark in _proc(pid, "environ").split(b"\0")]
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def roles(pids: Sequence[int]) -> dict[str, list[int]]:
    """The services among ``pids``: role → pids."""
    found: dict[str, list[int]] = {}
    for pid in pids:
        words = _proc(pid, "cmdline").split(b"\0")
        if len(words) > 2 and words[1].endswith(b"shmloader/prefetch/boot.py"):
            found.setdefault(words[2].decode(), []).append(pid)
    return found


def services(pids: Sequence[int]) -> list[int]:
    """The services among ``pids``."""
    return [pid for found in roles(pids).values() for pid in found]


def supervisor_of(dataset: Any) -> int:
    """The supervisor's pid."""
    return wait_until(lambda: roles(dataset.stats().service_pids).get("supervisor"))[0]


def prefetchers_of(dataset: Any) -> list[int]:
    """The prefetchers' pids (attached ones)."""
    return roles(dataset.stats().service_pids).get("prefetcher", [])


def kill(*pids: int, sig: int = signal.SIGKILL) -> None:
    """Send ``sig`` to each; those that are gone already are left out."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, sig)


def modules(pid: int) -> str:
    """The files that process ``pid`` has mapped, a line each."""
    return _proc(pid, "maps").decode()


def left_in_shm(before: set[str], pids: Sequence[int]) -> set[str]:
    """What ``pids`` left in /dev/shm since ``before``; other processes of the machine use it too."""
    new = names("/dev/shm") - before
    return {name for name in new if "shmloader" in name or any(f"_{pid}_" in name for pid in pids)}


def names(folder: str) -> set[str]:
    """What is in ``folder``."""
    return {path.name for path in Path(folder).iterdir()}


def descriptors() -> dict[str, str]:
    """The open descriptors of this process: number → what it is."""
    found = {}
    for fd in names("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
    return found


def _pids() -> list[int]:
    return [int(name) for name in names("/proc") if name.isdigit()]


def _proc(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or somebody else's
        return b""


# ---- scripts -----------------------------------------------------------------------------------------


@contextmanager
def script(folder: Path, source: str, *args: str, **kwargs: Any) -> Iterator[subprocess.Popen[str]]:
    """A Python script at work, with pipes; killed at the end of the block."""
    path = folder / "script.py"
    path.write_text(source)
    found_at = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": found_at, **kwargs.pop("env", {})}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs.pop("pipes", {})}
    command = [sys.executable, *kwargs.pop("flags", []), str(path), *args]
    with subprocess.Popen(command, text=True, env=env, **pipes, **kwargs) as process:
        try:
            yield process
        finally:
            process.kill()


def run_script(folder: Path, source: str, *args: str, seconds: float = 55, **kwargs: Any) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a Python script."""
    with script(folder, source, *args, **kwargs) as process:
        out, err = process.communicate(timeout=seconds)
        return process.returncode, out, err


# ---- rings without services ---------------------------------------------------------------------------


@contextmanager
def ring_files(
    num_rows: int = 8,
    rows_per_chunk: int = 4,
    resident_bytes: int = 1 << 20,
    transit_bytes: int = 0,
    raw_bytes: int = 1 << 20,
    units: Sequence[int] | None = None,
    spill_bytes: int = 0,
) -> Iterator[RingFiles]:
    """The files of a set that has no services; each chunk is a unit of its own unless ``units`` says otherwise."""
    files = RingFiles.create()
    try:
        chunks = [(first, min(rows_per_chunk, num_rows - first)) for first in range(0, num_rows, rows_per_chunk)]
        sizes = Sizes(resident_bytes, transit_bytes, raw_bytes, raw_bytes)
        units = range(len(chunks)) if units is None else units
        format_set(files, sizes, num_rows, chunks, units, spill_bytes=spill_bytes)
        yield files
    finally:
        files.close()


def put(ring: Ring | Writer, row: int, data: bytes, stamp: Stamp | None = None, urgent: bool = False) -> None:
    """Commit ``data`` as the record of ``row``. Raises as `Writer.reserve`."""
    writer = ring if isinstance(ring, Writer) else Writer(ring)
    ticket = writer.reserve(row, len(data), stamp, urgent)
    assert ticket is not None
    writer.record_of(ticket)[: len(data)] = data
    writer.commit(ticket)


def read(ring: Ring, row: int, num_bytes: int, timeout_s: float = 30) -> bytes:
    """The first bytes of the record of ``row``, which is kept while they are copied; waits for it."""
    refs = ring.get_many([row], timeout_s)
    return bytes(refs.record(0)[:num_bytes])


def in_child(work: Callable[[], None]) -> int:
    """The pid of a forked child that does ``work`` and ends with 0, or with 1 if it raised."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def join(pid: int, seconds: float = 40) -> int:
    """The exit status of a forked child (negative: the signal that ended it)."""
    wait_for_end(pid, seconds)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
