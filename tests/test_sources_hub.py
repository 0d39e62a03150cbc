"""Parquet datasets on a Hub: plans, rows, what is fetched, and tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hub import Hub, serve
from support_hub import IMPATIENT, ask
from support_parquet import (
    plan_and_read,
    read_all,
    read_file,
    rows,
    run,
    write_card,
    write_images,
    write_texts,
)

from shmloader.errors import (
    SourceError,
    to_wire,
)
from shmloader.sources.base import SourcePlan, SourceRequest
from shmloader.sources.resolve import translated

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


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve(tmp_path / "hub") as running:
        yield running


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
    env = {"HF_HUB_OFFLINE": "1"} if is_offline else {}
    error = ask(gone, "org/texts", tmp_path, before=IMPATIENT, env=env).error
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
