"""Plans of local Parquet are kept from run to run, and never used for other data."""

from __future__ import annotations

import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shmloader.sources import make_plan, plan_cache
from shmloader.sources.base import SourceRequest


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with one Parquet file of 10 texts, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    write(data, 10)
    return data


def write(folder, num_rows):
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(num_rows)]}), folder / "train.parquet")


def request(folder, **changes):
    return SourceRequest(**{"dataset": str(folder), "split": "train"} | changes)


def test_the_same_request_finds_the_plan_again(folder):
    plan = make_plan(request(folder))
    assert plan_cache.load(request(folder)) == plan


def test_a_kept_plan_needs_no_datasets(folder):
    make_plan(request(folder))
    code = (
        "import sys; from shmloader.sources import make_plan; from shmloader.sources.base import SourceRequest\n"
        f"plan = make_plan(SourceRequest(dataset={str(folder)!r}, split='train'))\n"
        "assert plan.num_rows == 10; assert 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_changed_data_is_planned_anew(folder):
    make_plan(request(folder))
    write(folder, 11)
    assert make_plan(request(folder)).num_rows == 11


def test_a_file_of_the_same_size_but_another_time_is_planned_anew(folder):
    make_plan(request(folder))
    os.utime(folder / "train.parquet", ns=(1, 1))
    assert plan_cache.load(request(folder)) is None


def test_a_new_file_is_planned_anew(folder):
    make_plan(request(folder))
    (folder / "README.md").write_text("# more\n")
    assert plan_cache.load(request(folder)) is None


@pytest.mark.parametrize(
    "change", [{"columns": {"text": "text"}}, {"all_columns": True}, {"load": {"verification_mode": "no_checks"}}]
)
def test_another_request_is_planned_anew(folder, change):
    make_plan(request(folder))
    assert plan_cache.load(request(folder, **change)) is None


def test_files_named_elsewhere_are_not_kept(folder, tmp_path):
    other = tmp_path / "other.parquet"
    for num_rows in (5, 9):
        pq.write_table(pa.table({"text": ["x"] * num_rows}), other)
        assert make_plan(request(folder, load={"data_files": str(other)})).num_rows == num_rows


def test_a_damaged_plan_is_made_again(folder, tmp_path):
    plan = make_plan(request(folder))
    (kept,) = (tmp_path / "cache" / "shmloader" / "plans").iterdir()
    kept.write_text("{")
    assert make_plan(request(folder)) == plan


def test_a_cache_that_cannot_be_written_is_left_out(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert make_plan(request(folder)).num_rows == 10


def test_only_the_newest_plans_are_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_cache, "MAX_PLANS", 2)
    plan = make_plan(request(folder))
    for i in range(4):
        plan_cache.store(request(folder, load={"name": str(i)}), plan)
    assert len(list((tmp_path / "cache" / "shmloader" / "plans").iterdir())) == 2


def test_objects_and_hub_ids_are_not_kept():
    assert plan_cache.load(SourceRequest(dataset=object(), split="train")) is None
    assert plan_cache.load(SourceRequest(dataset="nobody/nothing", split="train")) is None
