"""The batch ring: where workers put batches, and the tokens that cross a worker's queue in their stead.

::

    worker:   lease = lease_slot(n) ─▶ gather into lease.part(...) ─▶ WorkerBatch ─▶ queue (pickled here: a token)
    trainer:  token unpickled ─▶ slot adopted ─▶ plain dict of tensors ─▶ the last tensor dies ─▶ slot is free

One batch ring per training process, for all of its datasets; made with the first of them, inherited by workers with
fork or handed over with spawn. Nobody ever waits for a slot: with none free a batch goes as bytes through the pipe.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch

import shmloader._native as native
from shmloader.errors import StaleTokenError
from shmloader.ring import memory_limits
from shmloader.views import Sample, WorkerBatch, tensor_over

#: Slots that one worker may have at once: two batches queued (prefetch_factor), one being filled, two that the training
#: loop holds, and one over.
MAX_SLOTS_PER_WORKER = 6
#: Of the smallest memory limit, for the slots of all workers of a process, and never more than this (guessed).
BUDGET_SHARE = 1 / 16
MAX_BUDGET_BYTES = 4 << 30
#: Address space per byte of budget: slots of outgrown sizes leave gaps in it, not in memory.
ADDRESSES_PER_BYTE = 4


@dataclass
class Counters:
    """How this process received its batches."""

    in_slots: int = 0
    copied: int = 0
    inline: int = 0


class BatchRing:
    """This process's handle to a batch ring."""

    def __init__(self, fd: int, uuid: str, role: int) -> None:
        self.fd = fd
        self.uuid = uuid
        self.mapping = native.Mapping(fd, os.fstat(fd).st_size, True, "batch ring")
        if role == native.OWNER:
            budget = min(int(memory_limits()[0] * BUDGET_SHARE), MAX_BUDGET_BYTES)
            native.format_batch(self.mapping, budget)
        self.ring = native.BatchRing(self.mapping, fd)
        self.client = self.ring.register(role)
        self.counters = Counters()

    def lease(self, num_bytes: int) -> Lease | None:
        """A slot to fill, or None: none is free and the budget is used up. Worker only; never waits."""
        slot = self.ring.acquire(num_bytes, MAX_SLOTS_PER_WORKER)
        return Lease(self, slot) if isinstance(slot, tuple) else None


class Lease:
    """A slot that this worker fills; free again when it dies unsent."""

    def __init__(self, owner: BatchRing, slot: tuple[int, int, int, int]) -> None:
        self._owner = owner
        self.slot = slot
        self.is_sent = False

    def part(self, offset: int, num_bytes: int) -> Any:
        """An exporter of bytes of the slot, which keeps this lease."""
        return self._owner.mapping.view(self.slot[0] + offset, num_bytes, self)

    def send(self) -> tuple[str, tuple[int, int, int, int], int]:
        """Hand the slot over: (batch ring, slot, how many slots this worker can count on)."""
        self._owner.ring.send(self.slot)
        self.is_sent = True
        return (self._owner.uuid, self.slot, MAX_SLOTS_PER_WORKER)

    def __del__(self) -> None:
        if not self.is_sent and self._owner.mapping.is_home:
            self._owner.ring.drop(self.slot)


class Hold:
    """A slot that this training process has adopted; free when the last tensor over it is gone."""

    __slots__ = ("_owner", "_slot")

    def __init__(self, owner: BatchRing, slot: tuple[int, int, int, int]) -> None:
        self._owner = owner
        self._slot = slot

    def __del__(self) -> None:
        self._owner.ring.release(self._slot)


@dataclass
class _BatchFiles:
    """The batch ring that this process knows: its own as a training process, its owner's as a worker."""

    fd: int
    uuid: str
    owner_pid: int
    handle: BatchRing | None = None


_known: _BatchFiles | None = None


def open_batch_ring() -> None:
    """Make the batch ring of this training process, if there is none. With the first dataset; stays until exit."""
    global _known
    if _known is not None and _known.owner_pid == os.getpid():
        return
    name = os.urandom(8).hex()
    fd = os.memfd_create(f"shmloader-batch-{name}", os.MFD_CLOEXEC)
    budget = min(int(memory_limits()[0] * BUDGET_SHARE), MAX_BUDGET_BYTES)
    os.ftruncate(fd, ADDRESSES_PER_BYTE * budget)
    _known = _BatchFiles(fd, name, os.getpid(), BatchRing(fd, name, native.OWNER))


def batch_ring() -> BatchRing | None:
    """This process's handle, attached on first use and again after a fork; None if there is no batch ring."""
    if _known is None:
        return None
    if _known.handle is None or not _known.handle.mapping.is_home:
        _known.handle = BatchRing(_known.fd, _known.uuid, native.WORKER)
    return _known.handle


def known_files() -> tuple[Any, str, int] | None:
    """The batch ring as it travels to a spawned worker; for `join`."""
    return None if _known is None else (reduction.DupFd(_known.fd), _known.uuid, _known.owner_pid)


def join(files: tuple[Any, str, int] | None) -> None:
    """Take over what `known_files` gave in the parent."""
    global _known
    if files is None:
        return
    fd = files[0].detach()
    if _known is not None and _known.uuid == files[1]:
        return  # with the dataset before this one; the descriptor is the same
    _known = _BatchFiles(fd, files[1], files[2])


# -- crossing the queue ------------------------------------------------------------------------------------


def _pack(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split into CPU tensors, as (dtype, shape, bytes), and the rest."""
    tensors, rest = {}, {}
    for name, value in values.items():
        if type(value) is torch.Tensor and value.device.type == "cpu" and value.layout == torch.strided:
            array = value.detach().contiguous().view(-1).view(torch.uint8).numpy() if value.numel() else b""
            tensors[name] = (value.dtype, tuple(value.shape), bytes(array))
        else:
            rest[name] = value
    return tensors, rest


def _unpack(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    # bytearray: the tensor may be written to, and has its bytes for itself.
    return {name: tensor_over(bytearray(data), dtype, shape) for name, (dtype, shape, data) in tensors.items()}


def _reduce_batch(batch: WorkerBatch) -> tuple[Any, ...]:
    order = list(batch) if batch._is_filled else [*batch.parts, *batch.plain]
    names = list(batch.in_slot())
    inline, rest = _pack(batch.extra())
    if not names or batch.lease.is_sent:
        values, rest = _pack(dict(batch))
        return _receive_inline, (order, values, rest)
    parts = {name: batch.parts[name] for name in names}
    return _receive, (batch.lease.send(), order, parts, inline, rest)


def _reduce_sample(sample: Sample) -> tuple[Any, ...]:
    tensors, rest = _pack(dict(sample))
    return _receive_inline, (list(sample), tensors, rest)


class InlineBatch(dict[str, Any]):
    """A batch in a worker for which there was no slot: private tensors, which cross the queue as bytes."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (dict, (dict(self),))


def _reduce_inline(batch: InlineBatch) -> tuple[Any, ...]:
    tensors, rest = _pack(batch)
    return _receive_inline, (list(batch), tensors, rest)


def _receive_inline(order: list[str], tensors: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    ring = batch_ring()
    if ring is not None:
        ring.counters.inline += 1
    found = {**_unpack(tensors), **rest}
    return {name: found[name] for name in order}


def _receive(
    token: tuple[str, tuple[int, int, int, int], int],
    order: list[str],
    parts: dict[str, tuple[int, torch.dtype, tuple[int, ...]]],
    inline: dict[str, Any],
    rest: dict[str, Any],
) -> dict[str, Any]:
    """Adopt a slot, once; in the training process (or its pin-memory thread), while the queue is unpickled."""
    uuid, slot, limit = token
    ring = batch_ring()
    held = ring.ring.adopt(slot) if ring is not None and ring.uuid == uuid else None
    if ring is None or not isinstance(held, tuple):
        raise StaleTokenError(
            "A batch arrived after its slot of the batch ring had been given to another one: its worker died, or the "
            "token was unpickled twice or in another process than the one that runs the DataLoader.",
            slot=slot[2],
            generation=slot[3],
        )
    hold = Hold(ring, slot)
    # Held batches must not starve the worker: it cannot wait for a slot, since batches are delivered in order.
    is_copied = held[0] > limit // 2
    found: dict[str, Any] = {**_unpack(inline), **rest}
    for name, (offset, dtype, shape) in parts.items():
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        tensor = tensor_over(ring.mapping.view(slot[0] + offset, num_bytes, hold), dtype, shape)
        found[name] = tensor.clone() if is_copied else tensor
    if is_copied:
        ring.counters.copied += 1
    else:
        ring.counters.in_slots += 1
    return {name: found[name] for name in order}


ForkingPickler.register(WorkerBatch, _reduce_batch)
ForkingPickler.register(InlineBatch, _reduce_inline)
ForkingPickler.register(Sample, _reduce_sample)
