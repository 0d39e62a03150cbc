"""Streams: iterable datasets, and files without random access."""

from __future__ import annotations

import csv
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import numpy as np
import pyarrow as pa
import pytest
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
)
from PIL import Image as PillowImage

from shmloader.errors import EmptyDatasetError, ReadError, SourceError, SplitNotFoundError
from shmloader.sources import make_plan, open_reader
from shmloader.sources.base import GUESSED_ROW_BYTES, SourcePlan, SourceRequest
from shmloader.sources.rows import stream_bytes


def picture(seed: int) -> PillowImage.Image:
    return PillowImage.fromarray(np.full((4, 4, 3), seed % 256, np.uint8))


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def pixel(row: dict[str, bytes]) -> int:
    return PillowImage.open(io.BytesIO(row["bytes"])).getpixel((0, 0))[0]


def texts(num: int) -> dict[str, list[object]]:
    return {"text": [f"text {i}" for i in range(num)], "label": list(range(num))}


def generated(num: int) -> Iterator[dict[str, object]]:
    for i in range(num):
        yield {"text": f"text {i}", "label": i}


def generated_images(num: int) -> Iterator[dict[str, object]]:
    for i in range(num):
        yield {"image": picture(i), "label": i % 2}


def read_all(request: SourceRequest, plan: SourcePlan | None = None) -> pa.Table:
    plan = plan or make_plan(request)
    # A prefetcher gets the request pickled.
    reader = open_reader(pickle.loads(cloudpickle.dumps(request)), plan)
    parts = [part for chunk in plan.chunks for part in reader.read(chunk)]
    reader.close()
    assert [first for first, _ in parts] == list(range(0, plan.num_rows, 64))
    return pa.Table.from_batches([batch for _, batch in parts], plan.schema)


def write_json(path: Path, num: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in generated(num)))
    return path


STREAMS = {
    "arrow": lambda: Dataset.from_dict(texts(150)).to_iterable_dataset(num_shards=4),
    "generator": lambda: IterableDataset.from_generator(generated, gen_kwargs={"num": 150}),
    "typed generator": lambda: IterableDataset.from_generator(
        generated, gen_kwargs={"num": 150}, features=Features(text=Value("string"), label=Value("int64"))
    ),
    "mapped": lambda: (
        Dataset.from_dict({"i": list(range(150))})
        .to_iterable_dataset()
        .map(lambda row: {"text": f"text {row['i']}", "label": row["i"]}, remove_columns=["i"])
    ),
    "batch mapped": lambda: (
        Dataset.from_dict({"i": list(range(150))})
        .to_iterable_dataset()
        .map(lambda rows: {"text": [f"text {i}" for i in rows["i"]], "label": rows["i"]}, batched=True)
    ),
    "filtered": lambda: Dataset.from_dict(texts(400)).to_iterable_dataset().filter(lambda row: row["label"] < 150),
    "numpy format": lambda: Dataset.from_dict(texts(150)).to_iterable_dataset().with_format("numpy"),
    "taken": lambda: Dataset.from_dict(texts(400)).to_iterable_dataset().take(150),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_rows_are_the_streams_rows_in_order(kind):
    request = SourceRequest(STREAMS[kind](), "train")
    plan = make_plan(request)
    assert plan.is_sequential
    assert [(chunk.first_row, chunk.num_rows) for chunk in plan.chunks] == [(0, 64), (64, 64), (128, 22)]
    assert read_all(request, plan).to_pydict() == texts(150)


def test_rows_are_counted_with_a_notice_that_says_why():
    plan = make_plan(SourceRequest(STREAMS["filtered"](), "train"))
    assert any("150 rows, counted by reading the stream once, since it is transformed" in n for n in plan.notices)


def test_shuffled_stream_gives_the_same_order_to_a_reader_that_opens_it_again():
    stream = Dataset.from_dict(texts(150)).to_iterable_dataset(num_shards=3).shuffle(seed=1, buffer_size=20)
    request = SourceRequest(stream, "train")
    table = read_all(request)
    assert table.column("label").to_pylist() == [row["label"] for row in stream]
    assert read_all(request).equals(table)


def test_all_chunks_are_one_unit_and_their_bytes_are_the_cards_or_guessed(tmp_path):
    plan = make_plan(SourceRequest(STREAMS["arrow"](), "train"))
    assert plan.units == (0, 0, 0)
    more = stream_bytes(plan.schema)
    assert plan.chunk_bytes == tuple(num * GUESSED_ROW_BYTES + more for num in (64, 64, 22))
    assert SourcePlan.from_json(plan.to_json()) == plan
    write_json(tmp_path / "train.jsonl", 100)
    (tmp_path / "README.md").write_text(card(100).replace("num_bytes: 1\n", "num_bytes: 5000\n"))
    assert make_plan(SourceRequest(str(tmp_path), "train")).chunk_bytes == (64 * 50 + more, 36 * 50 + more)


def test_next_chunk_continues_the_open_stream():
    opened: list[int] = []

    def rows() -> Iterator[dict[str, object]]:
        opened.append(1)
        yield from generated(300)

    features = Features(text=Value("string"), label=Value("int64"))
    request = SourceRequest(IterableDataset.from_generator(rows, features=features), "train")
    plan = make_plan(request)
    reader = open_reader(request, plan)
    opened.clear()
    for chunk in plan.chunks:
        list(reader.read(chunk))
    assert opened == [1]


def test_a_stream_that_is_read_from_its_front_again_is_logged(caplog: pytest.LogCaptureFixture):
    caplog.set_level("DEBUG", "shmloader.sources")
    request = SourceRequest(STREAMS["generator"](), "train", None, True)
    plan = make_plan(request)
    reader = open_reader(request, plan)
    for number in (0, 1, 0):
        assert not [record for record in caplog.messages if record.startswith("source reopened")]
        list(reader.read(plan.chunks[number]))
    reader.close()
    (told,) = [record for record in caplog.messages if record.startswith("source reopened")]
    assert told.endswith("is read from its front up to row 0; this process had read it up to row 128")


def test_jumps_forwards_and_backwards_give_the_right_rows():
    request = SourceRequest(STREAMS["arrow"](), "train")
    plan = make_plan(request)
    reader = open_reader(request, plan)
    for index in (2, 0, 2, 1, 1):
        chunk = plan.chunks[index]
        ((first, batch),) = reader.read(chunk)
        assert first == chunk.first_row
        assert batch.column("label").to_pylist() == list(range(first, first + chunk.num_rows))


@pytest.mark.parametrize("features", [Features(image=Image(), label=Value("int64")), None])
def test_pillow_images_of_a_generator_are_encoded(features):
    stream = IterableDataset.from_generator(generated_images, gen_kwargs={"num": 70}, features=features)
    table = read_all(SourceRequest(stream, "train"))
    assert [pixel(row) for row in table.column("image").to_pylist()] == list(range(70))


def test_images_that_a_map_returns_are_encoded():
    features = Features(image=Image(), label=Value("int64"))
    images = Dataset.from_dict(
        {"image": [{"bytes": png(i), "path": None} for i in range(5)], "label": [0] * 5}, features
    )
    stream = images.to_iterable_dataset().map(lambda row: {"image": row["image"].rotate(90)}, features=features)
    table = read_all(SourceRequest(stream, "train"))
    assert [pixel(row) for row in table.column("image").to_pylist()] == [0, 1, 2, 3, 4]


def test_images_stored_in_the_stream_are_not_decoded():
    features = Features(image=Image(), label=ClassLabel(names=["a"]))
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(5)]
    stream = Dataset.from_dict({"image": images, "label": [0] * 5}, features).to_iterable_dataset()
    assert read_all(SourceRequest(stream, "train")).column("image").to_pylist() == images


def test_class_names_of_a_generator_become_numbers():
    features = Features(text=Value("string"), label=ClassLabel(names=["a", "b"]))
    stream = IterableDataset.from_generator(lambda: iter([{"text": "x", "label": "b"}]), features=features)
    assert read_all(SourceRequest(stream, "train")).to_pydict() == {"text": ["x"], "label": [1]}


def test_json_lines_are_read_as_a_stream(tmp_path):
    write_json(tmp_path / "train.jsonl", 100)
    request = SourceRequest(str(tmp_path), "train")
    plan = make_plan(request)
    assert plan.mode == "sequential"
    assert any("100 rows, counted" in notice for notice in plan.notices)
    assert read_all(request, plan).to_pydict() == texts(100)


def test_single_file_of_another_format_is_a_dataset(tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(generated(70))
    assert read_all(SourceRequest(str(tmp_path / "rows.csv"), "train")).to_pydict() == texts(70)


def test_number_of_rows_comes_from_the_card_without_counting(tmp_path):
    write_json(tmp_path / "train.jsonl", 100)
    (tmp_path / "README.md").write_text(card(100))
    plan = make_plan(SourceRequest(str(tmp_path), "train"))
    assert plan.num_rows == 100
    assert not any("counted" in notice for notice in plan.notices)


@pytest.mark.parametrize("told", [90, 110])
def test_card_that_contradicts_the_stream_is_a_read_error(tmp_path, told):
    write_json(tmp_path / "train.jsonl", 100)
    (tmp_path / "README.md").write_text(card(told))
    request = SourceRequest(str(tmp_path), "train")
    with pytest.raises(ReadError, match=f"where {told} were told"):
        read_all(request)


def card(num_examples: int) -> str:
    return (
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype: int64\n"
        f"  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: {num_examples}\n"
        "  download_size: 1\n  dataset_size: 1\n---\n"
    )


def test_folder_of_images_is_a_stream_with_their_bytes_and_the_folders_as_classes(tmp_path):
    for i in range(6):
        path = tmp_path / "train" / ("cat" if i % 2 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    request = SourceRequest(str(tmp_path), "train")
    plan = make_plan(request)
    assert plan.columns.class_names == ("cat", "dog")
    table = read_all(request, plan)
    found = {pixel(row): label for row, label in zip(*table.to_pydict().values(), strict=True)}
    assert found == {0: 1, 1: 0, 2: 1, 3: 0, 4: 1, 5: 0}


def test_streaming_object_of_load_dataset_is_read(tmp_path):
    write_json(tmp_path / "train.jsonl", 100)
    stream = load_dataset(str(tmp_path), split="train", streaming=True)
    assert read_all(SourceRequest(stream, "train")).to_pydict() == texts(100)


def test_split_of_a_dict_of_streams_is_chosen_and_a_missing_one_is_an_error():
    splits = IterableDatasetDict(train=STREAMS["arrow"](), test=STREAMS["arrow"]().take(3))
    assert read_all(SourceRequest(splits, "test")).num_rows == 3
    with pytest.raises(SplitNotFoundError, match="'train', 'test'"):
        make_plan(SourceRequest(splits, "validation"))


def test_split_that_the_files_lack_is_an_error(tmp_path):
    write_json(tmp_path / "train.jsonl", 1)
    write_json(tmp_path / "test.jsonl", 1)
    with pytest.raises(SplitNotFoundError, match="'train', 'test'"):
        make_plan(SourceRequest(str(tmp_path), "validation"))


def test_stream_without_rows_is_an_error():
    with pytest.raises(EmptyDatasetError):
        make_plan(SourceRequest(STREAMS["arrow"]().filter(lambda row: False), "train"))
    with pytest.raises(EmptyDatasetError):
        make_plan(SourceRequest(IterableDataset.from_generator(generated, gen_kwargs={"num": 0}), "train"))


def test_stream_that_repeats_for_ever_is_an_error_and_not_a_hang():
    with pytest.raises(SourceError, match=r"take\(n\)"):
        make_plan(SourceRequest(STREAMS["arrow"]().repeat(None), "train"))


def test_stream_that_fails_while_read_is_a_read_error_with_the_rows_and_the_cause():
    fails: list[int] = []

    def rows() -> Iterator[dict[str, object]]:
        for row in generated(200):
            if fails and row["label"] == 100:
                raise ValueError("the disk is on fire")
            yield row

    request = SourceRequest(IterableDataset.from_generator(rows), "train")
    plan = make_plan(request)
    fails.append(1)
    reader = open_reader(request, plan)
    list(reader.read(plan.chunks[0]))
    with pytest.raises(ReadError, match=r"rows 64 to 127 .*the disk is on fire") as caught:
        list(reader.read(plan.chunks[1]))
    assert (caught.value.first_row, caught.value.num_rows) == (64, 64)
    assert isinstance(caught.value.__cause__, ValueError)


def test_stream_that_fails_while_counted_is_an_error_with_the_cause():
    def rows() -> Iterator[dict[str, object]]:
        yield {"text": "a"}
        raise ValueError("the disk is on fire")

    features = Features(text=Value("string"))
    with pytest.raises(SourceError, match="the disk is on fire"):
        make_plan(SourceRequest(IterableDataset.from_generator(rows, features=features), "train"))


def test_broken_json_is_an_error_that_says_so(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(SourceError, match="JSON"):
        make_plan(SourceRequest(str(tmp_path), "train"))
