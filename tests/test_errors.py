"""The errors themselves; what a read raises, and what it says."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub import serve
from support_sets import Gate, number, run_script, wait_at, write_numbers, write_pictures, write_table
from torch.utils.data import DataLoader

import shmloader.errors as errors
from shmloader import MultimodalConfig, Options, ShmMultimodalDataset
from shmloader.errors import (
    ClosedError,
    DecodeError,
    ProcessError,
    RecordTooLargeError,
    ServiceError,
    ShmloaderError,
    SplitNotFoundError,
    WaitTimeoutError,
    from_wire,
    to_json,
    to_wire,
)

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ShmloaderError)]
OPTIONS = Options(ring_bytes="8MiB", prefetchers=1, timeout_s=30)
PICTURE = MultimodalConfig(vision_dim=16)


def make(name: str, **kwargs: Any) -> ShmMultimodalDataset:
    return ShmMultimodalDataset(dataset_name=name, **{"options": OPTIONS, **kwargs})


# ---- the errors themselves ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_can_be_made_of_a_text_alone_as_torch_does(kind: type[ShmloaderError]) -> None:
    assert str(kind("text")) == "text"


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_carries_its_data_as_attributes(kind: type[ShmloaderError]) -> None:
    error = kind("text", row=3, shard="s")
    assert (error.row, error.shard, error.data) == (3, "s", {"row": 3, "shard": "s"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
def test_an_error_is_copied_and_pickled_with_its_data(
    kind: type[ShmloaderError], way: Callable[[ShmloaderError], ShmloaderError]
) -> None:
    error = kind("text", row=3)
    error.remote_traceback = "remote"
    same = way(error)
    assert (type(same), str(same), same.row, same.remote_traceback) == (kind, "text", 3, "remote")


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_comes_over_the_wire_with_type_data_and_traceback(kind: type[ShmloaderError]) -> None:
    try:
        raise kind("text", row=3, available=("a", "b"), fd=object())
    except ShmloaderError as error:
        wire = json.loads(json.dumps(to_wire(error)))
    same = from_wire(wire)
    assert (type(same), str(same)) == (kind, "text")
    assert same.data == {"row": 3, "available": ["a", "b"]}
    assert "raise kind(" in str(same.__cause__)


def test_an_attribute_that_an_error_lacks_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="SampleError has no attribute 'nothing'"):
        _ = errors.SampleError("x").nothing


def test_a_foreign_error_comes_over_the_wire_as_a_service_error_that_names_it() -> None:
    error = from_wire(to_wire(KeyError("k")))
    assert (type(error), str(error)) == (ServiceError, "KeyError: 'k'")


@pytest.mark.parametrize("name", ["os", "Any", "traceback", "RemoteTraceback", "Nothing", "_rebuild"])
def test_what_is_no_error_of_the_tree_comes_over_the_wire_as_a_service_error(name: str) -> None:
    assert type(from_wire({"type": name, "message": "m", "data": {}, "traceback": None})) is ServiceError


@pytest.mark.parametrize("size", [10, 10_000, 1_000_000])
def test_an_error_as_json_keeps_within_its_bound(size: int) -> None:
    error = SplitNotFoundError("e" * size, split="é" * size, available=["\N{SNOWMAN}"] * size)
    text = to_json(error, 4096)
    assert len(text) <= 4096
    assert type(from_wire(json.loads(text))) is SplitNotFoundError


# ---- what a read raises ----------------------------------------------------------------------------------


def test_a_record_larger_than_its_room_is_an_error_that_names_row_sizes_and_variable(tmp_path: Path) -> None:
    def process(row: dict[str, Any]) -> dict[str, Any]:
        return {"x": np.zeros(100_000 if row["number"] == 5 else 100, np.uint8)}

    options = Options(ring_bytes="64KiB", prefetchers=1, timeout_s=30)
    with make(write_numbers(tmp_path / "d", 8), process=process, options=options) as dataset:
        have = dataset.stats().transit_bytes
        with pytest.raises(RecordTooLargeError, match=r"row 5 .*100,\d+ bytes.*SHMLOADER_RING_BYTES") as caught:
            dataset[5]
        assert f"{have:,}" in str(caught.value)
        assert (caught.value.row, caught.value.have_bytes) == (5, have)


def test_rows_beside_one_that_is_too_large_are_read(tmp_path: Path) -> None:
    def process(row: dict[str, Any]) -> dict[str, Any]:
        return {"x": np.full(100_000 if row["number"] == 5 else 100, row["number"], np.uint8)}

    options = Options(ring_bytes="64KiB", prefetchers=2, timeout_s=30)
    with make(write_numbers(tmp_path / "d", 64), process=process, options=options) as dataset:
        with pytest.raises(RecordTooLargeError):
            dataset[5]
        assert [int(dataset[i]["x"][99]) for i in range(64) if i != 5] == [i for i in range(64) if i != 5]


def bad_picture(tmp_path: Path) -> ShmMultimodalDataset:
    return make(write_pictures(tmp_path / "d", 40, bad=[5]), config=PICTURE)


def test_an_image_that_cannot_be_decoded_names_source_shard_row_and_why(tmp_path: Path) -> None:
    with bad_picture(tmp_path) as dataset:
        with pytest.raises(DecodeError, match=r"row 5 of '.*d'.*shard '.*parquet'.*image") as caught:
            dataset[5]
        assert (caught.value.row, caught.value.source) == (5, dataset.name)
        assert caught.value.shard.endswith(".parquet")


def test_an_image_that_cannot_be_decoded_shows_the_traceback_of_the_prefetcher(tmp_path: Path) -> None:
    with bad_picture(tmp_path) as dataset, pytest.raises(DecodeError) as caught:
        dataset[5]
    assert "prefetch/decoder.py" in str(caught.value.__cause__)


def test_samples_beside_one_that_cannot_be_decoded_are_read(tmp_path: Path) -> None:
    with bad_picture(tmp_path) as dataset:
        with pytest.raises(DecodeError):
            dataset.__getitems__(range(40))
        assert [int(dataset[i]["labels"]) for i in range(40) if i != 5] == [i for i in range(40) if i != 5]
        assert (dataset.stats().samples_ready, dataset.stats().samples_bad) == (39, 1)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_an_error_keeps_its_type_and_traceback_through_a_worker(tmp_path: Path, context: str) -> None:
    with bad_picture(tmp_path) as dataset:
        loader = DataLoader(dataset, batch_size=4, num_workers=1, multiprocessing_context=context)
        with pytest.raises(DecodeError, match=r"(?s)worker process 0.*decoder.py.*row 5 of") as caught:
            list(loader)
        del caught, loader


def test_a_process_that_raises_is_named_with_its_row_and_its_traceback(tmp_path: Path) -> None:
    def process(row: dict[str, Any]) -> dict[str, Any]:
        return {"x": 1 / (row["number"] - 3)}

    with make(write_numbers(tmp_path / "d", 8), process=process) as dataset:
        with pytest.raises(ProcessError, match=r"row 3 of .*process raised ZeroDivisionError") as caught:
            dataset[3]
        assert "in process" in str(caught.value.__cause__)
        assert float(dataset[4]["x"]) == 1


@pytest.mark.parametrize("nonsense", [None, 5, [1], {}, {"x": object()}, {1: 2}, {"source": 1}])
def test_a_process_that_returns_nonsense_is_an_error(tmp_path: Path, nonsense: Any) -> None:
    name = write_numbers(tmp_path / "d", 4)
    code = f"def process(row): return {nonsense!r}"
    if isinstance(nonsense, dict) and isinstance(nonsense.get("x"), object) and "x" in nonsense:
        code = "def process(row): return {'x': object()}"
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(code, scope)
    with make(name, process=scope["process"]) as dataset, pytest.raises(ProcessError, match="row 2 of"):
        dataset[2]


@pytest.mark.parametrize("prefetchers", [1, 3])
def test_a_process_whose_keys_differ_between_rows_is_an_error_of_the_rows_that_differ(
    tmp_path: Path, prefetchers: int
) -> None:
    def process(row: dict[str, Any]) -> dict[str, Any]:
        return {"even" if row["number"] < 32 else "odd": row["number"]}

    options = Options(ring_bytes="1MiB", prefetchers=prefetchers, timeout_s=30)
    with make(write_numbers(tmp_path / "d", 64), process=process, options=options) as dataset:
        found: dict[str, list[int]] = {"even": [], "odd": [], "error": []}
        for i in range(64):
            try:
                found[next(key for key in dataset[i] if key in found)].append(i)
            except ProcessError as error:
                assert f"row {i} of" in str(error) and "every row must have the fields" in str(error)  # noqa: PT017, PT018
                found["error"].append(i)
        halves = [list(range(32)), list(range(32, 64))]
        assert found["error"] in halves
        assert sorted(found["even"] + found["odd"] + found["error"]) == list(range(64))


@pytest.mark.parametrize("status", [0, 9])
def test_a_process_that_ends_its_interpreter_costs_its_row_and_no_other(tmp_path: Path, status: int) -> None:
    def process(row: dict[str, Any]) -> dict[str, Any]:
        if row["number"] == 20:
            os._exit(status)
        return {"number": row["number"]}

    with make(write_numbers(tmp_path / "d", 64), process=process) as dataset:
        with pytest.raises(ServiceError, match=r"row 20 of .*each of the 3 prefetch processes") as caught:
            dataset[20]
        assert caught.value.row == 20
        rows = [i for i in range(64) if i != 20]
        assert [int(sample["number"]) for sample in dataset.__getitems__(rows)] == rows
        assert dataset.stats().restarts == 3


def test_a_tokenizer_that_fails_on_one_text_costs_that_row_only(tmp_path: Path) -> None:
    class Tokenizer:
        def encode(self, text: str) -> list[int]:
            if text == "t5":
                raise RuntimeError("cannot")
            return [1, 2, 3]

    name = write_table(tmp_path / "d", {"text": [f"t{i}" for i in range(16)]})
    with make(name, tokenizer=Tokenizer()) as dataset:
        with pytest.raises(ShmloaderError, match=r"row 5 of .*cannot"):
            dataset[5]
        assert dataset[6]["text"].tolist() == [1, 2, 3]


def test_a_shard_that_vanished_is_an_error_of_its_rows(tmp_path: Path) -> None:
    name = write_numbers(tmp_path / "d", 64)
    gate = Gate(tmp_path / "gate")

    def process(row: dict[str, Any], gate: str = gate.path) -> dict[str, Any]:
        wait_at(gate)
        os._exit(1)

    with make(name, process=process) as dataset:
        (tmp_path / "d" / "train-00000-of-00001.parquet").unlink()
        gate.open()
        with pytest.raises(ShmloaderError, match=r"train-00000-of-00001\.parquet"):
            dataset[0]


def test_a_timeout_in_a_worker_keeps_its_type() -> None:
    wrapper = torch._utils.ExceptionWrapper(exc_info=_raised(WaitTimeoutError("late", row=1)), where="in a worker")
    with pytest.raises(WaitTimeoutError, match="in a worker"):
        wrapper.reraise()


def _raised(error: Exception) -> Any:
    import sys

    try:
        raise error
    except Exception:
        return sys.exc_info()


# ---- after close() ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda dataset: dataset[0],
        lambda dataset: dataset.__getitems__([0]),
        lambda dataset: next(iter(dataset)),
        lambda dataset: dataset.stats(),
        lambda dataset: dataset.__enter__(),
        lambda dataset: pickle.dumps(dataset),
        lambda dataset: list(DataLoader(dataset, num_workers=1)),
    ],
)
def test_use_after_close_is_an_error_that_names_the_dataset(tmp_path: Path, use: Callable[[Any], Any]) -> None:
    dataset = make(write_numbers(tmp_path / "d", 8), process=number)
    dataset.close()
    with pytest.raises(ClosedError, match="was closed"):
        use(dataset)


def test_closing_twice_is_fine(tmp_path: Path) -> None:
    dataset = make(write_numbers(tmp_path / "d", 8), process=number)
    dataset.close()
    dataset.close()


# ---- secrets ---------------------------------------------------------------------------------------------

SECRET = "hf_SECRETSECRETSECRETSECRET"
HUB = """
import sys
from shmloader import Options, ShmMultimodalDataset
options = Options(ring_bytes="1MiB", prefetchers=1, log="DEBUG")
load = {"token": sys.argv[1]}
try:
    process = lambda row: {"x": row["number"] / (row["number"] - 1)}
    with ShmMultimodalDataset(dataset_name="org/data", load=load, process=process, options=options) as dataset:
        dataset[0]
        import os
        for name, fd in dataset._reader.files.fds().items():
            if name == "log":  # a pipe: what comes out of it is shown
                continue
            data = os.pread(fd, 1 << 20, 0)
            if fd != dataset._reader.files.payload_fd and sys.argv[1].encode() in data:
                print("TOKEN in", os.readlink(f"/proc/self/fd/{fd}"))
        dataset[1]
except Exception:
    import traceback
    traceback.print_exc()
"""


@pytest.mark.parametrize("is_right", [True, False])
def test_a_token_is_in_no_message_no_log_and_no_shared_memory(tmp_path: Path, is_right: bool) -> None:
    write_numbers(tmp_path / "hub" / "org" / "data", 8)
    with serve(tmp_path / "hub", SECRET if is_right else "hf_other") as hub:
        env = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        status, out, err = run_script(tmp_path, HUB, SECRET, env=env)
    assert status == 0, err
    assert ("ProcessError" if is_right else "DatasetNotFoundError") in err
    assert SECRET not in err
    assert out == ""
