"""Folders of loose files: their rows come from listing them."""

from __future__ import annotations

import gc
import json
import os
import random
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import SIDE, opened
from datasets import Audio, Image, load_dataset
from hub import Hub, serve
from support_files import json_lines, png, read_rows, rows_of, wav, with_files, write_tree
from support_parquet import DATA, read_file, run

from shmloader import MultimodalConfig
from shmloader.errors import DecodeError, EmptyDatasetError, ReadError, SourceError
from shmloader.prefetch.plan import SetPlan, read_plan, write_plan
from shmloader.prefetch.plan_file import read_parts
from shmloader.sources import make_plan, open_reader
from shmloader.sources.base import SourcePlan, SourceRequest
from shmloader.sources.listing import Listing, path_of, write_listing
from shmloader.sources.media_files import MediaFiles, paths_of, with_bytes
from shmloader.sources.rows import KEPT_TABLE_BYTES, MEDIA_TYPE


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


def classes(num: int, ending: str = "png") -> dict[str, bytes]:
    """A train split of ``num`` files in two folders, and a test split of four."""
    make = png if ending == "png" else wav
    train = {f"train/{'cat' if i % 3 else 'dog'}/{i:04}.{ending}": make(i) for i in range(num)}
    return train | {f"test/{'cat' if i % 2 else 'dog'}/{i}.{ending}": make(200 + i) for i in range(4)}


def expected(folder: Path, tmp_path: Path, split: str = "train", kind: str = "image", **load: Any) -> list[dict]:
    """What ``load_dataset`` gives."""
    feature = Image(decode=False) if kind == "image" else Audio(decode=False)
    dataset = load_dataset(str(folder), split=split, cache_dir=str(tmp_path / "datasets"), **load)
    return with_files(dataset.cast_column(kind, feature).to_list())


def test_rows_labels_and_their_order_are_those_of_datasets(tmp_path):
    folder = write_tree(tmp_path / "d", classes(150))
    for split in ("train", "test"):
        plan = make_plan(SourceRequest(str(folder), split))
        assert plan.mode == "files"
        assert plan.columns.class_names == ("cat", "dog")
        assert read_rows(SourceRequest(str(folder), split), plan) == expected(folder, tmp_path, split)


def test_chunks_are_64_rows_each_a_unit_and_are_read_in_any_order(tmp_path):
    request = SourceRequest(str(write_tree(tmp_path / "d", classes(150))), "train")
    plan = make_plan(request)
    assert [(chunk.first_row, chunk.num_rows) for chunk in plan.chunks] == [(0, 64), (64, 64), (128, 22)]
    assert plan.units == (0, 1, 2)
    rows = read_rows(request, plan)
    reader = open_reader(request, plan)
    for chunk in random.Random(3).choices(plan.chunks, k=6):
        ((first, batch),) = reader.read(chunk)
        assert (first, batch.to_pylist()) == (chunk.first_row, rows[first : first + chunk.num_rows])


METADATA = {
    "csv": "file_name,text,score\na/0.png,zero,0.5\nb/1.png,one,\n2.png,two,2\n",
    "jsonl": json_lines({"text": t, "file_name": f} for f, t in (("2.png", "two"), ("a/0.png", None))),
    "nested": json_lines(
        {"pair": {"left_file_name": f, "n": n}, "file_names": ["2.png", f], "more": [n, 2]}
        for n, f in enumerate(("a/0.png", "b/1.png"))
    ),
}


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_gives_the_rows_and_their_columns(tmp_path, kind):
    ending = "csv" if kind == "csv" else "jsonl"
    files = {f"train/{name}.png": png(i) for i, name in enumerate(("a/0", "b/1", "2", "unlisted"))}
    folder = write_tree(tmp_path / "d", files | {f"train/metadata.{ending}": METADATA[kind]})
    stream = load_dataset(str(folder), split="train", streaming=True).decode(False)
    assert rows_of(folder) == [with_files(row) for row in stream]


def test_metadata_in_parquet_gives_the_rows(tmp_path):
    folder = write_tree(tmp_path / "d", {f"train/{i}.png": png(i) for i in range(3)})
    pa.parquet.write_table(
        pa.table({"file_name": ["2.png", "0.png"], "text": ["two", "zero"]}), folder / "train" / "metadata.parquet"
    )
    rows = rows_of(folder)
    assert [(row["text"], row["image"]["path"]) for row in rows] == [("two", "2.png"), ("zero", "0.png")]


def test_several_metadata_files_come_by_their_names_whatever_the_hash_seed(tmp_path):
    files: dict[str, bytes | str] = {}
    for part in "dbeac":
        files[f"train/{part}/0.png"] = png(ord(part))
        files[f"train/{part}/metadata.csv"] = f"file_name,text\n0.png,{part}\n"
    folder = write_tree(tmp_path / "d", files)
    assert [row["text"] for row in rows_of(folder)] == list("abcde")


def test_clips_are_listed_without_torchcodec(tmp_path):
    folder = write_tree(tmp_path / "d", classes(10, "wav"))
    rows = rows_of(folder)
    found = {path.name: path.read_bytes() for path in (folder / "train").rglob("*.wav")}
    assert {row["audio"]["path"]: row["audio"]["bytes"] for row in rows} == found
    assert [row["label"] for row in rows] == [0] * 6 + [1] * 4


def test_real_clips_in_folders_are_their_files_with_the_folders_as_labels():
    folder = DATA / "bezirganyan" / "LUMA"
    if not folder.is_dir():
        pytest.skip(f"no data under {DATA}")
    plan = make_plan(SourceRequest(str(folder), "train", all_columns=True))
    rows = read_rows(SourceRequest(str(folder), "train", all_columns=True), plan)
    names = sorted({path.parent.name for path in folder.rglob("*.wav")})
    files = sorted((names.index(path.parent.name), path.name, path.read_bytes()) for path in folder.rglob("*.wav"))
    assert sorted((row["label"], row["audio"]["path"], row["audio"]["bytes"]) for row in rows) == files


def test_no_file_is_opened_to_plan(tmp_path):
    folder = write_tree(tmp_path / "d", {"train/0.png": png(0), "train/metadata.csv": "file_name,text\n0.png,a\np,b\n"})
    os.mkfifo(folder / "train" / "p")  # to open it would be to wait for ever
    assert make_plan(SourceRequest(str(folder), "train")).num_rows == 2


def test_chunks_hold_fewer_files_where_these_are_large_and_one_file_may_be_larger(tmp_path):
    folder = write_tree(tmp_path / "d", {f"train/{i}.png": b"" for i in range(6)})
    for i, size in enumerate((40, 20, 40, 100, 1, 1)):
        os.truncate(folder / "train" / f"{i}.png", size << 20)
    plan = make_plan(SourceRequest(str(folder), "train"))
    assert [(chunk.first_row, chunk.num_rows) for chunk in plan.chunks] == [(0, 2), (2, 1), (3, 1), (4, 2)]
    megabytes = [num_bytes >> 20 for num_bytes in plan.chunk_bytes]
    assert megabytes == [60, 40, 100, 2]
    assert all(num_bytes <= KEPT_TABLE_BYTES for num_bytes in plan.chunk_bytes[:2])


def test_a_file_that_is_gone_costs_its_row_alone(tmp_path):
    folder = write_tree(tmp_path / "d", {f"train/{i}.png": png(i) for i in range(3)})
    request = SourceRequest(str(folder), "train")
    plan = make_plan(request)
    (folder / "train" / "1.png").unlink()
    rows = [row["image"] for row in read_rows(request, plan)]
    assert [row["bytes"] for row in rows] == [png(0), None, png(2)]
    assert rows[1]["path"] == str(folder / "train" / "1.png")


def test_archives_in_a_folder_are_read_as_a_stream(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    with zipfile.ZipFile(folder / "train.zip", "w") as archive:
        for i in range(3):
            archive.writestr(f"{i}.png", png(i))
    request = SourceRequest(str(folder), "train")
    plan = make_plan(request)
    assert plan.mode == "sequential"
    assert [row["image"]["bytes"] for row in read_rows(request, plan)] == [png(0), png(1), png(2)]


def test_files_that_are_not_read_for_the_rows_leave_their_paths(tmp_path):
    folder = write_tree(tmp_path / "d", {"train/0.mp4": b"film", "train/1.mp4": b"film"})
    assert [row["video"]["path"] for row in rows_of(folder)] == [str(folder / f"train/{i}.mp4") for i in range(2)]


def test_bad_metadata_is_a_source_error_that_says_so(tmp_path):
    files = {"train/0.png": png(0), "train/metadata.csv": "name,text\n0.png,a\n"}
    with pytest.raises(SourceError, match="file_name"):
        make_plan(SourceRequest(str(write_tree(tmp_path / "d", files)), "train"))


def test_metadata_without_rows_is_an_empty_dataset(tmp_path):
    files = {"train/0.png": png(0), "train/metadata.jsonl": "", "train/a/metadata.jsonl": '{"file_name": "x.png"}\n'}
    folder = write_tree(tmp_path / "d", files)
    load = {"filters": [("file_name", "==", "y")]}
    with pytest.raises((EmptyDatasetError, SourceError)):
        make_plan(SourceRequest(str(folder), "train", load=load))


def test_only_the_first_rows_are_read_if_no_more_are_asked_for(tmp_path):
    folder = write_tree(tmp_path / "d", classes(150))
    request = SourceRequest(str(folder), "train", is_iterable=True, max_samples=70)
    plan = make_plan(request)
    assert plan.num_rows == 70
    assert read_rows(request, plan) == read_rows(SourceRequest(str(folder), "train"))[:70]


# ---- the listing ---------------------------------------------------------------------------------------


def test_a_plan_travels_with_its_listing_which_is_read_in_place(tmp_path):
    request = SourceRequest(str(write_tree(tmp_path / "d", classes(70))), "train")
    plan = make_plan(request)
    assert json.loads(plan.to_json())["listing"] == 0  # which one it is of those that travel beside it
    fd = os.memfd_create("plan")
    write_plan(fd, SetPlan(plan, None, 1 << 20))
    layout, _, _ = read_parts(fd)
    assert layout.num_rows == 70
    found = read_plan(fd)
    os.close(fd)
    assert found.source == plan
    assert read_rows(request, found.source) == read_rows(request, plan)
    assert found.shard(3) == path_of(plan.listing, 3)
    assert found.describe(3).endswith(f"shard {path_of(plan.listing, 3)!r})")
    before = pa.total_allocated_bytes()
    listing = Listing(found.source.listing)
    assert pa.total_allocated_bytes() == before
    assert listing.rows(69, 1).num_rows == 1


def test_a_plan_without_a_listing_has_none_after_one_that_had(tmp_path):
    plan = make_plan(SourceRequest(str(write_tree(tmp_path / "d", classes(10))), "train"))
    other = SourcePlan("x", "train", "local", 0, (), (), plan.columns, plan.arrow_schema)
    fd = os.memfd_create("plan")
    for source in (plan, other):  # a second planner, after the first one was killed
        write_plan(fd, SetPlan(source, None, 1 << 20))
        assert read_plan(fd).source == source
    os.close(fd)


def test_nested_media_get_their_bytes_wherever_they_are(tmp_path):
    write_tree(tmp_path, {f"{i}": b"%d" % i for i in range(4)})
    media = [{"bytes": None, "path": str(tmp_path / str(i))} for i in range(4)]
    lists = pa.array([None, media[:2], [], [media[2], None, {"bytes": b"x", "path": "y"}]], pa.list_(MEDIA_TYPE))
    structs = pa.array([{"a": media[3], "n": 1}, None], pa.struct({"a": MEDIA_TYPE, "n": pa.int64()}))
    files = MediaFiles(SourceRequest("x", "train"))
    read = [{"bytes": b"%d" % i, "path": str(i)} for i in range(4)]
    filled = with_bytes(lists[1:], files)
    assert filled.to_pylist() == [read[:2], [], [read[2], None, {"bytes": b"x", "path": "y"}]]
    assert with_bytes(lists[:1], files).to_pylist() == [None]
    assert with_bytes(structs, files).to_pylist() == [{"a": read[3], "n": 1}, None]
    assert paths_of(lists) == ([str(tmp_path / "0"), str(tmp_path / "1"), str(tmp_path / "2"), "y"], [1, 1, 3, 3])
    for kind in (pa.list_(MEDIA_TYPE, 2), pa.large_list(MEDIA_TYPE)):
        assert with_bytes(pa.array([media[:2], None], kind), files).to_pylist() == [read[:2], None]


# ---- a whole set ---------------------------------------------------------------------------------------


def test_a_set_of_loose_files_tells_of_which_file_a_sample_could_not_be_made(tmp_path):
    folder = write_tree(tmp_path / "d", classes(100))
    (folder / "train" / "cat" / "0010.png").write_bytes(b"not a picture")
    config = MultimodalConfig(vision_dim=SIDE, image_dtype="uint8")
    with opened(str(folder), config=config) as dataset:
        assert len(dataset) == 100
        paths = [path_of(dataset._reader.plan.source.listing, i) for i in range(len(dataset))]
        bad = next(i for i, path in enumerate(paths) if path.endswith("0010.png"))
        with pytest.raises(DecodeError, match=r"0010\.png") as caught:
            dataset[bad]
        assert caught.value.shard == str(folder / "train" / "cat" / "0010.png")
        for i in (0, bad + 2, 99):
            value = int(paths[i][-8:-4])
            assert dataset[i]["image"].shape == (3, SIDE, SIDE)
            assert dataset[i]["image"][0].unique().tolist() == [value]
            assert int(dataset[i]["labels"]) == (0 if "/cat/" in paths[i] else 1)


# ---- on a Hub ------------------------------------------------------------------------------------------

PLAN = """
import sys
from shmloader.sources import make_plan
from shmloader.sources.base import SourceRequest
plan = make_plan(SourceRequest(sys.argv[1], "train"))
open(sys.argv[2], "w").write(plan.to_json())
open(sys.argv[2] + ".listing", "wb").write(plan.listing)
"""
READ = """
import os, sys
import pyarrow as pa
from shmloader.errors import ReadError
from shmloader.sources import open_reader
from shmloader.sources.base import SourcePlan, SourceRequest
listing = pa.py_buffer(open(sys.argv[2] + ".listing", "rb").read())
plan = SourcePlan.from_json(open(sys.argv[2]).read(), [listing])
touched = []
seconds = float(os.environ.get("SOURCE_TIMEOUT_S", 30))
reader = open_reader(SourceRequest(sys.argv[1], "train", source_timeout_s=seconds), plan, lambda: touched.append(1))
try:
    batches = [batch for chunk in plan.chunks for _, batch in reader.read(chunk)]
except ReadError as error:
    open(sys.argv[3], "w").write(str(error))
else:
    with pa.OSFile(sys.argv[3], "wb") as sink, pa.ipc.new_stream(sink, plan.schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    assert len(touched) >= plan.num_rows - 1
reader.close()
heavy = {"datasets", "torch"} & set(sys.modules)
assert not heavy, heavy
os._exit(0)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve(tmp_path / "hub") as running:
        yield running


def test_files_on_a_hub_are_listed_without_their_contents_and_fetched_one_by_one(hub, tmp_path):
    folder = write_tree(tmp_path / "hub" / "org" / "pets", classes(70))
    home = {"HF_ENDPOINT": hub.endpoint}
    run(PLAN, ["org/pets", tmp_path / "plan"], tmp_path, **home)
    assert hub.num_bytes == 0
    assert len(hub.requests) < 40  # and not one or more a file
    plan = SourcePlan.from_json(
        (tmp_path / "plan").read_text(), [pa.py_buffer((tmp_path / "plan.listing").read_bytes())]
    )
    assert (plan.mode, plan.num_rows, plan.revision) == ("remote files", 70, hub.commit("org/pets"))
    assert plan.num_bytes == sum(path.stat().st_size for path in (folder / "train").rglob("*.png"))
    hub.reset()
    gone = folder / "train" / "cat" / "0001.png"
    data = gone.read_bytes()
    gone.rename(tmp_path / "away")
    # The commit of this Hub is one of names and sizes: it must stay, as that of a real one that lost an object.
    commit, hub.commit = hub.commit("org/pets"), lambda repo: plan.revision
    assert commit != plan.revision
    run(READ, ["org/pets", tmp_path / "plan", tmp_path / "rows"], tmp_path, **home)
    rows = read_file(tmp_path / "rows").to_pylist()
    wanted = expected(write_tree(tmp_path / "same", classes(70)), tmp_path)
    lost = next(i for i, row in enumerate(wanted) if row["image"]["path"] == "0001.png")
    assert rows[lost]["image"]["bytes"] is None
    assert rows[lost]["image"]["path"].endswith("/train/cat/0001.png")
    wanted[lost]["image"] = rows[lost]["image"]
    assert rows == wanted
    assert hub.num_bytes == plan.num_bytes - len(data)


def test_a_hub_that_cannot_be_reached_is_a_read_error_that_names_the_file(hub, tmp_path):
    write_tree(tmp_path / "hub" / "org" / "pets", classes(5))
    run(PLAN, ["org/pets", tmp_path / "plan"], tmp_path, HF_ENDPOINT=hub.endpoint)
    quick = {"SOURCE_TIMEOUT_S": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    run(READ, ["org/pets", tmp_path / "plan", tmp_path / "error"], tmp_path, **quick)
    told = (tmp_path / "error").read_text()
    assert "cannot read the files of rows 0 to 4" in told
    assert "/train/cat/0001.png" in told


class Refused(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"the server says {status}")
        self.status = status


def remote_rows(monkeypatch: pytest.MonkeyPatch, folder: Path, status: int) -> tuple[SourceRequest, SourcePlan]:
    """The plan of three local files whose second one is now on a server, which answers with ``status``."""

    def refuse(_: MediaFiles, path: str) -> bytes:
        raise Refused(status)

    monkeypatch.setattr(MediaFiles, "_other", refuse)
    request = SourceRequest(str(write_tree(folder, {f"train/{i}.png": png(i) for i in range(3)})), "train")
    plan = make_plan(request)
    rows = Listing(plan.listing).rows(0, 3)
    paths = [row["path"] for row in rows.column("image").to_pylist()]
    paths[1] = "https://example.org/1.png"
    column = pa.array([{"bytes": None, "path": path} for path in paths], rows.schema.field("image").type)
    rows = rows.set_column(rows.schema.get_field_index("image"), rows.schema.field("image"), column)
    return request, replace(plan, listing=write_listing([rows], rows.schema, ["image"]))


def test_a_file_that_a_server_refuses_costs_its_row_alone(monkeypatch, tmp_path):
    rows = [row["image"] for row in read_rows(*remote_rows(monkeypatch, tmp_path / "d", 403))]
    assert [row["bytes"] for row in rows] == [png(0), None, png(2)]


def test_the_error_of_a_server_names_the_file_that_failed(monkeypatch, tmp_path):
    with pytest.raises(ReadError, match=r"rows 0 to 2, among them https://example\.org/1\.png: Refused.* 500") as info:
        read_rows(*remote_rows(monkeypatch, tmp_path / "d", 500))
    assert info.value.shard == "https://example.org/1.png"
