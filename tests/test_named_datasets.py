"""The nine named datasets, from a Hub that has them as the real one does: streamed, downloaded, and without the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from formats_data import sound
from hub import Hub, serve
from named_data import NUM_ROWS, expected, rows_of, write_named
from support_hub import Found
from support_named import ask_named, samples_of, text_in
from support_parquet import DATA

from shmloader.catalog import BUILT_IN
from shmloader.processors.audio import decode_audio

NAMES = [config.name for config in BUILT_IN]
WAYS = ("streamed", "downloaded", "offline")
TASK_TYPES = {"beans": "vision", "clotho_aqa": "audio_text", "luma": "audio_text"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    write_named(root)
    with serve(root) as running:
        yield running


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it are the caches that the downloads have left."""
    return tmp_path_factory.mktemp("downloaded")


@pytest.fixture(scope="module")
def found(hub: Hub, downloads: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Found]:
    """What each name gives in each way; offline with what the downloads have left."""
    streamed, downloaded = tmp_path_factory.mktemp("streamed"), downloads
    all_of = {
        "streamed": ask_named(hub, [(name, {}) for name in NAMES], streamed),
        "downloaded": ask_named(hub, [(name, {"is_downloaded": True}) for name in NAMES], downloaded),
    }
    hub.reset()
    all_of["offline"] = ask_named(hub, [(name, {}) for name in NAMES], downloaded, HF_HUB_OFFLINE="1")
    assert hub.requests == []
    return {(name, way): told for way, every in all_of.items() for name, told in zip(NAMES, every, strict=True)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_named_dataset_yields_exact_samples(found, name, way):
    samples = samples_of(found[name, way])
    assert len(samples) == NUM_ROWS
    for i, sample in enumerate(samples):
        right = expected(name, i)
        assert sample["task_type"] == TASK_TYPES.get(name, "text")
        assert sample["source"] == name
        if "answer" in right:
            prompt, answer = right["prompt"].encode(), right["answer"].encode()
            assert text_in(sample["text"]) == right["prompt"] + right["answer"]
            assert sample["labels"].tolist() == [-100] * len(prompt) + list(answer)
        if "text" in right:
            assert text_in(sample["text"]) == right["text"]
        if "labels" in right:
            assert sample["labels"].tolist() == right["labels"]
        if name == "luma":
            assert sample["labels"].tolist() == list(right["text"].encode())
        if name in ("luma", "clotho_aqa"):
            whole = decode_audio({"bytes": sound(i), "path": None}, 16000)[:1600]
            assert np.array_equal(sample["audio"], whole)
        if name == "beans":
            assert sample["image"].shape == (3, 8, 8)
            assert (sample["image"] == i).all()


MODES = {
    "beans": ("streaming", "downloaded", "local"),
    "luma": ("remote files", "files", "files"),
    "humaneval": ("streaming", "loaded", "loaded"),
}


@pytest.mark.parametrize("name", MODES)
def test_named_dataset_is_read_as_its_files_allow(found, name):
    assert tuple(found[name, way].mode for way in WAYS) == MODES[name]


@pytest.mark.parametrize("name", ["financial_phrasebank", "logiqa"])
def test_loading_scripts_are_read_from_the_parquet_copy_of_their_configuration(found, hub, name):
    told = found[name, "streamed"]
    repo = {"financial_phrasebank": "takala/financial_phrasebank", "logiqa": "lucasmccabe/logiqa"}[name]
    config = {"financial_phrasebank": "sentences_allagree", "logiqa": "default"}[name]
    assert told.plan["revision"] == hub.commit(repo, "refs/convert/parquet")
    assert all(f"/{config}/train/" in shard for shard in told.plan["shards"])


@pytest.mark.parametrize(("name", "repo"), [("logiqa", "lucasmccabe/logiqa"), ("beans", "AI-Lab-Makerere/beans")])
def test_cache_remembers_the_branch_that_was_downloaded_and_no_other(found, downloads, hub, name, repo):
    refs = downloads / "home" / "hub" / f"datasets--{repo.replace('/', '--')}" / "refs"
    branch = "main" if name == "beans" else "refs/convert/parquet"
    (kept,) = [path for path in refs.rglob("*") if path.is_file()]
    assert kept.relative_to(refs).as_posix() == branch
    assert kept.read_text() == hub.commit(repo, branch)


@pytest.mark.parametrize("name", ["clotho_aqa", "ds1000"])
def test_split_that_is_lacking_is_mapped_with_one_notice(found, name):
    used = {"clotho_aqa": "clotho_aqa_val_filtered", "ds1000": "test"}[name]
    plan = found[name, "streamed"].plan
    assert plan["split"] == used
    notices = [notice for notice in plan["notices"] if "has no split 'train'" in notice]
    assert len(notices) == 1
    assert repr(used) in notices[0]


def test_plan_says_where_the_name_was_found_and_no_token(found):
    plan = found["financial_phrasebank", "streamed"].plan
    assert plan["name"] == "financial_phrasebank"
    assert plan["resolved"]["dataset"] == "takala/financial_phrasebank"
    assert plan["resolved"]["load"] == {"name": "sentences_allagree"}


def test_next_place_is_taken_where_the_first_does_not_exist(tmp_path):
    root = tmp_path / "hub"
    write_named(root, "humaneval")
    (root / "openai").mkdir()
    (root / "code-rag-bench/humaneval").rename(root / "openai/openai_humaneval")
    (root / "openai/openai_humaneval/humaneval.json").rename(root / "openai/openai_humaneval/test.jsonl")
    with serve(root) as hub:
        told, other, wrong = ask_named(
            hub,
            [
                ("humaneval", {"is_downloaded": True}),
                ("financial_phrasebank", {}),
                ("humaneval", {"split": "nonsense"}),
            ],
            tmp_path,
        )
    assert told.plan["resolved"]["dataset"] == "openai/openai_humaneval"
    assert told.plan["split"] == "test"
    assert "read from openai/openai_humaneval, since there is no code-rag-bench/humaneval" in told.told()
    assert text_in(samples_of(told)[1]["text"]) == "".join(expected("humaneval", 1).values())
    assert other.error["type"] == "DatasetNotFoundError"
    assert wrong.error["type"] == "SplitNotFoundError"


def test_users_configuration_split_and_columns_come_before_the_catalogs(hub, tmp_path):
    config, columns, whole = ask_named(
        hub,
        [
            ("financial_phrasebank", {"load": {"name": "sentences_50agree"}}),
            ("humaneval", {"columns": {"text": "entry_point"}}),
            ("luma", {"all_columns": True}),
        ],
        tmp_path,
    )
    assert all("/sentences_50agree/" in shard for shard in config.plan["shards"])
    assert [text_in(sample["text"]) for sample in samples_of(columns)] == ["f0", "f1", "f2"]
    assert [row["tts_label"] for row in whole.rows] == ["eleven"] * NUM_ROWS
    assert [row["path"]["bytes"] for row in whole.rows] == [sound(i) for i in range(NUM_ROWS)]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the datasets of {DATA}")
def test_datasets_at_hand_are_read_by_their_short_names(tmp_path):
    with serve(DATA) as hub:
        every = ask_named(hub, [(name, {}) for name in ("humaneval", "beans", "open_platypus", "luma")], tmp_path)
    assert [told.plan["num_rows"] for told in every] == [164, 240, 4975, 120]
    samples = samples_of(every[0], max_text_length=10_000)
    for row, sample in zip(every[0].rows, samples, strict=True):
        assert (
            text_in(sample["text"])
            == row["prompt"] + ("" if row["prompt"].endswith("\n") else "\n") + row["canonical_solution"]
        )
        answer = sample["labels"][sample["labels"] != -100]
        assert text_in(answer) == row["canonical_solution"]


def test_rows_are_those_of_the_files(found):
    assert [row["options"] for row in found["logiqa", "streamed"].rows] == [row["options"] for row in rows_of("logiqa")]
