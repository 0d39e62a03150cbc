"""The demo's embedded datasets: made once, complete, as the Hub lays them out."""

from __future__ import annotations

import io
import multiprocessing
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shmloader.cli import demo_data
from shmloader.cli.demo_data import DATA_VERSION, DemoFolders, DemoSizes, default_cache, demo_folders
from shmloader.cli.demo_pictures import CLASS_NAMES, draw_jpeg
from shmloader.cli.demo_text import MAX_CHARACTERS, MIN_CHARACTERS, write_text

SMALL = DemoSizes(
    train_images=24, validation_images=6, image_shards=2, train_texts=250, validation_texts=20, text_shards=2
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folders(cache: Path) -> DemoFolders:
    return demo_folders(cache, sizes=SMALL)


def _load(folder: Path, cache: Path, split: str) -> Any:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return datasets.load_dataset(str(folder), split=split, cache_dir=str(cache / "hf"))


def test_defaults_are_large_enough() -> None:
    """The demo promises 600 pictures and 2,000 texts."""
    assert DemoSizes().train_images >= 600
    assert DemoSizes().train_texts >= 2000
    assert DemoSizes().image_shards > 1


@pytest.mark.parametrize(("split", "rows"), [("train", 24), ("validation", 6)])
def test_images_load_with_datasets(folders: DemoFolders, tmp_path: Path, split: str, rows: int) -> None:
    """`load_dataset` finds the splits, the Image and the ClassLabel, and each row decodes."""
    loaded = _load(folders.images, tmp_path, split)
    assert loaded.num_rows == rows
    assert loaded.features["label"].names == list(CLASS_NAMES)
    for row in loaded:
        assert row["image"].mode == "RGB"
        assert min(row["image"].size) > 200


@pytest.mark.parametrize(("split", "rows"), [("train", 250), ("validation", 20)])
def test_texts_load_with_datasets(folders: DemoFolders, tmp_path: Path, split: str, rows: int) -> None:
    """`load_dataset` finds the splits and the one column of text."""
    loaded = _load(folders.text, tmp_path, split)
    assert loaded.column_names == ["text"]
    assert loaded.num_rows == rows


def test_shards_are_cut_into_row_groups(folders: DemoFolders) -> None:
    """Several shards, row groups of at most 100 rows, and features in the schema."""
    files = sorted((folders.text / "data").glob("train-*.parquet"))
    assert [file.name for file in files] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    meta = pq.read_metadata(files[0])
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [100, 25]
    assert b"huggingface" in pq.read_schema(files[0]).metadata


def test_card_tells_the_truth(folders: DemoFolders) -> None:
    """The counts of the card are those of the files."""
    card = (folders.images / "README.md").read_text()
    assert "num_examples: 24" in card
    assert "num_examples: 6" in card
    files = [*(folders.images / "data").iterdir()]
    assert f"download_size: {sum(file.stat().st_size for file in files)}\n" in card


@pytest.mark.parametrize("label", range(len(CLASS_NAMES)))
def test_pictures_follow_from_their_seed(label: int) -> None:
    """The same seed draws the same file, another seed another one, both the size of a photograph."""
    first, again, other = (draw_jpeg(label, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert 15_000 < len(first) < 200_000
    assert Image.open(io.BytesIO(first)).format == "JPEG"


def test_texts_follow_from_their_seed_and_vary_in_length() -> None:
    """Within the promised lengths, hardly ever twice the same."""
    rng, again = random.Random(3), random.Random(3)
    texts = [write_text(rng) for _ in range(500)]
    assert texts == [write_text(again) for _ in range(500)]
    lengths = [len(text) for text in texts]
    assert min(lengths) >= MIN_CHARACTERS
    assert max(lengths) <= MAX_CHARACTERS
    assert max(lengths) > 8 * min(lengths)
    assert Counter(texts).most_common(1)[0][1] < 5


def test_second_use_makes_nothing(cache: Path, folders: DemoFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is used as it is, without a notice."""
    monkeypatch.setattr(demo_data, "_build", _fail)
    assert demo_folders(cache, _fail, SMALL) == folders


def test_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No version folder and no rest of one, so that the next use starts afresh."""
    monkeypatch.setattr(demo_data, "_build_text", _fail)
    with pytest.raises(RuntimeError, match="not now"):
        demo_folders(tmp_path, sizes=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_rest_of_a_killed_build_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that a killed builder left is gone after the next build."""
    rest = tmp_path / ".building-abc"
    (rest / "demo-images").mkdir(parents=True)
    monkeypatch.setattr(demo_data, "_build_images", lambda folder, sizes: folder.mkdir())
    demo_folders(tmp_path, sizes=SMALL)
    assert not rest.exists()
    assert (tmp_path / DATA_VERSION).is_dir()


def test_concurrent_first_uses_build_once(tmp_path: Path) -> None:
    """Four processes ask at once: all get complete folders, one made them."""
    context = multiprocessing.get_context("spawn")
    notices = context.SimpleQueue()
    processes = [context.Process(target=_ask, args=(tmp_path, notices)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert "making" in notices.get()
    assert notices.empty()


def test_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """XDG_CACHE_HOME where it is absolute, else ~/.cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "shmloader" / "demo"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "shmloader" / "demo"


def _ask(cache: Path, notices: Any) -> None:
    folders = demo_folders(cache, notices.put, SMALL)
    assert len([*(folders.images / "data").iterdir()]) == 3
    assert (folders.text / "README.md").is_file()


def _fail(*args: Any) -> None:
    raise RuntimeError("not now")
