"""What the services log, in the training process's logging."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support_sets import (
    Gate,
    gated,
    in_child,
    join,
    kill,
    number,
    prefetchers_of,
    run_script,
    supervisor_of,
    wait_for_end,
    wait_until,
    write_numbers,
)
from torch.utils.data import DataLoader

from shmloader import Options, ShmMultimodalDataset, log_pipe
from shmloader.log_pipe import LogPipe
from shmloader.prefetch.service_log import MOST_BYTES, PipeHandler, encode, may_be_told

OPTIONS = Options(ring_bytes="1MiB", prefetchers=1, timeout_s=30)


class Kept(logging.Handler):
    """Keeps records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def pipe() -> Iterator[LogPipe]:
    pipe = LogPipe.make()
    yield pipe
    if pipe in log_pipe._pipes:
        pipe.close()


@pytest.fixture
def service(pipe: LogPipe) -> Iterator[logging.Logger]:
    """The logging of a service, with what it falls back to as ``other``."""
    yield from logger_of(pipe.write_fd)


def logger_of(fd: int) -> Iterator[logging.Logger]:
    logger = logging.Logger("shmloader.prefetcher")
    logger.other = Kept()  # type: ignore[attr-defined]
    logger.addHandler(PipeHandler(fd, "prefetcher", logger.other))  # type: ignore[attr-defined]
    yield logger


# ---- the pipe ----------------------------------------------------------------------------------------------


def test_a_record_comes_with_who_where_and_why(
    pipe: LogPipe, service: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    before = time.time()
    try:
        raise KeyError("gone")
    except KeyError:
        service.exception("%d %% of %s", 3, "é\N{SNOWMAN}")
    pipe.show()
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == ("shmloader.prefetcher", "ERROR", "3 % of é☃")
    assert (record.process, record.processName, record.role) == (os.getpid(), "shmloader prefetcher", "prefetcher")
    assert (record.filename, record.funcName) == ("test_log_pipe.py", "test_a_record_comes_with_who_where_and_why")
    assert before <= record.created <= time.time()
    assert "KeyError: 'gone'" in caplog.text


def test_levels_and_handlers_are_those_of_the_training_process(
    pipe: LogPipe, service: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("ERROR", "shmloader.prefetcher"):
        service.warning("not this")
        service.error("this")
        pipe.show()
    assert caplog.messages == ["this"]


@pytest.mark.parametrize(
    "text", ["x" * 10_000, "\N{SNOWMAN}" * 10_000, "\0" * 10_000, "\udc80" * 10_000, '"\\' * 9_000]
)
def test_a_record_that_is_too_long_is_cut(text: str) -> None:
    record = logging.LogRecord("n" * 5000, logging.INFO, "p" * 9000, 1, text, (), None, "f" * 9000)
    data = encode(record, "planner")
    assert len(data) <= MOST_BYTES
    assert data.count(b"\n") == 1
    assert json.loads(data)["msg"][:50] == text[:50]


def test_of_a_long_traceback_the_end_is_kept(pipe: LogPipe, service: logging.Logger, caplog: Any) -> None:
    def sink(depth: int) -> None:
        exec("x" if depth == 0 else f"sink({depth - 1})  # {'long ' * 50}", {"sink": sink})

    try:
        sink(100)
    except NameError:
        service.exception("failed")
    pipe.show()
    assert caplog.messages == ["failed"]
    assert "NameError: name 'x' is not defined" in caplog.text


def test_what_has_no_room_goes_elsewhere_and_nothing_is_shown_twice(
    pipe: LogPipe, service: Any, caplog: pytest.LogCaptureFixture
) -> None:
    num = 10_000
    for i in range(num):
        service.warning("%d %s", i, "x" * 100)
    pipe.show()
    shown = [int(message.split()[0]) for message in caplog.messages]
    elsewhere = [int(record.getMessage().split()[0]) for record in service.other.records]
    assert shown
    assert elsewhere
    assert sorted(shown + elsewhere) == list(range(num))


def test_when_nobody_reads_any_more_records_go_elsewhere(pipe: LogPipe) -> None:
    fd = os.dup(pipe.write_fd)
    try:
        for service in logger_of(fd):
            pipe.close()
            service.warning("alone")
            assert [record.getMessage() for record in service.other.records] == ["alone"]  # type: ignore[attr-defined]
    finally:
        os.close(fd)


def test_a_forked_child_shows_nothing_and_does_not_pass_for_a_reader(
    pipe: LogPipe, service: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    service.warning("its parent's")

    def work() -> None:
        log_pipe.show()
        assert caplog.records == []
        os.close(os.open(gate.path, os.O_RDONLY))

    child = in_child(work)
    fd = os.dup(pipe.write_fd)
    try:
        for late in logger_of(fd):
            pipe.close()
            assert caplog.messages == ["its parent's"]
            # The child gives its end up as soon as it runs.
            wait_until(lambda late=late: late.warning("late") or late.other.records)
    finally:
        os.close(fd)
        gate.open()
        assert join(child) == 0


def test_the_loggers_of_others_are_below_the_services(pipe: LogPipe, service: Any, caplog: Any) -> None:
    for name in ("root", "urllib3.pool", "shmloader.sources", "shmloaderx"):
        service.handle(logging.makeLogRecord({"name": name, "levelno": 40, "levelname": "ERROR", "msg": "m"}))
    pipe.show()
    names = [record.name.removeprefix("shmloader.") for record in caplog.records]
    assert names == ["prefetcher", "prefetcher.urllib3.pool", "sources", "prefetcher.shmloaderx"]


@pytest.mark.parametrize(
    ("name", "level", "is_told"),
    [
        ("httpx2", logging.INFO, False),
        ("urllib3.connectionpool", logging.DEBUG, False),
        ("httpcore.http11", logging.WARNING, True),
        ("users.own", logging.DEBUG, True),
        ("shmloader.sources", logging.DEBUG, True),
    ],
)
def test_what_libraries_say_of_signed_addresses_is_not_told(name: str, level: int, is_told: bool) -> None:
    assert may_be_told(logging.LogRecord(name, level, "", 0, "m", (), None)) == is_told


def test_a_handler_may_use_the_dataset(pipe: LogPipe, service: Any) -> None:
    found: list[str] = []

    class Curious(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())
            log_pipe.show()

    handler, logger = Curious(), logging.getLogger("shmloader")
    logger.addHandler(handler)
    try:
        for i in range(3):
            service.warning("%d", i)
        pipe.show()
    finally:
        logger.removeHandler(handler)
    assert found == ["0", "1", "2"]


def test_a_handler_may_close_the_set(pipe: LogPipe, service: Any) -> None:
    class Closing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            pipe.close()

    handler, logger = Closing(), logging.getLogger("shmloader")
    logger.addHandler(handler)
    try:
        service.warning("0")
        pipe.show()
    finally:
        logger.removeHandler(handler)
    assert pipe.read_fd == -1


def test_what_another_thread_shows_is_shown_to_the_end_when_the_set_is_closed(pipe: LogPipe, service: Any) -> None:
    is_in_handler, may_go_on = threading.Event(), threading.Event()
    found: list[str] = []

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())
            is_in_handler.set()
            assert may_go_on.wait(60)

    handler, logger = Slow(), logging.getLogger("shmloader")
    logger.addHandler(handler)
    try:
        for i in range(3):
            service.warning("%d", i)
        reader, thread = pipe.read_fd, threading.Thread(target=pipe.show)
        thread.start()
        assert is_in_handler.wait(60)
        service.warning("3")
        pipe.close()
        assert os.fstat(reader)  # else it might be another file's by now, which the thread would read from
        may_go_on.set()
        thread.join()
    finally:
        logger.removeHandler(handler)
    assert found == ["0", "1", "2", "3"]
    assert (pipe.read_fd, pipe.write_fd) == (-1, -1)


def test_a_line_that_is_no_record_ends_nothing(pipe: LogPipe, service: Any, caplog: Any) -> None:
    os.write(pipe.write_fd, b"noise\n[1]\n")
    service.warning("a record")
    pipe.show()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert caplog.messages[2] == "a record"


def test_a_service_that_is_killed_while_it_logs_leaves_whole_records(
    pipe: LogPipe, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> None:
        for service in logger_of(pipe.write_fd):
            while True:
                service.warning("x" * 3000)

    for i in range(5):
        children = [in_child(work) for _ in range(2)]
        wait_until(lambda i=i: pipe.show() and len(caplog.records) > 50 * (i + 1))
        kill(*children)
        assert [join(child) for child in children] == [-signal.SIGKILL] * 2
        pipe.show()
        assert set(caplog.messages) == {"x" * 3000}
        assert pipe._rest == b""


def test_readers_look_in_from_time_to_time(
    pipe: LogPipe, service: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(log_pipe, "_look_at", 0.0)
    monkeypatch.setattr(log_pipe.time, "monotonic", lambda: now)
    for later in (0, log_pipe.LOOK_S / 2, log_pipe.LOOK_S):
        now = 1000.0 + later
        service.warning("one more")
        log_pipe.show_if_due()
        assert len(caplog.records) == (1 if later < log_pipe.LOOK_S else 3)


# ---- whole sets ----------------------------------------------------------------------------------------------


def make(name: str, **kwargs: Any) -> ShmMultimodalDataset:
    return ShmMultimodalDataset(dataset_name=name, **{"options": OPTIONS, **kwargs})


def test_a_prefetcher_that_died_is_told_with_how_it_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    gate = Gate(tmp_path / "gate")
    with make(write_numbers(tmp_path / "d", 64), process=gated(gate, 16)) as dataset:
        victim = wait_until(lambda: prefetchers_of(dataset))[0]
        kill(victim)
        gate.open()
        assert int(dataset[63]["number"]) == 63
    told = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [record.name for record in told] == ["shmloader.supervisor"]
    assert f"process {victim} was killed by signal 9 (SIGKILL)" in told[0].getMessage()
    assert told[0].process != os.getpid()
    assert "SIGKILL" not in capfd.readouterr().err


def test_a_prefetcher_that_dies_while_idle_is_not_told_to_have_died_over_its_last_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = Options(ring_bytes=8192, window_bytes=4096, in_flight=2, ahead=2, prefetchers=1)
    commits: list[int] = []

    def is_idle() -> bool:
        commits.append(dataset.stats().commits)
        return len(commits) > 50 and len(set(commits[-50:])) == 1

    with make(write_numbers(tmp_path / "d", 512), process=number, options=options) as dataset:
        for row in (500, 17, 301):
            assert int(dataset[row]["number"]) == row
        wait_until(is_idle)
        victim = wait_until(lambda: prefetchers_of(dataset))[0]
        kill(victim)
        wait_until(lambda: dataset.stats() and any(str(victim) in record.getMessage() for record in caplog.records))
    assert not [record for record in caplog.records if "while it decoded" in record.getMessage()]


def test_each_step_is_told_at_debug_level(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = Options(ring_bytes="1MiB", prefetchers=1, timeout_s=30, log="DEBUG")
    name = write_numbers(tmp_path / "d", 64)
    with caplog.at_level("DEBUG", "shmloader"), make(name, process=number, options=options) as dataset:
        assert [int(sample["number"]) for sample in dataset] == list(range(64))
        wait_until(lambda: dataset.stats().prefetchers == 0)
    for part in ("started by process", "64 rows in 4 chunks", "the set is open", "ready after", "number int64 []"):
        assert any(part in message for message in caplog.messages), part
    assert any("chunk 3 (" in message and "16 rows" in message for message in caplog.messages)
    assert {record.role for record in caplog.records if hasattr(record, "role")} == {
        "supervisor", "planner", "prefetcher",
    }  # fmt: skip


def test_batches_of_workers_bring_what_was_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate(tmp_path / "gate")
    with make(write_numbers(tmp_path / "d", 64), process=gated(gate, 16)) as dataset:
        batches = iter(DataLoader(dataset, 4, num_workers=1, prefetch_factor=1))
        next(batches)
        kill(*wait_until(lambda: prefetchers_of(dataset)))
        gate.open()
        assert sum(len(batch["number"]) for batch in batches) == 60
        assert any("SIGKILL" in message for message in caplog.messages)
        del batches


def test_a_supervisor_that_a_worker_started_logs_to_the_training_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate, options = Gate(tmp_path / "gate"), Options(ring_bytes="1MiB", prefetchers=1, timeout_s=30, log="DEBUG")
    for i, context in enumerate(("fork", "spawn")):
        gate, caplog.handler.records[:] = Gate(tmp_path / f"gate{i}"), []
        name = write_numbers(tmp_path / "d", 64)
        with caplog.at_level("DEBUG", "shmloader"), make(name, process=gated(gate, 16), options=options) as dataset:
            loader = DataLoader(dataset, 4, num_workers=1, prefetch_factor=1, multiprocessing_context=context)
            batches = iter(loader)
            next(batches)
            victim = supervisor_of(dataset)
            kill(victim)
            wait_for_end(victim)
            gate.open()
            assert sum(len(batch["number"]) for batch in batches) == 60
            dataset.stats()
            told = {record.process for record in caplog.records if record.name == "shmloader.supervisor"}
            assert len(told) == 2
            del batches, loader


SCRIPT = """
import logging, sys
from shmloader import Options, ShmMultimodalDataset
if sys.argv[2] == "configured":
    logging.basicConfig(level="DEBUG", format="<%(name)s>", handlers=[logging.StreamHandler(sys.stdout)])
dataset = ShmMultimodalDataset(dataset_name=sys.argv[1], process=lambda row: {"number": row["number"]},
                               options=Options(ring_bytes="1MiB", prefetchers=1))
dataset[0]
if sys.argv[2] == "child":
    import multiprocessing
    def work():
        other = ShmMultimodalDataset(dataset_name=sys.argv[1], process=lambda row: {"number": row["number"] * 1},
                                     options=Options(ring_bytes="1MiB", prefetchers=1))
        other[0]
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
"""


@pytest.mark.parametrize(
    ("how", "level", "is_told"),
    [
        ("plain", "WARNING", lambda out, err: (out, err) == ("", "")),
        ("plain", "DEBUG", lambda out, err: err.count("the set is open") == 1 and out == ""),
        ("configured", "DEBUG", lambda out, err: "<shmloader.planner>" in out and "planner" not in err),
        ("child", "DEBUG", lambda out, err: err.count("the set is open") == 2),
    ],
)
def test_what_a_program_shows(tmp_path: Path, how: str, level: str, is_told: Callable[[str, str], bool]) -> None:
    """At its end as well, whatever it configured; a child of it too."""
    name = write_numbers(tmp_path / "d", 8)
    status, out, err = run_script(tmp_path, SCRIPT, name, how, env={"SHMLOADER_LOG": level})
    assert status == 0, err
    assert is_told(out, err), (out, err)
