"""Each thing that can go wrong: which error it is, what it says and carries; and that nothing is left of the set.

What is refused before there is a set is in test_errors_opening.py and test_options.py.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support_leaks import Leaks
from support_sets import marked, number, write_numbers, write_pictures, write_table
from torch.utils.data import DataLoader

import shmloader.errors as errors
from shmloader import MultimodalConfig, Options, ShmMultimodalDataset, ShmMultimodalIterableDataset
from shmloader.errors import (
    ClosedError,
    ColumnError,
    DecodeError,
    OptionError,
    ProcessError,
    ReadError,
    RecordTooLargeError,
    RingTooSmallError,
    ServiceError,
    ShmloaderError,
    WaitTimeoutError,
)

BAD = 21


def options(**changes: Any) -> Options:
    return Options(**{"ring_bytes": "1MiB", "prefetchers": 1, "timeout_s": 30, **changes})


def at_bad(work: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    """A `process`: the number; ``work`` for row `BAD`."""
    return lambda row: work(row) if row["number"] == BAD else {"number": row["number"]}


def torn(folder: Path) -> str:
    """A Parquet dataset of which the second row group's pages are noise."""
    name = write_table(folder, {"number": list(range(4000))}, 2000)
    path = folder / "train-00000-of-00001.parquet"
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    begin, size = column.dictionary_page_offset or column.data_page_offset, column.total_compressed_size
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(b"\xff" * size)
    return name


def deadly() -> Iterator[dict[str, int]]:
    """A stream that ends who reads its 100th row."""
    for i in range(200):
        if i == 100:
            os._exit(7)
        yield {"number": i}


def deadly_stream(path: Path) -> Any:
    import datasets

    return datasets.IterableDataset.from_generator(deadly)


def numbers(path: Path) -> str:
    return write_numbers(path / "d", 64)


@dataclass
class Case:
    """What is wrong, and what comes of it. read: a row that is asked for; None: opening fails."""

    kind: type[Exception]
    fragments: tuple[str, ...]
    data: dict[str, Any] = field(default_factory=dict)
    name: Callable[[Path], Any] = numbers
    arguments: dict[str, Any] = field(default_factory=dict)
    read: int | None = BAD
    use: Callable[[Any], Any] | None = None
    dataset: type = ShmMultimodalDataset


ROW = (f"row {BAD} of '", "split 'train'", "train-00000-of-00001.parquet")
PLACE = {"row": BAD, "source": lambda value: value.endswith("/d"), "shard": lambda value: value.endswith(".parquet")}
DIED = (*ROW, "cannot be processed", "each of the 3 prefetch processes that tried died")


def deaths(text: str) -> dict[str, Any]:
    """Both deaths of the row alone are told."""
    return {**PLACE, "role": "prefetcher", "deaths": lambda value: len(value) == 2 and all(text in v for v in value)}


class BadTokenizer:
    def encode(self, text: str) -> list[int]:
        return [1, 999_999]


def held(lock: Any = threading.Lock()) -> Callable[..., Any]:  # noqa: B008
    """A function that cannot be pickled."""
    return lambda value: (lock, value)


class HeldTokenizer(BadTokenizer):
    def __init__(self) -> None:
        self.lock = threading.Lock()


CASES: dict[str, Case] = {
    # ---- the row ----
    "an id beyond the vocabulary": Case(
        DecodeError,
        (f"row {BAD} of '", "999999", "vocab_size"),
        {**PLACE, "field": "text"},
        name=lambda path: write_table(path / "d", {"text": ["t"] * 32}),
        arguments={"tokenizer": BadTokenizer(), "config": MultimodalConfig(vocab_size=100)},
    ),
    "an image that is none": Case(
        DecodeError,
        (*ROW, "cannot be decoded"),
        PLACE,
        name=lambda path: write_pictures(path / "d", 32, bad=[BAD]),
        arguments={"config": MultimodalConfig(vision_dim=16)},
    ),
    "a process that raises": Case(
        ProcessError,
        (*ROW, "process raised ZeroDivisionError"),
        PLACE,
        arguments={"process": at_bad(lambda row: 1 // 0)},
    ),
    "a process that returns nonsense": Case(
        ProcessError,
        (*ROW, "must return a dict", "but got list"),
        {**PLACE, "expected": "a dict of name → value", "got": "list"},
        arguments={"process": at_bad(lambda row: [1])},
    ),
    "a process that returns another dtype": Case(
        ProcessError,
        (*ROW, "must be int64 []", "but got float64 [2]"),
        {**PLACE, "field": "number", "expected": "int64 []", "got": "float64 [2]"},
        arguments={"process": at_bad(lambda row: {"number": np.zeros(2)})},
        use=lambda dataset: (dataset[0], dataset[BAD]),
    ),
    "a sample that is too large": Case(
        RecordTooLargeError,
        (*ROW, "bytes", "SHMLOADER_RING_BYTES"),
        {**PLACE, "variable": "SHMLOADER_RING_BYTES", "needed_bytes": lambda value: value > 1 << 20},
        arguments={"process": at_bad(lambda row: {"number": np.zeros(1 << 22)})},
    ),
    "a row that ends its prefetcher": Case(
        ServiceError,
        (*DIED, "ended with exit status 9", "process="),
        deaths("ended with exit status 9"),
        arguments={"process": at_bad(lambda row: os._exit(9))},
    ),
    "a row whose prefetcher is killed": Case(
        ServiceError,
        (*DIED, "was killed by signal 9 (SIGKILL)"),
        deaths("was killed by signal 9 (SIGKILL)"),
        arguments={"process": at_bad(lambda row: os.kill(os.getpid(), signal.SIGKILL))},
    ),
    "a row that crashes its decoder": Case(
        ServiceError,
        (*DIED, "was killed by signal 11 (SIGSEGV)", "What a crash prints is on stderr"),
        deaths("SIGSEGV"),
        arguments={"process": at_bad(lambda row: os.kill(os.getpid(), signal.SIGSEGV))},
    ),
    "a row for which there is no memory": Case(
        ServiceError,
        (*DIED, "there was no memory (MemoryError", "SHMLOADER_PREFETCHERS"),
        deaths("MemoryError"),
        arguments={"process": at_bad(lambda row: {"number": np.zeros(1 << 55)})},
    ),
    # ---- the source ----
    "a column that is not there": Case(
        ColumnError,
        ("'nope'", "number"),
        {"dataset": lambda value: value.endswith("/d"), "columns": lambda value: "number" in value},
        arguments={"columns": {"text": "nope"}},
        read=None,
    ),
    "a shard that cannot be read": Case(
        ReadError,
        ("train-00000-of-00001.parquet", "2000", "3999"),
        {"first_row": 2000, "num_rows": 2000, "shard": lambda value: value.endswith(".parquet")},
        name=lambda path: torn(path / "d"),
        arguments={"process": number},
        read=3000,
    ),
    "a stream that ends who reads it": Case(
        ServiceError,
        ("cannot be read", "each of the 3 prefetch processes that tried to fetch its chunk", "exit status 7"),
        {"row": lambda value: 64 <= value <= 100, "deaths": lambda value: len(value) == 3},
        name=deadly_stream,
        arguments={"process": number},
        use=list,
        dataset=ShmMultimodalIterableDataset,
    ),
    # ---- the services ----
    "nothing that moves": Case(
        WaitTimeoutError,
        (*ROW, "did not arrive", "SHMLOADER_TIMEOUT_S", "SHMLOADER_LOG=DEBUG"),
        {**PLACE, "waited_s": lambda value: value >= 0.3},
        arguments={"process": at_bad(lambda row: threading.Event().wait()), "options": options(timeout_s=0.3)},
    ),
    # ---- arguments, sizes ----
    "a process that cannot be pickled": Case(
        OptionError, ("process= cannot be sent", "lock"), {"name": "process"}, arguments={"process": held()}, read=None
    ),
    "a tokenizer that cannot be pickled": Case(
        OptionError,
        ("tokenizer= cannot be sent", "lock"),
        {"name": "tokenizer"},
        name=lambda path: write_table(path / "d", {"text": ["t"] * 8}),
        arguments={"tokenizer": HeldTokenizer()},
        read=None,
    ),
    "a ring that is too small": Case(
        RingTooSmallError,
        ("SHMLOADER_RING_BYTES=", "SHMLOADER_IN_FLIGHT"),
        {"variable": "SHMLOADER_RING_BYTES", "have_bytes": 32 << 10},
        name=lambda path: write_pictures(path / "d", 64),
        arguments={"config": MultimodalConfig(vision_dim=16), "options": options(ring_bytes="32KiB", in_flight=32)},
        read=None,
    ),
    "an index that is out of range": Case(
        IndexError, ("index 64 is out of range", "64 samples"), arguments={"process": number}, read=64
    ),
    "a closed dataset": Case(
        ClosedError,
        ("was closed",),
        {"dataset": lambda value: value.endswith("/d")},
        arguments={"process": number},
        use=lambda dataset: (dataset.close(), dataset[0]),
    ),
    "a closed iterable dataset": Case(
        ClosedError,
        ("was closed",),
        {"dataset": lambda value: value.endswith("/d")},
        arguments={"process": number},
        use=lambda dataset: (dataset.close(), next(iter(dataset))),
        dataset=ShmMultimodalIterableDataset,
    ),
}


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The first set of a process opens what stays: the batch ring, modules."""
    name = write_numbers(tmp_path_factory.mktemp("warm") / "d", 8)
    with ShmMultimodalDataset(dataset_name=name, process=number, options=options()) as first:
        first[0]


@pytest.fixture
def leaks(warm: None) -> Iterator[Leaks]:
    gc.collect()
    with marked() as kin:
        yield Leaks(kin)


def provoke(case: Case, path: Path) -> None:
    """Do what is wrong."""
    with case.dataset(dataset_name=case.name(path), **{"options": options(), **case.arguments}) as dataset:
        if case.use is not None:
            case.use(dataset)
        elif case.read is not None:
            dataset[case.read]


def provoked(case: Case, path: Path) -> ShmloaderError:
    """The error of ``case``, without what it came with."""
    with pytest.raises(case.kind) as caught:
        provoke(case, path)
    error = caught.value
    traceback_of_all(error)
    return error  # type: ignore[return-value]


def traceback_of_all(error: BaseException | None) -> None:
    """Have ``error`` and its causes keep no frames, and so no datasets."""
    while error is not None:
        error = error.with_traceback(None).__cause__ or error.__context__


@pytest.mark.parametrize("what", CASES)
def test_what_is_wrong_is_told_and_leaves_nothing(tmp_path: Path, leaks: Leaks, what: str) -> None:
    case = CASES[what]
    error = provoked(case, tmp_path)
    assert type(error) is case.kind
    for fragment in case.fragments:
        assert fragment in str(error), str(error)
    for name, wanted in case.data.items():
        found = getattr(error, name)
        assert wanted(found) if callable(wanted) else found == wanted, (name, found)
    del error
    leaks.check()


# ---- want of memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["raises", "limit"])
def test_a_row_for_which_there_was_no_memory_once_is_made_after_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    mark = str(tmp_path / "mark")

    def process(row: dict[str, Any]) -> dict[str, Any]:
        if row["number"] == BAD and not os.path.exists(mark):  # noqa: PTH110
            os.close(os.open(mark, os.O_CREAT | os.O_WRONLY))
            if how == "raises":
                raise MemoryError("none left")
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (64 << 20, 64 << 20))
            np.zeros(256 << 20, np.uint8)
        return {"number": row["number"]}

    with ShmMultimodalDataset(dataset_name=numbers(tmp_path), process=process, options=options()) as dataset:
        assert [int(sample["number"]) for sample in dataset.__getitems__(range(64))] == list(range(64))
        assert dataset.stats().restarts == 1
    assert "there was no memory (MemoryError; its log says where)" in caplog.text
    assert "ends for want of memory: " in caplog.text


def test_rows_beside_one_for_which_there_is_no_memory_are_made(tmp_path: Path) -> None:
    process = at_bad(lambda row: {"number": np.zeros(1 << 55)})
    with ShmMultimodalDataset(dataset_name=numbers(tmp_path), process=process, options=options()) as dataset:
        rows = [i for i in range(64) if i != BAD]
        assert [int(sample["number"]) for sample in dataset.__getitems__(rows)] == rows


# ---- through a worker ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.parametrize("kind", [ProcessError, ServiceError])
def test_an_error_keeps_its_attributes_through_a_worker(
    tmp_path: Path, context: str, kind: type[ShmloaderError]
) -> None:
    process = at_bad((lambda row: [1]) if kind is ProcessError else (lambda row: os._exit(1)))
    with ShmMultimodalDataset(dataset_name=numbers(tmp_path), process=process, options=options()) as dataset:
        loader = DataLoader(dataset, 4, num_workers=1, multiprocessing_context=context)
        with pytest.raises(kind) as caught:
            list(loader)
        del loader
        error = caught.value
        assert (error.row, error.source) == (BAD, dataset.name)
        assert error.shard.endswith(".parquet")
        assert "shmloader.data" not in str(error)
        assert "worker process 0" in str(error)
        if kind is ProcessError:
            assert (error.expected, error.got) == ("a dict of name → value", "list")
        else:
            assert len(error.deaths) == 2
        traceback_of_all(error)
        del caught


def test_data_that_json_does_not_know_stays_behind() -> None:
    error = DecodeError("text", row=3, thing=object())
    errors.carry_data(error)
    errors.carry_data(error)
    (note,) = error.__notes__
    again = DecodeError(f"Caught DecodeError.\nOriginal Traceback:\nDecodeError: text\n{note}\n")
    assert again.data == {"row": 3}
    assert str(again).endswith("DecodeError: text\n")


# ---- a supervisor that does not start ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("executable", "fragments"),
    [
        ("/nowhere/python", ("cannot be started", "No such file", "/nowhere/python", "ulimit -u")),
        ("/bin/false", ("died while it was starting", "SHMLOADER_LOG=DEBUG")),
    ],
)
def test_a_supervisor_that_does_not_start_is_an_error(
    tmp_path: Path, leaks: Leaks, monkeypatch: pytest.MonkeyPatch, executable: str, fragments: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(ServiceError) as caught:
        ShmMultimodalDataset(dataset_name=numbers(tmp_path), process=number, options=options())
    assert all(fragment in str(caught.value) for fragment in fragments)
    assert caught.value.role == "supervisor"
    del caught
    leaks.check()


# ---- after close ---------------------------------------------------------------------------------------------


def test_after_close_each_method_says_so_or_still_tells_what_it_knew(tmp_path: Path) -> None:
    dataset = ShmMultimodalDataset(dataset_name=numbers(tmp_path), process=number, options=options())
    dataset.close()
    for use in (
        lambda: dataset.sampler(),
        lambda: dataset.set_epoch(1),
        lambda: dataset.stats(),
        lambda: dataset[0],
        lambda: next(iter(dataset)),
        lambda: dataset.__enter__(),
    ):
        with pytest.raises(ClosedError, match="was closed"):
            use()
    assert len(dataset) == 64
    assert (dataset.name, dataset.sources[0]["rows"]) == (dataset._reader.plan.source.name, 64)
    assert "closed" in repr(dataset)
    assert dataset.collate is not None
    assert dataset.columns is not None


# ---- the tree and its document ---------------------------------------------------------------------------------


def test_every_class_is_documented_with_its_attributes() -> None:
    text = (Path(__file__).parent.parent / "docs" / "errors.md").read_text()
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ShmloaderError)]
    for kind in kinds:
        assert f"`{kind.__name__}`" in text, kind
        told = re.search(r"Attributes: ([^.]*)", kind.__doc__ or "")
        for name in re.findall(r"\b[a-z_]+\b", told[1] if told else ""):
            if "_" in name or name in ("row", "shard", "dataset", "name", "value", "expected", "got", "role", "deaths"):
                assert f"`{name}`" in text, (kind, name)


@pytest.mark.parametrize("text", ["shmloader.data: {broken\n}", 'shmloader.data: {"a": 1', "shmloader.data: [1]"])
def test_a_message_that_looks_like_carried_data_is_a_message(text: str) -> None:
    error = ShmloaderError(f"told by process:\n{text}")
    assert (str(error), error.data) == (f"told by process:\n{text}", {})
