"""Loaded ``datasets.Dataset`` objects, and those saved to disk."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from PIL import Image as PillowImage

from shmloader.errors import (
    ColumnError,
    DatasetNotFoundError,
    EmptyDatasetError,
    SourceError,
    SplitNotFoundError,
)
from shmloader.sources import make_plan, open_reader
from shmloader.sources.base import GUESSED_ROW_BYTES, SourcePlan, SourceRequest
from shmloader.sources.rows import stream_bytes


def png(seed: int) -> bytes:
    file = io.BytesIO()
    PillowImage.fromarray(np.full((4, 4, 3), seed % 256, np.uint8)).save(file, "PNG")
    return file.getvalue()


def texts(num: int, first: int = 0) -> Dataset:
    return Dataset.from_dict(
        {"text": [f"text {i}" for i in range(first, first + num)], "label": list(range(first, first + num))}
    )


def read_all(request: SourceRequest, plan: SourcePlan | None = None) -> pa.Table:
    plan = plan or make_plan(request)
    # A prefetcher gets the request pickled.
    reader = open_reader(pickle.loads(pickle.dumps(request)), plan)
    parts = [part for chunk in plan.chunks for part in reader.read(chunk)]
    reader.close()
    assert [first for first, _ in parts] == list(range(0, plan.num_rows, 64))
    return pa.Table.from_batches([batch for _, batch in parts], plan.schema)


def test_rows_are_the_datasets_rows_in_chunks_of_64():
    dataset = texts(150)
    plan = make_plan(SourceRequest(dataset, "train"))
    assert plan.mode == "loaded"
    assert [(chunk.first_row, chunk.num_rows) for chunk in plan.chunks] == [(0, 64), (64, 64), (128, 22)]
    assert read_all(SourceRequest(dataset, "train")).to_pydict() == dataset.to_dict()


def test_rows_come_in_the_order_of_an_indices_mapping():
    dataset = texts(200).shuffle(seed=3).select(range(10, 160))
    assert dataset._indices is not None
    assert read_all(SourceRequest(dataset, "train")).to_pydict() == dataset.to_dict()


def test_each_chunk_is_a_unit_of_its_own_and_has_its_part_of_the_bytes():
    dataset = texts(150)
    plan = make_plan(SourceRequest(dataset, "train"))
    assert plan.units == (0, 1, 2)
    more = 3 * stream_bytes(plan.schema)
    assert dataset.data.nbytes <= sum(plan.chunk_bytes) - more <= dataset.data.nbytes + 150
    assert SourcePlan.from_json(plan.to_json()) == plan


def test_bytes_of_images_that_only_name_a_file_are_guessed(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    dataset = Dataset.from_dict({"image": [str(tmp_path / "0.png")] * 3}).cast_column("image", Image())
    plan = make_plan(SourceRequest(dataset, "train"))
    assert plan.chunk_bytes == (3 * GUESSED_ROW_BYTES + stream_bytes(plan.schema),)


def test_chunks_can_be_read_in_any_order():
    request = SourceRequest(texts(300).shuffle(seed=1), "train")
    plan = make_plan(request)
    reader = open_reader(request, plan)
    for index in (4, 0, 2, 2, 1):
        chunk = plan.chunks[index]
        ((first, batch),) = reader.read(chunk)
        assert first == chunk.first_row
        expected = request.dataset[chunk.first_row : chunk.first_row + chunk.num_rows]
        assert batch.column("label").to_pylist() == expected["label"]


def test_images_are_read_undecoded():
    features = Features(image=Image(), label=ClassLabel(names=["a", "b"]))
    images = [{"bytes": png(i), "path": None} for i in range(70)]
    dataset = Dataset.from_dict({"image": images, "label": [0, 1] * 35}, features=features)
    table = read_all(SourceRequest(dataset, "train"))
    assert table.column("image").to_pylist() == images
    assert make_plan(SourceRequest(dataset, "train")).columns.class_names == ("a", "b")


def test_images_that_only_name_a_file_get_its_bytes(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    dataset = Dataset.from_dict({"image": paths}).cast_column("image", Image())
    table = read_all(SourceRequest(dataset, "train"))
    assert [row["bytes"] for row in table.column("image").to_pylist()] == [png(i) for i in range(3)]


def test_image_whose_file_is_gone_keeps_its_path_so_that_only_its_row_is_lost(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(png(i))
    dataset = Dataset.from_dict({"image": list(map(str, paths))}).cast_column("image", Image())
    request = SourceRequest(dataset, "train")
    plan = make_plan(request)
    paths[1].unlink()
    table = read_all(request, plan)
    assert table.column("image").to_pylist() == [
        {"bytes": png(0), "path": "0.png"},
        {"bytes": None, "path": str(paths[1])},
        {"bytes": png(2), "path": "2.png"},
    ]


def test_image_whose_file_cannot_be_read_keeps_its_path_so_that_only_its_row_is_lost(tmp_path):
    (tmp_path / "odd.png").mkdir()
    (tmp_path / "1.png").write_bytes(png(1))
    paths = [str(tmp_path / "odd.png"), str(tmp_path / "1.png")]
    dataset = Dataset.from_dict({"image": paths}).cast_column("image", Image())
    assert read_all(SourceRequest(dataset, "train")).column("image").to_pylist() == [
        {"bytes": None, "path": paths[0]},
        {"bytes": png(1), "path": "1.png"},
    ]


def test_only_the_needed_columns_are_read():
    dataset = texts(5).add_column("extra", ["x"] * 5)
    assert read_all(SourceRequest(dataset, "train")).column_names == ["text", "label"]


def test_format_of_the_dataset_is_ignored_with_a_notice():
    dataset = texts(5).with_format("numpy")
    plan = make_plan(SourceRequest(dataset, "train"))
    assert any("format ('numpy') is ignored" in notice for notice in plan.notices)
    assert read_all(SourceRequest(dataset, "train"), plan).num_rows == 5


def test_split_of_a_dataset_dict_is_chosen():
    splits = DatasetDict(train=texts(10), test=texts(3, first=100))
    assert read_all(SourceRequest(splits, "test")).column("label").to_pylist() == [100, 101, 102]


def test_split_that_a_dataset_dict_lacks_is_an_error_that_names_those_there_are():
    splits = DatasetDict(train=texts(10), test=texts(3))
    with pytest.raises(SplitNotFoundError, match="'train', 'test'") as caught:
        make_plan(SourceRequest(splits, "validation"))
    assert caught.value.available == ["train", "test"]


def test_dataset_without_rows_is_an_error():
    with pytest.raises(EmptyDatasetError, match="has no rows"):
        make_plan(SourceRequest(texts(5).filter(lambda row: False), "train"))


def test_dataset_without_usable_columns_is_an_error():
    with pytest.raises(ColumnError):
        make_plan(SourceRequest(Dataset.from_dict({"n": [1, 2]}), "train"))


def test_what_is_no_dataset_is_an_error():
    with pytest.raises(SourceError, match="list is not a dataset"):
        make_plan(SourceRequest([1, 2], "train"))


@pytest.mark.parametrize("is_dict", [True, False])
def test_dataset_saved_to_disk_is_read_from_there(tmp_path, is_dict):
    saved = DatasetDict(train=texts(100), test=texts(1)) if is_dict else texts(100)
    saved.save_to_disk(tmp_path / "saved")
    request = SourceRequest(str(tmp_path / "saved"), "train")
    assert make_plan(request).name == str(tmp_path / "saved")
    assert read_all(request).to_pydict() == texts(100).to_dict()


def test_files_that_load_dataset_prepared_before_are_read_from_its_cache_in_any_order(tmp_path):
    (tmp_path / "set").mkdir()
    texts(150).to_json(tmp_path / "set" / "train.jsonl")
    load = {"cache_dir": str(tmp_path / "cache")}
    request = SourceRequest(str(tmp_path / "set"), "train", load=load)
    assert make_plan(request).mode == "sequential"
    load_dataset(str(tmp_path / "set"), **load)
    plan = make_plan(request)
    assert plan.mode == "loaded"
    assert [Path(shard).suffix for shard in plan.shards] == [".arrow"]
    assert read_all(request, plan).to_pydict() == texts(150).to_dict()


def test_prepared_files_are_not_used_once_the_data_has_changed(tmp_path):
    (tmp_path / "set").mkdir()
    texts(150).to_json(tmp_path / "set" / "train.jsonl")
    load = {"cache_dir": str(tmp_path / "cache")}
    load_dataset(str(tmp_path / "set"), **load)
    texts(30).to_json(tmp_path / "set" / "train.jsonl")
    plan = make_plan(SourceRequest(str(tmp_path / "set"), "train", load=load))
    assert (plan.mode, plan.num_rows) == ("sequential", 30)


def test_damaged_saved_dataset_is_a_source_error_that_names_it(tmp_path):
    texts(100).save_to_disk(tmp_path / "saved")
    next(Path(tmp_path / "saved").glob("*.arrow")).write_bytes(b"nonsense")
    with pytest.raises(SourceError, match="saved"):
        make_plan(SourceRequest(str(tmp_path / "saved"), "train"))


def test_folder_that_is_gone_is_not_found(tmp_path):
    with pytest.raises(DatasetNotFoundError):
        make_plan(SourceRequest(str(tmp_path / "saved"), "train"))


def test_every_column_is_read_for_whole_rows():
    dataset = Dataset.from_dict({"a": [[1, 2], [3]], "b": [{"c": 1}, {"c": 2}]})
    table = read_all(SourceRequest(dataset, "train", all_columns=True))
    assert table.to_pydict() == dataset.to_dict()
