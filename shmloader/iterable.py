"""`ShmMultimodalIterableDataset`: samples one after the other, for streams that tell no length."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from shmloader.base_dataset import SharedDataset
from shmloader.iteration import Iteration, Share
from shmloader.options import Options
from shmloader.permutation import whole_number
from shmloader.selection import select
from shmloader.sources.base import SourceRequest

#: Iterations begun in this process, outside of a DataLoader's workers.
_iterations = itertools.count()


class ShmMultimodalIterableDataset(SharedDataset, IterableDataset[dict[str, Any]]):
    """The samples of a dataset in its own order, each decoded once and read in place; nobody needs to know how many.

    As `ShmMultimodalDataset`, but iterated over: for streams without a length, endless ones included, and for any other
    source. With a stock ``torch.utils.data.DataLoader`` worker w of W yields the samples at positions w, w + W, …:
    all together each position once, for any number of workers and of shards. Each ``iter()`` begins at the front, and
    several may live at once.

    Where the number of rows is known, those that fit stay in the ring for the next iteration. Else each iteration reads
    the stream anew, ahead of its readers; a stream must give the same rows each time it is read in the same epoch.
    ``set_epoch(e)`` is handed on to it, so that ``stream.shuffle()`` gives another order each epoch.

    Several threads of one process that iterate wait one at a time: one whose stream is slow holds up the others. Use
    DataLoader workers, or processes, for that.

    Args:
        config, tokenizer, split, dataset_name, task_type, transform, process, columns, keys, load, train_on_prompt,
            options, writable, seed: as of `ShmMultimodalDataset`. A ``transform`` is seeded by (seed, epoch, position);
            the epoch is what `set_epoch` said before the iteration began, else 0.
        fallback, on_error, max_bad: as of `ShmMultimodalDataset`. A stream without a length may end behind a bad row:
            so "skip" leaves the row out there, and there is one sample less; a made-up one is like the next good one,
            and left out if there is none; and ``max_bad`` is a share of the rows that each reader has come to, 1,000 at
            least. A stream that fails is an error in any case.
        cache_size: as of `ShmMultimodalDataset` where the number of rows is known. Of a stream nothing stays: then at
            most so many samples are decoded ahead of its readers, but never less than 16; those that readers work on
            come on top.
        max_samples: end after so many, over all workers; None: at the end.

    Raises:
        As `ShmMultimodalDataset`; OptionError: max_samples is no whole number from 1 up. Iterating raises what went
        wrong where the first sample that it concerns would come, and `RingError` when 64 iterations live.
    """

    def __init__(
        self,
        config: Any = None,
        tokenizer: Any = None,
        split: str = "train",
        dataset_name: Any = "auto",
        task_type: str | None = None,
        use_streaming: bool = True,
        cache_size: int | None = None,
        *,
        transform: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
        process: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
        columns: dict[str, Any] | None = None,
        keys: str | Mapping[str, str | None] = "shmloader",
        load: dict[str, Any] | None = None,
        fallback: str = "synthetic",
        on_error: str = "raise",
        max_bad: float = 0.01,
        train_on_prompt: bool = False,
        options: Options | None = None,
        writable: bool = False,
        seed: int = 0,
        max_samples: int | None = None,
    ) -> None:
        self.max_samples = None if max_samples is None else whole_number("max_samples", max_samples, 1)
        self._begun = 0
        self._ended: list[Iteration] = []
        request = SourceRequest(
            dataset_name,
            split,
            columns,
            process is not None,
            dict(load or {}),
            is_iterable=True,
            max_samples=self.max_samples,
            is_downloaded=not use_streaming,
            fallback=fallback,
        )
        self._open(
            config,
            tokenizer,
            select(dataset_name, task_type, request),
            transform=transform,
            process=process,
            options=options,
            cache_size=cache_size,
            keys=keys,
            writable=writable,
            seed=seed,
            on_error=on_error,
            max_bad=max_bad,
            train_on_prompt=train_on_prompt,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        share = self._share()
        # Those of several readers that came to their end before. Till now they were members nonetheless: a worker that
        # is slow to start joins their iteration, where it would find none and begin another if all others had left.
        while self._ended:
            self._ended.pop().leave()
        return self._samples(share)

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} has no samples by index: iterate over it. ShmMultimodalDataset has, where the "
            "number of rows is known."
        )

    def _share(self) -> Share:
        """The next iteration: all workers of a DataLoader name it alike, and nobody else does."""
        worker = get_worker_info()
        if worker is None:
            return Share.of(0, 1, os.getpid(), next(_iterations))
        # Each worker has a copy of this dataset, and begins as many iterations as the others.
        self._begun += 1
        return Share.of(worker.id, worker.num_workers, worker.seed - worker.id, self._begun)

    def _samples(self, share: Share) -> Iterator[dict[str, Any]]:
        iteration = Iteration.join(self._reader, share, self.max_samples)
        try:
            for attachment, refs, positions in iteration.blocks():
                for i, position in enumerate(positions):
                    writable = self.writable or self.transform is not None
                    sample = self._sample(attachment, refs, i, iteration.id_of(position), writable)
                    if self.transform is not None:
                        sample = self._transformed(sample, position, iteration.epoch)
                    yield sample
                # They keep their records where they are, and nobody must wait with these.
                del attachment, refs, sample
        except BaseException:  # closed, collected, or an error
            iteration.leave()
            raise
        if share.num_readers == 1:
            iteration.leave()
        else:
            self._ended.append(iteration)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_ended": []}
