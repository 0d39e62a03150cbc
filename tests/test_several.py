"""Several datasets in one set: its rows, batches, errors and names, through whole sets."""

from __future__ import annotations

import pytest
from conftest import opened
from support_several import CONFIG, check_batch, check_sample, write_classes, write_clips, write_stories
from torch.utils.data import DataLoader

NUM = {"classes": 20, "stories": 50, "clips": 30}
TOTAL = sum(NUM.values())


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three datasets, in the order of `NUM`."""
    root = tmp_path_factory.mktemp("several")
    writers = {"classes": write_classes, "stories": write_stories, "clips": write_clips}
    return {kind: writers[kind](root / kind, num) for kind, num in NUM.items()}


def place(index: int, paths: dict[str, str]) -> tuple[str, int, str]:
    """(kind, row, source) of a sample of the whole."""
    for kind, num in NUM.items():
        if index < num:
            return kind, index, paths[kind]
        index -= num
    raise IndexError


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_sample_comes_once_with_exactly_what_its_own_dataset_has(paths, num_workers):
    with opened(list(paths.values()), config=CONFIG) as dataset:
        assert len(dataset) == TOTAL
        for index in (0, 19, 20, 69, 70, 99, -1):
            check_sample(dataset[index], *place(index % TOTAL, paths))
        seen = []
        loader = DataLoader(dataset, batch_size=9, num_workers=num_workers, sampler=dataset.sampler(seed=3))
        order = loader.sampler.order(0).rows(0, TOTAL).tolist()
        for batch in loader:
            indices = order[len(seen) : len(seen) + len(batch["source"])]
            check_batch(batch, [place(index, paths) for index in indices])
            seen += indices
        assert sorted(seen) == list(range(TOTAL))


def test_what_was_opened_is_told_of_each(paths):
    with opened(list(paths.values()), config=CONFIG) as dataset:
        assert dataset.name == " + ".join(paths.values())
        assert [source["name"] for source in dataset.sources] == list(paths.values())
        assert [source["rows"] for source in dataset.sources] == list(NUM.values())
        assert {source["mode"] for source in dataset.sources} == {"local"}
        assert [source["why"] for source in dataset.sources] == [None] * 3
        assert dataset.columns[paths["clips"]] == {"text": "text", "audio": "audio"}
        assert f"rows={TOTAL}" in repr(dataset)
