"""What each variant is: something that yields shuffled batches of a workload, epoch after epoch.

Each is written as a user would write it, with a stock ``torch.utils.data.DataLoader`` where it has one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bench.workload import BATCH_SIZE, IMAGE_SIDE, TEXT_LENGTH, Workload

Batch = Mapping[str, torch.Tensor]

OURS, TENSORS, MEMMAP, DECODE, GATHER = (
    "shmloader",
    "TensorDataset",
    "np.memmap",
    "decode each epoch",
    "one-buffer gather",
)
#: In the order of the table.
VARIANTS = (OURS, TENSORS, MEMMAP, DECODE, GATHER)


class Loader(Protocol):
    """A variant, opened. Used in one process, by one thread."""

    def epoch(self) -> Iterator[Any]:
        """The batches of one epoch, in a new order. A batch may be overwritten once the next is asked for."""

    def fields(self, batch: Any) -> Batch:
        """The batch as a dict with the workload's field names; not called for every batch in the measured loop."""

    def first(self, batch: Any) -> torch.Tensor:
        """The workload's first field of ``batch``."""

    def service_pids(self) -> list[int]:
        """Processes at work for this loader that are not children of this one."""

    def facts(self) -> dict[str, Any]:
        """What else is worth recording, at the end."""

    def close(self) -> None:
        """Called once, last."""


@dataclass
class StockLoader:
    """A dataset behind a stock DataLoader. names: of the items, where samples are tuples."""

    loader: DataLoader[Any]
    first_key: Any
    names: tuple[str, ...] | None = None
    services: Callable[[], list[int]] = list
    get_facts: Callable[[], dict[str, Any]] = dict
    at_close: Callable[[], object] = field(default=lambda: None)

    def epoch(self) -> Iterator[Any]:
        return iter(self.loader)

    def fields(self, batch: Any) -> Batch:
        if self.names is None:
            found: Batch = batch
            return found
        return dict(zip(self.names, batch, strict=True))

    def first(self, batch: Any) -> torch.Tensor:
        found: torch.Tensor = batch[self.first_key]
        return found

    def service_pids(self) -> list[int]:
        return self.services()

    def facts(self) -> dict[str, Any]:
        return self.get_facts()

    def close(self) -> None:
        self.at_close()


def open_loader(variant: str, workload: Workload, num_workers: int) -> Loader:
    """Open ``variant`` over ``workload``; the gather has no workers."""
    return _OPEN[variant](workload, num_workers)


def _stock(dataset: Any, num_workers: int, collate: Callable[[Any], Any] | None = None) -> DataLoader[Any]:
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # more workers than cores: on purpose
    return DataLoader(
        dataset,
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=collate,
    )


def _open_ours(workload: Workload, num_workers: int) -> Loader:
    from shmloader import MultimodalConfig, ShmMultimodalDataset

    config = MultimodalConfig(vision_dim=IMAGE_SIDE, max_text_length=TEXT_LENGTH, image_dtype="uint8")
    dataset = ShmMultimodalDataset(config, dataset_name=str(workload.folder))

    def facts() -> dict[str, Any]:
        stats = dataset.stats()
        return {
            "decodes_per_sample": stats.commits / workload.num_samples,
            "batches_in_slots": stats.batches_in_slots,
            "batches_copied": stats.batches_copied,
            "batches_inline": stats.batches_inline,
        }

    return StockLoader(
        _stock(dataset, num_workers),
        workload.fields[0],
        services=lambda: dataset.stats().service_pids,
        get_facts=facts,
        at_close=dataset.close,
    )


def _open_tensors(workload: Workload, num_workers: int) -> Loader:
    tensors = [torch.from_numpy(workload.array(name)) for name in workload.fields]
    return StockLoader(_stock(TensorDataset(*tensors), num_workers), 0, workload.fields)


class MemmapDataset(Dataset[tuple[torch.Tensor, ...]]):
    """Each sample read from the mapped files. Copy-on-write, since torch has no read-only tensors."""

    def __init__(self, workload: Workload) -> None:
        self.arrays = [workload.array(name, "c") for name in workload.fields]

    def __len__(self) -> int:
        return len(self.arrays[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_numpy(array[index, ...]) for array in self.arrays)


def _open_memmap(workload: Workload, num_workers: int) -> Loader:
    return StockLoader(_stock(MemmapDataset(workload), num_workers), 0, workload.fields)


def _open_decode(workload: Workload, num_workers: int) -> Loader:
    """HF map-style: Pillow decodes and resizes, texts become their bytes, at every read."""
    from shmloader.cli.plain import PlainConfig, collate_plain, open_plain

    config = PlainConfig(image_size=IMAGE_SIDE, image_dtype="uint8", max_text_length=TEXT_LENGTH)
    dataset = open_plain(str(workload.folder), "train", config)
    return StockLoader(_stock(dataset, num_workers, collate_plain), workload.fields[0])


class GatherLoader:
    """One process on one core that copies each sample of a batch into one buffer per field: the upper bound."""

    def __init__(self, workload: Workload) -> None:
        torch.set_num_threads(1)  # two threads are not faster at it
        self._names = workload.fields
        self._data = [torch.from_numpy(workload.array(name)) for name in workload.fields]
        self._out = [torch.empty((BATCH_SIZE, *data.shape[1:]), dtype=data.dtype) for data in self._data]

    def epoch(self) -> Iterator[list[torch.Tensor]]:
        for rows in torch.split(torch.randperm(len(self._data[0])), BATCH_SIZE):
            batch = [out[: len(rows)] for out in self._out]
            for data, out in zip(self._data, batch, strict=True):
                torch.index_select(data, 0, rows, out=out)
            yield batch

    def fields(self, batch: list[torch.Tensor]) -> Batch:
        return dict(zip(self._names, batch, strict=True))

    def first(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return batch[0]

    def service_pids(self) -> list[int]:
        return []

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


_OPEN: dict[str, Callable[[Workload, int], Loader]] = {
    OURS: _open_ours,
    TENSORS: _open_tensors,
    MEMMAP: _open_memmap,
    DECODE: _open_decode,
    GATHER: lambda workload, _: GatherLoader(workload),
}
