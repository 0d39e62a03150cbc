"""For tests of a dataset of rows that are known: what becomes of one, and which rows some batches hold."""

from __future__ import annotations

import sys
from typing import Any

import cloudpickle
import numpy as np
import torch
from conftest import NUM_ROWS

# The services need `make_row`, and not what is imported here: torch alone takes each of them two seconds.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

EVERY_ROW = list(range(NUM_ROWS))


def make_row(row: dict[str, Any]) -> dict[str, Any]:
    return {"x": row["x"], "block": np.full((2, 50), row["x"], np.float32), "tail": np.arange(row["x"] % 4)}


def rows_of(batches: Any) -> list[int]:
    """The rows of all batches, each of which must hold what belongs to its rows."""
    rows: list[int] = []
    for batch in batches:
        x = batch["x"].reshape(-1)
        assert torch.equal(batch["block"].reshape(-1, 2, 50)[:, 1, 49], x.float())
        rows += x.tolist()
    return rows
