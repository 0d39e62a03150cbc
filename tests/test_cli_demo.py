"""`shmloader demo`: what it measures, checks and says. The dataset is a stand-in that keeps no promises."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.data._utils.collate import default_collate_fn_map

import shmloader
from shmloader.cli import demo, demo_data, main
from shmloader.cli.demo_data import DemoFolders, DemoSizes, demo_folders
from shmloader.cli.demo_epochs import DemoRun, SeededOrder, measure
from shmloader.cli.demo_progress import EpochProgress
from shmloader.cli.demo_report import format_bytes, words
from shmloader.cli.plain import PlainConfig, PlainDataset, collate_plain, differences, open_plain
from shmloader.errors import SplitNotFoundError

SMALL = DemoSizes(
    train_images=20, validation_images=4, image_shards=2, train_texts=40, validation_texts=4, text_shards=2
)


class StandInSample(dict[str, torch.Tensor]):
    """What a stock DataLoader collates as the loader would."""


class StandIn(torch.utils.data.Dataset[StandInSample]):
    """`ShmMultimodalDataset` as far as the demo knows it, over a plain decode; ``fault`` spoils samples."""

    commits_per_sample = 1
    transit_bytes = 0
    fault: Any = None

    def __init__(self, config: Any, *, split: str, dataset_name: str) -> None:
        if split not in ("train", "validation"):
            raise SplitNotFoundError(f"no split {split}", split=split)
        self._plain = open_plain(dataset_name, split, PlainConfig.of(config))

    def __len__(self) -> int:
        return len(self._plain)

    def __getitem__(self, index: int) -> StandInSample:
        sample = StandInSample(self._plain[index])
        if self.fault is not None:
            type(self).fault(sample)
        return sample

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(
            num_rows=len(self),
            commits=len(self) * self.commits_per_sample,
            ring_bytes=10**9,
            ring_used_bytes=len(self) * 150_528,
            transit_bytes=self.transit_bytes,
            service_pids=[],
            batches_in_slots=1,
            batches_copied=0,
            batch_backed_bytes=0,
            batches_inline=0,
        )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> DemoFolders:
    return demo_folders(tmp_path_factory.mktemp("cache"), sizes=SMALL)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[StandIn]:
    """The public API, replaced by the stand-in; `datasets` keeps its cache in a folder of the test."""
    config = SimpleNamespace(vision_dim=32, image_dtype="float32", max_text_length=200)
    monkeypatch.setattr(shmloader, "MultimodalConfig", lambda: config, raising=False)
    monkeypatch.setattr(shmloader, "ShmMultimodalDataset", StandIn, raising=False)
    monkeypatch.setattr(StandIn, "fault", None)
    monkeypatch.setattr(StandIn, "commits_per_sample", 1)
    monkeypatch.setattr(StandIn, "transit_bytes", 0)
    monkeypatch.setitem(default_collate_fn_map, StandInSample, _collate)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    return StandIn


def _collate(samples: list[Any], *, collate_fn_map: Any = None) -> dict[str, Any]:
    return {**collate_plain(samples), "source": ["stand-in"] * len(samples)}


def _spoil_pixels(sample: StandInSample) -> None:
    sample["image"] = sample["image"] + 0.1


def _spoil_label(sample: StandInSample) -> None:
    sample["labels"] = sample["labels"] + 1


def _spoil_text(sample: StandInSample) -> None:
    sample["text"] = sample["text"].clone()
    sample["text"][-1] = 7


def _run(folder: Path, workers: int = 0, epochs: int = 2, batch_size: int = 8) -> Any:
    run = DemoRun(str(folder), "train", workers, epochs, batch_size)
    return measure(run, Console(file=io.StringIO(), width=120))


@pytest.mark.parametrize("workers", [0, 2])
def test_equal_batches_pass(stand_in: type[StandIn], folders: DemoFolders, workers: int) -> None:
    """Both datasets: all epochs counted, some samples checked, nothing found, every worker seen."""
    for folder, num_rows in ((folders.images, 20), (folders.text, 40)):
        outcome = _run(folder, workers)
        assert outcome.differences == []
        assert [epoch.num_samples for epoch in outcome.epochs] == [num_rows] * 2
        assert [epoch.num_samples for epoch in outcome.plain_epochs] == [num_rows] * 2
        assert outcome.num_checked >= 16
        assert set(outcome.fields) == ({"image", "labels"} if num_rows == 20 else {"text", "attention_mask", "labels"})
        assert len(outcome.memory.workers) == workers


@pytest.mark.parametrize(
    ("fault", "said"),
    [(_spoil_pixels, "image differs from Pillow"), (_spoil_label, "labels is"), (_spoil_text, "text is 7 at position")],
)
def test_differing_batches_fail(stand_in: type[StandIn], folders: DemoFolders, fault: Any, said: str) -> None:
    """What differs is named, with its epoch and row."""
    stand_in.fault = fault
    outcome = _run(folders.text if fault is _spoil_text else folders.images, epochs=1)
    assert outcome.differences
    assert all(what.startswith("epoch 1, row ") and said in what for what in outcome.differences)


def test_second_decode_of_a_sample_fails(stand_in: type[StandIn], folders: DemoFolders) -> None:
    """Each sample is decoded once, or the demo says that it was not."""
    stand_in.commits_per_sample = 2
    assert _run(folders.images, epochs=1).differences == ["40 samples were decoded, but there are 20"]


@pytest.mark.parametrize(("decodes", "is_right"), [(2, True), (0.5, False)])
def test_samples_that_do_not_fit_the_ring_may_be_decoded_again_but_none_is_left_out(
    stand_in: type[StandIn], folders: DemoFolders, decodes: float, is_right: bool
) -> None:
    stand_in.commits_per_sample, stand_in.transit_bytes = decodes, 10**6  # type: ignore[assignment]
    assert bool(_run(folders.images, epochs=1).differences) is not is_right


def test_command_shows_tables_and_succeeds(
    stand_in: type[StandIn], folders: DemoFolders, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --dataset both embedded datasets run, and the exit code is 0."""
    monkeypatch.setattr(demo_data, "demo_folders", lambda **options: folders)
    assert main(["demo", "--workers", "0", "--epochs", "2", "--batch-size", "8"]) == 0
    out = capsys.readouterr().out
    assert "epoch 2 of 2" in out
    for title in ("demo-images", "demo-text", "decodes per sample", "bytes in the ring", "one cache per worker"):
        assert title in out
    assert "Every sample was decoded once" in out


def test_command_fails_where_samples_differ(
    stand_in: type[StandIn], folders: DemoFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, and what differs is printed."""
    stand_in.fault = _spoil_label
    arguments = ["demo", "--dataset", str(folders.images), "--workers", "0", "--epochs", "1"]
    assert main(arguments) == demo.DIFFERS
    assert "DIFFERS: epoch 1, row" in capsys.readouterr().out


def test_command_reports_errors_in_one_line(
    stand_in: type[StandIn], folders: DemoFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error of the package is a message on stderr, without a traceback."""
    assert main(["demo", "--dataset", str(folders.images), "--split", "tset"]) == demo.FAILED
    assert capsys.readouterr().err == "shmloader demo: SplitNotFoundError: no split tset\n"


def test_ctrl_c_leaves_cleanly(
    stand_in: type[StandIn], folders: DemoFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 130 and one word."""

    def interrupt(sample: StandInSample) -> None:
        raise KeyboardInterrupt

    stand_in.fault = interrupt
    assert main(["demo", "--dataset", str(folders.images), "--workers", "0"]) == demo.INTERRUPTED
    assert capsys.readouterr().out.endswith("interrupted\n")


@pytest.mark.parametrize("arguments", [["--workers", "-1"], ["--epochs", "0"], ["--batch-size", "many"]])
def test_bad_arguments_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The option, the value and what is allowed."""
    with pytest.raises(SystemExit):
        main(["demo", *arguments])
    assert f"argument {arguments[0]}: '{arguments[1]}' is not a whole number from" in capsys.readouterr().err


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    """`shmloader --version`."""
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == "shmloader 0.1.0\n"


def test_order_has_every_row_once_and_differs_by_epoch() -> None:
    """Seeded, a permutation, and `current` is the one that runs."""
    order, again = SeededOrder(100), SeededOrder(100)
    first, second = list(order), list(order)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert order.current == second
    assert list(again) == first


def test_missing_fields_and_wrong_shapes_are_told() -> None:
    """A batch that lacks a field, and one of another dtype, are differences, not errors."""
    rows = _Rows([{"text": "ab"}, {"text": "abc"}])
    plain = PlainDataset(rows, SimpleNamespace(text="text", image=None, audio=None, labels=None), PlainConfig())
    right = collate_plain([plain[0], plain[1]])
    assert right["labels"].tolist() == [[97, 98, -100], [97, 98, 99]]
    assert set(right) == plain.fields
    assert differences(right, [0, 1], plain) == []
    assert differences({"text": right["text"]}, [0, 1], plain)[0].startswith("the batch lacks labels")
    wrong = {**right, "text": right["text"].int()}
    assert differences(wrong, [0, 1], plain) == ["text is int32 [2, 3], but should be int64 [2, 3]"]


class _Rows(list[dict[str, Any]]):
    def select_columns(self, names: list[str]) -> _Rows:
        return self


def test_terminal_gets_a_bar_and_a_file_gets_lines() -> None:
    """The same facts in both."""
    for terminal in (True, False):
        file = io.StringIO()
        with EpochProgress(Console(file=file, force_terminal=terminal, width=100), "epoch 1", 10) as progress:
            progress.advance_to(4)
            progress.advance_to(10)
        assert "epoch 1" in file.getvalue()
        assert "10/10" in file.getvalue()
        assert ("━" in file.getvalue()) == terminal


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (90_400_000, "90.4 MB"), (361_200_000, "361 MB"), (6.1e9, "6.1 GB")],
)
def test_bytes_are_readable(num_bytes: float, text: str) -> None:
    """Two or three digits and a unit."""
    assert format_bytes(num_bytes) == text


def test_words_are_honest_about_a_slower_loader(stand_in: type[StandIn], folders: DemoFolders) -> None:
    """A ratio below 1 is not told as a gain."""
    outcome = _run(folders.text)
    outcome.epochs[1] = type(outcome.epochs[1])(40, 2.0, 1.0)
    outcome.plain_epochs[1] = type(outcome.epochs[1])(40, 1.0, 1.0)
    assert "0.5 times" in words([outcome])
    assert "costs too little" in words([outcome])


def test_clips_and_conversations_are_decoded_directly() -> None:
    """What `shmloader` makes of them, made in another way."""
    from support_audio import encoded, sound

    from shmloader import decode_audio

    clip = encoded(sound(0.2, 8000, 2), 8000)
    turns = [{"role": "user", "content": "hi"}, {"from": "gpt", "value": "yo"}]
    rows = _Rows([{"clip": {"bytes": clip, "path": None}, "turns": turns}])
    columns = SimpleNamespace(text="turns", image=None, audio="clip", labels=None)
    sample = PlainDataset(rows, columns, PlainConfig(max_audio_length=5000))[0]
    assert sample["audio"].tolist() == decode_audio(clip, num_samples=5000).tolist()
    assert bytes(sample["text"].tolist()) == b"user: hi\nassistant: yo"
