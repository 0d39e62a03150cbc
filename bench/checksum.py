"""What an epoch delivered, in a few numbers that do not depend on the order of its samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench.workload import BATCH_SIZE, Workload

#: Pillow's and the loader's resizing differ; see shmloader.cli.plain.MAX_IMAGE_DIFFERENCE. Of 255.
_MAX_MEAN_DIFFERENCE = 1.0


@dataclass
class Checksum:
    """Of all bytes of all samples.

    digest: sum over the samples of a hash of all their fields, which belong together. touched: sum of the element that
    the measured loop reads. sums, num_items: of each field, for variants that need not agree in every bit.
    """

    num_samples: int = 0
    digest: int = 0
    touched: int = 0
    sums: tuple[int, ...] = ()
    num_items: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Checksum:
        """What `dataclasses.asdict` gave, once through JSON, which has no tuples."""
        lists = {name: tuple(fields[name]) for name in ("sums", "num_items")}
        return cls(**(fields | lists))

    def add(self, batch: Mapping[str, Any], workload: Workload) -> None:
        """Take a batch in. Reads all of it."""
        tensors = [batch[name] for name in workload.fields]
        rows = len(tensors[0])
        hashes = torch.zeros(rows, dtype=torch.int64)
        for tensor in tensors:
            hashes = hashes * 1_000_003 + _row_hashes(tensor.reshape(rows, -1))
        self.num_samples += rows
        self.digest = (self.digest + int((hashes * hashes).sum())) % 2**64
        self.touched += int(tensors[0][workload.touched].sum())
        before = self.sums or (0,) * len(tensors)
        self.sums = tuple(b + int(t.sum()) for b, t in zip(before, tensors, strict=True))
        counted = self.num_items or (0,) * len(tensors)
        self.num_items = tuple(n + t.numel() for n, t in zip(counted, tensors, strict=True))

    def agrees(self, reference: Checksum, is_exact: bool) -> bool:
        """Whether it is the reference's: to the bit, or (a field of bytes) in the mean."""
        if self.num_samples != reference.num_samples or self.num_items != reference.num_items:
            return False
        if is_exact:
            return self.digest == reference.digest and self.touched == reference.touched
        first = abs(self.sums[0] - reference.sums[0]) / max(1, self.num_items[0])
        return first <= _MAX_MEAN_DIFFERENCE and self.sums[1:] == reference.sums[1:]


def reference(workload: Workload) -> Checksum:
    """The checksum of an epoch that has every sample once."""
    arrays = [workload.array(name, "c") for name in workload.fields]
    found = Checksum()
    for start in range(0, workload.num_samples, BATCH_SIZE):
        parts = (torch.from_numpy(array[start : start + BATCH_SIZE]) for array in arrays)
        found.add(dict(zip(workload.fields, parts, strict=True)), workload)
    return found


def _row_hashes(rows: torch.Tensor) -> torch.Tensor:
    """A number for each row, with wrap-around: every element counts with a weight of its own."""
    words = rows.contiguous()
    if words.dtype == torch.uint8 and words.shape[1] % 8 == 0:
        words = words.view(torch.int64)
    words = words.to(torch.int64)
    weights = torch.arange(1, words.shape[1] + 1, dtype=torch.int64) * 0x5851_F42D_4C95_7F2D + 1
    # The upper half folded in: else the product of a byte would only reach the bits above its own.
    words = words * weights
    return (words ^ (words >> 32)).sum(1)
