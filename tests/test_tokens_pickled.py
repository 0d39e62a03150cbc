"""Tokens: what crosses a worker's queue in a batch's stead, and when it is stale."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import cloudpickle
import pytest
import torch
from conftest import opened, run_script
from support_tokens import BATCH, assert_right, make_row, slots
from torch.utils.data import default_collate

from shmloader import ShmMultimodalDataset
from shmloader.errors import StaleTokenError
from shmloader.tokens import MAX_SLOTS_PER_WORKER
from shmloader.views import WorkerBatch

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


# -- tokens ----------------------------------------------------------------------------------------------------


def _send_tokens(dataset: Any, kinds: list[str], connection: Any) -> None:
    """In a process that acts as a DataLoader worker: pickled batches of rows 0-9, as its queue has them."""
    torch.utils.data._utils.worker._worker_info = torch.utils.data._utils.worker.WorkerInfo(
        id=0, num_workers=1, seed=0, dataset=None
    )
    for kind in kinds:
        batch = default_collate(dataset.__getitems__(range(BATCH)))
        assert isinstance(batch, WorkerBatch)
        if kind == "copied":
            connection.send_bytes(pickle.dumps(copy.copy(batch)))
            continue
        if kind == "unpicklable":
            try:
                ForkingPickler.dumps(extended_badly(batch))
            except TypeError:
                connection.send_bytes(b"")
                continue
        token = bytes(ForkingPickler.dumps(batch))
        if kind == "dropped":
            batch.lease._owner.ring.drop(batch.lease.slot)  # as is done for a dead worker's
        connection.send_bytes(token)
    connection.recv()


def extended_badly(batch: Any) -> Any:
    batch["thread lock"] = threading.Lock()
    return batch


@pytest.fixture
def tokens(dataset: Any) -> Iterator[Callable[..., list[bytes]]]:
    """Pickled batches from a worker, one for each kind; the worker lives until the test's end."""
    context = multiprocessing.get_context("fork")
    started: list[Any] = []

    def get(*kinds: str) -> list[bytes]:
        ours, theirs = context.Pipe()
        worker = context.Process(target=_send_tokens, args=(dataset, list(kinds), theirs))
        worker.start()
        started.append((worker, ours))
        theirs.close()
        return [ours.recv_bytes() for _ in kinds]

    yield get
    for worker, ours in started:
        ours.send(None)
        worker.join()
        assert worker.exitcode == 0


def test_token_is_a_few_bytes(tokens: Any) -> None:
    (token,) = tokens("token")
    assert len(token) < 1000 < BATCH * 3 * 100 * 4
    assert_right(pickle.loads(token), 0)


def test_token_can_be_unpickled_once(tokens: Any) -> None:
    (token,) = tokens("token")
    batch = pickle.loads(token)
    with pytest.raises(StaleTokenError, match="unpickled twice"):
        pickle.loads(token)
    assert_right(batch, 0)


def test_token_unpickled_after_its_batch_died_is_stale(tokens: Any) -> None:
    (token,) = tokens("token")
    pickle.loads(token)
    with pytest.raises(StaleTokenError):
        pickle.loads(token)


def test_token_of_a_slot_that_was_given_away_is_stale(tokens: Any) -> None:
    (token,) = tokens("dropped")
    with pytest.raises(StaleTokenError) as caught:
        pickle.loads(token)
    assert isinstance(caught.value.slot, int)


def test_token_in_another_process_is_stale(tokens: Any) -> None:
    (token,) = tokens("token")
    done = run_script(
        "import pickle, sys\nimport shmloader.tokens\npickle.loads(bytes.fromhex(sys.argv[1]))", token.hex()
    )
    assert "StaleTokenError" in done.stderr
    assert_right(pickle.loads(token), 0)


def test_copy_of_a_worker_s_batch_goes_by_value(tokens: Any) -> None:
    """So torch's pinning of a batch, which copies it, does not send its slot twice."""
    (first, second) = tokens("copied", "token")
    assert_right(pickle.loads(first), 0)
    assert_right(pickle.loads(first), 0)
    assert_right(pickle.loads(second), 0)


def test_batch_that_cannot_be_pickled_gives_its_slot_back(tokens: Any) -> None:
    """Many of them do not use the slots up: the last batch still comes in one."""
    before = slots()["num_sent"]
    *_, token = tokens(*["unpicklable"] * (2 * MAX_SLOTS_PER_WORKER), "token")
    assert slots()["num_sent"] == before + 1
    assert len(token) < 1000
    assert_right(pickle.loads(token), 0)
