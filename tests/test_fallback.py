"""What is taken in the place of a dataset that cannot be had as it was asked for."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import opened
from hub import Hub, serve
from hub_server import _Handler
from support_catalog import LEAVES, known, request_of
from support_hub import ask, write_json
from support_sets import write_table
from torch.utils.data import DataLoader

from shmloader import MultimodalConfig, ShmMultimodalDataset, ShmMultimodalIterableDataset
from shmloader.errors import DatasetNotFoundError, OptionError, SourceError
from shmloader.sources import fallback, make_plan
from shmloader.sources.base import Columns, SourcePlan, SourceRequest
from shmloader.sources.hub import NoRanges
from shmloader.sources.resolve import translated


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve(tmp_path / "hub") as running:
        yield running


def some_plan(request: SourceRequest) -> SourcePlan:
    schema = pa.schema({"text": pa.string()}).serialize().to_pybytes()
    mode = "downloaded" if request.is_downloaded else "streaming"
    return SourcePlan(str(request.dataset), request.split, mode, 1, (), (), Columns(text="text"), schema)


def failing(error: Exception, only_streaming: bool = False) -> Any:
    """A planner that raises ``error`` as the clients' libraries would."""

    def plan_entry(request: SourceRequest) -> SourcePlan:
        if only_streaming and request.is_downloaded:
            return some_plan(request)
        with translated(request, "open"):
            raise error

    return plan_entry


UNREACHABLE = ConnectionError("refused")
ANSWERS = [FileNotFoundError("no"), ValueError("a bad card"), PermissionError("gated")]


# ---- which way is taken -----------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["synthetic", "download", "error"])
def test_what_can_be_had_is_taken_as_it_is(monkeypatch, asked):
    monkeypatch.setattr(fallback, "plan_entry", some_plan)
    plan = fallback.plan_with_fallback(request_of(LEAVES, fallback=asked))
    assert (plan.mode, plan.why, plan.warnings) == ("streaming", None, ())


def test_what_cannot_be_reached_is_made_up_with_a_warning_that_says_so(monkeypatch):
    monkeypatch.setattr(fallback, "plan_entry", failing(UNREACHABLE))
    plan = fallback.plan_with_fallback(request_of(LEAVES))
    assert (plan.name, plan.mode) == ("leaves (synthetic)", "synthetic")
    assert "cannot be reached" in plan.why
    (warning,) = plan.warnings
    for part in ("SYNTHETIC DATA", "leaves (synthetic)", "fallback='error'", "refused"):
        assert part in warning


@pytest.mark.parametrize("asked", ["download", "error"])
def test_nothing_is_made_up_where_that_is_not_allowed(monkeypatch, asked):
    monkeypatch.setattr(fallback, "plan_entry", failing(UNREACHABLE))
    with pytest.raises(SourceError, match="cannot be reached"):
        fallback.plan_with_fallback(request_of(LEAVES, fallback=asked))


@pytest.mark.parametrize("error", ANSWERS, ids=lambda error: type(error).__name__)
def test_an_answer_is_an_error_whatever_is_allowed(monkeypatch, error):
    monkeypatch.setattr(fallback, "plan_entry", failing(error))
    with pytest.raises(SourceError):
        fallback.plan_with_fallback(request_of(LEAVES))


def test_of_an_id_outside_of_the_catalog_nothing_can_be_made_up_and_the_error_says_why(monkeypatch):
    monkeypatch.setattr(fallback, "plan_entry", failing(UNREACHABLE))
    with pytest.raises(SourceError, match=r"cannot be reached.*register_dataset.*fallback='error'") as caught:
        fallback.plan_with_fallback(SourceRequest("org/unknown", "train"))
    assert caught.value.dataset == "org/unknown"
    assert caught.value.endpoint


def test_a_local_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DatasetNotFoundError):
        make_plan(SourceRequest(str(tmp_path / "nothing"), "train"))


@pytest.mark.parametrize("why", [NotImplementedError("TAR cannot be streamed"), NoRanges("whole files only")])
@pytest.mark.parametrize("asked", ["synthetic", "download"])
def test_what_cannot_be_streamed_is_downloaded_with_a_notice(monkeypatch, why, asked):
    monkeypatch.setattr(fallback, "plan_entry", failing(why, only_streaming=True))
    plan = fallback.plan_with_fallback(request_of(LEAVES, fallback=asked))
    assert (plan.mode, plan.resolved) == ("downloaded", {"is_downloaded": True})
    assert str(why) in plan.why
    assert any("downloaded, since it cannot be streamed" in notice for notice in plan.notices)


def test_what_can_neither_be_streamed_nor_downloaded_is_made_up(monkeypatch):
    def plan_entry(request: SourceRequest) -> Any:
        return failing(UNREACHABLE if request.is_downloaded else NoRanges("whole files only"))(request)

    monkeypatch.setattr(fallback, "plan_entry", plan_entry)
    assert fallback.plan_with_fallback(request_of(LEAVES)).mode == "synthetic"
    with pytest.raises(SourceError, match="cannot be reached"):
        fallback.plan_with_fallback(request_of(LEAVES, fallback="download"))


def test_what_cannot_be_streamed_is_not_downloaded_where_that_is_not_allowed(monkeypatch):
    monkeypatch.setattr(fallback, "plan_entry", failing(NoRanges("whole files only"), only_streaming=True))
    with pytest.raises(SourceError, match=r"whole files only.*use_streaming=False"):
        fallback.plan_with_fallback(request_of(LEAVES, fallback="error"))


# ---- through a Hub ----------------------------------------------------------------------------------------


def test_a_server_that_gives_whole_files_only_has_them_downloaded(hub, tmp_path, monkeypatch):
    from support_parquet import write_texts

    texts = [f"text {i} " * 2000 for i in range(1000)]
    write_texts(hub.root / "org" / "texts", texts, row_group=100)
    monkeypatch.setattr(_Handler, "parse_request", _without_ranges(_Handler.parse_request))
    found = ask(hub, "org/texts", tmp_path)
    assert found.mode == "downloaded"
    assert "it ignores ranges" in found.plan["why"]
    assert [row["text"] for row in found.rows] == texts
    refused = ask(hub, "org/texts", tmp_path / "again", fallback="error").error
    assert (refused["type"], refused["data"]["dataset"]) == ("SourceError", "org/texts")
    assert "use_streaming=False" in refused["message"]


def _without_ranges(parse: Any) -> Any:
    def parse_request(self: Any) -> Any:
        parsed = parse(self)
        if parsed:
            del self.headers["Range"]
        return parsed

    return parse_request


def test_what_has_no_known_length_is_not_downloaded_unasked_where_that_is_not_allowed(hub, tmp_path):
    write_json(hub.root / "org" / "lines" / "train.jsonl", 0, 10)
    refused = ask(hub, "org/lines", tmp_path, fallback="error").error
    assert "fallback='error' forbids to download" in refused["message"]
    found = ask(hub, "org/lines", tmp_path, fallback="download")
    assert found.mode == "loaded"
    assert "no card tells how many rows" in found.plan["why"]


# ---- whole sets -------------------------------------------------------------------------------------------


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as entered:
        yield entered


@pytest.fixture
def dead_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A Hub whose port is closed; the services started in the test try for 3 s."""
    with serve(tmp_path) as gone:
        pass
    for name, value in (
        ("HF_ENDPOINT", gone.endpoint),
        ("HF_HOME", str(tmp_path)),
        ("SHMLOADER_SOURCE_TIMEOUT_S", "3"),
    ):
        monkeypatch.setenv(name, value)
    return gone.endpoint


def test_a_dataset_whose_hub_is_dead_is_made_up_and_every_sample_says_so(dead_hub, stack):
    with known(LEAVES) as name, pytest.warns(UserWarning, match=r"leaves: SYNTHETIC DATA.*fallback='error'"):
        dataset = stack.enter_context(opened(name, config=MultimodalConfig(vision_dim=32)))
    (source,) = dataset.sources
    assert (source["mode"], source["rows"], source["name"]) == ("synthetic", 1000, "leaves (synthetic)")
    assert dead_hub in source["why"]
    batch = next(iter(DataLoader(dataset, batch_size=8, num_workers=2)))
    assert batch["image"].shape == (8, 3, 32, 32)
    assert batch["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert batch["source"] == ["leaves (synthetic)"] * 8
    assert batch["task_type"] == ["vision"] * 8


def test_all_splits_of_a_dataset_are_made_up(monkeypatch, tmp_path, stack):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with pytest.warns(UserWarning, match="beans: SYNTHETIC DATA"):
        dataset = stack.enter_context(opened("beans", split="all"))
    assert len(dataset) == 3000  # train, validation, test


def test_each_of_several_datasets_falls_back_by_itself(monkeypatch, tmp_path, stack):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    own = write_table(tmp_path / "d", {"text": ["a", "b"]})
    with pytest.warns(UserWarning, match="beans: SYNTHETIC DATA"):
        dataset = stack.enter_context(opened(["beans", own]))
    assert [source["mode"] for source in dataset.sources] == ["synthetic", "local"]
    assert [source["why"] is None for source in dataset.sources] == [False, True]
    assert dataset[[0, 1000, 1001]]["source"] == ["beans (synthetic)", own, own]


@pytest.mark.parametrize("kind", [ShmMultimodalDataset, ShmMultimodalIterableDataset])
def test_offline_without_a_cache_fallback_error_raises(kind, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with known(LEAVES) as name, pytest.raises(SourceError, match="HF_HUB_OFFLINE"):
        kind(dataset_name=name, fallback="error")


def test_an_iterable_dataset_falls_back_too(monkeypatch, tmp_path, stack):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with known(LEAVES) as name, pytest.warns(UserWarning, match="SYNTHETIC DATA"):
        dataset = stack.enter_context(opened(name, ShmMultimodalIterableDataset, max_samples=10))
    assert [sample["source"] for sample in dataset] == ["leaves (synthetic)"] * 10


@pytest.mark.parametrize("value", ["never", None, True, "Error"])
def test_fallback_is_one_of_three_words(value, tmp_path):
    with pytest.raises(OptionError, match="'synthetic', 'download', 'error'") as caught:
        ShmMultimodalDataset(dataset_name=str(tmp_path), fallback=value)
    assert (caught.value.name, json.dumps(caught.value.allowed)) == ("fallback", '["synthetic", "download", "error"]')
