"""Local Parquet datasets: plans and rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, Image, Value
from support_parquet import (
    DATA,
    jpeg,
    plan_and_read,
    rows,
    run,
    write_card,
    write_images,
    write_texts,
)

from shmloader.errors import (
    ColumnError,
    DatasetNotFoundError,
    EmptyDatasetError,
    ReadError,
    SourceError,
    SplitNotFoundError,
)
from shmloader.sources import make_plan, open_reader
from shmloader.sources.base import Reader, SourcePlan, SourceRequest
from shmloader.sources.rows import stream_bytes


def test_local_rows_are_the_files_rows_with_the_needed_columns_only(tmp_path):
    folder = write_images(tmp_path / "set", {"train-0.parquet": 100, "train-1.parquet": 7})
    plan, table = plan_and_read(folder)
    assert plan.mode == "local"
    assert plan.num_rows == 107
    assert table.column_names == ["image", "labels"]
    assert table.to_pydict() == {k: v for k, v in rows(107).items() if k != "note"}
    assert plan.columns.class_names == ("x", "y")
    assert plan.shard_bytes == tuple(Path(shard).stat().st_size for shard in plan.shards)


def test_row_group_is_a_chunk_and_a_unit(tmp_path):
    plan, _ = plan_and_read(write_texts(tmp_path, [str(i) for i in range(150)], row_group=100))
    assert [(c.first_row, c.num_rows, c.piece[:3]) for c in plan.chunks] == [
        (0, 100, (0, 0, 100)),
        (100, 50, (1, 0, 50)),
    ]
    assert plan.units == (0, 1)


def test_bytes_of_a_chunk_are_at_least_those_that_its_types_need(tmp_path):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": ["a"] * 10_000, "label": [7] * 10_000}), path)  # the file has each value once
    plan, table = plan_and_read(path)
    assert 10_000 * 12 <= plan.chunk_bytes[0] <= table.nbytes
    sink = pa.MockOutputStream()
    with pa.ipc.new_stream(sink, plan.schema) as stream:
        stream.write_table(pa.table({"text": ["a"], "label": [7]}))
    assert sink.size() <= stream_bytes(plan.schema)


def test_local_row_group_too_large_to_keep_is_cut_coarsely_and_read_in_bounded_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("shmloader.sources.parquet_plan.KEPT_TABLE_BYTES", 20_000)
    monkeypatch.setattr("shmloader.sources.parquet.STREAM_BATCH_BYTES", 1000)
    texts = [f"{i} " + "x" * (i % 200) for i in range(1000)]
    plan, table = plan_and_read(write_texts(tmp_path, texts, row_group=700))
    assert [chunk.num_rows for chunk in plan.chunks] == [175] * 4 + [150] * 2
    assert plan.units == (0, 0, 0, 0, 4, 4)
    assert all(10_000 < size <= 21_000 for size in plan.chunk_bytes)
    assert table.column("text").to_pylist() == texts


def cut_group(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[SourcePlan, Reader, list[str], list[int]]:
    """A row group of 1,000 texts in four pieces, and where its batches begin when they are decompressed."""
    monkeypatch.setattr("shmloader.sources.parquet_plan.KEPT_TABLE_BYTES", 9_000)
    monkeypatch.setattr("shmloader.sources.parquet.STREAM_BATCH_BYTES", 1000)
    texts = [f"{i:06} " + "x" * 20 for i in range(1000)]
    request = SourceRequest(str(write_texts(folder, texts)), "train")
    plan = make_plan(request)
    assert [chunk.num_rows for chunk in plan.chunks] == [250] * 4
    decompressed: list[int] = []
    iter_batches = pq.ParquetFile.iter_batches

    def counted(self: pq.ParquetFile, *args: object, **kwargs: object) -> Iterator[pa.RecordBatch]:
        for batch in iter_batches(self, *args, **kwargs):
            decompressed.append(int(batch.column("text")[0].as_py()[:6]))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    return plan, open_reader(request, plan), texts, decompressed


def test_next_piece_of_a_row_group_goes_on_in_the_same_stream(tmp_path, monkeypatch):
    plan, reader, texts, decompressed = cut_group(tmp_path, monkeypatch)
    for index in (0, 1, 3):  # the third is passed over
        chunk = plan.chunks[index]
        got = [text for _, batch in reader.read(chunk) for text in batch.column("text").to_pylist()]
        assert got == texts[chunk.first_row : chunk.first_row + 250]
        if index == 0:
            assert max(decompressed) < 300  # no more than is needed
    assert decompressed == sorted(set(decompressed))
    assert len(decompressed) > 20


def test_piece_before_the_last_one_begins_at_the_front_again(tmp_path, monkeypatch):
    plan, reader, texts, decompressed = cut_group(tmp_path, monkeypatch)
    for index in (2, 1, 1):
        chunk = plan.chunks[index]
        got = [text for _, batch in reader.read(chunk) for text in batch.column("text").to_pylist()]
        assert got == texts[chunk.first_row : chunk.first_row + 250]
    assert decompressed.count(0) == 3


def test_reading_of_whole_groups_between_pieces_gives_the_right_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("shmloader.sources.parquet_plan.KEPT_TABLE_BYTES", 9_000)
    texts = [f"{i:06} " + "x" * 20 for i in range(1100)]
    request = SourceRequest(str(write_texts(tmp_path, texts, row_group=1000)), "train")
    plan = make_plan(request)
    assert plan.units == (0, 0, 0, 0, 4)
    reader = open_reader(request, plan)
    for index in (0, 4, 1, 2, 4, 3):
        chunk = plan.chunks[index]
        got = [text for _, batch in reader.read(chunk) for text in batch.column("text").to_pylist()]
        assert got == texts[chunk.first_row : chunk.first_row + chunk.num_rows]


def test_each_read_touches(tmp_path, monkeypatch):
    touched: list[int] = []
    request = SourceRequest(str(write_texts(tmp_path, ["a"] * 10)), "train")
    plan = make_plan(request)
    list(open_reader(request, plan, lambda: touched.append(1)).read(plan.chunks[0]))
    assert touched


def test_chunks_can_be_read_in_any_order_and_again(tmp_path):
    texts = [f"text {i}" for i in range(500)]
    request = SourceRequest(str(write_texts(tmp_path, texts, row_group=130)), "train")
    plan = make_plan(request)
    reader = open_reader(request, plan)
    for index in np.random.default_rng(0).integers(0, len(plan.chunks), 50):
        chunk = plan.chunks[index]
        got = [text for _, batch in reader.read(chunk) for text in batch.column("text").to_pylist()]
        assert got == texts[chunk.first_row : chunk.first_row + chunk.num_rows]


def test_every_column_is_read_for_whole_rows(tmp_path):
    folder = write_images(tmp_path, {"train-0.parquet": 5})
    _, table = plan_and_read(folder, all_columns=True)
    assert table.to_pydict() == rows(5)


def test_single_parquet_file_is_a_dataset_with_a_train_split(tmp_path):
    write_texts(tmp_path, ["a", "b"])
    plan, table = plan_and_read(tmp_path / "data" / "train-00000.parquet")
    assert (plan.mode, table.column("text").to_pylist()) == ("local", ["a", "b"])


def test_class_names_stored_as_strings_become_numbers(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": ["p", "q", "r"], "label": ["b", "a", None]}), path)
    features = Features(text=Value("string"), label=ClassLabel(names=["a", "b"]))
    _, table = plan_and_read(path, load={"features": features})
    assert table.column("label").to_pylist() == [1, 0, None]


def test_images_stored_as_bare_bytes_become_bytes_and_path(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"image": pa.array([jpeg(0), None], pa.binary())}), path)
    _, table = plan_and_read(path, load={"features": Features(image=Image())})
    assert table.column("image").to_pylist() == [{"bytes": jpeg(0), "path": None}, None]


def test_files_with_other_types_for_a_column_are_read_as_the_features_say(tmp_path):
    write_texts(tmp_path, ["a"], name="train-0.parquet")
    pq.write_table(pa.table({"text": pa.array(["b"], pa.large_string())}), tmp_path / "data" / "train-1.parquet")
    pq.write_table(pa.table({"text": pa.nulls(1)}), tmp_path / "data" / "train-2.parquet")
    _, table = plan_and_read(tmp_path)
    assert table.column("text").to_pylist() == ["a", "b", None]


def test_unknown_split_is_an_error_that_names_those_there_are(tmp_path):
    write_texts(tmp_path, ["a"], name="train-0.parquet")
    write_texts(tmp_path, ["a"], name="test-0.parquet")
    with pytest.raises(SplitNotFoundError, match=r"'validation'.*'train', 'test'") as caught:
        make_plan(SourceRequest(str(tmp_path), "validation"))
    assert caught.value.available == ["train", "test"]
    assert caught.value.split == "validation"


@pytest.mark.parametrize("content", [b"", b"PAR1", b"nonsense" * 100, b"PAR1" + b"x" * 100 + b"PAR1"])
def test_file_that_is_no_parquet_is_a_read_error(tmp_path, content):
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(ReadError, match=r"train\.parquet"):
        make_plan(SourceRequest(str(tmp_path), "train"))


def test_mistyped_local_path_is_not_found_and_the_near_name_is_suggested(tmp_path):
    write_texts(tmp_path / "flowers", ["a"])
    with pytest.raises(DatasetNotFoundError, match=r"Did you mean '.*flowers'") as caught:
        make_plan(SourceRequest(str(tmp_path / "flower"), "train"))
    assert caught.value.dataset == str(tmp_path / "flower")


def test_folder_without_data_files_is_an_empty_dataset(tmp_path):
    with pytest.raises(EmptyDatasetError, match="no data files"):
        make_plan(SourceRequest(str(tmp_path), "train"))


def test_files_without_rows_are_an_empty_dataset(tmp_path):
    with pytest.raises(EmptyDatasetError, match="has no rows") as caught:
        make_plan(SourceRequest(str(write_texts(tmp_path, [])), "train"))
    assert caught.value.split == "train"


def test_files_without_rows_among_others_are_passed_over(tmp_path):
    write_texts(tmp_path, [], name="train-0.parquet")
    write_texts(tmp_path, ["a"], name="train-1.parquet")
    plan, table = plan_and_read(tmp_path)
    assert (plan.num_rows, table.num_rows) == (1, 1)


def test_truncated_file_is_a_read_error_that_names_the_shard(tmp_path):
    folder = write_texts(tmp_path, [str(i) for i in range(1000)])
    write_texts(tmp_path, ["a"], name="train-1.parquet")
    shard = folder / "data" / "train-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    write_card(folder, 1001)
    with pytest.raises(ReadError, match=r"train-00000.parquet is not a whole Parquet file") as caught:
        make_plan(SourceRequest(str(folder), "train"))
    assert caught.value.shard == str(shard)


def test_file_truncated_after_planning_is_a_read_error_with_the_rows(tmp_path):
    request = SourceRequest(str(write_texts(tmp_path, [f"{i} {i * 7}" for i in range(300)], 100)), "train")
    plan = make_plan(request)
    reader = open_reader(request, plan)
    Path(plan.shards[0]).write_bytes(Path(plan.shards[0]).read_bytes()[:500])
    with pytest.raises(ReadError, match=r"rows 100 to 199 from .*train-00000.parquet") as caught:
        list(reader.read(plan.chunks[1]))
    assert (caught.value.shard, caught.value.first_row, caught.value.num_rows) == (plan.shards[0], 100, 100)


def test_damaged_pages_are_a_read_error_with_the_rows(tmp_path):
    folder = write_texts(tmp_path, [os.urandom(20).hex() for _ in range(500)])
    request = SourceRequest(str(folder), "train")
    plan = make_plan(request)
    content = bytearray(Path(plan.shards[0]).read_bytes())
    content[4:2000] = b"\xff" * 1996
    Path(plan.shards[0]).write_bytes(content)
    with pytest.raises(ReadError, match="cannot read rows 0 to 499") as caught:
        list(open_reader(request, plan).read(plan.chunks[0]))
    assert caught.value.__cause__ is not None


def test_file_that_lacks_a_column_is_an_error_that_names_it(tmp_path):
    write_texts(tmp_path, ["a"], name="train-0.parquet")
    pq.write_table(pa.table({"other": ["b"]}), tmp_path / "data" / "train-1.parquet")
    with pytest.raises(ColumnError, match=r"train-1.parquet lacks the columns 'text'"):
        make_plan(SourceRequest(str(tmp_path), "train"))


def test_card_that_contradicts_the_files_is_an_error_with_both_numbers(tmp_path):
    write_card(write_texts(tmp_path, ["a", "b"]), 3)
    with pytest.raises(SourceError, match=r"card says 3 rows.*hold 2") as caught:
        make_plan(SourceRequest(str(tmp_path), "train"))
    assert (caught.value.expected_rows, caught.value.num_rows) == (3, 2)


def test_card_that_agrees_with_the_files_is_accepted(tmp_path):
    write_card(write_texts(tmp_path, ["a", "b"]), 2)
    assert make_plan(SourceRequest(str(tmp_path), "train")).num_rows == 2


def test_plan_survives_json(tmp_path):
    plan, _ = plan_and_read(write_images(tmp_path, {"train-0.parquet": 70}))
    assert SourcePlan.from_json(plan.to_json()) == plan


def test_importing_sources_imports_neither_datasets_nor_the_hub_client(tmp_path):
    check = "import sys, shmloader.sources; assert not {'datasets', 'huggingface_hub', 'torch'} & set(sys.modules)"
    run(check, [], tmp_path)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real datasets are not at {DATA}; set SHMLOADER_TEST_DATA")
@pytest.mark.parametrize(
    ("name", "split", "column", "num_rows"),
    [
        ("AI-Lab-Makerere/beans", "train", "image", 240),
        ("openai/gsm8k", "test", "question", 1319),
        ("garage-bAInd/Open-Platypus", "train", "instruction", 4975),
        ("yizhongw/self_instruct", "train", "instruction", 252),
        ("code-rag-bench/mbpp", "train", "text", 500),
        ("openai/openai_humaneval", "test", "prompt", 164),
    ],
)
def test_real_dataset_rows_are_its_files_rows(name, split, column, num_rows):
    plan, table = plan_and_read(DATA / name, split)
    assert plan.num_rows == num_rows
    reference = pa.concat_tables([pq.read_table(shard, columns=[column]) for shard in plan.shards])
    assert table.column(column).to_pylist() == reference.column(column).to_pylist()
