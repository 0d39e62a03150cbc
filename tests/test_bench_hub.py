"""`python -m bench hub`: that it counts what the Hub sent, and notices rows that are missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_run_records_bytes_and_waits(tmp_path: Path) -> None:
    sizes = ["--workers", "2", "--rows", "300", "--epochs", "2", "--timeouts", "1.5"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "hub", *sizes, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("hub-*.json")
    report = json.loads(file.read_text())
    share = {one["variant"]: one["sent_bytes"] / one["num_bytes"] for one in report["bytes"]}
    assert [one["num_rows"] for one in report["bytes"]] == [600, 600]
    assert 1 <= share["shmloader"] <= 1.05
    assert share["datasets"] >= 2  # an epoch, a pass
    (dead,) = report["dead"]
    assert min(dead["batch_s"], dead["error_s"]) >= 1.5
    assert (dead["error"], dead["is_synthetic"]) == ("SourceError", True)
    assert "datasets" in done.stdout
