"""Made-up rows: what they are, and that they are always the same."""

from __future__ import annotations

import io
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from support_catalog import CHOICES, LEAVES, QUESTIONS, request_of

from shmloader import MultimodalConfig, processors
from shmloader.catalog import BUILT_IN
from shmloader.errors import EmptyDatasetError, OptionError, SplitNotFoundError
from shmloader.registry import built_in
from shmloader.sources import open_reader
from shmloader.sources.base import SourcePlan, SourceRequest
from shmloader.sources.rows import MEDIA_TYPE
from shmloader.sources.synthetic import NUM_ROWS, can_make, plan_synthetic

ENTRIES = [LEAVES, QUESTIONS, CHOICES]


def rows(request: SourceRequest, chunks: slice = slice(None)) -> list[dict[str, Any]]:
    plan = plan_synthetic(request)
    reader = open_reader(request, plan)
    return [row for chunk in plan.chunks[chunks] for _, batch in reader.read(chunk) for row in batch.to_pylist()]


def test_made_up_rows_have_the_columns_and_types_of_the_dataset():
    schemas = {entry.name: plan_synthetic(request_of(entry)).schema for entry in ENTRIES}
    query = pa.struct({"plain": pa.string()})
    assert schemas == {
        "leaves": pa.schema({"image": MEDIA_TYPE, "labels": pa.int64()}),
        "questions": pa.schema({"context": pa.string(), "query": query, "clip": MEDIA_TYPE}),
        "choices": pa.schema({"query": pa.string(), "options": pa.list_(pa.string()), "correct": pa.int64()}),
    }


def test_a_made_up_source_says_so_in_its_name_and_mode():
    plan = plan_synthetic(request_of(LEAVES))
    assert (plan.name, plan.mode, plan.num_rows) == ("leaves (synthetic)", "synthetic", NUM_ROWS)
    assert plan.columns.class_names == LEAVES.class_names


def test_every_made_up_text_says_so():
    for row in rows(request_of(QUESTIONS), slice(1)) + rows(request_of(CHOICES), slice(1)):
        texts = [row["context"], row["query"]["plain"]] if "context" in row else [row["query"], *row["options"]]
        assert all(text.startswith("synthetic ") for text in texts)


def test_the_number_of_the_choice_is_one_of_the_choices():
    found = rows(request_of(CHOICES))
    assert all(0 <= row["correct"] < len(row["options"]) for row in found)
    assert {row["correct"] for row in found} == {0, 1, 2, 3}


def test_all_classes_occur_alike_also_if_there_are_more_than_rows_otherwise():
    entry = replace(LEAVES, columns={"text": "t", "labels": "labels"}, task_type="text")
    counts = Counter(row["labels"] for row in rows(request_of(entry)))
    assert set(counts) == {0, 1, 2}
    assert max(counts.values()) - min(counts.values()) <= 1
    many = replace(entry, class_names=tuple(map(str, range(1500))))
    assert {row["labels"] for row in rows(request_of(many))} == set(range(1500))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_rows_depend_on_dataset_split_and_row_alone(entry):
    first = rows(request_of(entry), slice(1))
    assert first == rows(request_of(entry), slice(1))
    assert len({str(row) for row in first}) == len(first)
    others = [request_of(entry, "test"), request_of(replace(entry, name="other"))]
    assert all(row != other for request in others for row, other in zip(first, rows(request, slice(1)), strict=True))


def test_rows_are_the_same_in_another_process():
    script = """
import hashlib, sys
sys.path[:0] = [sys.argv[1]]
from support_catalog import LEAVES, request_of
from test_synthetic import rows
print(hashlib.sha256(repr(rows(request_of(LEAVES), slice(1))).encode()).hexdigest())
"""
    import hashlib
    from pathlib import Path

    tests = str(Path(__file__).parent)
    told = subprocess.run([sys.executable, "-c", script, tests], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == hashlib.sha256(repr(rows(request_of(LEAVES), slice(1))).encode()).hexdigest()


def test_a_reader_of_made_up_rows_needs_neither_datasets_nor_the_client_of_the_hub():
    script = """
import sys
sys.path[:0] = [sys.argv[1]]
from support_catalog import QUESTIONS, request_of
from shmloader.sources import open_reader
from shmloader.sources.synthetic import plan_synthetic
request = request_of(QUESTIONS)
plan = plan_synthetic(request)
next(open_reader(request, plan).read(plan.chunks[0]))
print([name for name in ("datasets", "huggingface_hub", "httpx") if name in sys.modules])
"""
    from pathlib import Path

    tests = str(Path(__file__).parent)
    told = subprocess.run([sys.executable, "-c", script, tests], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_pictures_and_clips_are_real_ones():
    import soundfile

    picture = Image.open(io.BytesIO(rows(request_of(LEAVES), slice(1))[5]["image"]["bytes"]))
    assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (320, 240))
    samples, rate = soundfile.read(io.BytesIO(rows(request_of(QUESTIONS), slice(1))[5]["clip"]["bytes"]))
    assert rate == 16_000
    assert 8_000 <= len(samples) <= 24_000
    assert 0.1 < np.abs(samples).max() <= 1


@pytest.mark.parametrize("entry", [LEAVES, QUESTIONS], ids=lambda entry: entry.name)
def test_made_up_rows_go_through_the_processors_of_real_ones(entry):
    request = request_of(entry)
    plan = plan_synthetic(request)
    built = processors.build(plan.columns, MultimodalConfig(vision_dim=32))
    (_, batch) = next(open_reader(request, plan).read(plan.chunks[0]))
    for processor in built:
        made = processor.begin(batch)
        assert all(set(made.shapes(i)) == {field.name for field in processor.fields} for i in range(batch.num_rows))
    assert processors.schema_of(built, plan.name).task_types == (entry.task_type,)


@pytest.mark.parametrize("entry", built_in(), ids=lambda entry: entry.name)
def test_each_dataset_of_the_catalog_can_be_made_up(entry):
    request = request_of(entry)
    plan = plan_synthetic(request)
    built = processors.build(plan.columns, MultimodalConfig(vision_dim=32))
    assert processors.schema_of(built, plan.name).task_types == (entry.task_type,)
    (_, batch) = next(open_reader(request, plan).read(replace(plan.chunks[0], num_rows=8)))
    for processor in built:
        made = processor.begin(batch)
        for i in range(8):
            shapes = made.shapes(i)
            out = {f.name: np.zeros(shapes[f.name], f.numpy_dtype) for f in processor.fields if f.name in shapes}
            made.write(i, out)
            assert out


def test_a_plan_of_made_up_rows_survives_its_journey():
    plan = plan_synthetic(request_of(QUESTIONS, "train[:10%]+test[5:7]"))
    assert SourcePlan.from_json(plan.to_json()) == plan


def test_a_slice_has_the_rows_that_it_has_of_the_whole():
    entry = replace(CHOICES, columns={"text": "query"})
    whole, test = rows(request_of(entry)), rows(request_of(entry, "test"))
    assert rows(request_of(entry, "train[:95%]")) == whole[:950]
    assert rows(request_of(entry, "train[-30:]+test[3:5]")) == whole[-30:] + test[3:5]


@pytest.mark.parametrize("split", ["train[", "train[5:4%]x", "", "a b"])
def test_what_is_no_split_is_an_error(split):
    with pytest.raises(OptionError, match="the name of a split, or splits of the form"):
        plan_synthetic(request_of(LEAVES, split))


def test_a_split_that_the_dataset_never_had_is_an_error_and_not_made_up():
    (beans,) = [config for config in BUILT_IN if config.name == "beans"]
    with pytest.raises(SplitNotFoundError, match=r"no split 'trian'; it has 'train', 'validation', 'test'"):
        plan_synthetic(request_of(beans, "trian[:10]"))
    assert plan_synthetic(request_of(beans, "validation")).num_rows == 1000


def test_a_slice_without_rows_is_an_error():
    with pytest.raises(EmptyDatasetError, match="no rows"):
        plan_synthetic(request_of(LEAVES, "train[5:5]"))


def test_for_a_process_nothing_is_made_up_since_it_may_need_columns_that_nobody_knows():
    assert can_make(request_of(QUESTIONS))
    assert not can_make(request_of(QUESTIONS, all_columns=True))


def test_columns_that_the_user_names_are_made():
    request = request_of(LEAVES, columns={"image": "photo", "labels": "kind"})
    plan = plan_synthetic(request)
    assert plan.schema.names == ["photo", "kind"]
    assert plan.columns.class_names is None  # of another column than the catalog's


@pytest.mark.parametrize(
    "request_", [SourceRequest("org/unknown", "train"), request_of(LEAVES, columns={"video": "v"})], ids=["id", "role"]
)
def test_nothing_is_made_up_of_a_dataset_whose_columns_nobody_knows(request_):
    assert not can_make(request_)
