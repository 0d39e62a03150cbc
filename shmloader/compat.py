"""The names of the loader that this package replaces, for scripts that still use them; docs/migration.md tells the new.

What they did with a thread and a deque in every worker is done by the set of `ShmMultimodalDataset` here: rows are
fetched and processed once, by processes that all workers share.
"""

from __future__ import annotations

import logging
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from shmloader.collate import PADDED, collate_as
from shmloader.dataset import ShmMultimodalDataset
from shmloader.errors import OptionError
from shmloader.iterable import ShmMultimodalIterableDataset
from shmloader.permutation import whole_number
from shmloader.sources.features import item_of

__all__ = ["MultimodalDataset", "StreamingDatasetWrapper", "collate_fn", "create_multimodal_dataloaders"]

log = logging.getLogger("shmloader.compat")

#: Workers of `create_multimodal_dataloaders` where the caller says nothing: as the old function had.
_NUM_WORKERS = 2


class MultimodalDataset(ShmMultimodalDataset):
    """`ShmMultimodalDataset` under its old name, with the same arguments.

    The methods by which it loaded its rows do nothing any more, and say so: rows are loaded by the prefetch processes,
    from the constructor on.
    """

    def _load_data(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Deprecated: an empty list."""
        _warn_of("_load_data", "rows are streamed by prefetch processes; index the dataset")
        return []

    def _ensure_local_dataset(self, *args: Any, **kwargs: Any) -> None:
        """Deprecated: None."""
        _warn_of("_ensure_local_dataset", "use_streaming=False downloads a dataset first")

    def _load_single_dataset(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Deprecated: an empty list."""
        _warn_of("_load_single_dataset", "dataset_name= takes one name, or a list of them")
        return []


def _warn_of(method: str, instead: str) -> None:
    message = f"MultimodalDataset.{method}() does nothing any more: {instead}. It will be removed."
    log.warning("%s", message)
    warnings.warn(message, DeprecationWarning, stacklevel=3)


class StreamingDatasetWrapper(IterableDataset[dict[str, Any]]):
    """Iterates over the rows of any ``datasets`` object, fetched and decoded ahead by processes that all workers share.

    A row is a dict of Python objects, as ``datasets`` yields it without a format: images as PIL images, audio as
    {"array": float32 [n], "sampling_rate", "path"} (mono, at the rate that its feature names, else at its own). In the
    workers of a DataLoader each row comes once, over all of them. Each ``iter()`` begins at the front.

    Safe to use from several threads, and in DataLoader workers, forked or spawned. `close` it, or use it as a context
    manager; else its processes end with this one.

    dataset: a ``Dataset`` or an ``IterableDataset``; of a dict of these the split ``"train"``.
    max_cache_size: of a stream, rows that are decoded ahead of the readers; else, rows that stay for the next
        iteration.

    Raises:
        OptionError: it is something else, or max_cache_size no whole number from 1 up. Iterating raises what is wrong
            with a row where it would come (docs/errors.md).
    """

    def __init__(self, dataset: Any, max_cache_size: int = 1000) -> None:
        if not hasattr(dataset, "features") and not isinstance(dataset, Mapping):
            raise OptionError(
                f"StreamingDatasetWrapper takes a Dataset or IterableDataset of `datasets`, but got "
                f"{type(dataset).__name__}. For a name or a folder use ShmMultimodalIterableDataset.",
                name="dataset",
                value=type(dataset).__name__,
                allowed="a Dataset or IterableDataset",
            )
        rows = dataset["train"] if isinstance(dataset, Mapping) and "train" in dataset else dataset
        self.dataset = rows
        self.max_cache_size = whole_number("max_cache_size", max_cache_size, 1)
        self._samples = ShmMultimodalIterableDataset(
            dataset_name=rows, process=_Pickled(getattr(rows, "features", None)), cache_size=self.max_cache_size
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for sample in self._samples:
            # A copy of its own: what is unpickled may keep the buffer.
            yield pickle.loads(sample["row"].numpy().tobytes())

    def __len__(self) -> int:
        num_rows = self._samples.stats().num_rows
        if num_rows is None:
            raise TypeError("this stream does not tell its length")
        return num_rows

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch of the next iteration: another order of a shuffled stream."""
        self._samples.set_epoch(epoch)

    def close(self) -> None:
        """End its processes, and free what they kept."""
        self._samples.close()

    cleanup = close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker reads through the set, not from the rows: they may be large, and open files.
        return {**self.__dict__, "dataset": None}


class _Pickled:
    """A ``process``: a row of Python objects, pickled. features: of ``datasets``, None where a stream has none."""

    def __init__(self, features: Any) -> None:
        self._features = features

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        features = self._features or {}
        decoded = {name: _decoded(features.get(name), value) for name, value in row.items()}
        return {"row": np.frombuffer(pickle.dumps(decoded, protocol=5), np.uint8)}


def _decoded(feature: Any, value: Any) -> Any:
    """``value`` with the images and clips in it decoded, however deep. feature: None: not known."""
    if value is None or feature is None:
        return value
    kind = type(feature).__name__
    if kind == "Image" and feature.decode:
        return feature.decode_example(value)
    if kind == "Audio" and feature.decode:
        return _clip(value, feature.sampling_rate)
    if isinstance(feature, Mapping):
        return {name: _decoded(feature.get(name), inner) for name, inner in value.items()}
    item = item_of(feature)
    return [_decoded(item, inner) for inner in value] if item is not None and isinstance(value, list) else value


def _clip(value: Mapping[str, Any], rate: int | None) -> dict[str, Any]:
    """A decoded clip, as ``datasets`` gave it before it took torchcodec."""
    from shmloader.processors.audio import decode_audio
    from shmloader.processors.sound_file import read_sound

    if rate is None:
        _, rate = read_sound(value["bytes"], value["path"], lambda _: 1)
    return {"path": value["path"], "array": decode_audio(value, rate), "sampling_rate": rate}


def collate_fn(batch: Sequence[Mapping[str, Any]]) -> Any:
    """The batch of samples: padded, with masks, whether they are this package's samples or plain dicts.

    As ``dataset.collate``, for scripts that name the function without the dataset.

    Raises:
        ShmloaderError: the samples have different fields, or the values of one cannot be laid side by side.
    """
    return collate_as(None, PADDED, batch)


def create_multimodal_dataloaders(
    config: Any = None,
    tokenizer: Any = None,
    batch_size: int = 32,
    dataset_name: Any = "auto",
    task_type: str | None = None,
    *,
    splits: tuple[str, str] | None = None,
    num_workers: int = _NUM_WORKERS,
    seed: int = 0,
    **arguments: Any,
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Two DataLoaders, for training (shuffled, each epoch anew) and for validation (in the data's order).

    splits: of training and of validation; None: "train" and "validation", but where a named dataset has no validation
        split, and the end of another one is taken for it (docs/datasets.md), training has the rest of that.
    arguments: further ones of `ShmMultimodalDataset`.

    Raises:
        As `ShmMultimodalDataset`; SplitNotFoundError: there is no validation split. OptionError: training would have
            the rows of validation, of several datasets with others in the place of their validation splits, say.
    """
    train_split, validation_split = splits or ("train", "validation")

    def open_split(split: str) -> MultimodalDataset:
        return MultimodalDataset(config, tokenizer, split, dataset_name, task_type, **arguments)

    with ExitStack() as stack:  # what was made is closed if the rest cannot be
        validation = stack.enter_context(open_split(validation_split))
        if splits is None:
            train_split = _rest_of(validation)
        train = stack.enter_context(open_split(train_split))
        if splits is None:
            _check_apart(train, validation)
        loaders = tuple(
            DataLoader(
                dataset,
                batch_size=batch_size,
                sampler=dataset.sampler(shuffle=dataset is train, seed=seed),
                num_workers=num_workers,
                persistent_workers=num_workers > 0,
            )
            for dataset in (train, validation)
        )
        stack.pop_all()
    return loaders[0], loaders[1]


def _check_apart(train: MultimodalDataset, validation: MultimodalDataset) -> None:
    """Raise OptionError if a named dataset has the same split for both."""
    own = {(source["dataset"], source["split"]) for source in train.sources}
    for source in validation.sources:
        if (source["dataset"], source["split"]) in own:
            raise OptionError(
                f"{source['name']}: its splits 'train' and 'validation' are the same one here, {source['split']!r}, so "
                "training would have the rows of validation. Name two splits, or parts of one, with splits=, "
                "('train[:90%]', 'train[90%:]') say.",
                name="splits",
                value="None",
                allowed="the splits of training and of validation",
            )


def _rest_of(validation: MultimodalDataset) -> str:
    """The split to train on, which has no row of ``validation``."""
    rest = set()
    for source in validation.sources:
        tail = re.fullmatch(r"(\w+)\[(\d+%?):\]", source["split"])
        if tail is not None:
            rest.add(f"{tail[1]}[:{tail[2]}]")
        else:
            rest.add("train")
    if len(rest) == 1:
        return rest.pop()
    raise OptionError(
        f"{validation.name}: some of these datasets have no validation split, and a part of another split is taken in "
        "its place, others have one; so there is no split that all of them could train on. Make the datasets one by "
        "one, or name two splits that all of them have with splits=.",
        name="splits",
        value="None",
        allowed="the splits of training and of validation",
    )
