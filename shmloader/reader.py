"""One process's access to a set: attached on first use, again after a fork, with a supervisor that lives."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import Any

import shmloader._native as native
from shmloader.checksum import RECORD_AT, Damage, damage
from shmloader.errors import (
    ChecksumError,
    ClosedError,
    PoisonedError,
    ServiceError,
    ShmloaderError,
    TooManyBadRowsError,
    WaitTimeoutError,
    carry_data,
)
from shmloader.files import RingFiles
from shmloader.keys import Face, Keys
from shmloader.live_orders import LiveOrder, LivingOrders
from shmloader.log_pipe import LogPipe, show_if_due
from shmloader.order import Order
from shmloader.policy import BadRows, is_bad_row, is_passing
from shmloader.prefetch.launch import SetFiles, ensure_supervisor
from shmloader.prefetch.plan import SetPlan, read_plan
from shmloader.quarantine import Quarantine
from shmloader.ring import Place, Refs, Ring
from shmloader.sample import Schema
from shmloader.stand_ins import StandIns

log = logging.getLogger("shmloader")

_ADVICE = (
    "shmloader: in-place write to a sample that lies in shared memory: it is read-only, and other processes read it. "
    "Give the dataset writable=True for private copies, do it in transform= (which gets them), or use sample.clone().\n"
)

#: A bad row is logged so often at most, in seconds.
TELL_S = 10.0

_attaching = threading.Lock()
# Another thread of the parent may have held it when this process was forked.
os.register_at_fork(after_in_child=lambda: globals().update(_attaching=threading.Lock()))


@dataclass(frozen=True)
class Attachment:
    """What a process that reads a set holds. Samples keep it alive, and with it the mapping of the ring."""

    ring: Ring
    face: Face


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
        self._told_at, self._num_untold = float("-inf"), 0
        self._keys = Keys()
        self._quarantine = Quarantine(files.ring.quarantine_fd)
        self.set_policy(BadRows())
        self._face: Face | None = None

    def name_fields(self, keys: Keys) -> None:
        """Give samples and batches these names; before the first is read. OptionError, if the schema is known."""
        self._keys = keys
        self.face()

    def set_policy(self, policy: BadRows) -> None:
        """Say what is to be done about bad rows; before the first is read."""
        self.policy = policy
        self._stand_ins = StandIns(
            self.plan, policy, self._quarantine, self.wait_for, lambda rows: self.attach().are_at_hand(rows)
        )

    def face(self) -> Face | None:
        """What is to be seen of the samples; None as long as no row was processed that tells. OptionError: bad keys."""
        if self._face is None:
            schema = self.plan.schema
            if schema is None and not self.is_closed:
                text = self.attach().segment.text_get(native.TEXT_SCHEMA)
                schema = None if text is None else Schema.from_json(text.decode())
            self._face = None if schema is None else self._keys.face(schema)
        return self._face

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
        """Where the records of ``rows`` lie, or of what stands in for them (``ids`` tells); waits. Raises as `find`."""
        ring = self.attach()
        has_place = ring.has_transit and not ring.is_guest and ring.segment.num_orders()
        place = self._orders.place_of(ring, rows) if has_place else None
        refs = self.find(rows, place)
        return self.attachment(), refs

    def find(self, rows: Sequence[int], place: Place | None) -> Refs:
        """As `wait_for`, but what stands in for bad rows, if the policy has it so; ``Refs.ids`` are what was found.

        Raises also a TooManyBadRowsError.
        """
        if not self.policy.substitutes:
            return self.wait_for(rows, place)
        try:
            return self._stand_ins.find(rows, place)
        except TooManyBadRowsError as error:
            self._complete(error)
            raise

    def known(self, rows: Sequence[int]) -> Sequence[int]:
        """``rows``, with what this process knows to stand in for bad ones. Raises a TooManyBadRowsError."""
        try:
            return self._stand_ins.known(rows)
        except TooManyBadRowsError as error:
            self._complete(error)
            raise

    def wait_for(self, rows: Sequence[int], place: Place | None) -> Refs:
        """Where the records of ``rows`` lie, which are at ``place`` of an order (None: of none). As `Ring.get_many`.

        Raises also a ChecksumError: a sample is not what its prefetcher wrote.
        """
        show_if_due()
        try:
            refs = self.attach().get_many(rows, self.timeout_s, self._tick, self.plan.describe, place)
            damaged = self.damage_of(refs)
            if damaged is not None:
                refs = replace(refs, pins=None)  # an error that is kept must not keep them
                raise damaged
        except ShmloaderError as error:
            if is_bad_row(error) and not is_passing(error):
                self._note_bad(error)
            self._complete(error)
            raise
        return refs

    def _note_bad(self, error: ShmloaderError) -> None:
        """List what a reader has met; with a warning of the first of the set that something else stands in for."""
        assert error.at is not None
        row, chunk = error.at
        first, num_rows = row, 1
        if chunk is not None and not self.plan.source.is_open:
            first, end = self.plan.chunk_rows(row)
            num_rows = end - first
        if not self._quarantine.add(first, num_rows, error, is_met=True) or not self.policy.substitutes:
            return
        self._tell_bad(error)
        if self.attach().segment.text_put(native.TEXT_BAD_ROW, b"1") != native.EXISTS:
            name, policy = self.plan.origin(row)["source"], self.policy
            warnings.warn(
                f"{name} has a bad row, in whose place on_error={policy.on_error!r} has another, so for those to come, "
                f"which dataset.quarantine lists and the log tells of. {error}",
                stacklevel=2,
            )

    def _tell_bad(self, error: ShmloaderError) -> None:
        """Log a bad row, but not each of many: ``quarantine`` lists them."""
        self._num_untold += 1
        if time.monotonic() - self._told_at < TELL_S:
            return
        self._told_at, num, self._num_untold = time.monotonic(), self._num_untold, 0
        log.warning("a bad row%s: %s", f" ({num} since the last such line)" if num > 1 else "", error)

    def too_many(self, what: str) -> TooManyBadRowsError:
        """The error that says ``what`` there is too much of."""
        error = self._stand_ins.too_many(what)
        self._complete(error)
        return error

    def quarantine(self) -> list[dict[str, Any]]:
        """What `SharedDataset.quarantine` tells."""
        if self.is_closed:
            raise self._closed()
        plan = self.plan
        return [
            {
                **plan.origin(bad.id),
                "num_rows": bad.num_rows,
                "field": bad.field,
                "error": bad.error,
                "message": bad.message,
            }
            for bad in self._quarantine.rows()
        ]

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
        """What samples need to be looked into. Raises as `face`; PoisonedError: there is no schema, so no sample."""
        ring = self.attach()
        attachment = self._attachment
        if attachment is None or attachment.ring is not ring:
            face = self.face()
            if face is None:
                raise PoisonedError("there are samples but no schema", reason="no schema")
            with _attaching:
                attachment = self._attachment
                if attachment is None or attachment.ring is not ring:
                    attachment = self._attachment = Attachment(ring, face)
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

    def _complete(self, error: ShmloaderError) -> None:
        """Have ``error`` name source and shard of its row as attributes, and have these survive a worker's queue."""
        row = error.data.get("row")
        if isinstance(error, ServiceError | WaitTimeoutError) and isinstance(row, int):
            error.data |= self.plan.origin(row)
        if os.getpid() != self.owner_pid:
            carry_data(error)

    def _closed(self) -> ClosedError:
        return ClosedError(f"The dataset {self.plan.source.name!r} was closed", dataset=self.plan.source.name)

    def _tick(self) -> None:
        if self.is_closed:  # by another thread: its descriptors may be another file's by now
            raise self._closed()
        show_if_due()
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
        ring, spill_fd, log = self.files.ring, self.files.spill_fd, self.files.log
        fds = (*ring.fds, self.files.payload_fd, self.files.plan_fd)
        return {
            "uuid": ring.uuid,
            "fds": [reduction.DupFd(fd) for fd in fds],
            "spill_fd": None if spill_fd is None else reduction.DupFd(spill_fd),
            "log_fd": None if log is None else reduction.DupFd(log.write_fd),
            "timeout_s": self.timeout_s,
            "verify": self.verify,
            "owner_pid": self.owner_pid,
            "owner": self.owner,
            "keys": self._keys,
            "policy": self.policy,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        *ring, payload, plan = (fd.detach() for fd in state["fds"])
        spill = None if state["spill_fd"] is None else state["spill_fd"].detach()
        log = None if state["log_fd"] is None else LogPipe(state["log_fd"].detach())
        files = SetFiles(RingFiles(state["uuid"], *ring), payload, plan, spill, log)
        set_plan = read_plan(plan)
        assert set_plan is not None
        self.__init__(files, set_plan, state["timeout_s"], state["verify"])  # type: ignore[misc]
        self.owner_pid, self.owner, self._keys = state["owner_pid"], state["owner"], state["keys"]
        self.set_policy(state["policy"])


def _damaged(plan: SetPlan, row: int, found: Damage) -> ChecksumError:
    return ChecksumError(
        f"{plan.describe(row)} is damaged: in shared memory it has the checksum {found.found:#010x}, but was written "
        f"with {found.told}. Something wrote to the ring behind our back: a decoder past the end of its array (a "
        "C extension that `process=` or the tokenizer uses?), another process of this user, or memory that is faulty. "
        "Make the dataset again; if it comes back, leave `process=` out to see whose it is, and test the memory.",
        **plan.origin(row),
        place="ring",
        expected=found.expected,
        found=found.found,
    )
