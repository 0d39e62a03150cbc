"""Parquet datasets, local and on a Hub: plans and rows."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from hub import Hub, serve
from PIL import Image as PillowImage

from shmloader.errors import (
    ColumnError,
    DatasetNotFoundError,
    EmptyDatasetError,
    ReadError,
    SourceError,
    SplitNotFoundError,
    to_wire,
)
from shmloader.sources import make_plan, open_reader
from shmloader.sources.base import Reader, SourcePlan, SourceRequest
from shmloader.sources.resolve import translated
from shmloader.sources.rows import stream_bytes

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("SHMLOADER_TEST_DATA") or ROOT.parent / "shared" / "data")
FEATURES = Features(image=Image(), note=Value("string"), labels=ClassLabel(names=["x", "y"]))
TIMEOUT_S = 100

#: Run in a fresh interpreter: plan (and say so), or read with a given plan and write the rows.
PLAN = """
import json, sys
from shmloader.sources import make_plan
from shmloader.sources.base import SourceRequest
name, load, path = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
try:
    text = make_plan(SourceRequest(name, "train", load=load)).to_json()
except Exception as error:
    import traceback
    from shmloader.errors import to_wire
    text = json.dumps(to_wire(error) | {"printed": "".join(traceback.format_exception(error))})
open(path, "w").write(text)
"""
READ = """
import json, os, sys
import pyarrow as pa
from shmloader.sources import open_reader
from shmloader.sources.base import Chunk, SourcePlan, SourceRequest
name, load, path, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
plan = SourcePlan.from_json(open(path).read())
reader = open_reader(SourceRequest(name, "train", load=load), plan)
with pa.OSFile(out, "wb") as sink, pa.ipc.new_stream(sink, plan.schema) as writer:
    row = 0
    for chunk in plan.chunks:
        for first, batch in reader.read(chunk):
            assert first == row and batch.num_rows, (first, row, batch.num_rows)
            row += batch.num_rows
            writer.write_batch(batch)
reader.close()
heavy = {"datasets", "torch"} & set(sys.modules)
assert not heavy, heavy
os._exit(0)  # as a prefetcher ends: pyarrow's threads can abort an interpreter's exit
"""


def jpeg(seed: int, side: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def rows(num: int, side: int = 16, first: int = 0) -> dict[str, list[object]]:
    return {
        "image": [{"bytes": jpeg(i, side), "path": f"{i}.jpg"} for i in range(first, first + num)],
        "note": [f"note {i} " * 30 for i in range(first, first + num)],
        "labels": [i % 2 for i in range(first, first + num)],
    }


def write_images(folder: Path, sizes: dict[str, int], side: int = 16, row_group: int | None = None) -> Path:
    """A Parquet dataset as ``push_to_hub`` lays it out, without a card; ``sizes``: rows of each file."""
    first = 0
    for name, num in sizes.items():
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows(num, side, first), features=FEATURES).to_parquet(path, batch_size=row_group)
        first += num
    return folder


def write_card(folder: Path, num_examples: int) -> None:
    (folder / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  splits:\n  - name: train\n"
        f"    num_bytes: 1\n    num_examples: {num_examples}\n  download_size: 1\n  dataset_size: 1\n"
        "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
    )


def write_texts(folder: Path, texts: list[str], row_group: int = 1000, name: str = "train-00000.parquet") -> Path:
    path = folder / "data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=row_group)
    return folder


def read_all(request: SourceRequest, plan: SourcePlan) -> pa.Table:
    reader = open_reader(request, plan)
    parts = [part for chunk in plan.chunks for part in reader.read(chunk)]
    reader.close()
    firsts = [first for first, _ in parts]
    assert firsts == list(np.cumsum([0] + [batch.num_rows for _, batch in parts[:-1]]))
    return pa.Table.from_batches([batch for _, batch in parts], plan.schema)


def plan_and_read(dataset: object, split: str = "train", **more: object) -> tuple[SourcePlan, pa.Table]:
    request = SourceRequest(str(dataset), split, **more)
    plan = make_plan(request)
    return plan, read_all(request, plan)


def read_file(path: Path) -> pa.Table:
    with pa.OSFile(str(path)) as source:
        return pa.ipc.open_stream(source).read_all()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve(tmp_path / "hub") as running:
        yield running


def run(script: str, arguments: list[object], tmp_path: Path, **env: str) -> None:
    """Run ``script`` in a fresh interpreter with an empty Hub cache; it must succeed."""
    home = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "USE_TORCH": "0"}
    base = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], env=base | home | env, check=True, timeout=TIMEOUT_S
    )


def hub_plan(
    hub: Hub, name: str, tmp_path: Path, load: dict[str, object] | None = None, **env: str
) -> dict[str, object]:
    out = tmp_path / "plan.json"
    run(PLAN, [name, json.dumps(load or {}), out], tmp_path, HF_ENDPOINT=hub.endpoint, **env)
    return json.loads(out.read_text())


def hub_rows(hub: Hub, name: str, tmp_path: Path, load: dict[str, object] | None = None) -> pa.Table:
    out = tmp_path / "rows.arrow"
    arguments = [name, json.dumps(load or {}), tmp_path / "plan.json", out]
    run(READ, arguments, tmp_path, HF_ENDPOINT=hub.endpoint)
    return read_file(out)


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


def test_slice_of_a_split_is_an_error_that_says_how_to_get_one(tmp_path):
    with pytest.raises(SplitNotFoundError, match="load them with datasets"):
        make_plan(SourceRequest(str(write_texts(tmp_path, ["a"])), "train[:50%]"))


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


def test_hub_rows_are_the_local_rows_and_every_byte_is_fetched_about_once(hub, tmp_path):
    folder = write_images(hub.root / "org" / "pictures", {"train-0.parquet": 240}, side=250, row_group=60)
    num_bytes = (folder / "data" / "train-0.parquet").stat().st_size
    assert num_bytes > 8 << 20
    plan = hub_plan(hub, "org/pictures", tmp_path)
    assert plan["mode"] == "streaming"
    assert plan["revision"] == hub.commit("org/pictures")
    assert [chunk[1] for chunk in plan["chunks"]] == [60, 60, 60, 60]
    assert hub.num_bytes <= 0.02 * num_bytes
    hub.reset()
    table = hub_rows(hub, "org/pictures", tmp_path)
    assert hub.num_bytes_of(".parquet") <= 1.1 * num_bytes
    assert table.equals(plan_and_read(folder)[1])


def test_hub_fetches_only_the_needed_columns(hub, tmp_path):
    folder = write_images(hub.root / "org" / "pictures", {"train-0.parquet": 240}, side=250, row_group=60)
    num_bytes = (folder / "data" / "train-0.parquet").stat().st_size
    plan = hub_plan(hub, "org/pictures", tmp_path, {"columns": ["note", "labels"]})
    assert plan["columns"]["text"] == "note"
    hub.reset()
    table = hub_rows(hub, "org/pictures", tmp_path)
    assert table.column("note").to_pylist() == rows(240)["note"]
    assert hub.num_bytes <= 0.05 * num_bytes


def test_hub_row_group_too_large_to_buffer_is_streamed_and_fetched_about_once(hub, tmp_path):
    folder = write_images(hub.root / "org" / "pictures", {"train-0.parquet": 240}, side=250, row_group=240)
    num_bytes = (folder / "data" / "train-0.parquet").stat().st_size
    small = "import shmloader.sources.parquet_plan as p; p.KEPT_TABLE_BYTES = 3 << 20\n"
    run(small + PLAN, ["org/pictures", "{}", tmp_path / "plan.json"], tmp_path, HF_ENDPOINT=hub.endpoint)
    assert len(json.loads((tmp_path / "plan.json").read_text())["chunks"]) > 2
    hub.reset()
    small = "import shmloader.sources.parquet as p; p.STREAM_BUFFER_BYTES = 1 << 20\n"
    out = tmp_path / "rows.arrow"
    run(small + READ, ["org/pictures", "{}", tmp_path / "plan.json", out], tmp_path, HF_ENDPOINT=hub.endpoint)
    assert hub.num_bytes <= 1.1 * num_bytes
    assert len([1 for _, path, _ in hub.requests if path.endswith(".parquet")]) >= 8
    assert read_file(out).equals(plan_and_read(folder)[1])


def test_hub_files_under_8_mib_are_fetched_whole_and_once(hub, tmp_path):
    folder = hub.root / "org" / "texts"
    texts = [os.urandom(40).hex() for _ in range(4000)]
    write_texts(folder, texts[:2500], row_group=500, name="train-0.parquet")
    write_texts(folder, texts[2500:], row_group=500, name="train-1.parquet")
    hub_plan(hub, "org/texts", tmp_path)
    hub.reset()
    assert hub_rows(hub, "org/texts", tmp_path).column("text").to_pylist() == texts
    fetched = [(path.rsplit("/", 1)[1], sent) for _, path, sent in hub.requests if path.endswith(".parquet")]
    assert fetched == [(f"train-{i}.parquet", (folder / "data" / f"train-{i}.parquet").stat().st_size) for i in (0, 1)]


def test_hub_files_in_the_local_cache_are_not_fetched_again(hub, tmp_path):
    write_texts(hub.root / "org" / "texts", ["a", "b"])
    fetch = "import huggingface_hub as h; h.snapshot_download('org/texts', repo_type='dataset')"
    run(fetch, [], tmp_path, HF_ENDPOINT=hub.endpoint)
    hub.reset()
    plan = hub_plan(hub, "org/texts", tmp_path)
    assert plan["mode"] == "local"
    assert hub_rows(hub, "org/texts", tmp_path).column("text").to_pylist() == ["a", "b"]
    assert hub.num_bytes_of(".parquet") == 0


def test_dataset_prepared_before_is_read_offline(hub, tmp_path):
    write_texts(hub.root / "org" / "texts", ["a", "b"])
    prepare = "import datasets; datasets.load_dataset('org/texts')"
    run(prepare, [], tmp_path, HF_ENDPOINT=hub.endpoint)
    hub.reset()
    plan = hub_plan(hub, "org/texts", tmp_path, HF_HUB_OFFLINE="1")
    assert plan["mode"] == "loaded"
    request = SourceRequest("org/texts", "train")
    assert read_all(request, SourcePlan.from_json(json.dumps(plan))).column("text").to_pylist() == ["a", "b"]
    assert hub.requests == []


def test_hub_folder_of_images_is_a_stream_with_their_bytes(hub, tmp_path):
    for i in range(4):
        path = hub.root / "org" / "loose" / "train" / ("cat" if i % 2 else "dog") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    plan = hub_plan(hub, "org/loose", tmp_path)
    assert (plan["mode"], plan["num_rows"], plan["revision"]) == ("sequential", 4, hub.commit("org/loose"))
    assert hub.num_bytes_of(".jpg") == 0
    loose = READ.replace("assert not heavy, heavy", "")
    out = tmp_path / "rows.arrow"
    run(loose, ["org/loose", "{}", tmp_path / "plan.json", out], tmp_path, HF_ENDPOINT=hub.endpoint)
    found = {row["image"]["bytes"]: row["label"] for row in read_file(out).to_pylist()}
    assert found == {jpeg(i): 0 if i % 2 else 1 for i in range(4)}


def test_unknown_hub_dataset_is_not_found(hub, tmp_path):
    hub.root.mkdir()
    error = hub_plan(hub, "org/nothing", tmp_path)
    assert error["type"] == "DatasetNotFoundError"
    assert error["data"]["dataset"] == "org/nothing"
    assert hub.endpoint in error["message"]
    assert "no local folder" in error["message"]


@pytest.mark.parametrize("is_offline", [True, False])
def test_unreachable_hub_is_said_and_not_that_the_dataset_does_not_exist(tmp_path, is_offline):
    with serve(tmp_path) as gone:
        pass
    error = hub_plan(gone, "org/texts", tmp_path, **({"HF_HUB_OFFLINE": "1"} if is_offline else {}))
    assert error["type"] == "SourceError"
    assert "cannot be reached" in error["message"]
    assert ("HF_HUB_OFFLINE" in error["message"]) == is_offline
    assert "There is no dataset" not in error["message"]


def test_unknown_configuration_names_those_there_are(hub, tmp_path):
    write_card(write_texts(hub.root / "org" / "texts", ["a"]), 1)
    error = hub_plan(hub, "org/texts", tmp_path, {"name": "german"})
    assert error["type"] == "SourceError"
    assert "'default'" in error["message"]
    assert "load=" in error["message"]


def test_token_opens_a_private_dataset_and_is_in_no_plan_and_no_repr(tmp_path):
    token = "hf_secretsecretsecret"
    with serve(tmp_path / "hub", token) as private:
        write_texts(private.root / "org" / "texts", ["a", "b"])
        plan = hub_plan(private, "org/texts", tmp_path, {"token": token})
        assert token not in json.dumps(plan)
        table = hub_rows(private, "org/texts", tmp_path, {"token": token})
    assert table.column("text").to_pylist() == ["a", "b"]
    assert token not in repr(SourceRequest("org/texts", "train", load={"token": token}))


def test_wrong_token_is_in_no_message_and_no_traceback(tmp_path):
    token = "hf_wrongwrongwrong"
    with serve(tmp_path / "hub", "hf_right") as private:
        write_texts(private.root / "org" / "texts", ["a"])
        error = hub_plan(private, "org/texts", tmp_path, {"token": token})
    assert error["type"] == "DatasetNotFoundError"
    assert token not in json.dumps(error)


def test_token_in_the_message_of_another_library_is_blotted_out_and_its_traceback_dropped():
    token = "hf_secretsecretsecret"
    request = SourceRequest("org/texts", "train", load={"token": token})
    with pytest.raises(SourceError) as caught, translated(request, "find"):
        raise RuntimeError(f"bad header: Bearer {token}")
    assert "bad header: Bearer ***" in str(caught.value)
    assert token not in json.dumps(to_wire(caught.value))


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
