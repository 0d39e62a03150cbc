"""The sampler: rows in the order of an epoch, and live orders that end when they should and only then."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from shmloader.errors import OptionError
from shmloader.order import Chunks, Kind, Order
from shmloader.sampler import ShmSampler

NUM_ROWS = 2500  # more than two blocks of the sampler


def order_of(epoch: int, **arguments: Any) -> Order:
    rows = np.full(10, NUM_ROWS // 10)
    chunks = Chunks(np.arange(10) * (NUM_ROWS // 10), rows, np.arange(10), rows)
    return Order(chunks, Kind.UNIFORM, epoch=epoch, **arguments)


def rows_of(epoch: int) -> list[int]:
    return [int(row) for row in order_of(epoch).rows(0, NUM_ROWS)]


class Calls:
    """What a sampler called: "epoch 0", "begin 0", "end 0", … in sequence."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.log: list[str] = []

    @property
    def live(self) -> list[int]:
        """The epochs that began and did not end; each may end once."""
        began, ended = ([int(call.split()[1]) for call in self.log if what in call] for what in ("begin", "end"))
        for epoch in ended:
            began.remove(epoch)
        return began

    def make(self, epoch: int) -> Order:
        self.made.append(epoch)
        return order_of(epoch)

    def begin(self, order: Order, epoch: int) -> Handle:
        assert order.epoch == epoch
        self.log.append(f"begin {epoch}")
        return Handle(self, epoch)

    def on_epoch(self, epoch: int) -> None:
        self.log.append(f"epoch {epoch}")


class Handle:
    def __init__(self, calls: Calls, epoch: int) -> None:
        self.calls = calls
        self.epoch = epoch

    def end(self) -> None:
        self.calls.log.append(f"end {self.epoch}")

    def __reduce__(self) -> Any:
        raise TypeError("a live order does not travel")


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def sampler(calls: Calls) -> ShmSampler:
    return ShmSampler(calls.make, calls.begin, calls.on_epoch)


class Numbers(Dataset[int]):
    """Row i is i; in torch's workers too."""

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> int:
        return index


def batches(loader: Any) -> list[int]:
    return [int(row) for batch in loader for row in batch]


# -- rows and epochs -------------------------------------------------------------------------------------------


def test_an_iteration_is_the_order_of_its_epoch(sampler: ShmSampler) -> None:
    """Python ints, all of them, in sequence."""
    rows = list(sampler)
    assert rows == rows_of(0)
    assert {type(row) for row in rows} == {int}


def test_each_iteration_is_another_epoch(sampler: ShmSampler) -> None:
    """Without set_epoch, the epochs follow one another; `epoch` is that of the next."""
    assert sampler.epoch == 0
    assert [list(sampler) for _ in range(3)] == [rows_of(epoch) for epoch in range(3)]
    assert sampler.epoch == 3


def test_set_epoch_names_the_next_iteration(sampler: ShmSampler, calls: Calls) -> None:
    """And those after it count on from there; naming the one that it would be anyway changes nothing."""
    next(iter(sampler))
    sampler.set_epoch(7)
    assert list(sampler) == rows_of(7)
    sampler.set_epoch(8)
    assert list(sampler) == rows_of(8)
    assert list(sampler) == rows_of(9)
    sampler.set_epoch(0)
    assert list(sampler) == rows_of(0)
    assert [call for call in calls.log if "epoch" in call] == [f"epoch {e}" for e in (0, 7, 8, 9, 0)]


@pytest.mark.parametrize("epoch", [-1, 1.0, None, "1", True])
def test_a_bad_epoch_is_an_error_and_changes_nothing(sampler: ShmSampler, epoch: Any) -> None:
    """It is raised by set_epoch, not by the iteration after it."""
    with pytest.raises(OptionError, match="epoch="):
        sampler.set_epoch(epoch)
    assert sampler.epoch == 0


def test_the_epoch_is_that_at_the_time_of_iter(sampler: ShmSampler) -> None:
    """Not that at the first next."""
    rows = iter(sampler)
    sampler.set_epoch(5)
    assert list(rows) == rows_of(0)


def test_an_iteration_that_could_not_begin_is_not_counted(calls: Calls) -> None:
    """The next one is the same epoch."""

    def fail(order: Order, epoch: int) -> None:
        raise OSError("no prefetchers")

    sampler = ShmSampler(calls.make, fail, calls.on_epoch)
    with pytest.raises(OSError, match="no prefetchers"):
        iter(sampler)
    assert sampler.epoch == 0


@pytest.mark.parametrize(("world_size", "drop_last"), [(1, False), (3, False), (3, True)])
def test_the_length_is_exact(world_size: int, drop_last: bool) -> None:
    """That of the order, before, during and after an iteration; it begins nothing."""
    calls = Calls()
    sampler = ShmSampler(
        lambda epoch: order_of(epoch, world_size=world_size, drop_last=drop_last), calls.begin, calls.on_epoch
    )
    length = len(sampler)
    assert calls.log == []
    rows = iter(sampler)
    next(rows)
    assert len(sampler) == length == 1 + len(list(rows)) == len(sampler)


def test_a_sampler_of_no_rows_ends_at_once(calls: Calls) -> None:
    """And again, one epoch after the other."""
    none = np.zeros(0, np.int64)
    sampler = ShmSampler(
        lambda epoch: Order(Chunks(none, none, none, none), Kind.UNIFORM, epoch=epoch), calls.begin, calls.on_epoch
    )
    assert (len(sampler), list(sampler), list(sampler)) == (0, [], [])
    assert calls.live == [1]


# -- when a live order ends ------------------------------------------------------------------------------------


def test_an_order_is_live_from_iter_on(sampler: ShmSampler, calls: Calls) -> None:
    """The epoch is told first, so that nothing is read under the one before."""
    rows = iter(sampler)
    assert calls.log == ["epoch 0", "begin 0"]
    assert calls.made == [0]
    del rows


@pytest.mark.parametrize("num_rows", [0, 1, 1500])
@pytest.mark.parametrize("way", ["close", "collect"])
def test_an_iteration_that_is_given_up_ends_its_order(
    sampler: ShmSampler, calls: Calls, num_rows: int, way: str
) -> None:
    """At once, whether it was closed or dropped, even before its first row."""
    rows: Any = iter(sampler)
    list(itertools.islice(rows, num_rows))
    assert calls.live == [0]
    if way == "close":
        rows.close()
        assert calls.live == []
        rows.close()
        assert list(rows) == []
    del rows
    gc.collect()
    assert calls.log == ["epoch 0", "begin 0", "end 0"]


def test_an_exhausted_order_is_live_until_the_next_begins(sampler: ShmSampler, calls: Calls) -> None:
    """Its last batches are on their way when the sampler is done."""
    rows = iter(sampler)
    list(rows)
    del rows
    gc.collect()
    assert calls.live == [0]
    more = iter(sampler)
    assert calls.log == ["epoch 0", "begin 0", "end 0", "epoch 1", "begin 1"]
    del more


def test_an_exhausted_order_ends_with_the_sampler(calls: Calls) -> None:
    """When nobody has it any more."""
    sampler = ShmSampler(calls.make, calls.begin, calls.on_epoch)
    list(sampler)
    assert calls.live == [0]
    del sampler
    gc.collect()
    assert calls.live == []


def test_an_iteration_may_outlive_its_sampler(calls: Calls) -> None:
    """It goes on, and its order ends when it is exhausted."""
    rows = iter(ShmSampler(calls.make, calls.begin, calls.on_epoch))
    gc.collect()
    assert calls.live == [0]
    assert list(rows) == rows_of(0)
    gc.collect()
    assert calls.live == []


def test_two_iterations_are_live_at_once(sampler: ShmSampler, calls: Calls) -> None:
    """Zipped: each has its own order, and ends it itself."""
    first, second = iter(sampler), iter(sampler)
    assert calls.live == [0, 1]
    pairs = list(itertools.islice(zip(first, second, strict=True), 1300))
    assert [list(rows) for rows in zip(*pairs, strict=True)] == [rows_of(0)[:1300], rows_of(1)[:1300]]
    del first
    gc.collect()
    assert calls.live == [1]
    third = iter(sampler)
    assert calls.live == [1, 2]
    assert list(second) == rows_of(1)[1300:]
    assert calls.live == [1, 2]
    fourth = iter(sampler)  # ends what is exhausted, and only that
    assert calls.live == [2, 3]
    del third, fourth


def test_an_order_that_fails_ends(calls: Calls) -> None:
    """An error while rows are made reaches the caller, and the order is not left behind."""

    class Broken(Order):
        def rows(self, start: int, stop: int) -> Any:
            if start:
                raise OSError("broken")
            return super().rows(start, stop)

    whole = order_of(0)
    sampler = ShmSampler(lambda epoch: Broken(whole.chunks, Kind.UNIFORM), calls.begin, calls.on_epoch)
    rows = iter(sampler)
    with pytest.raises(OSError, match="broken"):
        list(rows)
    assert calls.live == []


def test_prefetchers_may_need_no_word(calls: Calls) -> None:
    """`begin` may give None."""
    sampler = ShmSampler(calls.make, lambda order, epoch: None, calls.on_epoch)
    assert list(sampler) == rows_of(0)
    next(iter(sampler))
    assert list(sampler) == rows_of(2)


# -- other processes -------------------------------------------------------------------------------------------


def in_child(action: Callable[[], None]) -> int:
    """Run ``action`` in a forked child; its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_child_ends_nothing(calls: Calls) -> None:
    """It inherits an exhausted and a running iteration; closing, collecting and iterating there leaves both alone."""
    holder = [ShmSampler(calls.make, calls.begin, calls.on_epoch)]
    running = [iter(holder[0])]
    list(holder[0])

    def action() -> None:
        running[0].close()  # type: ignore[attr-defined]
        running.clear()
        holder.clear()
        gc.collect()
        assert calls.live == [0, 1]

    assert in_child(action) == 0
    assert calls.live == [0, 1]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_child_ends_what_it_began_itself(sampler: ShmSampler, calls: Calls) -> None:
    """It may iterate a sampler that it inherited."""
    list(sampler)

    def action() -> None:
        rows = iter(sampler)
        assert calls.live == [0, 1]  # that of the parent is not ours
        rows.close()  # type: ignore[attr-defined]
        assert calls.live == [0]

    assert in_child(action) == 0
    assert calls.live == [0]


@pytest.mark.parametrize("copied", [lambda s: pickle.loads(pickle.dumps(s)), copy.copy, copy.deepcopy])
def test_a_copy_has_no_live_orders(
    sampler: ShmSampler, calls: Calls, copied: Callable[[ShmSampler], ShmSampler]
) -> None:
    """Pickled on its way to another process: it goes on with the epoch, and ends nothing of the original."""
    running = iter(sampler)
    list(sampler)
    made = copied(sampler)
    assert list(made) == rows_of(2)
    made.set_epoch(9)
    assert [len(made), made.epoch, sampler.epoch] == [NUM_ROWS, 9, 2]
    del made
    gc.collect()
    assert {0, 1} <= set(calls.live)
    del running


EXIT = """
    import os
    import sys
    import numpy as np
    from shmloader.order import Chunks, Kind, Order
    from shmloader.sampler import ShmSampler

    class Handle:
        def end(self, write=os.write, is_exiting=sys.is_finalizing):
            write(2, b"ended while exiting" if is_exiting() else b"ended")

    rows = np.full(3, 1000)
    chunks = Chunks(np.arange(3) * 1000, rows, np.arange(3), rows)
    make = lambda epoch: Order(chunks, Kind.UNIFORM, epoch=epoch)
    sampler = ShmSampler(make, lambda order, epoch: Handle(), lambda epoch: None)
    running = iter(sampler)
    next(running)
    list(sampler)  # and one that is exhausted
    print("done", flush=True)
"""


def test_a_process_exits_quietly_in_the_middle_of_an_iteration() -> None:
    """Status 0, and nothing on stderr: no error, and no order is ended then."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EXIT)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


# -- torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("drop_last", "num_batches"), [(False, 40), (True, 39)])
def test_torchs_batch_sampler_takes_it(sampler: ShmSampler, drop_last: bool, num_batches: int) -> None:
    """Batches of 64 in the sequence of the order; their number is right."""
    batched = BatchSampler(sampler, 64, drop_last)
    assert len(batched) == num_batches
    for epoch in range(2):
        assert [row for batch in batched for row in batch] == rows_of(epoch)[: 64 * num_batches]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataloader_takes_it(sampler: ShmSampler, calls: Calls, num_workers: int) -> None:
    """With persistent workers, epoch after epoch; one live order at a time, and none when all is gone."""
    loader = DataLoader(
        Numbers(), batch_size=100, sampler=sampler, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    assert len(loader) == 25
    for epoch in range(3):
        assert batches(loader) == rows_of(epoch)
        assert calls.live == [epoch]
    del loader
    gc.collect()
    assert calls.live == [2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_leaving_an_epoch_early_ends_its_order(sampler: ShmSampler, calls: Calls, num_workers: int) -> None:
    """With ``break``, as soon as the loader's iterator is gone."""
    loader = DataLoader(Numbers(), batch_size=10, sampler=sampler, num_workers=num_workers)
    for batch in loader:
        assert batch.tolist() == rows_of(0)[:10]
        break
    gc.collect()
    assert calls.live == []
    assert batches(loader) == rows_of(1)


def test_zipped_loaders_of_one_sampler_have_orders_of_their_own(sampler: ShmSampler, calls: Calls) -> None:
    """Both to their end, one epoch apart."""
    loaders = [DataLoader(Numbers(), batch_size=100, sampler=sampler) for _ in range(2)]
    pairs = list(zip(*loaders, strict=True))
    for epoch in range(2):
        assert torch.cat([pair[epoch] for pair in pairs]).tolist() == rows_of(epoch)
    assert calls.live == [0, 1]


def test_every_nth_batch_may_be_taken(sampler: ShmSampler, calls: Calls) -> None:
    """As accelerate's BatchSamplerShard does: over all processes, each batch once."""

    def shard(batched: BatchSampler, index: int) -> Iterator[list[int]]:
        return (batch for i, batch in enumerate(batched) if i % 2 == index)

    found = []
    for index in range(2):
        sampler.set_epoch(3)
        found.append(list(shard(BatchSampler(sampler, 64, False), index)))
    merged = [batch for pair in itertools.zip_longest(*found) for batch in pair if batch is not None]
    assert [row for batch in merged for row in batch] == rows_of(3)
    assert calls.live == [3]
