"""Arrow files on this machine: mapped, and read in any order."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value, load_dataset
from support_files import png, read_rows, rows_of, with_files, write_tree
from support_parquet import run

from shmloader.errors import EmptyDatasetError, ReadError
from shmloader.sources import make_plan, open_reader
from shmloader.sources.arrow import check_offsets
from shmloader.sources.base import SourceRequest

FEATURES = Features(
    text=Value("string"), image=Image(), label=ClassLabel(names=["a", "b"]), pair=List({"n": Value("int32")})
)


def rows(num: int, first: int = 0) -> dict[str, list[object]]:
    numbers = range(first, first + num)
    return {
        "text": [None if i % 17 == 5 else f"text {i}" for i in numbers],
        "image": [{"bytes": png(i), "path": f"{i}.png"} for i in numbers],
        "label": [i % 2 for i in numbers],
        "pair": [[{"n": i}] * (i % 3) for i in numbers],
    }


def write_arrow(path: Path, table: pa.Table, form: str, rows_per_batch: int = 50, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    make = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)
    return path


def table_of(num: int, first: int = 0) -> pa.Table:
    return Dataset.from_dict(rows(num, first), features=FEATURES).data.table


def reference(folder: Path) -> list[dict[str, object]]:
    stream = load_dataset(str(folder), split="train", streaming=True)
    return [with_files(row) for row in stream.decode(False)]


@pytest.mark.parametrize("form", ["stream", "file"])
def test_rows_are_those_of_datasets_in_both_formats(tmp_path, form):
    for i, num in enumerate((130, 3, 64)):
        write_arrow(tmp_path / "d" / f"train-{i}.arrow", table_of(num, 200 * i), form)
    plan = make_plan(SourceRequest(str(tmp_path / "d"), "train"))
    assert (plan.mode, plan.num_rows) == ("arrow", 197)
    assert [(chunk.num_rows, chunk.shard) for chunk in plan.chunks] == [(64, 0), (64, 0), (2, 0), (3, 1), (64, 2)]
    assert rows_of(tmp_path / "d") == reference(tmp_path / "d")
    assert plan.columns.class_names == ("a", "b")


def test_a_single_file_is_a_dataset_and_its_chunks_are_read_in_any_order(tmp_path):
    path = write_arrow(tmp_path / "x.arrow", table_of(300), "file")
    request = SourceRequest(str(path), "train")
    plan = make_plan(request)
    expected = read_rows(request, plan)
    reader = open_reader(request, plan)
    for chunk in random.Random(1).choices(plan.chunks, k=8):
        ((first, batch),) = reader.read(chunk)
        assert batch.to_pylist() == expected[first : first + chunk.num_rows]


def test_rows_are_read_in_place_and_without_datasets(tmp_path):
    path = write_arrow(tmp_path / "x.arrow", table_of(100), "stream", 100)
    request = SourceRequest(str(path), "train", all_columns=True)
    plan = make_plan(request)
    (tmp_path / "plan").write_text(plan.to_json())
    script = f"""
import sys, os
import pyarrow as pa
from shmloader.sources import open_reader
from shmloader.sources.base import SourcePlan, SourceRequest
plan = SourcePlan.from_json(open(sys.argv[1]).read())
before = pa.total_allocated_bytes()
reader = open_reader(SourceRequest({str(path)!r}, "train", all_columns=True), plan)
batches = [batch for chunk in plan.chunks for _, batch in reader.read(chunk)]
assert sum(batch.num_rows for batch in batches) == 100
assert pa.total_allocated_bytes() - before < 4096, pa.total_allocated_bytes() - before
assert not {{"datasets", "torch"}} & set(sys.modules)
"""
    run(script, [tmp_path / "plan"], tmp_path)
    assert "datasets" in sys.modules


def test_compressed_files_are_read_as_a_stream(tmp_path):
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    write_arrow(tmp_path / "d" / "train.arrow", table_of(100), "file", options=options)
    plan = make_plan(SourceRequest(str(tmp_path / "d"), "train"))
    assert plan.mode == "sequential"
    assert rows_of(tmp_path / "d") == reference(tmp_path / "d")


def test_files_whose_types_differ_are_converted_as_datasets_does(tmp_path):
    write_arrow(tmp_path / "d" / "train-0.arrow", pa.table({"text": ["a"], "label": pa.array([1], pa.int64())}), "file")
    write_arrow(tmp_path / "d" / "train-1.arrow", pa.table({"text": ["b"], "label": pa.array([2], pa.int8())}), "file")
    assert rows_of(tmp_path / "d") == [{"text": "a", "label": 1}, {"text": "b", "label": 2}]


def test_features_that_are_given_hold(tmp_path):
    write_arrow(tmp_path / "x.arrow", pa.table({"text": ["a", "b"], "label": ["x", "y"]}), "file")
    features = Features(text=Value("string"), label=ClassLabel(names=["y", "x"]))
    request = SourceRequest(str(tmp_path / "x.arrow"), "train", load={"features": features})
    assert [row["label"] for row in read_rows(request)] == [1, 0]
    assert make_plan(request).columns.class_names == ("y", "x")


def test_images_that_only_name_a_file_get_its_bytes(tmp_path):
    write_tree(tmp_path, {"0.png": png(0), "1.png": png(1)})
    images = [{"bytes": None, "path": str(tmp_path / f"{i}.png")} for i in (0, 1, 2)]
    table = Dataset.from_dict({"image": images}, features=Features(image=Image())).data.table
    path = write_arrow(tmp_path / "x.arrow", table, "stream")
    found = [row["image"] for row in rows_of(path)]
    assert found[:2] == [{"bytes": png(i), "path": f"{i}.png"} for i in (0, 1)]
    assert found[2] == images[2]


@pytest.mark.parametrize("form", ["stream", "file"])
@pytest.mark.parametrize("what", ["cut short", "nonsense", "empty"])
def test_a_damaged_file_is_a_read_error_that_names_it(tmp_path, form, what):
    write_arrow(tmp_path / "d" / "train-0.arrow", table_of(10), form)
    path = write_arrow(tmp_path / "d" / "train-1.arrow", table_of(300), form)
    whole = path.read_bytes()
    path.write_bytes({"cut short": whole[: len(whole) // 2], "nonsense": b"nonsense" * 99, "empty": b""}[what])
    with pytest.raises(ReadError, match=r"train-1\.arrow") as caught:
        make_plan(SourceRequest(str(tmp_path / "d"), "train"))
    assert caught.value.shard == str(path)


def test_a_file_that_became_shorter_is_a_read_error_with_the_rows(tmp_path):
    path = write_arrow(tmp_path / "x.arrow", table_of(300), "stream")
    request = SourceRequest(str(path), "train")
    plan = make_plan(request)
    write_arrow(path, table_of(100), "stream")
    reader = open_reader(request, plan)
    list(reader.read(plan.chunks[0]))
    with pytest.raises(ReadError, match=r"rows 64 to 127 .*36 rows are there") as caught:
        list(reader.read(plan.chunks[1]))
    assert (caught.value.first_row, caught.value.num_rows) == (64, 64)


def test_files_without_rows_are_an_empty_dataset(tmp_path):
    path = write_arrow(tmp_path / "x.arrow", table_of(1)[:0], "file")
    with pytest.raises(EmptyDatasetError):
        make_plan(SourceRequest(str(path), "train"))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_binary(), pa.list_(pa.int8()), pa.list_(pa.string())])
def test_offsets_that_point_outside_are_found_before_they_are_followed(kind):
    inner = "xy" if not pa.types.is_list(kind) else [1, 2] if kind.value_type == pa.int8() else ["x", "y"]
    good = pa.array([inner] * 10, pa.string() if pa.types.is_large_binary(kind) else kind).cast(kind)
    check_offsets(good)
    check_offsets(good[3:7])
    buffers, wide = good.buffers(), np.int64 if pa.types.is_large_binary(kind) else np.int32
    offsets = np.frombuffer(buffers[1], wide).copy()
    offsets[5] = 10_000
    children = [good.values] if pa.types.is_list(kind) else []
    data = [] if children else buffers[2:]
    bad = pa.Array.from_buffers(kind, 10, [None, pa.py_buffer(offsets), *data], children=children)
    check_offsets(bad[:4])
    for array in (bad, pa.StructArray.from_arrays([bad], ["a"])):
        with pytest.raises(pa.ArrowInvalid, match="point outside"):
            check_offsets(array)
