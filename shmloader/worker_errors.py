"""What a DataLoader worker raises keeps its attributes on the way to the training process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.data import get_worker_info

from shmloader.errors import ShmloaderError, carry_data


@contextmanager
def carried() -> Iterator[None]:
    """In a worker, errors of this package that leave this block cross its queue with their ``data``."""
    try:
        yield
    except ShmloaderError as error:
        if get_worker_info() is not None:
            carry_data(error)
        raise
