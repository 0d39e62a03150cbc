"""Sets with a small ring and few prefetchers."""

from __future__ import annotations

from typing import Any

from shmloader import Options, ShmMultimodalDataset


def make(name: Any, **kwargs: Any) -> ShmMultimodalDataset:
    options = Options(ring_bytes="8MiB", prefetchers=kwargs.pop("prefetchers", 2), timeout_s=40)
    return ShmMultimodalDataset(dataset_name=name, **{"options": options, **kwargs})
