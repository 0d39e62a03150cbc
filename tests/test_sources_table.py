"""Tables whose rows name files: CSV and JSON with paths of images and clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from formats_data import picture, sound
from hub import serve
from named_data import LUMA_WORDS, write_named
from support_hub import ask, ask_offline

from shmloader.errors import ColumnError
from shmloader.sources import make_plan, open_reader
from shmloader.sources.base import SourceRequest

AUDIO = {"audio": "path", "text": "label"}


def write_csv(folder: Path, rows: dict[str, bytes | None], name: str = "train.csv") -> None:
    """A table of paths, and those of its files that have bytes, relative to the table's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, data in rows.items():
        if data is not None:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
    (folder / name).write_text("path,label\n" + "".join(f"{path},word {i}\n" for i, path in enumerate(rows)))


def rows_of(dataset: Any, columns: dict[str, Any] | None, **asked: Any) -> tuple[Any, list[dict[str, Any]]]:
    request = SourceRequest(str(dataset), "train", columns, **asked)
    plan = make_plan(request)
    reader = open_reader(request, plan)
    rows = [row for chunk in plan.chunks for _, batch in reader.read(chunk) for row in batch.to_pylist()]
    reader.close()
    return plan, rows


def test_paths_are_relative_to_the_folder_of_their_table(tmp_path):
    far = tmp_path / "far.wav"
    far.write_bytes(sound(9))
    write_csv(tmp_path / "set" / "list", {"a/0.wav": sound(0), "../1.wav": sound(1), str(far): sound(9)})
    plan, rows = rows_of(tmp_path / "set", AUDIO)
    assert (plan.mode, plan.num_rows, plan.columns.audio) == ("files", 3, "path")
    assert [row["path"]["bytes"] for row in rows] == [sound(0), sound(1), sound(9)]
    assert [row["label"] for row in rows] == ["word 0", "word 1", "word 2"]


def test_table_on_a_hub_may_name_files_of_its_own_repository_alone(tmp_path):
    root, far = tmp_path / "hub", tmp_path / "far.wav"
    far.write_bytes(sound(9))
    write_csv(root / "org" / "set", {"0.wav": sound(0), str(far): None})
    with serve(root) as hub:
        found = ask(hub, "org/set", tmp_path, columns=AUDIO)
        assert found.error["type"] == "ReadError"
        assert str(far) in found.message
        assert "no file of its repository" in found.message
    write_csv(root / "org" / "other", {"0.wav": sound(0), "../../set/0.wav": None})
    with serve(root) as hub:
        assert "no file of its repository" in ask(hub, "org/other", tmp_path, columns=AUDIO).message


def test_lines_of_json_may_name_pictures(tmp_path):
    (tmp_path / "0.png").write_bytes(picture(3))
    lines = [{"file": "0.png", "text": "three"}, {"file": None, "text": "none"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan, rows = rows_of(tmp_path, {"image": "file", "text": "text"})
    assert plan.mode == "files"
    assert [row["file"] and row["file"]["bytes"] for row in rows] == [picture(3), None]


def test_each_of_several_tables_has_its_own_folder(tmp_path):
    for i in range(2):
        write_csv(tmp_path / f"part{i}", {"x.wav": sound(i)}, f"train-{i}.csv")
    _, rows = rows_of(tmp_path, AUDIO, load={"data_files": "part*/*.csv"})
    assert [row["path"]["bytes"] for row in rows] == [sound(0), sound(1)]


def test_file_that_is_not_there_costs_its_row_alone(tmp_path):
    write_csv(tmp_path, {"0.wav": sound(0), "1.wav": None})
    _, rows = rows_of(tmp_path, AUDIO)
    assert rows[0]["path"]["bytes"] == sound(0)
    assert rows[1]["path"] == {"bytes": None, "path": str(tmp_path / "1.wav")}


def test_table_is_a_listing_only_where_the_user_says_so(tmp_path):
    write_csv(tmp_path, {"0.wav": sound(0)})
    plan, rows = rows_of(tmp_path, {"text": "path"})
    assert (plan.mode, rows) == ("sequential", [{"path": "0.wav"}])
    with pytest.raises(ColumnError, match="there is no column 'paths'"):
        rows_of(tmp_path, {"audio": "paths"})


def test_listed_files_of_a_hub_are_read_when_needed_or_downloaded_before(tmp_path):
    root = tmp_path / "hub"
    write_named(root, "luma")
    asked = {"columns": AUDIO, "load": {"data_files": "audio/datalist.csv"}}
    with serve(root) as hub:
        streamed = ask(hub, "bezirganyan/LUMA", tmp_path, **asked)
        assert streamed.mode == "remote files"
        assert streamed.plan["num_bytes"] == sum(len(sound(i)) for i in range(3))
        assert hub.num_bytes_of(".wav") == sum(len(sound(i)) for i in range(3))
        downloaded = ask(hub, "bezirganyan/LUMA", tmp_path, is_downloaded=True, **asked)
        assert downloaded.mode == "files"
        offline = ask_offline(hub, "bezirganyan/LUMA", tmp_path, **asked)
        assert offline.mode == "files"
    for found in (streamed, downloaded, offline):
        assert [row["label"] for row in found.rows] == list(LUMA_WORDS)
        assert [row["path"]["bytes"] for row in found.rows] == [sound(i) for i in range(3)]
