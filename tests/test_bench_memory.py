"""`python -m bench memory`: that it measures, checks and tells what grows. How much it is, is not for a test."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench.memory import (
    FEW_BYTES,
    MIB,
    ROW_BYTES,
    CountLetters,
    _verdict,
    _write_tar,
    most_shared_bytes,
    private_bytes,
)

ROOT = Path(__file__).resolve().parent.parent


def test_every_source_is_measured_and_right(tmp_path: Path) -> None:
    sizes = ["--sources", "parquet", "--sizes", "2MiB,4MiB", "--group", "1MiB", "--prefetchers", "1"]
    sizes += ["--runs", "2"]
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
        for name in ("prefetcher_bytes", "services_bytes", "shared_bytes"):
            assert result[name] == max(peak[name] for peak in result["peaks"])
        assert len(result["peaks"]) == 2
    assert "bounded" in done.stdout


FEW = {"source": "jsonl", "prefetchers": 2, "chunk_bytes": 32 * MIB, "is_open": False}
FEW |= {"prefetcher_bytes": 200 * MIB, "shared_bytes": 64 * MIB}
SMALL = {**FEW, "prefetcher_bytes": 300 * MIB, "shared_bytes": 400 * MIB}


@pytest.mark.parametrize(
    ("name", "grown", "is_bounded"),
    [
        ("prefetcher", -200, True),
        ("prefetcher", 0, True),
        ("prefetcher", 2 * 32 + 32, True),  # two chunks, and what the allocators keep
        ("prefetcher", 2 * 32 + 33, False),
        ("shared", -200, True),
        ("shared", 2 * 2 * 32 + 64, True),  # two chunks of each prefetcher, and an extent
        ("shared", 2 * 2 * 32 + 65, False),
        ("shared", 1500, False),
    ],
)
def test_what_grows_with_the_source_is_told(name: str, grown: int, is_bounded: bool) -> None:
    large = {**SMALL, f"{name}_bytes": SMALL[f"{name}_bytes"] + grown * MIB}
    verdict = _verdict(FEW, SMALL, large)
    assert (verdict["growth_bytes"][name], verdict["is_bounded"]) == (grown * MIB, is_bounded)


@pytest.mark.parametrize("name", ["prefetcher", "shared"])
def test_what_takes_more_than_its_bound_is_told_although_it_does_not_grow(name: str) -> None:
    most = {
        # two chunks, what is read ahead of them, what the allocator keeps; beyond that of a few rows
        "prefetcher": (200 + 2 * 32 + 20 + 256) * MIB,
        # 3 chunks for an order, 2 to fill, 2 of each of 2 prefetchers; a gap before each, and one more; 3 extents
        "shared": ((2 * 9 + 1) * 32 + 3 * 64) * MIB,
    }
    for beyond, is_bounded in ((0, True), (MIB, False)):
        same = {**SMALL, f"{name}_bytes": most[name] + beyond}
        assert _verdict(FEW, same, same)["is_bounded"] is is_bounded


def test_of_a_stream_is_kept_what_is_fetched_ahead() -> None:
    num_kept = 128 // 4 + 2 * 2
    stream = {**SMALL, "chunk_bytes": 4 * MIB, "is_open": True}
    assert most_shared_bytes(stream) == ((2 * num_kept + 1) * 4 + 3 * 64) * MIB


def test_each_row_of_an_archive_has_its_number_and_its_text(tmp_path: Path) -> None:
    assert _write_tar(tmp_path / "data.tar", 3 * ROW_BYTES, 0) == 3
    with tarfile.open(tmp_path / "data.tar") as archive:
        members = {member.name: archive.extractfile(member).read().decode() for member in archive}
    os.mkfifo(tmp_path / "gate")
    gate = os.open(tmp_path / "gate", os.O_RDWR)
    count_letters = CountLetters(tmp_path / "gate")
    for row in range(3):
        sample = {"index": int(members[f"{row:08d}.index"]), "text": members[f"{row:08d}.text"]}
        assert count_letters(sample) == {"number": row, "length": ROW_BYTES - row}
    assert len(members) == 6
    os.close(gate)


def test_the_private_memory_of_a_process_is_its_own() -> None:
    before = private_bytes(os.getpid())
    # Mapped by itself: the allocator may have pages at hand that are counted already.
    with mmap.mmap(-1, 32 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block[:] = b"x" * len(block)
        assert private_bytes(os.getpid()) - before > 24 * MIB
    assert private_bytes(2**22 + 1) == 0
