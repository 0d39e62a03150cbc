"""`python -m bench memory`: that it measures, checks and tells what grows. How much it is, is not for a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.memory import FEW_BYTES, MIB, _verdict, private_bytes

ROOT = Path(__file__).resolve().parent.parent


def test_every_source_is_measured_and_right(tmp_path: Path) -> None:
    sizes = ["--sources", "parquet", "--sizes", "2MiB,4MiB", "--group", "1MiB", "--prefetchers", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "memory", *sizes, "--out", str(tmp_path), "--folder", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.iterdir()  # the data is gone
    report = json.loads(file.read_text())
    assert [result["bytes"] for result in report["results"]] == [FEW_BYTES, 2 * MIB, 4 * MIB]
    for result in report["results"]:
        assert result["is_right"]
        assert result["services_bytes"] > result["prefetcher_bytes"] > result["supervisor_bytes"] > 0
        assert result["shared_bytes"] > 0
        assert result["looks"] > 0
    assert "bounded" in done.stdout


@pytest.mark.parametrize(("grown", "is_bounded"), [(-200, True), (0, True), (120, True), (129, False), (1500, False)])
@pytest.mark.parametrize("name", ["prefetcher_bytes", "shared_bytes"])
def test_what_grows_with_the_source_is_told(name: str, grown: int, is_bounded: bool) -> None:
    small = {"source": "jsonl", "prefetchers": 2, "chunk_bytes": 32 * MIB}
    small |= {"prefetcher_bytes": 300 * MIB, "shared_bytes": 400 * MIB}
    large = {**small, name: small[name] + grown * MIB}
    assert _verdict(small, large)["is_bounded"] is is_bounded


def test_the_noise_of_allocators_is_no_growth() -> None:
    small = {"source": "jsonl", "prefetchers": 1, "chunk_bytes": MIB, "prefetcher_bytes": 0, "shared_bytes": 0}
    assert _verdict(small, {**small, "prefetcher_bytes": 20 * MIB})["is_bounded"]
    assert not _verdict(small, {**small, "prefetcher_bytes": 40 * MIB})["is_bounded"]


def test_the_private_memory_of_a_process_is_its_own() -> None:
    before = private_bytes(os.getpid())
    block = bytearray(os.urandom(1 << 16) * 512)
    assert private_bytes(os.getpid()) - before > 24 * MIB
    assert len(block) == 32 * MIB
    assert private_bytes(2**22 + 1) == 0
