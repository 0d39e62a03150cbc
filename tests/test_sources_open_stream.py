"""Streams of unknown length: plans without chunks, and readers of several iterations at once."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from datasets import Dataset, Features, IterableDataset, Value
from support_streams import counted, failing
from support_streams import stream_of as stream_of_numbers

from shmloader.errors import ReadError
from shmloader.sources import make_plan, open_reader
from shmloader.sources.base import Chunk, SourcePlan, SourceRequest
from shmloader.sources.patience import ServerGivenUp

NUM = 150


def request_of(stream: Any, **kwargs: Any) -> SourceRequest:
    return SourceRequest(stream, "train", None, True, is_iterable=True, **kwargs)


def reader_of(request: SourceRequest) -> Any:
    return open_reader(pickle.loads(cloudpickle.dumps(request)), make_plan(request))


def chunk(number: int, key: int = 1, epoch: int = 0, num_rows: int = 64) -> Chunk:
    return Chunk(number * 64, num_rows, 0, (key, 7, epoch, 99))


def read(reader: Any, wanted: Chunk) -> list[int]:
    """The numbers of a chunk; each row must be told by itself, and all come together."""
    told: list[Any] = []
    found = list(reader.read(wanted, lambda row: told.append(row) is None))
    rows = [row for row in told if row is not None]
    assert {row.num_rows for row in rows} <= {1}
    assert [first for first, _ in found] == ([wanted.first_row] if rows else [])
    numbers = found[0][1].column(0).to_pylist() if found else []
    if rows:
        batch, unfit = reader.plain(rows)
        assert (batch.column(0).to_pylist(), unfit) == (numbers, None)
    return numbers


STREAMS = {
    "generator": lambda: stream_of_numbers(counted, num=NUM),
    "untyped generator": lambda: IterableDataset.from_generator(counted, gen_kwargs={"num": NUM}),
    "arrow": lambda: Dataset.from_dict({"number": list(range(NUM))}).to_iterable_dataset(num_shards=4),
    "mapped": lambda: (
        Dataset.from_dict({"i": list(range(NUM))})
        .to_iterable_dataset()
        .map(lambda row: {"number": row["i"]}, remove_columns=["i"])
    ),
    "batch mapped": lambda: (
        Dataset.from_dict({"i": list(range(NUM))})
        .to_iterable_dataset()
        .map(lambda rows: {"number": rows["i"]}, batched=True, batch_size=10, remove_columns=["i"])
    ),
    "filtered": lambda: (
        Dataset.from_dict({"number": list(range(400))}).to_iterable_dataset().filter(lambda row: row["number"] < NUM)
    ),
    "numpy format": lambda: Dataset.from_dict({"number": list(range(NUM))}).to_iterable_dataset().with_format("numpy"),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_the_rows_of_a_stream_are_told_one_by_one_until_it_ends(kind: str):
    reader = reader_of(request_of(STREAMS[kind]()))
    assert [read(reader, chunk(i)) for i in range(3)] == [list(range(64)), list(range(64, 128)), list(range(128, NUM))]
    reader.close()


def test_a_stream_may_end_with_a_chunk():
    reader = reader_of(request_of(stream_of_numbers(counted, num=128)))
    assert [read(reader, chunk(i)) for i in range(3)] == [list(range(64)), list(range(64, 128)), []]


@pytest.mark.parametrize("kind", STREAMS)
def test_iterations_do_not_disturb_one_another(kind: str):
    reader = reader_of(request_of(STREAMS[kind]()))
    first = [read(reader, chunk(0, key=1)), read(reader, chunk(0, key=2)), read(reader, chunk(1, key=1))]
    assert first == [list(range(64)), list(range(64)), list(range(64, 128))]
    assert read(reader, chunk(1, key=2)) == list(range(64, 128))
    assert read(reader, chunk(2, key=1)) == read(reader, chunk(2, key=2)) == list(range(128, NUM))


def test_a_plan_of_a_stream_without_a_length_is_open_and_survives_its_text():
    plan = make_plan(request_of(STREAMS["arrow"]()))
    assert (plan.is_open, plan.num_rows, plan.chunks, plan.mode) == (True, None, (), "sequential")
    assert SourcePlan.from_json(plan.to_json()) == plan
    assert plan.first(10) == plan


def test_planning_a_stream_reads_no_row_if_it_knows_its_columns():
    def rows() -> Iterator[dict[str, Any]]:
        raise AssertionError("nobody may read it")
        yield {}

    stream = IterableDataset.from_generator(rows, features=Features(number=Value("int64")))
    assert make_plan(request_of(stream)).is_open


def test_only_as_many_rows_are_taken_from_the_stream_as_are_asked_for():
    reader = reader_of(request_of(stream_of_numbers(failing, num=100, at=70)))
    assert read(reader, chunk(0)) == list(range(64))
    assert read(reader, chunk(1, num_rows=6)) == list(range(64, 70))


def test_a_jump_backwards_opens_the_stream_again_and_rows_before_are_skipped():
    reader = reader_of(request_of(STREAMS["generator"]()))
    assert read(reader, chunk(2)) == list(range(128, NUM))
    assert read(reader, chunk(1)) == list(range(64, 128))


def test_a_stream_that_another_process_had_begun_is_logged_to_be_read_from_its_front(
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level("DEBUG", "shmloader.sources")
    reader = reader_of(request_of(STREAMS["generator"]()))
    read(reader, chunk(0, key=2))
    assert not [message for message in caplog.messages if message.startswith("source reopened")]
    read(reader, chunk(1))
    reader.close()
    (told,) = [message for message in caplog.messages if message.startswith("source reopened")]
    assert told.endswith("is read from its front up to row 64; this process had read it up to row 0")


def unreachable(num: int) -> Iterator[dict[str, int]]:
    """0, 1, … below ``num``; then the server is not reached any more."""
    yield from counted(num)
    raise ServerGivenUp("hub was given up after 30.0 s: GET it", "hub")


def test_a_server_that_is_not_reached_is_told_with_what_to_do_for_every_chunk_of_its_iteration():
    reader = reader_of(request_of(stream_of_numbers(unreachable, num=100)))
    assert read(reader, chunk(0)) == list(range(64))
    for number in (1, 2, 4, 1):
        parts = reader.read(chunk(number), lambda row: True)
        if number == 1:
            assert next(parts)[1].num_rows == 36
        with pytest.raises(ReadError, match=r"row 100\b.*was given up after.*SHMLOADER_SOURCE_TIMEOUT_S") as caught:
            next(parts)
        assert caught.value.endpoint.startswith("http")


def test_a_failure_is_told_again_for_every_later_chunk_of_its_iteration():
    reader = reader_of(request_of(stream_of_numbers(failing, num=300, at=100)))
    assert read(reader, chunk(0)) == list(range(64))
    for number, first, num_rows in ((1, 100, 28), (2, 128, 64), (4, 256, 64), (1, 100, 28)):
        parts = reader.read(chunk(number), lambda row: True)
        if number == 1:
            assert next(parts)[1].column(0).to_pylist() == list(range(64, 100))
        with pytest.raises(ReadError, match=r"row 100\b.*no number 100") as caught:
            next(parts)
        assert (caught.value.first_row, caught.value.num_rows) == (first, num_rows)
        assert "same rows" not in str(caught.value)
    assert read(reader, chunk(0, key=2)) == list(range(64))


def test_of_rows_that_are_not_what_was_promised_those_before_are_given():
    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"number": "x" if i == 70 else i} for i in range(100))

    stream = IterableDataset.from_generator(rows)
    reader = reader_of(request_of(stream))
    assert read(reader, chunk(0)) == list(range(64))
    parts = reader.read(chunk(1), lambda row: True)
    assert next(parts)[1].column(0).to_pylist() == list(range(64, 70))
    with pytest.raises(ReadError, match=r"row 70\b") as caught:
        next(parts)
    assert (caught.value.first_row, caught.value.num_rows) == (70, 58)


@pytest.mark.parametrize("most", [1, 70])
def test_no_more_is_read_than_is_needed(most: int):
    """Neither of the chunk nor on the way to it."""
    reader = reader_of(request_of(stream_of_numbers(failing, num=100, at=most)))
    told: list[Any] = []
    assert list(reader.read(chunk(1), lambda row: told.append(row) or len(told) < most)) == []
    assert [row is None for row in told] == [i < 64 for i in range(most)]


def test_a_stream_that_gives_fewer_rows_when_it_is_read_again_is_an_error(tmp_path: Path):
    def rows(mark: str) -> Iterator[dict[str, int]]:
        is_first = not Path(mark).exists()
        Path(mark).touch()
        yield from ({"number": i} for i in range(200 if is_first else 50))

    reader = reader_of(request_of(stream_of_numbers(rows, mark=str(tmp_path / "mark"))))
    assert read(reader, chunk(1)) == list(range(64, 128))
    with pytest.raises(ReadError, match=r"50 rows now, and more before.*gives the same rows"):
        read(reader, chunk(1))


def test_iterations_that_are_not_kept_begin_anew():
    reader = reader_of(request_of(STREAMS["generator"]()))
    read(reader, chunk(0, key=1))
    read(reader, chunk(0, key=2))
    reader.keep({(2, 7)})
    assert set(reader._iterations) == {(2, 7)}
    assert read(reader, chunk(0, key=1)) == list(range(64))


def test_epochs_of_a_shuffled_stream_differ_and_each_is_repeatable():
    stream = Dataset.from_dict({"number": list(range(64))}).to_iterable_dataset(num_shards=4).shuffle(3, buffer_size=20)
    reader = reader_of(request_of(stream))
    orders = [read(reader, chunk(0, key=key, epoch=key % 3)) for key in range(6)]
    assert orders[:3] == orders[3:]
    assert len({tuple(order) for order in orders}) == 3
    for epoch in range(3):
        stream.set_epoch(epoch)
        assert orders[epoch] == [row["number"] for row in stream]


# ---- the first rows of a source of known length -------------------------------------------------------


@pytest.mark.parametrize("most", [1, 63, 64, 65, 149, 150, 10**6, None])
def test_the_first_rows_of_a_loaded_dataset(most: int | None):
    dataset = Dataset.from_dict({"number": list(range(NUM))})
    request = request_of(dataset, max_samples=most)
    plan = make_plan(request)
    expected = list(range(NUM))[:most]
    assert plan.num_rows == len(expected)
    reader = open_reader(request, plan)
    found = [row["number"] for part in plan.chunks for _, batch in reader.read(part) for row in batch.to_pylist()]
    assert found == expected
    assert len(plan.units) == len(plan.chunks) == len(plan.chunk_bytes)
    assert plan.chunks[-1].first_row < len(expected)


@pytest.mark.parametrize("most", [1, 64, 100, 150])
def test_the_first_rows_of_parquet(tmp_path: Path, most: int):
    Dataset.from_dict({"number": list(range(NUM))}).to_parquet(tmp_path / "data.parquet", batch_size=40)
    request = request_of(str(tmp_path), max_samples=most)
    plan = make_plan(request)
    reader = open_reader(request, plan)
    found = [row["number"] for part in plan.chunks for _, batch in reader.read(part) for row in batch.to_pylist()]
    assert found == list(range(most))
    assert plan.num_rows == most
