"""What stands in for rows while a Hub cannot be reached, and that they come once it can."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import opened, wait_until
from hub import Hub, serve
from hub_faults import Fault
from support_parquet import write_card, write_texts
from torch.utils.data import DataLoader

from shmloader import Options
from shmloader.errors import SourceError

ROWS = 30
OPTIONS = {"ring_bytes": "8MiB", "prefetchers": 1, "timeout_s": 60, "source_timeout_s": 1.0}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with three files of ten rows, of which the second has been planned and cannot be fetched any more."""
    with serve(tmp_path / "hub") as running:
        for i in range(3):
            texts = [f"text {row}" for row in range(10 * i, 10 * i + 10)]
            write_texts(running.root / "org" / "texts", texts, name=f"train-{i:05}.parquet")
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        with opened("org/texts", options=Options(**OPTIONS)) as dataset:
            dataset[list(range(ROWS))]
        second = [path for method, path, _ in running.requests if method == "GET" and path.endswith("1.parquet")]
        # The last one was for its rows.
        running.faults.add(Fault(status=503, method="GET", path="1.parquet$", first=len(second) - 1, times=None))
        yield running


def test_rows_at_hand_stand_in_while_a_hub_fails_and_the_rows_come_once_it_does_not(hub):
    with opened("org/texts", on_error="skip", max_bad=0.0, options=Options(**OPTIONS)) as dataset:
        dataset[[*range(10), *range(20, 30)]]
        texts = [bytes(ids.tolist()).decode() for ids in dataset[[5, 12, 15, 25]]["text"]]
        assert [text.rstrip("\0") for text in texts] == ["text 5", "text 20", "text 21", "text 25"]
        assert dataset.quarantine == []
        hub.faults.clear()
        assert wait_until(lambda: all(dataset._reader.attach().are_at_hand(range(ROWS))))
        loader = DataLoader(dataset, batch_size=6, num_workers=2)
        found = [bytes(ids.tolist()).decode().rstrip("\0") for batch in loader for ids in batch["text"]]
        assert found == [f"text {row}" for row in range(ROWS)]


def test_who_waits_far_behind_where_a_file_that_is_read_in_order_breaks_off_is_told(tmp_path, monkeypatch):
    """For a row of a chunk that nobody comes to while the Hub fails."""
    num_rows = 64 * 100
    with serve(tmp_path / "hub") as running:
        path = running.root / "org" / "lines" / "data" / "train-0.jsonl"
        path.parent.mkdir(parents=True)
        write_card(running.root / "org" / "lines", num_rows)  # or it would be downloaded, to be counted
        path.write_text("".join(json.dumps({"text": f"text {row}".ljust(250)}) + "\n" for row in range(num_rows)))
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        with opened("org/lines", options=Options(**OPTIONS)) as dataset:
            assert len(dataset) == num_rows
        running.faults.add(Fault(status=503, method="GET", path="jsonl$", times=None))
        with opened("org/lines", options=Options(**OPTIONS)) as dataset:
            with pytest.raises(SourceError, match=r"train-0\.jsonl.*given up"):
                dataset[num_rows - 1]
            running.faults.clear()
            text = bytes(dataset[num_rows - 1]["text"].tolist()).decode()
            assert text.rstrip("\0 ") == f"text {num_rows - 1}"
