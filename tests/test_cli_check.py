"""``shmloader check``: tries what is promised, reports each, and fails if one is not kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import serve
from named_data import write_named

STEPS = ("streaming", "download", "automatic selection", "errors", "bad rows", "fallbacks")


def check(endpoint: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    more = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "COLUMNS": "200", "SHMLOADER_SOURCE_TIMEOUT_S": "3"}
    return subprocess.run(
        [sys.executable, "-m", "shmloader", "check", "--workers", "0", *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, **more},
        check=False,
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_all_that_is_promised_is_tried_and_reported(tmp_path: Path, home: Path) -> None:
    root = tmp_path / "hub"
    write_named(root, "humaneval", "open_platypus")
    with serve(root) as hub:
        done = check(hub.endpoint, home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [
        line.split("  ")[1].split(" (")[0] for line in done.stdout.splitlines() if line.startswith("passed")
    ] == list(STEPS)
    assert "all 6 checks passed" in done.stdout


def test_a_promise_that_is_not_kept_is_named_and_the_exit_status_is_1(tmp_path: Path, home: Path) -> None:
    root = tmp_path / "hub"
    write_named(root, "open_platypus")
    with serve(root) as hub:
        done = check(hub.endpoint, home, "org/nowhere")
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert [line.split("  ")[1].split(" (")[0] for line in failed] == ["streaming", "download"]
    assert "2 of 6 checks failed: streaming, download" in done.stdout
    assert "org/nowhere" in done.stdout
