"""One reader's share of one iteration of a dataset: every n-th position, from the reader's own on.

All readers of an iteration (the workers of a DataLoader) join the same order by its key. Prefetchers follow it, its
low-water mark is where the slowest reader is, and what all have passed makes way. Where all samples stay in the ring
there is no order, and need not be one.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import shmloader._native as native
from shmloader.errors import RecordTooLargeError, RingError, SampleError, ServiceError, ShmloaderError
from shmloader.order import Kind
from shmloader.policy import is_bad_row
from shmloader.prefetch.plan import LAST_POSITION
from shmloader.reader import Attachment, Reader
from shmloader.ring import Place, Refs, Ring

#: Positions that are looked up at once (guessed: enough to share the cost of a look-up, little to hold at a time).
BLOCK = 16
#: So many rows behind a bad one are looked at for one to make a sample up like (guessed: what is decoded ahead anyway).
MOST_BEHIND = 64
#: Of a stream a share of bad rows is one of so many at least: its first rows tell little (guessed).
LEAST_ROWS = 1000


@dataclass(frozen=True)
class Share:
    """Which part of which iteration: reader ``reader`` of ``num_readers`` of the one that ``key`` (64 bits) names."""

    key: int
    reader: int
    num_readers: int

    @classmethod
    def of(cls, reader: int, num_readers: int, *names: int) -> Share:
        """Of the iteration that these numbers name."""
        digest = hashlib.blake2b(repr(names).encode(), digest_size=8, person=b"shmloader join")
        return cls(int.from_bytes(digest.digest(), "little"), reader, num_readers)


class Iteration:
    """A reader's membership in an iteration, from `join` until `leave`, or until this process leaves the set.

    epoch: that of the first who joined. num_positions: where the iteration ends at the latest. For one thread.
    """

    def __init__(self, reader: Reader, ring: Ring, share: Share, epoch: int, num_positions: int) -> None:
        self._reader, self._ring, self._share = reader, ring, share
        self._order: tuple[int, int] | None = None
        self._first_id, self._is_open, self._num_bad = 0, False, 0
        self._good_from = 0  # from the last bad position that was met up to here, all that was looked at is bad
        self.epoch, self.num_positions = epoch, num_positions

    @classmethod
    def join(cls, reader: Reader, share: Share, most: int | None) -> Iteration:
        """Join the iteration, or begin it. most: it ends after so many positions, if not before; None: it does not.

        Raises:
            RingError: as many iterations live as can; or this process has no slot in the set's table of clients, and
                so no mark: where the slowest reader is, what all have passed makes way, and so must be known.
        """
        ring = reader.attach()
        if ring.has_transit and not ring.has_slot():
            raise _no_slot(reader.plan.source.name)
        named = ring.segment.epoch()
        epoch = named - 1 if named else 0
        num_rows = reader.plan.source.num_rows
        length = min(LAST_POSITION if num_rows is None else num_rows, LAST_POSITION if most is None else most)
        self = cls(reader, ring, share, epoch, length)
        if ring.has_transit:
            self._join_order(is_open=num_rows is None)
        return self

    def _join_order(self, is_open: bool) -> None:
        ring, share, owner = self._ring, self._share, self._reader.owner
        assert owner is not None
        who = (share.key, share.reader, share.num_readers, *owner)
        what = (0, self.epoch, self.num_positions, int(Kind.SEQUENTIAL))
        begun = ring.segment.order_join(*who, *what)
        if isinstance(begun, int):  # perhaps only since some that are dead have not been buried yet
            ring.segment.reap(True)
            begun = ring.segment.order_join(*who, *what)
        if isinstance(begun, int):
            raise RingError(
                f"{native.MAX_ORDERS} iterations over the dataset {self._reader.plan.source.name!r} live, and there "
                "can be no more at once. Close or drop iterators that are not needed any more."
            )
        slot, gen, self.num_positions, self.epoch, _ = begun
        self._order = slot, gen
        if is_open:
            self._first_id, self._is_open = native.open_id(slot, gen, 0), True

    def blocks(self) -> Iterator[tuple[Attachment, Refs, range]]:
        """The samples of this share, as (attachment, references, their positions), a few at a time; waits for them.

        What is there is not held back for what is not: only the first of a block is waited for.

        Raises:
            As `Reader.get`, when the sample is reached that the error is of.
        """
        stride = self._share.num_readers
        position = self._share.reader
        while position < self.num_positions:
            block = range(position, min(position + BLOCK * stride, self.num_positions), stride)
            refs, num_ready = self._look_up(block)
            if num_ready == 0:
                return
            if refs is not None:
                yield self._reader.attachment(), refs, block[:num_ready]
            del refs  # or its pins would be held while the next are waited for
            position += num_ready * stride

    # Argument: at interpreter exit the names of modules may be gone.
    def leave(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        """This reader reads no further; the iteration ends with its last reader."""
        order, self._order = self._order, None
        if order is not None and not is_exiting() and self._ring.is_home:
            with contextlib.suppress(ShmloaderError):  # the set was closed, and the membership is gone with this client
                self._ring.segment.order_leave(*order)

    def _look_up(self, block: range) -> tuple[Refs | None, int]:
        """The first samples of ``block``, and how many; at least one, which is waited for, or none: it has ended.

        None: the first is left out.
        """
        ring, ids = self._reader.attach(), self._reader.known(self._ids(block))
        if ring.is_guest:  # all is resident, or there would be an order to join
            return self._reader.find(ids, None), len(block)
        packed, num_missing, pins, is_over = ring.segment.get_many(array("Q", ids), 0, self._place(block))
        refs = Refs(ids, packed, ring.mapping, pins)
        num_ready = _num_ready(refs)
        if num_ready and not num_missing and not is_over:
            error = self._reader.damage_of(refs)
            if error is not None:
                refs, pins = replace(refs, pins=None), None  # an error that is kept must not keep them
                raise error
            return refs, num_ready
        refs, pins = replace(refs, pins=None), None  # given back before we wait
        block = block[: max(num_ready, 1)]
        if self._is_open and self._reader.policy.substitutes:
            return self._next_of_stream(block)
        refs = self._reader.find(self._ids(block), self._place(block))
        return refs, _num_ready(refs)

    def _next_of_stream(self, block: range) -> tuple[Refs | None, int]:
        """As `_look_up`, of a stream: behind a bad row there may be none to take its place, so it is left out.

        A made-up sample takes its place if there is one behind it, to be like.
        """
        try:
            refs = self._reader.wait_for(self._ids(block), self._place(block))
            return refs, _num_ready(refs)
        except _OF_ROWS as error:
            if error.at is None or not _is_of_row(error):
                raise
            position = error.at[0] - self._first_id
            if position != block.start:  # those before it are there
                return self._next_of_stream(block[: block.index(position)])
            self._count_bad(error, position)
        return (None if self._reader.policy.on_error == "skip" else self._good_one_behind(position)), 1

    def _good_one_behind(self, position: int) -> Refs | None:
        """The next good sample of the stream, whoever reads it; None: it has ended, or all of `MOST_BEHIND` are bad."""
        place = self._place(range(position, position + 1, self._share.num_readers))
        self._good_from = max(self._good_from, position + 1)
        while self._good_from <= position + MOST_BEHIND:
            try:
                refs = self._reader.wait_for([self.id_of(self._good_from)], place)
            except _OF_ROWS as error:
                if not _is_of_row(error):
                    raise
                self._good_from += 1
                continue
            return refs if _num_ready(refs) else None
        return None

    def _count_bad(self, error: ShmloaderError, position: int) -> None:
        """Raise if too many of the rows that this reader has come to are bad."""
        self._num_bad += 1
        policy = self._reader.policy
        num_read = position // self._share.num_readers + 1
        most = policy.most(max(num_read, LEAST_ROWS))
        if most is None or self._num_bad <= most:
            return
        of = f"{num_read} rows that this reader has come to"
        what = f"{self._num_bad} of the {of} are bad, and max_bad={policy.max_bad} allows {most}"
        raise self._reader.too_many(what) from error

    def _ids(self, block: range) -> list[int]:
        return [self.id_of(position) for position in block]

    def id_of(self, position: int) -> int:
        """The id of the row at ``position``."""
        return self._first_id + position

    def _place(self, block: range) -> Place | None:
        """Its end is the next position that this reader has to read: what the others have not read counts as theirs."""
        return None if self._order is None else (*self._order, block.start, block[-1] + block.step)


#: What a row of a stream is bad by. A ReadError is of the stream, behind which nothing comes.
_OF_ROWS = SampleError, RecordTooLargeError, ServiceError


def _is_of_row(error: ShmloaderError) -> bool:
    """Whether it is one bad row's; else the chunk's, and so the stream's, or that of none of them."""
    return is_bad_row(error) and error.at is not None and error.at[1] is None


def _no_slot(name: str) -> RingError:
    return RingError(
        f"This worker cannot take part in an iteration over {name!r}: living processes have all slots of its set's "
        f"table of clients that workers may have ({native.MAX_CLIENTS} less those kept for services), and what does "
        "not all stay in the ring is read by clients only. Use fewer workers over this dataset at a time."
    )


def _num_ready(refs: Refs) -> int:
    """How many samples there are before the first that is not there."""
    statuses = [status for status, _ in refs.statuses()]
    return next((i for i, status in enumerate(statuses) if status != native.READY), len(statuses))
