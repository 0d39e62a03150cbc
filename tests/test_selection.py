"""What a dataset_name and a task_type stand for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shmloader import registry
from shmloader.catalog import BUILT_IN
from shmloader.errors import DatasetNotFoundError, OptionError
from shmloader.selection import select
from shmloader.sources.base import SourceRequest

REQUEST = SourceRequest(None, "train")


def names(dataset_name: object, task_type: str | None = None, **asked: object) -> list[object]:
    return [request.dataset for request in select(dataset_name, task_type, replace(REQUEST, **asked))]


@pytest.mark.parametrize(
    ("task_type", "name"),
    [
        (None, "open_platypus"),
        ("text", "open_platypus"),
        ("code", "humaneval"),
        ("code-generation", "humaneval"),
        ("vision", "beans"),
        ("audio", "luma"),
        ("financial", "financial_phrasebank"),
        ("stock", "financial_phrasebank"),
    ],
)
def test_task_type_chooses_where_no_dataset_is_named(task_type, name):
    assert names("auto", task_type) == [name]


def test_unknown_task_type_is_an_error_that_lists_them():
    with pytest.raises(OptionError, match=r"'code', 'code-generation', 'financial', 'stock', 'text', 'vision'") as info:
        select("auto", "chess", REQUEST)
    assert info.value.name == "task_type"


def test_all_are_the_nine():
    assert names("all") == [config.name for config in BUILT_IN]
    assert len(BUILT_IN) == 9


@pytest.mark.parametrize("name", ["logiqa", "logicqa", "LogiQA", " logiqa "])
def test_aliases_and_other_spellings_are_the_same_dataset(name):
    (request,) = select(name, None, REQUEST)
    assert request.dataset == "logiqa"
    assert request.entry is registry.find("logiqa")


def test_list_mixes_names_ids_folders_and_objects(tmp_path):
    loaded = object()
    given = ["beans", "AI-Lab-Makerere/beans", str(tmp_path), tmp_path / "x", loaded]
    requests = select(given, None, REQUEST)
    assert [request.dataset for request in requests] == given
    assert [request.entry is None for request in requests] == [False, True, True, True, True]


def test_hub_id_that_the_catalog_has_is_a_plain_hub_id():
    (request,) = select("AI-Lab-Makerere/beans", None, REQUEST)
    assert (request.entry, request.columns) == (None, None)


@pytest.mark.parametrize("name", ["humanevall", "human_eval", "bean", "logqa"])
def test_unknown_name_is_an_error_with_near_matches(name):
    with pytest.raises(DatasetNotFoundError, match="Did you mean") as info:
        select(name, None, REQUEST)
    assert info.value.near
    assert "clotho_aqa, ds1000" in str(info.value)


def test_unknown_name_without_near_ones_says_how_the_hubs_are_named():
    with pytest.raises(DatasetNotFoundError, match="'owner/imdb'") as info:
        select("imdb", None, REQUEST)
    assert "Did you mean" not in str(info.value)


def test_builder_of_a_format_needs_its_files():
    assert names("json", load={"data_files": "x.json"}) == ["json"]
    with pytest.raises(DatasetNotFoundError):
        select("json", None, REQUEST)


def test_short_name_comes_before_a_folder_and_a_folder_before_another_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("beans", "Luma", "mine"):
        Path(name).mkdir()
    found = select(["beans", "Luma", "mine", "./beans"], None, REQUEST)
    assert [request.entry is not None for request in found] == [True, False, False, False]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ([], "at least one dataset"),
        (["beans", ["luma"]], "not lists in lists"),
        (["beans", "all"], "not in a list"),
        (["logiqa", "logicqa"], "without 'logiqa' twice"),
        (["org/a", "org/a"], "without 'org/a' twice"),
        ([None], "dataset_name= is needed"),
    ],
)
def test_lists_that_cannot_be_meant_are_errors(name, said):
    with pytest.raises(OptionError, match=said):
        select(name, None, REQUEST)


def test_same_object_twice_is_an_error_and_two_alike_are_not():
    one, other = object(), object()
    assert names([one, other]) == [one, other]
    with pytest.raises(OptionError, match="twice"):
        select([one, one], None, REQUEST)


@pytest.mark.parametrize(
    ("name", "task_type"), [("humaneval", "vision"), ("beans", "text"), (["beans", "luma"], "audio")]
)
def test_task_type_that_a_named_dataset_cannot_have_is_an_error(name, task_type):
    with pytest.raises(OptionError, match=f"task_type='{task_type}' asks for samples with"):
        select(name, task_type, REQUEST)


def test_task_type_that_a_named_dataset_can_have_changes_nothing():
    assert names("humaneval", "text") == ["humaneval"]
    assert names("clotho_aqa", "audio") == ["clotho_aqa"]
    assert names("org/unknown", "audio") == ["org/unknown"]


def test_columns_are_those_of_all_or_of_each_by_name():
    both = ["humaneval", "org/x"]
    assert [r.columns for r in select(both, None, replace(REQUEST, columns={"text": "a"}))] == [{"text": "a"}] * 2
    by_name = {"org/x": {"text": "a"}}
    assert [r.columns for r in select(both, None, replace(REQUEST, columns=by_name))] == [None, {"text": "a"}]
    for wrong in ({"org/y": {"text": "a"}}, {"text": "a", "org/x": {"text": "a"}}):
        with pytest.raises(OptionError, match="or a dict for each that is named"):
            select(both, None, replace(REQUEST, columns=wrong))


@pytest.mark.parametrize("name", ["beans", ["beans"]])
def test_what_is_told_by_name_may_be_told_of_one(name):
    request = replace(REQUEST, columns={"beans": {"image": "picture"}}, load={"beans": {"revision": "r"}})
    (found,) = select(name, None, request)
    assert (found.columns, found.load) == ({"image": "picture"}, {"revision": "r"})


def test_load_is_that_of_all_or_of_each_by_name():
    both = ["humaneval", "org/x"]
    shared = {"token": "hf_x", "cache_dir": "/x"}
    assert [r.load for r in select(both, None, replace(REQUEST, load=shared))] == [shared] * 2
    by_name = {"org/x": {"revision": "v1"}}
    assert [r.load for r in select(both, None, replace(REQUEST, load=by_name))] == [{}, {"revision": "v1"}]
    with pytest.raises(OptionError, match="'revision' is of one") as info:
        select(both, None, replace(REQUEST, load={"revision": "v1", "token": "hf_secret"}))
    assert "hf_secret" not in str(info.value) + info.value.value
    with pytest.raises(OptionError, match="or a dict for each that is named") as info:
        select(both, None, replace(REQUEST, load={"org/x": {"token": "hf_secret"}, "token": "hf_secret"}))
    assert "hf_secret" not in str(info.value) + info.value.value
