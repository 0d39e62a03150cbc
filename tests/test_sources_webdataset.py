"""WebDataset archives: samples are members of a tar with one name and several endings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Audio, Features, Image, Value, load_dataset
from hub import serve
from support_files import png, read_rows, rows_of, wav, write_tar
from support_parquet import read_file, run

from shmloader.errors import ReadError, SourceError
from shmloader.sources import make_plan
from shmloader.sources.base import SourceRequest


def sample(i: int, **changes: bytes | None) -> list[tuple[str, bytes]]:
    """The members of sample ``i``; ``changes``: other contents, None: it has none."""
    members: dict[str, bytes | None] = {
        "jpg": png(i),
        "wav": wav(i),
        "txt": f"text {i}".encode(),
        "cls": str(i % 3).encode(),
        "json": json.dumps({"n": i, "tags": ["a"] * (i % 2)}).encode(),
    }
    return [(f"d/{i:03}.{ending}", data) for ending, data in (members | changes).items() if data is not None]


def write_samples(path: Path, *samples: list[tuple[str, bytes]]) -> Path:
    return write_tar(path, [member for members in samples for member in members])


def reference(folder: Path, num: int) -> list[dict[str, object]]:
    """What ``datasets`` yields, of which it can encode all but audio without torchcodec."""
    features = Features(
        jpg=Image(decode=False), wav=Value("binary"), txt=Value("string"), cls=Value("int64"),
        json={"n": Value("int64"), "tags": [Value("string")]}, __key__=Value("string"), __url__=Value("string"),
    )  # fmt: skip
    rows = list(load_dataset(str(folder), split="train", streaming=True, features=features))
    assert len(rows) == num
    return [row | {"wav": {"bytes": row["wav"], "path": f"{row['__key__']}.wav"}} for row in rows]


def test_members_of_each_sample_are_its_columns_over_several_archives(tmp_path):
    write_samples(tmp_path / "d" / "train-0.tar", *[sample(i) for i in range(70)])
    write_samples(tmp_path / "d" / "train-1.tar", *[sample(i) for i in range(70, 100)])
    plan = make_plan(SourceRequest(str(tmp_path / "d"), "train", all_columns=True))
    assert (plan.mode, plan.num_rows, plan.warnings) == ("sequential", 100, ())
    assert any("100 rows, counted by the headers of its archives" in notice for notice in plan.notices)
    assert rows_of(tmp_path / "d") == reference(tmp_path / "d", 100)


def test_a_member_that_a_later_sample_lacks_is_null(tmp_path):
    samples = [sample(i) for i in range(8)] + [sample(8, txt=None, wav=None), sample(9)]
    path = write_samples(tmp_path / "train.tar", *samples)
    rows = rows_of(path)
    assert [row["txt"] for row in rows] == [f"text {i}" for i in range(8)] + [None, "text 9"]
    assert [row["wav"] is None for row in rows] == [False] * 8 + [True, False]


def test_samples_that_differ_from_the_start_are_an_error_that_tells_them_apart(tmp_path):
    path = write_samples(tmp_path / "train.tar", sample(0), sample(1, txt=None), sample(2))
    with pytest.raises(SourceError, match=r"d/000: jpg, wav, txt, cls, json\n +d/001: jpg, wav, cls, json\n"):
        make_plan(SourceRequest(str(path), "train"))
    features = Features(jpg=Image(), wav=Audio(), txt=Value("string"), __key__=Value("string"))
    rows = rows_of(path, load={"features": features})
    assert [row["txt"] for row in rows] == ["text 0", None, "text 2"]
    assert rows[1]["wav"] == {"bytes": wav(1), "path": "d/001.wav"}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"cls": b"seven"}, "invalid literal"),
        ({"json": b'{"n": "seven", "tags": []}'}, "column 'json'"),
        ({"json": b"{"}, "JSON"),
    ],
)
def test_a_bad_member_is_a_read_error_that_names_the_row_and_the_sample_before(tmp_path, changes, why):
    path = write_samples(tmp_path / "train.tar", *[sample(i) for i in range(7)], sample(7, **changes))
    with pytest.raises(ReadError, match=rf"row 7, after 'd/006' of '{path}'.*{why}"):
        rows_of(path)


def test_an_archive_that_ends_within_a_member_is_a_read_error_that_names_both(tmp_path):
    path = write_samples(tmp_path / "d" / "train-0.tar", *[sample(i, jpg=None, wav=bytes(5000)) for i in range(9)])
    with path.open("r+b") as file:
        file.truncate(8 * (512 + 5120 + 3 * 1024) + 2048)
    with pytest.raises(ReadError, match=r"train-0\.tar: ReadError: it ends in the middle of 'd/008\.wav'"):
        make_plan(SourceRequest(str(tmp_path / "d"), "train", all_columns=True))


def test_an_archive_without_an_end_is_read_with_a_warning(tmp_path):
    path = write_samples(tmp_path / "train.tar", sample(0, jpg=None), sample(1, jpg=None))
    size = 512 * 2 * 2 * 3 + 2 * (512 + len(wav(0)) + -len(wav(0)) % 512)
    with path.open("r+b") as file:
        file.truncate(size)
    for is_iterable in (False, True):
        plan = make_plan(SourceRequest(str(path), "train", is_iterable=is_iterable, all_columns=True))
        assert [str(path) in warning and "no end" in warning for warning in plan.warnings] == [True]
    assert len(rows_of(path)) == 2


def test_what_is_no_archive_is_a_read_error_that_names_it(tmp_path):
    write_samples(tmp_path / "d" / "train-0.tar", sample(0))
    (tmp_path / "d" / "train-1.tar").write_bytes(b"nonsense" * 200)
    with pytest.raises(ReadError, match=r"cannot read the tar archive .*train-1\.tar"):
        make_plan(SourceRequest(str(tmp_path / "d"), "train"))


def test_an_iterable_request_counts_nothing(tmp_path):
    path = write_samples(tmp_path / "train.tar", *[sample(i) for i in range(70)])
    assert make_plan(SourceRequest(str(path), "train", is_iterable=True)).num_rows is None


READ = """
import os, sys
import pyarrow as pa
from shmloader.sources import make_plan, open_reader
from shmloader.sources.base import SourceRequest
request = SourceRequest(sys.argv[1], "train", all_columns=True)
plan = make_plan(request)
reader = open_reader(request, plan)
batches = [batch for chunk in plan.chunks for _, batch in reader.read(chunk)]
with pa.OSFile(sys.argv[2], "wb") as sink, pa.ipc.new_stream(sink, plan.schema) as writer:
    for batch in batches:
        writer.write_batch(batch)
assert "torch" not in sys.modules
os._exit(0)
"""


def test_archives_on_a_hub_are_read_like_local_ones_but_for_their_url(tmp_path):
    folder = tmp_path / "hub" / "org" / "tars"
    for i in range(2):
        write_samples(folder / f"train-{i}.tar", *[sample(n) for n in range(40 * i, 40 * i + 40)])
    # Else they are fetched first: nobody reads them twice to count them.
    card = "---\ndataset_info:\n  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: 80\n---\n"
    (folder / "README.md").write_text(card)
    with serve(tmp_path / "hub") as hub:
        run(READ, ["org/tars", tmp_path / "rows"], tmp_path, HF_ENDPOINT=hub.endpoint)
        rows = read_file(tmp_path / "rows").to_pylist()
    for row, expected in zip(rows, reference(folder, 80), strict=True):
        assert row.pop("__url__").startswith("hf://datasets/org/tars@")
        expected.pop("__url__")
        assert row == expected


def test_one_column_of_an_archive_is_read_alone(tmp_path):
    path = write_samples(tmp_path / "train.tar", *[sample(i) for i in range(70)])
    request = SourceRequest(str(path), "train", columns={"image": "jpg"})
    rows = read_rows(request)
    assert rows[69] == {"jpg": {"bytes": png(69), "path": "d/069.jpg"}}
