"""Images and audio that rows only name: their files' bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import zipfile

import pyarrow as pa
import pytest
from datasets import Audio, Features, Image, List, Value
from hub import serve

from shmloader.sources.base import SourceRequest
from shmloader.sources.media_files import MediaFiles, embed_media
from shmloader.sources.rows import MEDIA_TYPE

FILES = MediaFiles(SourceRequest("here", "train"))


def named(*paths):
    return pa.array([None if path is None else {"bytes": None, "path": str(path)} for path in paths], MEDIA_TYPE)


@pytest.fixture
def files(tmp_path):
    made = [tmp_path / f"{i}.bin" for i in range(3)]
    for i, path in enumerate(made):
        path.write_bytes(bytes([i]) * 5)
    return made


@pytest.mark.parametrize("feature", [Image(), Audio()])
def test_files_are_read_and_what_has_bytes_is_left(files, feature):
    column = pa.array(
        [{"bytes": b"own", "path": str(files[0])}, {"bytes": None, "path": str(files[1])}, None], MEDIA_TYPE
    )
    touched = []
    batch = embed_media(
        pa.record_batch({"it": column}),
        Features(it=feature),
        MediaFiles(SourceRequest("here", "train"), lambda: touched.append(1)),
    )
    assert len(touched) == 1
    assert batch.column("it").to_pylist() == [
        {"bytes": b"own", "path": str(files[0])},
        {"bytes": bytes([1]) * 5, "path": "1.bin"},
        None,
    ]


def test_a_batch_that_names_no_file_is_handed_on_as_it_is():
    batch = pa.record_batch({"it": pa.array([{"bytes": b"x", "path": None}, None], MEDIA_TYPE)})
    assert embed_media(batch, Features(it=Image()), FILES) is batch


def test_media_inside_structs_are_read_and_null_structs_stay(files):
    kind = pa.struct([("deep", pa.struct([("photo", MEDIA_TYPE)])), ("n", pa.int64())])
    rows = [{"deep": {"photo": {"bytes": None, "path": str(files[2])}}, "n": 1}, None, {"deep": None, "n": 3}]
    features = Features(it={"deep": {"photo": Image()}, "n": Value("int64")})
    batch = embed_media(pa.record_batch({"it": pa.array([None, *rows], kind).slice(1)}), features, FILES)
    found = batch.column("it").to_pylist()
    assert found[0] == {"deep": {"photo": {"bytes": bytes([2]) * 5, "path": "2.bin"}}, "n": 1}
    assert found[1] is None
    assert found[2] == {"deep": None, "n": 3}


def test_other_columns_of_the_same_make_are_no_media(files):
    features = Features(it={"bytes": Value("binary"), "path": Value("string")})
    batch = pa.record_batch({"it": named(files[0])})
    assert embed_media(batch, features, FILES) is batch


def test_a_file_in_an_archive_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("sub/a.png", b"pixels")
    column = named(f"zip://sub/a.png::{tmp_path / 'all.zip'}")
    batch = embed_media(pa.record_batch({"it": column}), Features(it=Image()), FILES)
    assert batch.column("it").to_pylist()[0]["bytes"] == b"pixels"


def test_a_local_file_that_cannot_be_read_costs_its_row_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(b"pixels")
    batch = embed_media(pa.record_batch({"it": named(tmp_path, tmp_path / "a.png")}), Features(it=Image()), FILES)
    rows = batch.column("it").to_pylist()
    assert rows == [{"bytes": None, "path": str(tmp_path)}, {"bytes": b"pixels", "path": "a.png"}]


def test_a_file_in_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no archive")
    path = f"zip://a.png::{tmp_path / 'a.zip'}"
    with pytest.raises(OSError, match=r"cannot read the file 'zip://a\.png::.*BadZipFile"):
        embed_media(pa.record_batch({"it": named(path)}), Features(it=Image()), FILES)


def test_media_inside_lists_are_read(files):
    column = pa.array([named(*files[:2]).to_pylist(), [], None, named(files[2]).to_pylist()], pa.list_(MEDIA_TYPE))
    batch = embed_media(pa.record_batch({"it": column}), Features(it=List(Image())), FILES)
    found = batch.column("it").to_pylist()
    assert [None if row is None else [item["bytes"] for item in row] for row in found] == [
        [bytes([0]) * 5, bytes([1]) * 5],
        [],
        None,
        [bytes([2]) * 5],
    ]


def test_files_that_are_not_local_are_read_several_at_once(monkeypatch):
    together = threading.Barrier(4, timeout=30)

    def read(self, path):
        together.wait()
        return path.encode()

    monkeypatch.setattr(MediaFiles, "_other", read)
    paths = [f"https://somewhere/{i}.png" for i in range(8)]
    batch = embed_media(pa.record_batch({"it": named(*paths)}), Features(it=Image()), FILES)
    assert [row["bytes"].decode() for row in batch.column("it").to_pylist()] == paths


EMBED = """
import json, sys
import pyarrow as pa
from datasets import Audio, Features
from shmloader.sources.base import SourceRequest
from shmloader.sources.media_files import MediaFiles, embed_media
from shmloader.sources.rows import MEDIA_TYPE
column = pa.array([{"bytes": None, "path": path} for path in json.loads(sys.argv[1])], MEDIA_TYPE)
request = SourceRequest("org/name", "train", load={"token": "hf_secret"})
batch = embed_media(pa.record_batch({"it": column}), Features(it=Audio()), MediaFiles(request))
print(json.dumps([[row["bytes"] and row["bytes"].hex(), row["path"]] for row in batch.column("it").to_pylist()]))
"""


def test_files_of_a_hub_are_read_with_the_token_and_one_that_is_missing_is_left(tmp_path):
    folder = tmp_path / "root" / "org" / "name"
    folder.mkdir(parents=True)
    for i in range(5):
        (folder / f"{i}.wav").write_bytes(bytes([i]) * 9)
    with serve(tmp_path / "root", token="hf_secret") as hub:
        paths = [f"hf://datasets/org/name@{hub.commit('org/name')}/{i}.wav" for i in range(6)]
        done = subprocess.run(
            [sys.executable, "-c", EMBED, json.dumps(paths)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"},
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[(bytes([i]) * 9).hex(), f"{i}.wav"] for i in range(5)] + [[None, paths[5]]]
