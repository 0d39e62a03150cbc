"""Epochs under random kills, end to end: every sample comes once an epoch and is right, and nothing stays behind.

``SHMLOADER_SOAK_S`` says how many seconds all of it lasts. The dice are seeded; kills are paced by commits.
"""

from __future__ import annotations

import gc
import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support_leaks import Leaks
from support_sets import kill, marked, png, prefetchers_of, roles, wait_for_end, wait_until
from torch.utils.data import DataLoader, RandomSampler

from shmloader import MultimodalConfig, Options, ShmMultimodalDataset
from shmloader.processors.image import IMAGENET_MEAN, IMAGENET_STD

SECONDS = float(os.environ.get("SHMLOADER_SOAK_S", "10"))
pytestmark = [
    pytest.mark.timeout(int(10 * SECONDS) + 200),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # more workers than cores
    pytest.mark.filterwarnings("ignore:.* in an order that the prefetchers do not know:UserWarning"),
]

NUM_ROWS = 400
SIDE = 16
CONFIG = MultimodalConfig(vision_dim=SIDE, max_text_length=128)
#: Half of what the samples take, most of it transit.
OPTIONS = Options(ring_bytes="320KiB", in_flight=48, ahead=16, prefetchers=2, timeout_s=60)
COMMITS_PER_KILL = (40, 250)


def text_of(row: int) -> str:
    return f"row {row} " + "äx" * (row * 7 % 37)


def write_rows(folder: Path) -> str:
    """Pictures of one colour, texts, and the number of the row."""
    rows = list(range(NUM_ROWS))
    pictures = [{"bytes": png(row), "path": None} for row in rows]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(pictures, kind), "label": rows, "text": [text_of(row) for row in rows]})
    features = {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}
    features["text"] = {"dtype": "string", "_type": "Value"}
    folder.mkdir()
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=16)
    return str(folder)


def check(batch: dict[str, Any]) -> list[int]:
    """The rows of a batch, each byte of which is what belongs there."""
    rows: list[int] = batch["labels"].tolist()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = ((batch["image"] * std + mean) * 255).round().to(torch.int64)
    for row, colours, ids, mask in zip(rows, pixels, batch["text"], batch["attention_mask"], strict=True):
        assert colours.shape == (3, SIDE, SIDE)
        assert colours.unique().tolist() == [row % 256], f"row {row}"
        assert bytes(ids[mask.bool()].tolist()).decode() == text_of(row)
        assert not ids[~mask.bool()].any()
    return rows


class Killer:
    """Kills somebody whenever so many samples more were made as the dice say."""

    def __init__(self, dataset: ShmMultimodalDataset, rng: random.Random) -> None:
        self.dataset, self.rng = dataset, rng
        self.killed: Counter[str] = Counter()
        self.due = 0
        self._wait()

    def _wait(self) -> None:
        self.due = self.dataset.stats().commits + self.rng.randint(*COMMITS_PER_KILL)

    def is_due(self) -> bool:
        return self.dataset.stats().commits >= self.due

    def strike(self, role: str, pids: Iterable[int]) -> None:
        victims = list(pids)
        self.killed[role] += len(victims)
        kill(*victims)  # torch's SIGCHLD handler may raise here
        for victim in victims:
            wait_for_end(victim)
        self._wait()

    def strike_a_service(self) -> None:
        """The supervisor, a prefetcher, or both prefetchers at once."""
        how = self.rng.choice(["supervisor", "prefetcher", "prefetchers"])
        if how == "supervisor":
            self.strike(how, roles(self.dataset.stats().service_pids).get("supervisor", []))
        else:
            living = prefetchers_of(self.dataset)
            self.rng.shuffle(living)
            self.strike("prefetcher", living[: 1 if how == "prefetcher" else 2])


def loader(dataset: ShmMultimodalDataset, rng: random.Random, least_workers: int = 0) -> DataLoader[Any]:
    """One of the ways in which an epoch is read."""
    own = dataset.sampler(shuffle=rng.random() < 0.7, seed=rng.randrange(100))
    foreign = RandomSampler(dataset, generator=torch.Generator().manual_seed(rng.randrange(100)))
    sampler: Any = own if rng.random() < 0.7 else foreign
    return DataLoader(dataset, rng.choice([8, 16]), sampler=sampler, num_workers=rng.randint(least_workers, 3))


@contextmanager
def soaked(tmp_path: Path) -> Iterator[ShmMultimodalDataset]:
    """A set of which nothing is left in the end."""
    name = write_rows(tmp_path / "d")
    arguments = {"dataset_name": name, "config": CONFIG, "options": OPTIONS}
    with ShmMultimodalDataset(**arguments) as dataset:  # the first of a process opens what stays
        list(DataLoader(dataset, 16, num_workers=1))
    gc.collect()
    with marked() as kin:
        leaks = Leaks(kin)
        with ShmMultimodalDataset(**arguments) as dataset:
            yield dataset
            check_set(dataset)
        leaks.check()


def check_set(dataset: ShmMultimodalDataset) -> None:
    """No row was lost, nothing of the killed is left, and the memory is in order."""
    stats, segment = dataset.stats(), dataset._reader.attach().segment
    assert (stats.samples_bad, 0 < stats.transit_bytes < stats.ring_bytes) == (0, True)
    wait_until(lambda: segment.reap(True) >= 0 and dataset.stats().num_workers == 0)
    assert segment.check() is None
    assert segment.wanted(NUM_ROWS) == []


def report(capsys: pytest.CaptureFixture[str], num_epochs: int, killed: Counter[str]) -> None:
    with capsys.disabled():
        print(f"\n  {num_epochs} epochs, killed: {dict(killed)}")


def test_epochs_are_complete_while_services_are_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed, num_epochs, until = 1, 0, monotonic() + SECONDS / 2
    rng = random.Random(seed)
    with soaked(tmp_path) as dataset:
        killer = Killer(dataset, rng)
        while monotonic() < until or num_epochs < 2 or sum(killer.killed.values()) < 4:
            rows: list[int] = []
            for batch in loader(dataset, rng):
                rows += check(batch)
                if killer.is_due():
                    killer.strike_a_service()
            assert sorted(rows) == list(range(NUM_ROWS)), f"epoch {num_epochs} with seed {seed}"
            num_epochs += 1
    report(capsys, num_epochs, killer.killed)


def test_epochs_after_a_worker_was_killed_are_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed, num_epochs, until = 2, 0, monotonic() + SECONDS / 2
    rng = random.Random(seed)
    with soaked(tmp_path) as dataset:
        killer = Killer(dataset, rng)
        while monotonic() < until or num_epochs < 2:
            batches: Any = iter(loader(dataset, rng, least_workers=1))
            last = rng.randrange(4)
            with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):  # noqa: PT012 (by torch's SIGCHLD handler)
                for number, batch in enumerate(batches):
                    check(batch)
                    if number == last:
                        killer.strike("worker", [rng.choice(batches._workers).pid])
            del batches, batch
            rows = [row for batch in loader(dataset, rng) for row in check(batch)]
            assert sorted(rows) == list(range(NUM_ROWS)), f"epoch {num_epochs} with seed {seed}"
            num_epochs += 1
    report(capsys, num_epochs, killer.killed)
