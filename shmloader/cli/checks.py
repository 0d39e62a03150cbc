"""What ``shmloader check`` tries: each check says what it found, or raises what went wrong."""

from __future__ import annotations

import os
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from shmloader import Options, ShmloaderError, ShmMultimodalDataset
from shmloader.errors import DatasetNotFoundError, OptionError, SourceError, SplitNotFoundError

#: Samples that are looked at.
_NUM_SAMPLES = 16
#: What a dead Hub may take beyond ``SHMLOADER_SOURCE_TIMEOUT_S``: the services' start, and the first batch.
_SLACK_S = 5.0
#: How long a Hub that does not answer is tried here: what is checked is that it is given up then.
_DEAD_HUB_S = 3.0


class CheckError(Exception):
    """A promise was not kept."""


class Checks:
    """The checks, which share what the first of them has read.

    name: a dataset's short name, a Hub id or a local folder. workers: of the DataLoader.
    """

    def __init__(self, name: str, split: str, workers: int) -> None:
        self._name, self._split, self._workers = name, split, workers
        self._streamed: list[dict[str, Any]] = []

    def streaming(self) -> str:
        """The real dataset, through a DataLoader, from where it lies."""
        with self._opened() as dataset:
            self._streamed = self._read(dataset)
            return _described(dataset, self._streamed)

    def download(self) -> str:
        """The same, downloaded first: the same samples."""
        with self._opened(use_streaming=False) as dataset:
            downloaded = self._read(dataset)
            is_same = len(self._streamed) == len(downloaded) and all(map(_are_equal, self._streamed, downloaded))
            if self._streamed and not is_same:
                raise CheckError("what was downloaded gives other samples than what was streamed")
            return f"{_described(dataset, downloaded)}{', equal to those streamed' if self._streamed else ''}"

    def selection(self) -> str:
        """The dataset that is chosen when none is named."""
        with ShmMultimodalDataset(dataset_name="auto", fallback="error") as dataset:
            samples = self._read(dataset)
            return f"without a name or a task: {_described(dataset, samples)}"

    def errors(self) -> str:
        """What does not exist is an error, which says what there is."""
        with tempfile.TemporaryDirectory(prefix="shmloader-check-") as folder:
            Path(folder, "train.txt").write_text("a line\n")
            tried: tuple[tuple[str, type[ShmloaderError], dict[str, Any], str], ...] = (
                ("an unknown name", DatasetNotFoundError, {"dataset_name": "beens"}, "beans"),
                ("an unknown task", OptionError, {"dataset_name": "auto", "task_type": "smell"}, "vision"),
                ("an unknown split", SplitNotFoundError, {"dataset_name": folder, "split": "trian"}, "train"),
                ("no such column", ShmloaderError, {"dataset_name": folder, "columns": {"text": "txet"}}, "text"),
            )
            for what, kind, arguments, hint in tried:
                error = _raised(what, kind, partial(ShmMultimodalDataset, **arguments))
                if hint not in str(error):
                    raise CheckError(f"the error for {what} does not name {hint!r}: {error}")
        return f"{', '.join(what for what, *_ in tried)}: each an error that names what there is"

    def bad_rows(self) -> str:
        """A row that cannot be decoded raises, or a neighbour takes its place."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with tempfile.TemporaryDirectory(prefix="shmloader-check-") as folder:
            texts = [None if row == 1 else f"text {row}" for row in range(4)]
            pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), Path(folder, "train.parquet"))
            with ShmMultimodalDataset(dataset_name=folder) as dataset:
                _raised("a null text", ShmloaderError, lambda: dataset[1])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with ShmMultimodalDataset(dataset_name=folder, on_error="skip", max_bad=0.5) as dataset:
                    if not _are_equal(dataset[1], dataset[2]):
                        raise CheckError("on_error='skip' did not put the next row in the place of a bad one")
                    rows = [bad["row"] for bad in dataset.quarantine]
            if rows != [1]:
                raise CheckError(f"the quarantine lists rows {rows}, and row 1 is bad")
        return "raises, or is skipped and listed in the quarantine"

    def fallbacks(self) -> str:
        """A Hub that cannot be reached: synthetic data with a warning, or an error, and both in time."""
        options = Options(source_timeout_s=_DEAD_HUB_S)
        with _dead_hub():
            began = time.monotonic()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with ShmMultimodalDataset(dataset_name="beans", options=options) as dataset:
                    sample = dataset[0]
            took_s = _in_time("the first synthetic sample", began)
            if "synthetic" not in sample["source"] or not any("SYNTHETIC" in str(w.message).upper() for w in caught):
                raise CheckError(f"synthetic data was given without saying so: source {sample['source']!r}")
            began = time.monotonic()
            _raised(
                "a Hub that cannot be reached, with fallback='error'",
                SourceError,
                partial(ShmMultimodalDataset, dataset_name="beans", fallback="error", options=options),
            )
            error_s = _in_time("the error", began)
        return (
            f"a dead Hub, given up after {_DEAD_HUB_S:g} s: synthetic data that says so after {took_s:.1f} s, or an "
            f"error after {error_s:.1f} s"
        )

    def _opened(self, **arguments: Any) -> ShmMultimodalDataset:
        return ShmMultimodalDataset(
            dataset_name=self._name, split=self._split, fallback="error", on_error="raise", **arguments
        )

    def _read(self, dataset: ShmMultimodalDataset) -> list[dict[str, Any]]:
        """Its first samples, by way of a DataLoader."""
        rows = range(min(_NUM_SAMPLES, len(dataset)))
        loader: DataLoader[Any] = DataLoader(
            dataset, batch_size=None, sampler=list(rows), num_workers=self._workers, collate_fn=dict
        )
        samples = [{name: _own(value) for name, value in sample.items()} for sample in loader]
        if len(samples) != len(rows):
            raise CheckError(f"{len(rows)} samples were asked for, and {len(samples)} came")
        return samples


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _are_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


def _described(dataset: ShmMultimodalDataset, samples: list[dict[str, Any]]) -> str:
    fields = ", ".join(
        f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        for name, value in samples[0].items()
        if isinstance(value, torch.Tensor)
    )
    modes = ", ".join(dict.fromkeys(source["mode"] for source in dataset.sources))
    return f"{dataset.name}: {len(dataset):,} rows, mode {modes!r}; the first sample: {fields}"


def _raised(what: str, kind: type[ShmloaderError], function: Callable[[], Any]) -> ShmloaderError:
    try:
        made = function()
    except kind as error:
        return error
    if isinstance(made, ShmMultimodalDataset):
        made.close()
    raise CheckError(f"{what} should raise {kind.__name__}, but did not")


def _in_time(what: str, began: float) -> float:
    took_s = time.monotonic() - began
    if took_s > _DEAD_HUB_S + _SLACK_S:
        raise CheckError(f"{what} took {took_s:.1f} s; promised are {_DEAD_HUB_S + _SLACK_S:g}")
    return took_s


@contextmanager
def _dead_hub() -> Iterator[None]:
    """Have services that start meanwhile find no Hub, and nothing in its caches."""
    with socket.socket() as closed, tempfile.TemporaryDirectory(prefix="shmloader-check-") as home:
        closed.bind(("127.0.0.1", 0))  # bound, and nobody listens: each connection is refused
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        changes = {"HF_ENDPOINT": address, "HF_HOME": home, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        caches = ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HUGGINGFACE_HUB_CACHE")
        before = {name: os.environ.get(name) for name in (*changes, *caches)}
        os.environ.update(changes)
        for name in caches:
            os.environ.pop(name, None)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
