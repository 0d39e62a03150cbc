"""Short names: which of their places is taken, and which split and columns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shmloader.catalog import BUILT_IN, DatasetConfig, Repo
from shmloader.errors import DatasetNotFoundError, SourceError, SplitNotFoundError
from shmloader.sources import entries, make_plan, open_reader
from shmloader.sources.base import Columns, SourcePlan, SourceRequest
from shmloader.sources.entries import mapped_split, plan_entry

ENTRY = DatasetConfig(
    name="mine",
    repos=(
        Repo("org/first", configuration="big", splits={"validation": "test", "test": "train[95%:]"}),
        Repo("org/second", columns={"text": "other"}),
    ),
    columns={"text": "words", "labels": "class"},
    class_names=("x", "y"),
)


def plan_of(request: SourceRequest) -> SourcePlan:
    return SourcePlan(
        name=str(request.dataset), split=request.split, mode="local", num_rows=1, shards=(), chunks=(),
        columns=Columns(text="words", labels="class"), arrow_schema=b"", notices=("a notice",),
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[SourceRequest]:
    """The requests that were planned; a dataset in ``gone`` is not there, and splits are "train" alone."""
    planned: list[SourceRequest] = []

    def plan_source(request: SourceRequest) -> SourcePlan:
        planned.append(request)
        error = FAILURES.get(str(request.dataset))
        if error is not None:
            raise error
        if not request.split.startswith("train"):
            raise SplitNotFoundError("no such split", dataset=request.dataset, split=request.split, available=["train"])
        return plan_of(request)

    FAILURES.clear()
    monkeypatch.setattr(entries, "plan_source", plan_source)
    return planned


FAILURES: dict[str, Exception] = {}


def request_for(split: str = "train", **asked: Any) -> SourceRequest:
    return SourceRequest("mine", split, entry=ENTRY, **asked)


def test_first_place_is_asked_for_by_its_id_with_configuration_and_columns(asked):
    plan = plan_entry(request_for())
    (request,) = asked
    assert (request.dataset, request.load, request.entry) == ("org/first", {"name": "big"}, None)
    assert request.columns == {"text": "words", "labels": "class"}
    assert (plan.name, plan.notices) == ("mine", ("a notice",))
    assert plan.columns.class_names == ("x", "y")


def test_what_was_found_is_what_readers_go_by_with_the_users_own_token(asked):
    request = request_for(load={"token": "hf_secret", "name": "small"})
    plan = SourcePlan.from_json(plan_entry(request).to_json())
    assert "hf_secret" not in plan.to_json()
    found = plan.resolve(request)
    assert (found.dataset, found.split, found.entry) == ("org/first", "train", None)
    assert found.load == {"token": "hf_secret", "name": "small"}
    assert asked[0].load == {"token": "hf_secret", "name": "small"}


def test_next_place_is_taken_only_where_the_one_before_does_not_exist(asked):
    FAILURES["org/first"] = DatasetNotFoundError("not there", dataset="org/first")
    plan = plan_entry(request_for())
    assert plan.resolved["dataset"] == "org/second"
    assert asked[-1].columns == {"text": "other"}
    assert plan.notices[0] == "mine: it is read from org/second, since there is no org/first"
    FAILURES["org/first"] = SourceError("cannot be reached", dataset="org/first", endpoint="http://x")
    with pytest.raises(SourceError, match="cannot be reached"):
        plan_entry(request_for())


def test_name_of_which_no_place_exists_is_an_error_that_names_them(asked):
    for name in ("org/first", "org/second"):
        FAILURES[name] = DatasetNotFoundError(f"{name} is not there", dataset=name)
    with pytest.raises(DatasetNotFoundError, match="org/first is not there; org/second is not there") as info:
        plan_entry(request_for())
    assert (info.value.dataset, info.value.tried) == ("mine", ["org/first", "org/second"])


def test_split_that_is_lacking_is_mapped_with_a_notice_that_says_what_to_train_on(asked):
    plan = plan_entry(request_for("validation"))
    assert (asked[-1].split, plan.resolved["split"]) == ("train[95%:]", "train[95%:]")
    assert plan.notices == (
        "mine has no split 'validation': 'train[95%:]' is used in its place, which 'train' holds too: train on "
        "split='train[:95%]'",
        "a notice",
    )


def test_split_that_nothing_stands_for_is_the_error_that_it_was(asked):
    with pytest.raises(SplitNotFoundError, match="no such split"):
        plan_entry(request_for("nonsense"))


@pytest.mark.parametrize(
    ("split", "available", "used"),
    [
        ("validation", ["train", "test"], "test"),
        ("validation", ["train"], "train[95%:]"),
        ("validation", ["train", "validation"], "validation"),
        ("nonsense", ["train"], "nonsense"),
    ],
)
def test_what_stands_for_a_split_may_itself_be_lacking(split, available, used):
    assert mapped_split(ENTRY.repos[0], split, available) == used


@pytest.fixture
def hundred(tmp_path: Path) -> DatasetConfig:
    """A dataset of 100 rows, all of them "train"."""
    (tmp_path / "train.jsonl").write_text("".join(f'{{"words": "{i}"}}\n' for i in range(100)))
    splits = {"validation": "train[95%:]", "test": "validation", "exam": "train"}
    return DatasetConfig("mine", Repo(str(tmp_path), splits=splits), {"text": "words"})


def numbers_of(entry: DatasetConfig, split: str) -> list[int]:
    request = SourceRequest("mine", split, entry=entry)
    plan = SourcePlan.from_json(make_plan(request).to_json())
    reader = open_reader(request, plan)
    rows = [row for chunk in plan.chunks for _, batch in reader.read(chunk) for row in batch.to_pylist()]
    assert plan.num_rows == len(rows)
    return [int(row["words"]) for row in rows]


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("validation[:2]", [95, 96]),
        ("test[-1:]", [99]),
        ("exam[10:12]", [10, 11]),
        ("train[:3]+validation", [0, 1, 2, 95, 96, 97, 98, 99]),
        ("train[:95%]+validation[:1]", [*range(95), 95]),
        ("train[:2]+train[:2]", [0, 1, 0, 1]),
    ],
)
def test_slices_and_sums_of_what_stands_for_a_split_are_those_rows(hundred, split, rows):
    assert numbers_of(hundred, split) == rows


@pytest.mark.parametrize(
    "split", ["train+validation", "validation+test", "exam+train[:1]", "train[90:96]+validation[:2]"]
)
def test_rows_that_would_come_twice_by_what_stands_for_a_split_are_an_error(hundred, split):
    with pytest.raises(SplitNotFoundError, match=r"would have rows of 'train' twice, since mine has no split") as info:
        numbers_of(hundred, split)
    assert (info.value.split, info.value.available) == (split, ["train"])


def test_place_that_the_cache_has_is_taken_where_the_one_before_cannot_be_asked_for(asked, monkeypatch):
    FAILURES["org/first"] = SourceError("cannot be reached", dataset="org/first", endpoint="http://x")
    monkeypatch.setattr(entries, "cached_snapshot", lambda repo, revision: repo == "org/second")
    plan = plan_entry(request_for())
    assert plan.resolved["dataset"] == "org/second"
    assert plan.notices[0] == (
        "mine: it is read from org/second, which the Hub's cache has; org/first comes before it, but cannot be asked "
        "for now"
    )


def test_mapping_that_goes_in_circles_ends():
    repo = Repo("org/x", splits={"train": "test", "test": "train"})
    assert mapped_split(repo, "train", ["other"]) in ("train", "test")


@pytest.mark.parametrize("config", BUILT_IN, ids=lambda config: config.name)
def test_every_usual_split_of_a_built_in_dataset_leads_to_one_that_it_has(config):
    for repo in config.repos:
        for split in ("train", "validation", "test"):
            used = mapped_split(repo, split, repo.has)
            assert used.split("[")[0] in repo.has


def test_folder_of_the_same_name_is_said_not_to_be_meant(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    assert "that is './mine'" in plan_entry(request_for()).notices[0]


def test_plan_of_a_short_name_is_made_anew_where_its_place_may_have_changed(tmp_path, monkeypatch):
    """A folder in the working directory that has the name of a short name is not what is planned."""
    monkeypatch.chdir(tmp_path)
    for folder, text in (("mine", "wrong"), ("right", "right")):
        Path(folder).mkdir()
        Path(folder, "train.jsonl").write_text(f'{{"words": "{text}"}}\n')
    entry = replace(ENTRY, repos=(Repo(str(tmp_path / "right")),), columns={"text": "words"})
    for _ in range(2):
        request = SourceRequest("mine", "train", entry=entry)
        plan = make_plan(request)
        ((_, batch),) = open_reader(request, plan).read(plan.chunks[0])
        assert batch.to_pylist() == [{"words": "right"}]
