"""Batches of known content, and what the batch ring counts."""

from __future__ import annotations

import sys
from typing import Any

import cloudpickle
import numpy as np
import torch
from conftest import NUM_ROWS

from shmloader.tokens import batch_ring

cloudpickle.register_pickle_by_value(sys.modules[__name__])

BATCH = 10
NUM_BATCHES = NUM_ROWS // BATCH


def make_row(row: dict[str, Any]) -> dict[str, Any]:
    return {"x": row["x"], "block": np.full((3, 100), row["x"], np.float32), "word": row["word"]}


def slots() -> dict[str, int]:
    """The counters of this process's batch ring."""
    ring = batch_ring()
    assert ring is not None
    return ring.ring.stats()


def assert_right(batch: dict[str, Any], number: int) -> None:
    """It is the ``number``-th batch of an unshuffled epoch."""
    first = number * BATCH
    assert batch["x"].tolist() == list(range(first, first + BATCH))
    assert batch["block"].shape == (BATCH, 3, 100)
    assert torch.equal(batch["block"][:, 2, 99], batch["x"].float())
    assert batch["word"] == [f"w{i}" for i in range(first, first + BATCH)]
