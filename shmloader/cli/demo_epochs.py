"""The demo's work: epochs through shmloader and through a plain DataLoader, timed alike, with checks."""

from __future__ import annotations

import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader, Sampler

import shmloader
from shmloader.cli.demo_progress import EpochProgress
from shmloader.cli.memory import JobMemory, job_memory

if TYPE_CHECKING:  # imports `datasets`, which would count as memory of the training process
    from shmloader.cli.plain import PlainDataset

_SEED = 0
#: Batches of each epoch that are kept and checked afterwards (few: they hold slots of the batch ring).
_CHECKED_BATCHES = 2


@dataclass(frozen=True)
class DemoRun:
    """What to run."""

    dataset: str
    split: str
    num_workers: int
    num_epochs: int
    batch_size: int


@dataclass(frozen=True)
class Epoch:
    """One timed pass. ``first_batch_s`` counts from its start: workers, prefetchers and all."""

    num_samples: int
    seconds: float
    first_batch_s: float

    @property
    def samples_per_s(self) -> float:
        """Over the whole pass."""
        return self.num_samples / self.seconds


@dataclass
class Outcome:
    """What a run gave.

    stats: `ShmMultimodalDataset.stats` after the last epoch. memory: the largest total that was seen, each time
    with the last batch of an epoch just delivered and all processes at work. differences: to what should be, one
    text each; none if all is well. fields: what was compared. opened_s, plain_opened_s: until ``len()`` was known.
    """

    run: DemoRun
    epochs: list[Epoch]
    stats: Any
    memory: JobMemory
    differences: list[str]
    plain_epochs: list[Epoch] = field(default_factory=list)
    fields: tuple[str, ...] = ()
    num_checked: int = 0
    opened_s: float = 0.0
    plain_opened_s: float = 0.0


class SeededOrder(Sampler[int]):
    """Every row once, in another order each epoch; `current` is the order of the epoch that runs."""

    def __init__(self, num_rows: int, seed: int = _SEED) -> None:
        self.current: list[int] = []
        self._num_rows = num_rows
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[int]:
        self.current = torch.randperm(self._num_rows, generator=self._generator).tolist()
        return iter(self.current)


class _Kept:
    """Batches on disk until they are checked: held in memory, they would be counted as the loader's."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._entries: list[tuple[int, list[int], Path]] = []

    def add(self, epoch: int, indices: list[int], batch: dict[str, Any]) -> None:
        file = self._folder / f"{len(self._entries)}.pt"
        torch.save(batch, file)
        self._entries.append((epoch, indices, file))

    def check(self, outcome: Outcome, plain: PlainDataset) -> None:
        """Compare them all with a direct decode, and put what was found into ``outcome``."""
        from shmloader.cli.plain import differences

        for epoch, indices, file in self._entries:
            batch = torch.load(file)
            outcome.fields = tuple(name for name in batch if name in plain.fields)
            outcome.num_checked += len(indices)
            outcome.differences += [f"epoch {epoch}, {what}" for what in differences(batch, indices, plain)]


def measure(run: DemoRun, console: Console) -> Outcome:
    """Run the epochs; shows progress on ``console``.

    shmloader goes first: what `datasets` downloads for the other would spare it the streaming.

    Raises:
        ShmloaderError: the dataset cannot be loaded.
    """
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # more workers than cores: on purpose
    config = shmloader.MultimodalConfig()
    with tempfile.TemporaryDirectory() as folder:
        kept = _Kept(folder)
        started = time.perf_counter()
        with shmloader.ShmMultimodalDataset(config, split=run.split, dataset_name=run.dataset) as dataset:
            opened_s = time.perf_counter() - started
            outcome = _measure_shared(dataset, run, console, kept)
        outcome.opened_s = opened_s
        started = time.perf_counter()
        from shmloader.cli.plain import PlainConfig, open_plain

        plain = open_plain(run.dataset, run.split, PlainConfig.of(config))
        outcome.plain_opened_s = time.perf_counter() - started
        if outcome.stats.num_rows != len(plain):
            outcome.differences.append(
                f"the dataset has {outcome.stats.num_rows} samples, but should have {len(plain)}"
            )
        else:
            kept.check(outcome, plain)
    outcome.plain_epochs = _measure_plain(plain, run, console)
    return outcome


def _measure_shared(dataset: Any, run: DemoRun, console: Console, kept: _Kept) -> Outcome:
    order = SeededOrder(len(dataset))
    loader = _loader(dataset, order, run)
    choice = random.Random(_SEED)
    memories: list[JobMemory] = []
    epochs, found = [], []

    def at_end() -> None:
        memories.append(job_memory(dataset.stats().service_pids))

    for number in range(1, run.num_epochs + 1):
        chosen = set(choice.sample(range(len(loader)), min(_CHECKED_BATCHES, len(loader))))
        with EpochProgress(console, f"shmloader         epoch {number} of {run.num_epochs}", len(dataset)) as progress:
            epoch, batches = run_epoch(loader, progress, chosen, at_end)
        epochs.append(epoch)
        if epoch.num_samples != len(dataset):
            found.append(f"epoch {number} gave {epoch.num_samples} samples of {len(dataset)}")
        while batches:
            position, batch = batches.pop()
            kept.add(number, order.current[position * run.batch_size :][: run.batch_size], batch)
    stats = dataset.stats()
    if stats.commits < len(dataset) or (stats.transit_bytes == 0 and stats.commits > len(dataset)):  # of 0 all fit
        found.append(f"{stats.commits} samples were decoded, but there are {len(dataset)}")
    memory = max(memories, key=lambda seen: seen.total.total_bytes)
    return Outcome(run, epochs, stats, memory, found)


def _measure_plain(plain: PlainDataset, run: DemoRun, console: Console) -> list[Epoch]:
    from shmloader.cli.plain import collate_plain

    loader = _loader(plain, SeededOrder(len(plain)), run, collate_plain)
    epochs = []
    for number in range(run.num_epochs):
        with EpochProgress(
            console, f"plain DataLoader  epoch {number + 1} of {run.num_epochs}", len(plain)
        ) as progress:
            epoch, _ = run_epoch(loader, progress)
        epochs.append(epoch)
    return epochs


def _loader(dataset: Any, order: SeededOrder, run: DemoRun, collate: Callable[[Any], Any] | None = None) -> Any:
    return DataLoader(
        dataset,
        batch_size=run.batch_size,
        sampler=order,
        num_workers=run.num_workers,
        persistent_workers=run.num_workers > 0,
        collate_fn=collate,
    )


def run_epoch(
    loader: Any,
    progress: EpochProgress,
    kept: set[int] | frozenset[int] = frozenset(),
    at_end: Callable[[], object] = lambda: None,
) -> tuple[Epoch, list[tuple[int, dict[str, Any]]]]:
    """One timed pass over ``loader``, and the batches at the positions ``kept``.

    at_end: called with the last batch in hand and the clock stopped, while all workers are still there.
    """
    num_samples, first_batch_s, seconds = 0, 0.0, 0.0
    batches = []
    started = time.perf_counter()
    for position, batch in enumerate(loader):
        seconds = time.perf_counter() - started
        first_batch_s = first_batch_s or seconds
        num_samples += len(next(iter(batch.values())))
        if position in kept:
            batches.append((position, batch))
        progress.advance_to(num_samples)
        if position == len(loader) - 1:
            at_end()
    return Epoch(num_samples, seconds, first_batch_s), batches
