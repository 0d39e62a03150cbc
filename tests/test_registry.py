"""Datasets that a program names itself, and what the catalog's words may say."""

from __future__ import annotations

import pytest
from support_named import text_in

from shmloader import DatasetConfig, Repo, ShmMultimodalDataset, register_dataset, registry
from shmloader.catalog import BUILT_IN
from shmloader.errors import OptionError
from shmloader.selection import select
from shmloader.sources.base import SourceRequest

REQUEST = SourceRequest(None, "train")


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


def mine(**changes: object) -> DatasetConfig:
    return DatasetConfig(**{"name": "mine", "repos": "org/mine", "columns": {"text": "q", "target": "a"}, **changes})


def test_registered_dataset_is_found_by_its_name_and_aliases():
    config = register_dataset(mine(aliases="my-own"))
    for name in ("mine", "MINE", "my-own", "my_own"):
        (request,) = select(name, None, REQUEST)
        assert (request.dataset, request.entry) == ("mine", config)
    assert config in registry.known()
    assert "mine" not in [request.dataset for request in select("all", None, REQUEST)]


@pytest.mark.parametrize("changes", [{"name": "beans"}, {"aliases": ("logicqa",)}, {"name": "mine"}])
def test_name_that_is_taken_is_an_error_unless_it_is_to_be_replaced(changes):
    register_dataset(mine())
    config = mine(**{"name": "other", **changes})
    with pytest.raises(OptionError, match=r"or replace=True"):
        register_dataset(config)
    register_dataset(config, replace=True)
    assert registry.find(config.keys[-1]) is config


def test_dataset_that_is_replaced_is_gone_with_all_its_names():
    register_dataset(mine(aliases=("second",)))
    register_dataset(mine(), replace=True)
    assert registry.find("second") is None


def test_replaced_built_in_is_not_among_all():
    register_dataset(mine(name="beans"), replace=True)
    assert [request.dataset for request in select("all", None, REQUEST)] == [
        config.name for config in BUILT_IN if config.name != "beans"
    ]


def test_process_of_a_registered_dataset_takes_whole_rows_unless_columns_are_given():
    register_dataset(mine(columns={}, process=dict))
    assert select("mine", None, REQUEST)[0].all_columns
    asked = SourceRequest(None, "train", columns={"text": "q"})
    assert not select("mine", None, asked)[0].all_columns


@pytest.mark.parametrize(
    ("columns", "task_type"),
    [
        ({"text": "a"}, "text"),
        ({"image": "a", "labels": "b"}, "vision"),
        ({"image": "a", "text": "b"}, "vision_text"),
        ({"audio": "a", "text": ["b", "c"], "target": "d"}, "audio_text"),
        ({"audio": "a"}, "audio"),
        ({}, None),
    ],
)
def test_task_type_is_what_the_columns_say(columns, task_type):
    assert mine(columns=columns).task_type == task_type


def test_places_may_be_given_as_ids():
    assert mine(repos="org/a").repos == (Repo("org/a"),)
    assert mine(repos=["org/a", Repo("org/b", configuration="c")]).repos == (
        Repo("org/a"),
        Repo("org/b", configuration="c"),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "org/mine"},
        {"name": "auto"},
        {"name": 3},
        {"aliases": ("a b",)},
        {"repos": ()},
        {"repos": 3},
        {"repos": [3]},
        {"repos": {"id": "x"}},
        {"columns": {"texts": "a"}},
        {"columns": {"text": 3}},
        {"columns": {"text": []}},
        {"columns": {"target": "a"}},
        {"columns": {"text": "a", "target": "b", "labels": "c"}},
        {"columns": ["text"]},
        {"task_type": "chess"},
        {"task_type": "vision"},
        {"process": "x"},
    ],
    ids=repr,
)
def test_config_that_cannot_be_meant_is_an_error_at_once(changes):
    with pytest.raises(OptionError, match=r"DatasetConfig: .* must be"):
        mine(**changes)


@pytest.mark.parametrize(
    "changes", [{"id": " "}, {"splits": {"a": 3}}, {"splits": {"a[1:]": "b"}}, {"columns": {"x": 1}}]
)
def test_place_that_cannot_be_meant_is_an_error_at_once(changes):
    with pytest.raises(OptionError, match=r"Repo: .* must be"):
        Repo(**{"id": "org/a", **changes})


def test_only_a_config_can_be_registered():
    with pytest.raises(OptionError, match="takes a DatasetConfig, but got str"):
        register_dataset("mine")


def test_registered_dataset_is_read_like_any_other(tmp_path, make_dataset):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"q": "1 + 1?", "a": "2"}\n{"q": "2 + 2?", "a": "4"}\n')
    register_dataset(mine(repos=str(tmp_path), aliases="sums"))
    dataset: ShmMultimodalDataset = make_dataset("sums")
    assert [text_in(dataset[i]["text"].numpy()) for i in range(2)] == ["1 + 1?\n2", "2 + 2?\n4"]
    assert dataset[1]["labels"].tolist() == [-100] * 7 + [ord("4")]
    assert (dataset[1]["source"], dataset.name) == ("mine", "mine")
    batch = dataset.collate([dataset[0], dataset[1]])
    assert batch["labels"].tolist() == [[-100] * 7 + [ord("2")], [-100] * 7 + [ord("4")]]


def test_registered_process_makes_the_samples(tmp_path, make_dataset):
    (tmp_path / "train.jsonl").write_text('{"q": 3}\n{"q": 4}\n')
    register_dataset(mine(repos=str(tmp_path), columns={}, process=lambda row: {"double": 2 * row["q"]}))
    dataset = make_dataset("mine")
    assert [int(dataset[i]["double"]) for i in range(2)] == [6, 8]
