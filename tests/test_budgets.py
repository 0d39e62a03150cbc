"""What the datasets of one process share: the default size of their rings, and the batch ring."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from conftest import opened, small_options
from support_sets import TESTS, Gate, gated, number, run_script, wait_until, write_numbers, write_pictures

import shmloader.opening as opening
from shmloader import MultimodalConfig, Options
from shmloader.errors import DatasetNotFoundError

cloudpickle.register_pickle_by_value(sys.modules[__name__])

MIB = 1 << 20
LIMIT = 256 * MIB
WHOLE = LIMIT // 4


@pytest.fixture(autouse=True)
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of `LIMIT` bytes, and no other datasets."""
    monkeypatch.setattr(opening, "memory_limits", lambda: (LIMIT, LIMIT, "a test"))
    monkeypatch.setattr(opening, "_default_rings", {})


@pytest.fixture(scope="module")
def numbers_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_numbers(tmp_path_factory.mktemp("numbers"), 100)


def by_default() -> Options:
    return small_options(ring_bytes=None)


def ring_bytes(dataset: Any) -> int:
    """The most that its samples may take."""
    return int(dataset.stats().ring_bytes)


# ---- rings ---------------------------------------------------------------------------------------------


def test_datasets_by_default_take_a_quarter_of_memory_together(numbers_path: str, tmp_path: Path) -> None:
    """Those whose samples' sizes nobody knows may each need all that they can get, as long as not all are there."""
    options, gate = by_default(), Gate(tmp_path / "gate")
    process = gated(gate, 50)
    with (
        opened(numbers_path, process=process, options=options) as train,
        opened(numbers_path, process=process, options=options) as validation,
        opened(numbers_path, process=process, options=options) as test,
    ):
        sizes = [ring_bytes(dataset) for dataset in (train, validation, test)]
        assert sizes[0] == WHOLE * 7 // 8
        assert sum(sizes) <= WHOLE
        assert sizes == sorted(sizes, reverse=True)
        gate.open()
        assert all([int(sample["number"]) for sample in dataset] == list(range(100)) for dataset in (train, test))


def test_what_fits_leaves_the_rest_to_those_that_come_after(tmp_path: Path) -> None:
    path, config = write_pictures(tmp_path, 32), MultimodalConfig(vision_dim=64, image_dtype="uint8")
    with (
        opened(path, config=config, options=by_default()) as train,
        opened(path, config=config, options=by_default()) as validation,
    ):
        most = 32 * train._reader.plan.schema.most_record_bytes()
        assert train.stats().transit_bytes == 0
        assert WHOLE * 7 // 8 - MIB <= ring_bytes(validation) + most <= WHOLE


def test_what_is_there_for_good_takes_no_more_than_it_has(numbers_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of samples whose sizes were not known before, once all are there."""
    limit = 8 << 30
    monkeypatch.setattr(opening, "memory_limits", lambda: (limit, limit, "a test"))
    with opened(numbers_path, process=number, options=by_default()) as first:
        assert len(list(first)) == 100
        assert wait_until(lambda: first._reader.attach().segment.stats()["chunks_done"] == 7)
        with opened(numbers_path, process=number, options=by_default()) as second:
            assert ring_bytes(second) > ring_bytes(first) - (1 << 30)


def test_a_dataset_that_is_closed_or_never_came_gives_its_part_back(numbers_path: str) -> None:
    for _ in range(3):
        with opened(numbers_path, process=number, options=by_default()) as dataset:
            assert ring_bytes(dataset) == WHOLE * 7 // 8
        assert not opening._default_rings
        with pytest.raises(DatasetNotFoundError, match="nowhere"):
            opening_of("/nowhere/at/all")
        assert not opening._default_rings


def opening_of(name: str) -> None:
    with opened(name, process=number, options=by_default()):
        pass


def test_a_ring_whose_size_was_said_takes_nothing_of_the_others(numbers_path: str) -> None:
    with (
        opened(numbers_path, process=number, options=small_options(ring_bytes="60MiB")),
        opened(numbers_path, process=number, options=by_default()) as dataset,
    ):
        assert ring_bytes(dataset) == WHOLE * 7 // 8


def test_after_many_large_ones_there_is_still_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(opening._default_rings, "large", lambda: 2 * WHOLE)
    assert opening._ring_size(by_default()) == WHOLE // 64


def test_a_forked_child_does_not_enter_its_parents_sets(numbers_path: str) -> None:
    with opened(numbers_path, process=number, options=by_default()) as dataset:
        assert len(list(dataset)) == 100
        (may_take,) = opening._default_rings.values()
        segment = dataset._reader.attach().segment
        num_clients = len(segment.clients())
        pid = os.fork()
        if pid == 0:
            os._exit(0 if may_take() == ring_bytes_at_most(dataset) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert len(segment.clients()) <= num_clients


def ring_bytes_at_most(dataset: Any) -> int:
    return int(dataset._reader.files.ring.file_bytes) and WHOLE * 7 // 8


# ---- batches -------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys, warnings
from support_sets import number
from torch.utils.data import DataLoader
from shmloader import Options, ShmMultimodalDataset
options = dict(ring_bytes="16MiB", prefetchers=1)

def make(**kwargs):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        dataset = ShmMultimodalDataset(dataset_name=sys.argv[1], process=number, options=Options(**options, **kwargs))
    return dataset, [(str(w.message), w.filename == __file__) for w in told if "batch_bytes" in str(w.message)]

if __name__ == "__main__":
    first, told = make(**json.loads(sys.argv[2]))
    found = [first.stats().batch_bytes, told]
    second, told = make(**json.loads(sys.argv[3]))
    found += [second.stats().batch_bytes, told]
    loader = DataLoader(second, 10, num_workers=1, multiprocessing_context=sys.argv[4])
    rows = [n for batch in loader for n in batch["number"].tolist()]
    stats = second.stats()
    print(json.dumps(found + [rows == list(range(100)), stats.batches_in_slots, stats.batches_inline]))
"""


def run_two(tmp_path: Path, path: str, first: Any, second: Any, method: str = "fork", **env: str) -> list[Any]:
    """Of two datasets with these options: batch_bytes and warnings of each, and how the second one's batches came."""
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    status, out, err = run_script(tmp_path, SCRIPT, path, json.dumps(first), json.dumps(second), method, env=env)
    assert status == 0, err
    found: list[Any] = json.loads(out)
    return found


def test_the_first_dataset_says_how_much_batches_take_and_another_size_is_told(
    tmp_path: Path, numbers_path: str
) -> None:
    found = run_two(tmp_path, numbers_path, {"batch_bytes": "24MiB"}, {"batch_bytes": "48MiB"})
    size, told, again, ((message, is_callers),), is_right, in_slots, inline = found
    assert (size, told, again) == (24 * MIB, [], 24 * MIB)
    assert is_right
    assert (in_slots, inline) == (10, 0)
    assert all(part in message for part in ("'48MiB'", "48.0 MiB", "24.0 MiB", "SHMLOADER_BATCH_BYTES"))
    assert is_callers


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_does_not_fit_crosses_the_pipe(tmp_path: Path, numbers_path: str, method: str) -> None:
    found = run_two(tmp_path, numbers_path, {}, {}, method, SHMLOADER_BATCH_BYTES="1KiB")
    assert found == [1024, [], 1024, [], True, 0, 10]


def test_a_share_is_of_memory_and_never_more_than_all_of_it(tmp_path: Path, numbers_path: str) -> None:
    found = run_two(tmp_path, numbers_path, {"batch_bytes": "100%"}, {"batch_bytes": "60TiB"})
    assert found[0] == found[2] > 0
    assert found[1] == found[3] == []
    assert found[4]
