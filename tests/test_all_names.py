"""All named datasets as one set, from a Hub that has them as the real one does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import opened, small_options
from hub import Hub, serve
from named_data import NUM_ROWS, expected, write_named
from torch.utils.data import DataLoader

from shmloader import MultimodalConfig
from shmloader.catalog import BUILT_IN

NAMES = [config.name for config in BUILT_IN]
CONFIG = MultimodalConfig(vision_dim=8, max_audio_length=1600)
VISION, AUDIO = ("beans",), ("clotho_aqa", "luma")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("hub")
    write_named(root)
    with serve(root) as running:
        yield running


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # of a machine with fewer cores
@pytest.mark.parametrize("use_streaming", [True, False])
def test_all_through_four_workers_yields_each_sample_once(
    hub: Hub, use_streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    came: list[tuple[str, str, Any]] = []
    with opened(
        "all", config=CONFIG, use_streaming=use_streaming, fallback="error", options=small_options()
    ) as dataset:
        assert [source["name"] for source in dataset.sources] == NAMES
        assert len(dataset) == NUM_ROWS * len(NAMES)
        for batch in DataLoader(dataset, batch_size=5, shuffle=True, num_workers=4):
            for i, source in enumerate(batch["source"]):
                text = bytes(batch["text"][i][batch["attention_mask"][i].bool()].tolist()).decode()
                learnt = [label for label in batch["labels"][i].tolist() if label != -100]
                came.append((source, text, tuple(learnt)))
                assert bool(batch["image_mask"][i]) is (source in VISION)
                assert bool(batch["audio_mask"][i]) is (source in AUDIO)
                assert bool(batch["image"][i].any()) <= (source in VISION)
            assert batch["task_type"] == [_task_type(source) for source in batch["source"]]
    assert Counter(came) == Counter(_expected(name, i) for name in NAMES for i in range(NUM_ROWS))


def _task_type(source: str) -> str:
    return "vision" if source in VISION else "audio_text" if source in AUDIO else "text"


def _expected(name: str, i: int) -> tuple[str, str, Any]:
    """Source, text, and the labels that are learnt."""
    right = expected(name, i)
    if "answer" in right:
        return name, right["prompt"] + right["answer"], tuple(right["answer"].encode())
    text = right.get("text", "")
    return name, text, (right["labels"],) if "labels" in right else tuple(text.encode())


def test_a_seeded_mixture_has_its_proportions(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    names = ["humaneval", "prosocial_dialog"]
    with opened(names, weights={"humaneval": 3, "prosocial_dialog": 1}, options=small_options()) as dataset:
        counts: Counter[str] = Counter()
        for epoch in range(64):
            dataset.set_epoch(epoch)
            counts.update(sample["source"] for sample in dataset.__getitems__(range(len(dataset))))
    total = 64 * NUM_ROWS * len(names)
    assert sum(counts.values()) == total
    assert abs(counts["humaneval"] - 0.75 * total) <= 2 + 256 / 4  # what `Mixture` promises
    assert torch.tensor(list(counts.values())).min() > 0
