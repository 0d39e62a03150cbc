"""What a source warns of is shown where the dataset is opened; downloading is asked for there too."""

from __future__ import annotations

import shutil
import warnings

import pytest
from conftest import opened
from hub import serve
from support_hub import write_json
from support_parquet import run, write_texts

from shmloader import ShmMultimodalIterableDataset


def number(row: dict[str, object]) -> dict[str, object]:
    """A `process`."""
    return {"number": len(str(row["text"]))}


def test_cache_instead_of_a_hub_that_gives_nothing_is_warned_of_once_and_where_the_dataset_is_made(
    tmp_path, monkeypatch
):
    with serve(tmp_path / "hub") as hub:
        folder = write_texts(hub.root / "org" / "texts", ["a", "bb"])
        commit = hub.commit("org/texts")
        run("import datasets; datasets.load_dataset('org/texts')", [], tmp_path, HF_ENDPOINT=hub.endpoint)
        shutil.rmtree(folder)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with opened("org/texts", process=number) as dataset:
                assert [int(dataset[i]["number"]) for i in range(2)] == [1, 2]
                assert commit in dataset.sources[0]["warnings"][0]
    told = [str(warning.message) for warning in caught if warning.filename.endswith("conftest.py")]
    assert len(told) == 1
    assert "did not give it" in told[0]


@pytest.mark.parametrize("kind", [None, ShmMultimodalIterableDataset])
def test_local_lines_without_streaming_have_random_access(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    write_json(tmp_path / "rows" / "train.jsonl", 0, 100)
    more = {} if kind is None else {"kind": kind}
    with opened(str(tmp_path / "rows"), process=number, use_streaming=False, **more) as dataset:
        (source,) = dataset.sources
        assert (source["mode"], source["rows"]) == ("loaded", 100)
