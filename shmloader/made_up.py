"""Samples that are made up in the likeness of another: what ``on_error="synthetic"`` gives for a bad row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shmloader.prefetch.plan import SetPlan
from shmloader.sources.base import SYNTHETIC
from shmloader.views import Sample


def made_up(like: Sample, plan: SetPlan, row: int) -> Sample:
    """A sample in the place of ``row``: private tensors with the dtypes and shapes of ``like``.

    What is in them are the values of ``like`` (so token ids are of the vocabulary, and pixels as pixels are), shuffled
    by a seed of (source, row). Fields of one shape are shuffled alike: labels that are the tokens still are. A class is
    drawn. Text becomes "synthetic", and ``source`` ends in " (synthetic)".
    """
    attachment = like._attachment
    assert attachment is not None
    face, classes, origin = attachment.face, plan.class_names(row), plan.origin(row)
    seed = f"{origin['source']}\0{origin['row']}"
    items: dict[str, Any] = {}
    for key, value in like.items():
        if isinstance(value, torch.Tensor):
            is_class = key == face.labels and classes and value.numel() == 1
            items[key] = _drawn(value, seed, len(classes)) if is_class else _shuffled(value, seed)
        elif key == face.source_name:
            items[key] = f"{value}{SYNTHETIC}"
        else:
            items[key] = "synthetic" if key in face.index else value
    made = Sample(items)
    made._attachment = attachment  # for the padding that the schema says
    return made


def _shuffled(value: torch.Tensor, seed: str) -> torch.Tensor:
    order = _random(seed, value.shape).permutation(value.numel())
    return value.reshape(-1)[torch.from_numpy(order)].reshape(value.shape)


def _drawn(value: torch.Tensor, seed: str, num_classes: int) -> torch.Tensor:
    return torch.full_like(value, int(_random(seed, ()).integers(num_classes)))


def _random(seed: str, shape: Sequence[int]) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}\0{tuple(shape)}".encode(), digest_size=16, person=b"shmloader bad").digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
