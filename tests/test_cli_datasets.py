"""`shmloader datasets`, and docs/datasets.md: both say what the catalog says."""

from __future__ import annotations

import json

import pytest
from catalog_document import described, in_document

from shmloader import registry
from shmloader.catalog import BUILT_IN, DatasetConfig, Repo
from shmloader.cli import main
from shmloader.cli.catalog_words import fields_of, rows_of, splits_of


def test_all_are_listed_with_their_ids_splits_and_licences(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "700")
    assert main(["datasets"]) == 0
    shown = capsys.readouterr().out
    for config in BUILT_IN:
        for said in (config.name, config.repos[0].id, config.task_type, config.licence):
            assert str(said) in shown


def test_narrow_terminal_cuts_nothing_off(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["datasets"])
    assert "…" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["logiqa", "logicqa", "LogiQA"])
def test_one_is_described_whole(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["datasets", name]) == 0
    shown = capsys.readouterr().out
    assert "lucasmccabe/logiqa" in shown
    assert "context + query + options → options[correct_option]" in shown


def test_json_has_all_of_it(capsys):
    assert main(["datasets", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in told] == [config.name for config in BUILT_IN]
    assert main(["datasets", "financial_phrasebank", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one == told[3]
    assert one["class_names"] == ["negative", "neutral", "positive"]
    assert one["chosen_by"] == ["financial", "stock"]
    assert one["repos"][0]["configuration"] == "sentences_allagree"


def test_unknown_name_is_an_error_with_near_ones(capsys):
    assert main(["datasets", "humanevall"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Did you mean 'humaneval'?" in said.err


def test_registered_ones_are_listed_too(capsys, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    registry.register_dataset(DatasetConfig("mine", "org/mine", process=dict))
    assert main(["datasets", "mine", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sample"] == {"…": "what its process= returns"}
    assert main(["datasets", "mine"]) == 0
    assert main(["datasets"]) == 0


def test_words_of_a_place_are_those_of_its_own_columns():
    config = DatasetConfig("mine", Repo("a", columns={"text": "x"}), {"text": "y", "labels": "z"})
    assert fields_of(config) == {"text": "x", "labels": "the tokens of text"}
    assert splits_of(Repo("a", splits={"validation": "test", "test": "train[9:]"}, has=("train",))) == (
        "train (validation → train[9:], test → train[9:])"
    )
    assert ("from", "a") in rows_of(config)


def test_document_says_what_the_catalog_says():
    assert in_document() == described().strip() + "\n", "run: make catalog"
