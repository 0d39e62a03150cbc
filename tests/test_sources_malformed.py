"""Files that are empty, damaged, or compressed: what is read, and what the errors name."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
import zipfile
from pathlib import Path

import datasets
import pytest
from support_hub import json_rows

from shmloader import ShmMultimodalDataset
from shmloader.errors import DatasetNotFoundError, EmptyDatasetError, OptionError, ReadError, SourceError
from shmloader.sources import make_plan, open_reader
from shmloader.sources.base import SourceRequest

LINES = "".join(json.dumps(row) + "\n" for row in json_rows(0, 100))
CSV = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in json_rows(0, 100))
TEXT = "".join(f"{row['text']}\n" for row in json_rows(0, 100))
PACKED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")


def read_all(path: Path, **asked: object) -> list[dict[str, object]]:
    request = SourceRequest(str(path), "train", **asked)
    plan = make_plan(request)
    assert plan.mode == ("loaded" if request.is_downloaded else "sequential")
    reader = open_reader(request, plan)
    return [row for chunk in plan.chunks for _, batch in reader.read(chunk) for row in batch.to_pylist()]


@pytest.mark.parametrize("is_downloaded", [False, True])
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize(("ending", "body"), [("jsonl", LINES), ("csv", CSV), ("txt", TEXT)])
def test_compressed_files_are_read_alone_and_in_a_folder(tmp_path, ending, body, packed, is_downloaded):
    path = tmp_path / "rows" / f"train.{ending}.{packed}"
    path.parent.mkdir()
    path.write_bytes(PACKED[packed](body.encode()))
    expected = [{"text": row["text"]} if ending == "txt" else row for row in json_rows(0, 100)]
    assert read_all(path, is_downloaded=is_downloaded) == expected
    assert read_all(path.parent, is_downloaded=is_downloaded) == expected


@pytest.mark.parametrize("is_downloaded", [False, True])
def test_zip_of_files_is_read_alone_and_in_a_folder(tmp_path, is_downloaded):
    path = tmp_path / "rows" / "train.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("part.jsonl", LINES)
    assert read_all(path, is_downloaded=is_downloaded) == json_rows(0, 100)
    assert read_all(path.parent, is_downloaded=is_downloaded) == json_rows(0, 100)


def test_compressed_file_whose_package_is_not_installed_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lz4", None)
    (tmp_path / "train.jsonl.lz4").write_bytes(bytes.fromhex("04224D18") + bytes(50))
    with pytest.raises(SourceError, match="pip install lz4") as caught:
        read_all(tmp_path)
    assert caught.value.package == "lz4"


@pytest.mark.parametrize("is_downloaded", [False, True])
@pytest.mark.parametrize(
    ("name", "body", "tells"),
    [
        ("train.jsonl", (LINES + '{"text": \n' + LINES).encode(), "row 100"),
        ("train.csv", b"text,label\na,1\nb,2,3,4\nc,5\n", "line 3"),
        ("train.csv", b"text,label\na,1\n\xff\xfe,2\n", "utf-8"),
        ("train.txt", b"a\nb\n\xff\xfe\xfa\nc\n", "utf-8"),
        ("train.jsonl.gz", gzip.compress(LINES.encode())[:-200], "ended before"),
    ],
    ids=["json", "ragged csv", "csv of other bytes", "text of other bytes", "truncated"],
)
def test_malformed_file_is_an_error_that_names_it_and_the_row(tmp_path, name, body, tells, is_downloaded):
    (tmp_path / name).write_bytes(body)
    with pytest.raises(ReadError, match=tells) as caught:
        read_all(tmp_path, is_downloaded=is_downloaded)
    assert caught.value.shard.endswith(str(tmp_path / name))
    assert "data_files=" in str(caught.value)


def test_malformed_file_that_is_come_upon_while_read_is_named(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train-0.jsonl").write_text(LINES)
    (folder / "train-1.jsonl").write_text(LINES)
    request = SourceRequest(str(folder), "train")
    plan = make_plan(request)
    (folder / "train-1.jsonl").write_text(LINES[:500] + "\n{{{\n")
    reader = open_reader(request, plan)
    with pytest.raises(ReadError, match=r"train-1\.jsonl"):
        list(reader.read(plan.chunks[-1]))


@pytest.mark.parametrize("is_downloaded", [False, True])
def test_files_without_a_byte_are_an_empty_dataset(tmp_path, is_downloaded):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(EmptyDatasetError, match="empty"):
        read_all(tmp_path, is_downloaded=is_downloaded)


@pytest.mark.parametrize(("name", "other"), [("x[12]", "x1"), ("y?", "y1"), ("run*", "run-old")])
def test_a_path_that_looks_like_a_pattern_is_a_path(tmp_path, name, other):
    for text in (name, other):
        (tmp_path / text).mkdir()
        for path in (tmp_path / f"{text}.jsonl", tmp_path / text / "train.jsonl"):
            path.write_text(json.dumps({"text": text}) + "\n")
    assert read_all(tmp_path / f"{name}.jsonl") == [{"text": name}]
    assert read_all(tmp_path / name / "train.jsonl") == [{"text": name}]
    with pytest.raises(SourceError, match=r"takes this folder's path for a pattern.*Rename the folder"):
        read_all(tmp_path / name)


def test_a_damaged_zip_is_a_read_error_that_names_it(tmp_path):
    path = tmp_path / "train.zip"
    path.write_bytes(b"PK\3\4 and nothing more")
    with pytest.raises(ReadError, match=r"train\.zip' is no ZIP archive, or a damaged one") as info:
        read_all(path)
    assert info.value.shard == str(path)


def test_a_name_too_long_for_a_file_is_no_dataset():
    with pytest.raises(DatasetNotFoundError, match=r"Cannot find 'x{60}…x{20}': File name too long"):
        make_plan(SourceRequest("x" * 300, "train"))


@pytest.mark.parametrize("name", [None, "", "  "])
def test_no_name_is_an_option_error(name):
    with pytest.raises(OptionError, match="dataset_name= is needed"):
        ShmMultimodalDataset(dataset_name=name)


@pytest.mark.parametrize("name", ["zip://a.jsonl::rows.zip", "x::y.jsonl"])
def test_a_chained_path_is_an_error_that_says_so(tmp_path, name):
    (tmp_path / "x::y.jsonl").write_text(LINES)
    with pytest.raises(DatasetNotFoundError, match=r"chained paths .* are not supported"):
        make_plan(SourceRequest(name if name.startswith("zip") else str(tmp_path / name), "train"))
