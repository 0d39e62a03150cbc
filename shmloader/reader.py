"""One process's access to a set: attached on first use, again after a fork, with a supervisor that lives."""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import Any

import shmloader._native as native
from shmloader.checksum import RECORD_AT, Damage, damage
from shmloader.errors import ChecksumError, ClosedError, PoisonedError
from shmloader.files import RingFiles
from shmloader.live_orders import LiveOrder, LivingOrders
from shmloader.order import Order
from shmloader.prefetch.launch import SetFiles, ensure_supervisor
from shmloader.prefetch.plan import SetPlan, read_plan
from shmloader.ring import Place, Refs, Ring
from shmloader.sample import Schema

_ADVICE = (
    "shmloader: in-place write to a sample that lies in shared memory: it is read-only, and other processes read it. "
    "Give the dataset writable=True for private copies, do it in transform= (which gets them), or use sample.clone().\n"
)

_attaching = threading.Lock()
# Another thread of the parent may have held it when this process was forked.
os.register_at_fork(after_in_child=lambda: globals().update(_attaching=threading.Lock()))


@dataclass(frozen=True)
class Attachment:
    """What a process that reads a set holds. Samples keep it alive, and with it the mapping of the ring."""

    ring: Ring
    schema: Schema


class Reader:
    """Reads samples of a set, from any process that has its files.

    The process that makes the set is its owner; every other one (a DataLoader worker, by fork or spawn) is a
    worker of that owner. Thread-safe.

    verify: samples are sealed with a checksum, which is compared before they are handed out.
    """

    def __init__(self, files: SetFiles, plan: SetPlan, timeout_s: float, verify: bool = False) -> None:
        self.files = files
        self.plan = plan
        self.timeout_s = timeout_s
        self.verify = verify
        self.owner_pid = os.getpid()
        self.owner: tuple[int, int] | None = None
        self.is_closed = False
        self._ring: Ring | None = None
        self._attachment: Attachment | None = None
        self._orders = LivingOrders(plan)
        self._shown: set[int] = set()

    def attach(self) -> Ring:
        """The attachment of this process, made now if there is none or it was inherited."""
        ring = self._ring
        if ring is not None and ring.is_home:
            return ring
        if self.is_closed:
            raise self._closed()
        with _attaching:
            ring = self._ring
            if ring is None or not ring.is_home:
                is_owner = os.getpid() == self.owner_pid
                ring = Ring(self.files.ring, native.OWNER if is_owner else native.WORKER, self.owner)
                if is_owner:
                    self.owner = (ring.slot, ring.gen)
                self._ring, self._attachment = ring, None
                # Now and not at import: a handler that torch or faulthandler installs later would hide ours.
                native.fault_report(_ADVICE)
            return ring

    def get(self, rows: Sequence[int]) -> tuple[Attachment, Refs]:
        """Where the records of ``rows`` lie; waits for them. Raises as `Ring.get_many`, ChecksumError."""
        ring = self.attach()
        has_place = ring.has_transit and not ring.is_guest and ring.segment.num_orders()
        place = self._orders.place_of(ring, rows) if has_place else None
        refs = self.wait_for(rows, place)
        return self.attachment(), refs

    def wait_for(self, rows: Sequence[int], place: Place | None) -> Refs:
        """Where the records of ``rows`` lie, which are at ``place`` of an order (None: of none). As `Ring.get_many`.

        Raises also a ChecksumError: a sample is not what its prefetcher wrote.
        """
        refs = self.attach().get_many(rows, self.timeout_s, self._tick, self.plan.describe, place)
        error = self.damage_of(refs)
        if error is not None:
            refs = replace(refs, pins=None)  # an error that is kept must not keep them
            raise error
        return refs

    def damage_of(self, refs: Refs) -> ChecksumError | None:
        """Of the first sample that is not what its prefetcher wrote; None: all are, or none is sealed.

        Returned, not raised: a traceback would keep the pins of ``refs``.
        """
        if not self.verify:
            return None
        for i, (row, (status, _)) in enumerate(zip(refs.ids, refs.statuses(), strict=True)):
            found = damage(refs.record(i), RECORD_AT) if status == native.READY else None
            if found is not None:
                return _damaged(self.plan, row, found)
        return None

    def attachment(self) -> Attachment:
        """What samples need to be looked into. Before the first one is there, there may be no schema: PoisonedError."""
        ring = self.attach()
        attachment = self._attachment
        if attachment is None or attachment.ring is not ring:
            with _attaching:
                attachment = self._attachment
                if attachment is None or attachment.ring is not ring:
                    attachment = self._attachment = Attachment(ring, self._schema(ring))
        return attachment

    def begin_order(self, order: Order, epoch: int) -> LiveOrder | None:
        """Have the prefetchers follow ``order``; None: they follow as many as they can, or need not follow any.

        None also for a guest: an order lives as long as its client.
        """
        ring = self.attach()
        return LiveOrder.begin(ring, order, epoch) if ring.has_transit and not ring.is_guest else None

    def close(self) -> None:
        """Leave the set and close its files; the services end with the last owner. Views stay valid."""
        if self.is_closed:
            return
        self.is_closed = True
        if self._ring is not None and self._ring.is_home:
            self._ring.leave()
        self._ring = self._attachment = None
        self.files.close()

    def _closed(self) -> ClosedError:
        return ClosedError(f"The dataset {self.plan.source.name!r} was closed", dataset=self.plan.source.name)

    def _tick(self) -> None:
        if self.is_closed:  # by another thread: its descriptors may be another file's by now
            raise self._closed()
        ensure_supervisor(self.files)
        ring = self._ring
        if ring is not None:
            for which in (native.TEXT_MEMORY, native.TEXT_REFETCH):
                self._show(ring, which)

    def _show(self, ring: Ring, which: int) -> None:
        """Show a warning of the services, once in all processes of the set."""
        if which in self._shown or (text := ring.segment.text_get(which)) is None:
            return
        self._shown.add(which)
        # Who puts it shows it: not a lock, which would be free again with the worker that has shown it.
        if ring.segment.text_put(native.TEXT_SHOWN + which, b"1") == native.EXISTS:
            return
        warnings.warn(json.loads(text)["message"], stacklevel=2)

    def _schema(self, ring: Ring) -> Schema:
        if self.plan.schema is not None:
            return self.plan.schema
        text = ring.segment.text_get(native.TEXT_SCHEMA)
        if text is None:
            raise PoisonedError("there are samples but no schema", reason="no schema")
        return Schema.from_json(text.decode())

    # -- travelling to a worker that is spawned --------------------------------------------------------

    def check_can_travel(self) -> None:
        """Raises a TypeError unless this is pickled for a process that multiprocessing spawns; ClosedError."""
        if self.is_closed:
            raise self._closed()
        if get_spawning_popen() is None:
            raise TypeError(
                "a shmloader dataset can be pickled or copied only on its way to a process that multiprocessing "
                "spawns: it is made of open files of shared memory. Make a new one where it is needed."
            )

    def __getstate__(self) -> dict[str, Any]:
        self.check_can_travel()
        ring, spill_fd = self.files.ring, self.files.spill_fd
        fds = (*ring.fds, self.files.payload_fd, self.files.plan_fd)
        return {
            "uuid": ring.uuid,
            "fds": [reduction.DupFd(fd) for fd in fds],
            "spill_fd": None if spill_fd is None else reduction.DupFd(spill_fd),
            "timeout_s": self.timeout_s,
            "verify": self.verify,
            "owner_pid": self.owner_pid,
            "owner": self.owner,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        control, ring, lock, payload, plan = (fd.detach() for fd in state["fds"])
        spill = None if state["spill_fd"] is None else state["spill_fd"].detach()
        files = SetFiles(RingFiles(state["uuid"], control, ring, lock), payload, plan, spill)
        set_plan = read_plan(plan)
        assert set_plan is not None
        self.__init__(files, set_plan, state["timeout_s"], state["verify"])  # type: ignore[misc]
        self.owner_pid, self.owner = state["owner_pid"], state["owner"]


def _damaged(plan: SetPlan, row: int, found: Damage) -> ChecksumError:
    return ChecksumError(
        f"{plan.describe(row)} is damaged: in shared memory it has the checksum {found.found:#010x}, but was written "
        f"with {found.told}. Something wrote to the ring behind our back: a decoder past the end of its array (a "
        "C extension that `process=` or the tokenizer uses?), another process of this user, or memory that is faulty. "
        "Make the dataset again; if it comes back, leave `process=` out to see whose it is, and test the memory.",
        source=plan.source.name,
        shard=plan.shard(row),
        row=plan.number(row),
        place="ring",
        expected=found.expected,
        found=found.found,
    )
