"""`ShmSampler`: torch's face of `order.py`, which tells the prefetchers what is to come."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Generator
from typing import Any, Protocol

from torch.utils.data import Sampler

from shmloader.order import Order
from shmloader.permutation import whole_number

#: Rows that are made at once, so that they share the overhead of the call (measured: 0.2 to 0.3 µs an index; in blocks
#: of 64 it is 1.4, in larger ones hardly less).
_BLOCK_ROWS = 1024


class Live(Protocol):
    """An order that the prefetchers follow until `end` is called: once, by any thread of the process that began it."""

    def end(self) -> None:
        """The prefetchers need not follow it any longer."""


class ShmSampler(Sampler[int]):
    """The rows of a dataset in the order that its prefetchers follow; made by ``dataset.sampler()``.

    For ``DataLoader(dataset, sampler=…)``, alone or inside a `BatchSampler`. Each iteration is one epoch, and has an
    order of its own: it takes ``epoch`` and leaves it one higher. So `set_epoch` is only needed to say it explicitly,
    as when a run is resumed; ``set_epoch(e)`` has the next iteration be epoch ``e``, and that after it ``e + 1``.

    An iteration's order stays live, that is, prefetchers work towards it, until its iterator is closed or collected.
    One that came to its end stays live until the next iteration begins, as its last batches are still on their way, or
    until the sampler is collected. Several iterators may be live at once.

    Use it in one process: a worker that inherits it ends nothing, and a pickled copy has no live orders. Not
    thread-safe.

    Args:
        make: the order of an epoch; all have the same length.
        begin: have the prefetchers follow an order of an epoch; None if nobody needs to.
        on_epoch: told the epoch of each iteration, before it begins.
    """

    def __init__(
        self,
        make: Callable[[int], Order],
        begin: Callable[[Order, int], Live | None],
        on_epoch: Callable[[int], None],
    ) -> None:
        self.epoch = 0
        """Of the next iteration."""
        self._make = make
        self._begin = begin
        self._on_epoch = on_epoch
        self._length: int | None = None
        self._watch()

    def _watch(self) -> None:
        self._exhausted: list[_Handle] = []
        # Kept apart from the sampler, so that it does not keep that alive. At exit the set notices that we are gone.
        self._closer = weakref.finalize(self, _end_all, self._exhausted)
        self._closer.atexit = False

    def set_epoch(self, epoch: int) -> None:
        """Have the next iteration be epoch ``epoch``, 0 or more.

        Raises:
            OptionError: it is no whole number, or negative.
        """
        self.epoch = whole_number("epoch", epoch, 0)

    def order(self, epoch: int) -> Order:
        """Which rows epoch ``epoch`` gives, without iterating: ``order(epoch).rows(0, n)`` are the first n."""
        return self._make(whole_number("epoch", epoch, 0))

    def __len__(self) -> int:
        if self._length is None:
            self._length = len(self._make(self.epoch))
        return self._length

    def __iter__(self) -> Generator[int, None, None]:
        _end_all(self._exhausted)
        epoch = self.epoch
        order = self._make(epoch)
        self._on_epoch(epoch)
        rows = self._rows(order, _Handle(self._begin(order, epoch)))
        next(rows)
        self.epoch = epoch + 1
        return rows

    def _rows(self, order: Order, handle: _Handle) -> Generator[int, None, None]:
        """Yields one number in vain: a generator that was not started would not end its handle when it is collected."""
        try:
            yield -1
            for start in range(0, len(order), _BLOCK_ROWS):
                yield from order.rows(start, start + _BLOCK_ROWS).tolist()
        except BaseException:  # closed, collected, or an error
            handle.end()
            raise
        self._exhausted.append(handle)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_exhausted", "_closer")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch()


class _Handle:
    """Ends a live order once, and only in the process that began it."""

    def __init__(self, live: Live | None) -> None:
        self._live = live
        self._pid = os.getpid()

    # Arguments: at interpreter exit the names of modules may be gone.
    def end(self, getpid: Callable[[], int] = os.getpid, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        live, self._live = self._live, None
        if live is not None and getpid() == self._pid and not is_exiting():
            live.end()


def _end_all(handles: list[_Handle]) -> None:
    while handles:
        handles.pop().end()
