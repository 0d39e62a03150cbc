"""`python -m bench order`: that it measures what it says, and agrees with theory where there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench.order import BUFFER_ROWS, REFERENCE, THEORY, UNIFORM, measure, through_buffer

ROOT = Path(__file__).resolve().parent.parent
NUM_ROWS = 20_000


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A small run, of two seeds."""
    out = tmp_path_factory.mktemp("results")
    sizes = ["--rows", str(NUM_ROWS), "--seeds", "2", "--windows", "10MiB,1GiB"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "order", *sizes, "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.json")
    content = json.loads(file.read_text())
    rows = {result["variant"]: result["median"] for result in content["results"]}
    return SimpleNamespace(content=content, rows=rows, folder=out, text=done.stdout)


def test_run_records_every_order(report: SimpleNamespace) -> None:
    """Ours, the reference and the buffers in the JSON and the table, each of all rows; where it ran; and a picture."""
    variants = list(report.rows)
    assert variants[:2] == [REFERENCE, UNIFORM]
    assert len(variants) == 6
    assert all(result["is_right"] and len(result["runs"]) == 2 for result in report.content["results"])
    assert all(variant in report.text for variant in variants)
    assert report.content["settings"]["rows"] == NUM_ROWS
    assert "commit" in report.content["host"]
    assert len(list(report.folder.glob("*.png"))) == 1


@pytest.mark.parametrize("variant", [REFERENCE, UNIFORM])
def test_a_uniform_order_agrees_with_theory(report: SimpleNamespace, variant: str) -> None:
    """Quantiles of the gaps, no serial correlation, and 63 of the other rows share a batch with a row."""
    figures = report.rows[variant]
    for share, expected in THEORY.items():
        assert figures[f"gap_{share:g}"] == pytest.approx(expected, abs=0.03)
    assert abs(figures["serial_correlation"]) < 4 / NUM_ROWS**0.5
    expected = 63 / (NUM_ROWS - 1)
    assert figures["neighbours_in_a_batch"] == pytest.approx(expected, abs=4 * (expected / NUM_ROWS) ** 0.5)


def test_a_window_parts_neighbours_by_no_more_than_itself(report: SimpleNamespace) -> None:
    """A small one leaves them near, a larger one less so."""
    small, large = (figures for variant, figures in report.rows.items() if "window" in variant)
    assert small["gap_0.5"] < large["gap_0.5"] < report.rows[UNIFORM]["gap_0.95"]
    assert small["neighbours_in_a_batch"] > large["neighbours_in_a_batch"]
    assert small["chunks_in_a_batch"] < large["chunks_in_a_batch"]


def test_a_buffer_gives_every_row_once_and_none_too_early() -> None:
    """What is given out was filled in before; short sources are shuffled as a whole."""
    for num_rows in (0, 1, 500, BUFFER_ROWS, 5000):
        rows = through_buffer(np.arange(num_rows), 1)
        assert sorted(rows.tolist()) == list(range(num_rows))
        assert (rows <= np.arange(num_rows) + BUFFER_ROWS).all()


def test_an_order_that_is_not_one_of_all_rows_is_told() -> None:
    """A row twice, another one never."""
    assert measure("right", lambda seed: np.arange(10), 10, 2, 1).is_right
    assert not measure("wrong", lambda seed: np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 8]), 10, 2, 1).is_right


def test_figures_are_those_of_a_source_as_it_lies() -> None:
    """Neighbours are one apart, and a chunk of 64 rows fills a batch."""
    figures = measure("as it lies", lambda seed: np.arange(640), 640, 64, 1).runs[0]
    assert figures["gap_0.5"] == pytest.approx(3 / 640)
    assert figures["serial_correlation"] == pytest.approx(1)
    assert figures["neighbours_in_a_batch"] == pytest.approx(630 / 639)
    assert figures["chunks_in_a_batch"] == 1
