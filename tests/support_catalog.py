"""Named datasets for tests, as the catalog describes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from shmloader.catalog import DatasetConfig, Repo
from shmloader.sources.base import SourceRequest

LEAVES = DatasetConfig(
    name="leaves",
    repos=(Repo("org/leaves"),),
    columns={"image": "image", "labels": "labels"},
    task_type="vision",
    class_names=("spot", "rust", "healthy"),
)
QUESTIONS = DatasetConfig(
    name="questions",
    repos=(Repo("org/questions"),),
    columns={"text": ["context", "query.plain"], "audio": "clip"},
    task_type="audio_text",
)
CHOICES = DatasetConfig(
    name="choices",
    repos=(Repo("org/choices"),),
    columns={"text": "query", "target": "options[correct]"},
    task_type="text",
)


def request_of(entry: DatasetConfig, split: str = "train", **changes: Any) -> SourceRequest:
    """What is asked for by the name of ``entry``."""
    return SourceRequest(entry.name, split, entry=entry, **changes)


@contextmanager
def known(entry: DatasetConfig) -> Iterator[str]:
    """The name of ``entry``, which ``dataset_name=`` stands for it in the block."""

    def select(dataset_name: Any, task_type: Any, request: SourceRequest) -> tuple[SourceRequest, ...]:
        assert dataset_name == entry.name
        return (replace(request, dataset=dataset_name, entry=entry),)

    with mock.patch("shmloader.dataset.select", select), mock.patch("shmloader.iterable.select", select):
        yield entry.name
