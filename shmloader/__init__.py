"""shmloader: one decoded copy of every sample per node, behind a stock ``torch.utils.data.DataLoader``.

    from torch.utils.data import DataLoader
    from shmloader import ShmMultimodalDataset

    dataset = ShmMultimodalDataset(dataset_name="AI-Lab-Makerere/beans", split="train")
    for batch in DataLoader(dataset, batch_size=64, shuffle=True, num_workers=8):
        batch["image"]

Importing the package runs nothing else; torch is imported with the first use of the dataset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shmloader.errors import ShmloaderError

if TYPE_CHECKING:
    from shmloader.catalog import DatasetConfig, Repo
    from shmloader.config import MultimodalConfig
    from shmloader.dataset import ShmMultimodalDataset
    from shmloader.iterable import ShmMultimodalIterableDataset
    from shmloader.options import Options
    from shmloader.processors.audio import decode_audio
    from shmloader.processors.image import decode_image
    from shmloader.registry import register_dataset
    from shmloader.stats import Stats

__version__ = "0.1.0"

__all__ = [
    "DatasetConfig",
    "MultimodalConfig",
    "Options",
    "Repo",
    "ShmMultimodalDataset",
    "ShmMultimodalIterableDataset",
    "ShmloaderError",
    "Stats",
    "__version__",
    "decode_audio",
    "decode_image",
    "register_dataset",
]

_HOMES = {
    "DatasetConfig": "shmloader.catalog",
    "MultimodalConfig": "shmloader.config",
    "Options": "shmloader.options",
    "Repo": "shmloader.catalog",
    "ShmMultimodalDataset": "shmloader.dataset",
    "ShmMultimodalIterableDataset": "shmloader.iterable",
    "Stats": "shmloader.stats",
    "decode_audio": "shmloader.processors.audio",
    "decode_image": "shmloader.processors.image",
    "register_dataset": "shmloader.registry",
}


def __getattr__(name: str) -> Any:
    # The services import this package too, and must not pay for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'shmloader' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
