"""The batch ring as the user sees it: slots that come back, batches that outlive everything, nothing waited for."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from conftest import opened, run_script, wait_until
from support_tokens import BATCH, NUM_BATCHES, assert_right, make_row, slots
from torch.utils.data import DataLoader, Dataset, Subset

from shmloader import ShmMultimodalDataset
from shmloader.tokens import MAX_SLOTS_PER_WORKER, batch_ring

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # more workers than cores
]


@pytest.fixture(scope="module")
def dataset(rows_path: str) -> Iterator[ShmMultimodalDataset]:
    with opened(rows_path, process=make_row) as made:
        yield made


@pytest.fixture(autouse=True)
def _nothing_is_held_after(dataset: ShmMultimodalDataset) -> Iterator[None]:
    """Whatever a test does, the training process holds no slot when its batches are gone."""
    yield
    gc.collect()
    assert slots()["num_held"] == 0


# -- lifetimes -------------------------------------------------------------------------------------------------


def test_slot_is_held_until_the_last_tensor_dies(dataset: Any) -> None:
    iterator = iter(DataLoader(dataset, batch_size=BATCH, num_workers=1))
    batch = next(iterator)
    assert slots()["num_held"] == 1
    part = batch["block"][3:, 1]
    del batch
    gc.collect()
    assert slots()["num_held"] == 1
    assert part[0, 0] == 3
    del part
    gc.collect()
    assert slots()["num_held"] == 0


def test_tensor_outlives_batch_loader_and_dataset(rows_path: str) -> None:
    with opened(rows_path, process=make_row) as dataset:
        loader = DataLoader(dataset, batch_size=BATCH, num_workers=1)
        tensor = next(iter(loader))["block"]
        dataset.close()
    del loader, dataset
    gc.collect()
    assert tensor[:, 0, 0].tolist() == list(range(BATCH))


def test_tensor_outlives_its_slot_s_next_uses(dataset: Any) -> None:
    """A held slot is not reused, whatever comes after."""
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=1)
    kept = next(iter(loader))
    for _ in range(2):
        for number, batch in enumerate(loader):
            assert_right(batch, number)
    assert_right(kept, 0)


def test_slots_are_used_again(dataset: Any) -> None:
    """Three epochs need no more slots than one worker may have."""
    for _ in DataLoader(dataset, batch_size=BATCH, num_workers=1):
        pass
    before = slots()["backed_bytes"]
    for _ in range(2):
        for _ in DataLoader(dataset, batch_size=BATCH, num_workers=1):
            pass
    assert slots()["backed_bytes"] <= max(before, MAX_SLOTS_PER_WORKER << 20)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_all_batches_can_be_held_at_once(dataset: Any, num_workers: int) -> None:
    before = dataset.stats()
    batches = list(DataLoader(dataset, batch_size=BATCH, num_workers=num_workers))
    assert len(batches) == NUM_BATCHES
    for number, batch in enumerate(batches):
        assert_right(batch, number)
    after = dataset.stats()
    in_slots = after.batches_in_slots - before.batches_in_slots
    copied = after.batches_copied - before.batches_copied
    inline = after.batches_inline - before.batches_inline
    assert in_slots + copied + inline == NUM_BATCHES
    assert copied + inline >= NUM_BATCHES - num_workers * MAX_SLOTS_PER_WORKER
    assert in_slots > 0


def test_each_tensor_has_a_storage_of_exactly_its_bytes(dataset: Any) -> None:
    for batch in DataLoader(dataset, batch_size=BATCH, num_workers=1):
        for name in ("x", "block"):
            assert batch[name].untyped_storage().nbytes() == batch[name].nbytes
            assert batch[name].storage_offset() == 0


def test_batch_may_be_written_in_place(dataset: Any) -> None:
    """By the trainer, without any effect on the next epoch, nor on other batches."""
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=2)
    for _ in range(2):
        for number, batch in enumerate(loader):
            assert_right(batch, number)
            batch["x"].fill_(-1)
            batch["block"].mul_(0)


def _saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b)), _saved],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_batches_are_copied_by_value(dataset: Any, duplicate: Callable[[Any], Any]) -> None:
    batch = next(iter(DataLoader(dataset, batch_size=BATCH, num_workers=1)))
    made = duplicate(batch)
    batch["block"].fill_(-1)
    batch["x"].fill_(-1)
    assert_right(made, 0)


# -- iterators that are given up -------------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [False, True])
def test_abandoned_epochs_leave_no_slot_behind(dataset: Any, persistent: bool) -> None:
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=2, persistent_workers=persistent)
    for _ in range(5):
        iterator = iter(loader)
        assert_right(next(iterator), 0)
        assert_right(next(iterator), 1)
        del iterator
    before = dataset.stats()
    for number, batch in enumerate(loader):
        assert_right(batch, number)
    del batch
    gc.collect()
    assert slots()["num_held"] == 0
    assert dataset.stats().batches_inline == before.batches_inline


def test_slots_of_workers_that_are_gone_are_used_by_the_next(dataset: Any) -> None:
    """Twenty abandoned epochs take no more memory than the workers of a few may have."""
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=2, prefetch_factor=4)
    for _ in range(4):
        next(iter(loader))
    few = slots()["num_slots"]
    for _ in range(8):
        next(iter(loader))
    assert slots()["num_slots"] <= few + 2 * MAX_SLOTS_PER_WORKER


def test_loader_dropped_with_a_batch_in_hand_keeps_the_batch(dataset: Any) -> None:
    iterator = iter(DataLoader(dataset, batch_size=BATCH, num_workers=2))
    batch = next(iterator)
    del iterator
    gc.collect()
    for number, other in enumerate(DataLoader(dataset, batch_size=BATCH, num_workers=2)):
        assert_right(other, number)
    assert_right(batch, 0)


# -- no room ---------------------------------------------------------------------------------------------------

_SMALL_BUDGET = """
import sys
from torch.utils.data import DataLoader
import shmloader.tokens
from shmloader import Options, ShmMultimodalDataset
shmloader.tokens.MAX_BUDGET_BYTES = int(sys.argv[2])
def process(row): return {"x": row["x"], "block": [[float(row["x"])] * 100] * 3}
if __name__ == "__main__":
    options = Options(ring_bytes="16MiB", prefetchers=1)
    with ShmMultimodalDataset(dataset_name=sys.argv[1], process=process, options=options) as dataset:
        seen = []
        for held in (False, True):
            loader = DataLoader(dataset, batch_size=10, num_workers=2)
            for batch in list(loader) if held else loader:
                assert (batch["block"][:, 2, 99] == batch["x"]).all()
                seen += batch["x"].tolist()
        assert seen == list(range(200)) * 2
        stats = dataset.stats()
        print(stats.batches_in_slots, stats.batches_copied, stats.batches_inline)
"""


@pytest.mark.parametrize(("budget_bytes", "all_inline"), [(4096, True), (32 << 10, False)])
def test_batches_beyond_the_budget_go_inline_and_are_right(rows_path: str, budget_bytes: int, all_inline: bool) -> None:
    done = run_script(_SMALL_BUDGET, rows_path, str(budget_bytes))
    assert done.returncode == 0, done.stderr
    in_slots, copied, inline = map(int, done.stdout.split())
    assert in_slots + copied + inline == 2 * NUM_BATCHES
    assert inline > 0
    assert (in_slots + copied == 0) == all_inline


# -- who has a batch ring --------------------------------------------------------------------------------------


class MadeInWorker(Dataset[Any]):
    """Makes its dataset when it is first read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.dataset: Any = None

    def __len__(self) -> int:
        return 40

    def __getitems__(self, indices: list[int]) -> Any:
        if self.dataset is None:
            from conftest import small_options

            self.dataset = ShmMultimodalDataset(dataset_name=self.path, process=make_row, options=small_options())
        return self.dataset.__getitems__(indices)


def test_dataset_made_in_a_worker_sends_what_its_training_process_can_read(dataset: Any, rows_path: str) -> None:
    loader = DataLoader(MadeInWorker(rows_path), batch_size=BATCH, num_workers=1)
    for number, batch in enumerate(loader):
        assert_right(batch, number)
    assert number == 3


def _train(dataset: Any, connection: Any) -> None:
    """A training process of its own, which has its dataset from its parent."""
    before = batch_ring().counters.inline if batch_ring() else 0
    for number, batch in enumerate(DataLoader(dataset, batch_size=BATCH, num_workers=2)):
        assert_right(batch, number)
    ring = batch_ring()
    assert ring is not None
    connection.send((number, ring.uuid, ring.counters.in_slots + ring.counters.copied, ring.counters.inline - before))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_that_trains_has_a_batch_ring_of_its_own(dataset: Any, method: str) -> None:
    """Else what it held when it is killed were lost to its parent."""
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    child = context.Process(target=_train, args=(dataset, theirs))
    child.start()
    theirs.close()
    number, uuid, in_slots, inline = ours.recv()
    child.join()
    assert child.exitcode == 0
    assert number == NUM_BATCHES - 1
    ring = batch_ring()
    assert ring is not None
    assert uuid != ring.uuid
    assert (in_slots, inline) == (NUM_BATCHES, 0)


def test_threads_that_make_datasets_share_one_batch_ring() -> None:
    script = """
    import threading
    from pathlib import Path
    import shmloader.tokens as tokens
    barrier = threading.Barrier(8)
    def make():
        barrier.wait()
        tokens.open_batch_ring()
    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    links = [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    print(sum("shmloader-batch" in link for link in links))
    """
    done = run_script(script)
    assert done.stdout.split() == ["1"], done.stderr


def test_a_second_dataset_uses_the_same_batch_ring(dataset: Any, rows_path: str, make_dataset: Any) -> None:
    first = batch_ring()
    other = make_dataset(rows_path, process=make_row)
    assert batch_ring() is first
    pairs = zip(*(DataLoader(d, batch_size=BATCH, num_workers=1) for d in (dataset, other)), strict=True)
    for number, (left, right) in enumerate(pairs):
        assert_right(left, number)
        assert_right(right, number)


def test_workers_leave_no_descriptor_in_the_training_process(dataset: Any) -> None:
    def batch_files() -> list[str]:
        return [str(fd) for fd in Path("/proc/self/fd").iterdir() if "shmloader-batch" in _link(fd)]

    files = batch_files()
    for _ in range(3):
        for _ in DataLoader(Subset(dataset, range(40)), batch_size=BATCH, num_workers=2):
            pass
    assert batch_files() == files


def _link(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError:  # the one of the listing itself
        return ""


def test_slots_of_a_killed_worker_are_free_again(dataset: Any) -> None:
    """What was in its pipe is lost with it, and the next epoch is complete, in slots."""
    iterator = iter(DataLoader(dataset, batch_size=BATCH, num_workers=1, prefetch_factor=4))
    next(iterator)
    assert wait_until(lambda: slots()["num_sent"] >= 2)
    worker = iterator._workers[0]
    worker.kill()
    worker.join()
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(iterator)
    del iterator
    gc.collect()
    before = dataset.stats()
    for number, batch in enumerate(DataLoader(dataset, batch_size=BATCH, num_workers=1, prefetch_factor=4)):
        assert_right(batch, number)
    after = dataset.stats()
    assert after.batches_inline == before.batches_inline


def test_closing_a_dataset_gives_the_memory_of_idle_slots_back(rows_path: str, make_dataset: Any) -> None:
    other = make_dataset(rows_path, process=make_row)
    batch = next(iter(DataLoader(other, batch_size=BATCH, num_workers=1)))
    kept = batch["x"].clone()
    gc.collect()
    assert slots()["num_slots"] >= 1
    other.close()
    assert wait_until(lambda: slots()["num_free"] == 0)
    assert torch.equal(batch["x"], kept)
