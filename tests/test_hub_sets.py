"""Whole sets over a Hub that fails in mid-run, and what they fetch of one that does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import opened, small_options
from hub import Hub, serve
from hub_faults import Fault
from support_parquet import write_images
from support_sets import number, write_numbers
from torch.utils.data import DataLoader

from shmloader.errors import ReadError

ROWS = 640
CHUNK_ROWS = 64


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(tmp_path / "hub") as running:
        for name, value in {"ENDPOINT": running.endpoint, "HOME": str(tmp_path / "home"), "HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(f"HF_{name}", value)
        yield running


def numbers_of(loader: Any) -> list[int]:
    return [int(n) for batch in loader for n in batch["number"]]


def test_rows_are_exact_through_refusals_and_broken_bodies_at_random(hub):
    write_numbers(hub.root / "org" / "numbers", ROWS, CHUNK_ROWS)
    kinds = [Fault(429, {"Retry-After": "0"}, times=None), Fault(503, times=None)]
    kinds += [Fault(end=end, after=after, times=None) for end in ("cut", "reset") for after in (None, 700)]
    hub.faults.at_random(11, 0.3, *kinds)
    options = small_options(source_timeout_s=60.0)
    with opened("org/numbers", process=number, options=options) as dataset:
        loader = DataLoader(dataset, 16, num_workers=2, sampler=dataset.sampler(seed=1))
        for _ in range(2):
            assert sorted(numbers_of(loader)) == list(range(ROWS))
    assert len(hub.requests) > 12


def test_hub_that_dies_in_mid_run_and_comes_back(hub):
    """What is in the ring is served; what is missing is an error, which passes when the Hub is back."""
    folder = hub.root / "org" / "numbers"
    write_numbers(folder, ROWS, CHUNK_ROWS)
    (shard,) = folder.glob("*.parquet")
    shard.rename(folder / "train-00000-of-00002.parquet")
    write_more(folder / "train-00001-of-00002.parquet")
    hub.faults.add(Fault(end="stall", path="00001-of-00002", first=1, times=None))  # after its footer
    with opened("org/numbers", process=number, options=small_options(source_timeout_s=1.5, prefetchers=1)) as dataset:
        assert [int(dataset[i]["number"]) for i in range(ROWS)] == list(range(ROWS))
        hub.die()
        assert [int(dataset[i]["number"]) for i in range(ROWS)] == list(range(ROWS))
        with pytest.raises(ReadError, match="was given up") as caught:
            dataset[ROWS]
        assert caught.value.dataset == "org/numbers"
        assert "train-00001-of-00002.parquet" in caught.value.shard
        assert caught.value.endpoint == hub.endpoint
        hub.faults.clear()
        hub.live()
        assert int(until_it_is_back(dataset, ROWS)["number"]) == ROWS
        assert [int(dataset[i]["number"]) for i in range(2 * ROWS)] == list(range(2 * ROWS))


def write_more(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"number": list(range(ROWS, 2 * ROWS))}), path, row_group_size=CHUNK_ROWS)


def until_it_is_back(dataset: Any, row: int) -> Any:
    """The sample; what failed just before the Hub came back is an error once more."""
    while True:
        try:
            return dataset[row]
        except ReadError:
            continue


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("num_workers", [0, 2, 4])
def test_a_pass_fetches_no_more_than_the_datasets_bytes_whatever_the_number_of_workers(hub, num_workers, pictures):
    target = hub.root / "org" / "pictures" / "data" / "train-0.parquet"
    target.parent.mkdir(parents=True)
    target.symlink_to(pictures)
    size = pictures.stat().st_size
    assert size > 9 << 20
    with opened("org/pictures", options=small_options(ring_bytes="512MiB", window_bytes="64MiB")) as dataset:
        assert dataset.sources[0]["mode"] == "streaming"
        loader = DataLoader(dataset, 16, num_workers=num_workers, shuffle=True)
        labels = [int(label) for batch in loader for label in batch["labels"]]
        assert sorted(labels) == sorted(i % 2 for i in range(240))
        assert 0.9 * size < hub.num_bytes_of(".parquet") <= 1.05 * size


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    return write_images(folder, {"train-0.parquet": 240}, side=260, row_group=60) / "data" / "train-0.parquet"


def test_shards_that_several_prefetchers_read_are_fetched_once_between_them(hub):
    """Each is small enough to be fetched whole, and has row groups for both."""
    folder = write_images(
        hub.root / "org" / "pictures", {f"train-{i}.parquet": 60 for i in range(3)}, side=250, row_group=12
    )
    sizes = [path.stat().st_size for path in (folder / "data").iterdir()]
    assert max(sizes) < 8 << 20 < sum(sizes)
    with opened("org/pictures", options=small_options(ring_bytes="512MiB", prefetchers=2)) as dataset:
        labels = [int(label) for batch in DataLoader(dataset, 16, shuffle=True) for label in batch["labels"]]
        assert len(labels) == 180
        assert 0.9 * sum(sizes) < hub.num_bytes_of(".parquet") <= 1.05 * sum(sizes)
