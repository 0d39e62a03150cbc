"""The batch ring: where workers put batches, and the tokens that cross a worker's queue in their stead.

::

    worker:   lease = ring.lease(n) ─▶ gather into lease.part(...) ─▶ WorkerBatch ─▶ queue (pickled here: a token)
    trainer:  token unpickled ─▶ slot adopted ─▶ plain dict of tensors ─▶ the last tensor dies ─▶ slot is free

One batch ring per training process, for all of its datasets; made with the first of them, inherited by workers with
fork or handed over with spawn. Nobody ever waits for a slot: with none free a batch goes as bytes through the pipe.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch.utils.data import get_worker_info

import shmloader._native as native
from shmloader.errors import StaleTokenError
from shmloader.files import memory_limits
from shmloader.log_pipe import show_if_due
from shmloader.options import ByteSize
from shmloader.packed import pack, unpacked
from shmloader.ring import JOIN_S
from shmloader.views import JaggedPart, Part, Sample, WorkerBatch, tensor_in

#: Slots that one worker may have at once: two batches queued (prefetch_factor), one being filled, two that the training
#: loop holds, and one over.
MAX_SLOTS_PER_WORKER = 6
#: Of the smallest memory limit, for the slots of all workers of a process, and never more than this (guessed).
BUDGET_SHARE = 1 / 16
MAX_BUDGET_BYTES = 4 << 30
#: Address space per byte of budget: slots of outgrown sizes leave gaps in it, not in memory.
ADDRESSES_PER_BYTE = 4
#: Address space on top, for the header and a little budget.
ADDRESSES_AT_LEAST = 64 << 20

#: A slot as the core gives and takes it: offset, capacity, index, generation.
Slot = tuple[int, int, int, int]


@dataclass
class Counters:
    """How this process received its batches."""

    in_slots: int = 0
    copied: int = 0
    inline: int = 0


class BatchRing:
    """This process's handle to a batch ring.

    budget_bytes: for all slots together; given by the training process, which formats the ring. None: be a worker.
    """

    def __init__(self, fd: int, uuid: str, budget_bytes: int | None = None) -> None:
        self.uuid = uuid
        self.mapping = native.Mapping(fd, os.fstat(fd).st_size, True, "batch ring")
        if budget_bytes is not None:
            native.format_batch(self.mapping, budget_bytes)
        self.ring = native.BatchRing(self.mapping, fd)
        self._role = native.WORKER if budget_bytes is None else native.OWNER
        self._is_client = False
        self._register()
        self.counters = Counters()

    def lease(self, num_bytes: int) -> Lease | None:
        """A slot to fill, or None: none is free and the budget is used up. Worker only; never waits.

        None also for a worker beyond the batch ring's table of clients, as long as that is full.
        """
        if not self._is_client and (time.monotonic() < self._register_at or not self._register()):
            return None
        slot = self.ring.acquire(num_bytes, MAX_SLOTS_PER_WORKER)
        return Lease(self, slot) if isinstance(slot, tuple) else None

    def _register(self) -> bool:
        self._is_client = self.ring.register(self._role) != native.CLIENTS
        self._register_at = time.monotonic() + JOIN_S
        return self._is_client


class Lease:
    """A slot that this worker fills; free again when it dies unsent."""

    def __init__(self, owner: BatchRing, slot: Slot) -> None:
        self._owner = owner
        self.slot = slot
        self.is_sent = False

    def part(self, offset: int, num_bytes: int) -> Any:
        """An exporter of bytes of the slot, which keeps this lease."""
        return self._owner.mapping.view(self.slot[0] + offset, num_bytes, self)

    def send(self) -> tuple[str, Slot, int]:
        """Hand the slot over; returns its token: (batch ring, slot, how many slots this worker can count on).

        Raises:
            StaleTokenError: the slot is not this worker's any more.
        """
        if self._owner.ring.send(self.slot) != 0:
            raise _stale(self.slot)
        self.is_sent = True
        return (self._owner.uuid, self.slot, MAX_SLOTS_PER_WORKER)

    def __del__(self) -> None:
        if not self.is_sent and self._owner.mapping.is_home:
            self._owner.ring.drop(self.slot)


class Hold:
    """A slot that this training process has adopted; free when the last tensor over it is gone."""

    __slots__ = ("_owner", "_slot")

    def __init__(self, owner: BatchRing, slot: Slot) -> None:
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
    budget_bytes: int
    handle: BatchRing | None = None


_known: _BatchFiles | None = None
_lock = threading.RLock()  # guards `_known` and its handle; RLock: a tensor that dies meanwhile may come here


def batch_budget(size: ByteSize | None) -> int:
    """Bytes for the slots of all workers of a process; ``size``: what was asked for, None: nothing was."""
    limit = memory_limits()[0]
    return min(int(limit * BUDGET_SHARE), MAX_BUDGET_BYTES) if size is None else min(size.resolve(limit), limit)


def open_batch_ring(budget_bytes: int | None = None) -> None:
    """Make the batch ring of this training process, if there is none. With the first dataset; stays until exit.

    A DataLoader worker has none of its own, also if it makes a dataset: what it sends is for its training process.

    budget_bytes: for its slots together; None: by default. Of a ring that is there already it changes nothing.
    """
    global _known
    with _lock:
        if get_worker_info() is not None or (_known is not None and _known.owner_pid == os.getpid()):
            return
        uuid = os.urandom(8).hex()
        if budget_bytes is None:
            budget_bytes = batch_budget(None) if _known is None else _known.budget_bytes
        fd = os.memfd_create(f"shmloader-batch-{uuid}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, ADDRESSES_PER_BYTE * budget_bytes + ADDRESSES_AT_LEAST)
            _known = _BatchFiles(fd, uuid, os.getpid(), budget_bytes, BatchRing(fd, uuid, budget_bytes))
        except BaseException:
            os.close(fd)
            raise


def batch_ring() -> BatchRing | None:
    """This process's handle, attached on first use and again after a fork; None if there is no batch ring."""
    known = _known
    if known is None or (known.handle is not None and known.handle.mapping.is_home):
        return None if known is None else known.handle
    with _lock:
        if known.handle is None or not known.handle.mapping.is_home:
            known.handle = BatchRing(known.fd, known.uuid)
        return known.handle


def trim_batch_ring() -> None:
    """Give back the memory of this training process's slots that hold nothing; when a dataset is closed."""
    known = _known
    if known is not None and known.owner_pid == os.getpid() and known.handle is not None:
        known.handle.ring.trim()


def known_files() -> tuple[Any, str, int, int] | None:
    """The batch ring as it travels to a process that is spawned; for `join`."""
    _have_own()
    if _known is None:
        return None
    # One descriptor a spawned process, however many datasets go there: the list that it inherits has no duplicates.
    process: Any = get_spawning_popen()
    duplicate = getattr(process, "_shmloader_batch_ring", None)
    if duplicate is None:
        duplicate = reduction.DupFd(_known.fd)
        if process is not None:
            process._shmloader_batch_ring = duplicate
    return duplicate, _known.uuid, _known.owner_pid, _known.budget_bytes


def join(files: tuple[Any, str, int, int] | None) -> None:
    """Take over what `known_files` gave in the parent."""
    global _known
    if files is None:
        return
    fd = files[0].detach()
    with _lock:
        # Known with the dataset before this one: then `fd` is the same, or (forkserver) a duplicate, which stays open
        # since closing any descriptor of a file gives up the locks that tell others that this process lives.
        if _known is None or _known.uuid != files[1]:
            _known = _BatchFiles(fd, *files[1:])


def _have_own() -> None:
    """Before this process has a child, which may be its DataLoader worker: a ring for what comes back.

    It has none yet if it was a child itself, of a training process from which it has its datasets.
    """
    if _known is not None and _known.owner_pid != os.getpid():
        open_batch_ring()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it


os.register_at_fork(before=_have_own, after_in_child=_after_fork)


# -- crossing the queue ------------------------------------------------------------------------------------


class InlineBatch(dict[str, Any]):
    """A batch in a worker for which there was no slot: private tensors, which cross the queue as bytes."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (dict, (dict(self),))


class _Token:
    """A lease on its way through the queue; sent once everything before it is pickled, so that it is not in vain."""

    def __init__(self, lease: Any) -> None:
        self.lease = lease

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (self.lease.send(),)


def _reduce_batch(batch: WorkerBatch) -> tuple[Any, ...]:
    parts = batch.in_slot()
    if not parts:
        return _reduce_inline(dict(batch))
    if batch.lease.is_sent:
        raise _stale(batch.lease.slot)  # what lies in the slot now may be another batch
    inline, rest = pack(batch.extra())
    return _receive, (batch.names(), parts, inline, rest, _Token(batch.lease))


def _reduce_inline(batch: dict[str, Any]) -> tuple[Any, ...]:
    tensors, rest = pack(batch)
    return _receive_inline, (list(batch), tensors, rest)


def _reduce_sample(sample: Sample) -> tuple[Any, ...]:
    return _reduce_inline(dict(sample))


def _receive_inline(names: list[str], tensors: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    show_if_due()
    ring = batch_ring()
    if ring is not None:
        ring.counters.inline += 1
    found = {**unpacked(tensors), **rest}
    return {name: found[name] for name in names}


def _receive(
    names: list[str],
    parts: dict[str, Part | JaggedPart],
    inline: dict[str, Any],
    rest: dict[str, Any],
    token: tuple[str, Slot, int],
) -> dict[str, Any]:
    """Adopt a slot, once; in the training process (or its pin-memory thread), while the queue is unpickled.

    Raises:
        StaleTokenError: the slot is not what was sent any more.
    """
    show_if_due()
    uuid, slot, limit = token
    ring = batch_ring()
    held = ring.ring.adopt(slot) if ring is not None and ring.uuid == uuid else None
    if ring is None or not isinstance(held, tuple):
        raise _stale(slot)
    hold = Hold(ring, slot)
    # Held batches must not starve the worker: it cannot wait for a slot, since batches are delivered in order.
    is_copied = held[0] > limit // 2
    mapping = ring.mapping

    def memory(offset: int, num_bytes: int) -> Any:
        return mapping.view(slot[0] + offset, num_bytes, hold)

    found: dict[str, Any] = {**unpacked(inline), **rest}
    for name, part in parts.items():
        found[name] = tensor_in(memory, part, is_copied)
    if is_copied:
        ring.counters.copied += 1
    else:
        ring.counters.in_slots += 1
    return {name: found[name] for name in names}


def _stale(slot: Slot) -> StaleTokenError:
    return StaleTokenError(
        "A batch arrived after its slot of the batch ring had been given to another one: its worker died, or the "
        "token was unpickled twice or in another process than the one that runs the DataLoader.",
        slot=slot[2],
        generation=slot[3],
    )


ForkingPickler.register(WorkerBatch, _reduce_batch)
ForkingPickler.register(InlineBatch, _reduce_inline)
ForkingPickler.register(Sample, _reduce_sample)
