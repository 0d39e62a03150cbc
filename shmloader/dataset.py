"""`ShmMultimodalDataset`: a map-style dataset whose samples lie, decoded once, in shared memory."""

from __future__ import annotations

import logging
import operator
import os
import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

import shmloader._native as native
from shmloader.collate import collate
from shmloader.config import MultimodalConfig
from shmloader.errors import ClosedError, OptionError
from shmloader.opening import close_set, open_set
from shmloader.options import Options
from shmloader.order import Kind, Order
from shmloader.prefetch.payload import Work
from shmloader.processors.text import check_tokenizer
from shmloader.sampler import ShmSampler
from shmloader.seeding import seeded
from shmloader.sources.base import SourceRequest
from shmloader.stats import Stats
from shmloader.tokens import batch_ring, join, known_files
from shmloader.views import Sample

log = logging.getLogger("shmloader")


class ShmMultimodalDataset(Dataset[dict[str, Any]]):
    """Samples of a dataset, each decoded once per node and read in place by any number of processes.

    Give it to a stock ``torch.utils.data.DataLoader``, with any number of workers. Constructing it starts the
    prefetch processes and returns when the number of rows is known; samples come as they are decoded, and whoever asks
    for one that is not there yet waits for it. Use it as a context manager, or `close` it; else it ends with the
    process.

    Args:
        config: sizes of a sample (`MultimodalConfig`, or anything with its attributes).
        tokenizer: anything with ``encode(str)``; ``tokenizers`` and transformers tokenizers are called by the batch;
            None: the text's UTF-8 bytes.
        split: name of the split.
        dataset_name: a Hub id, a local folder or file, or an already loaded ``datasets`` object.
        transform: called in the reading process on every read with a dict of private copies; returns a dict. Its
            random numbers (``random``, numpy's and torch's global generators) are seeded by (seed, epoch, sample).
        process: called in a prefetch process when a row is decoded (once, where all samples fit the ring), in
            place of the built-in decoding: takes the row as a dict
            (images as ``{"bytes", "path"}``), returns a dict of arrays, tensors, numbers or strings; cached.
        columns: which columns to use, as {"text" | "image" | "labels": column}; None: recognise them.
        load: passed on to ``datasets`` (name, revision, token, data_files, …).
        options: settings; None: those of the environment (``SHMLOADER_*``).
        writable: ``dataset[i]`` gives private copies in place of read-only views.
        seed: of the random numbers of ``transform``; another one gives other augmentations.

    A sample is a dict: ``text`` int64 [L], ``image`` [3, V, V] (dtype by the config), ``labels`` int64 (a class,
    or [L] tokens), ``task_type``, ``source``; what the dataset lacks is absent. A batch has tensors [B, …], with
    ``attention_mask`` beside ``text``.

    Raises:
        DatasetNotFoundError, SplitNotFoundError, EmptyDatasetError, ColumnError: at once.
        OptionError: a bad argument or environment variable.
        RingTooSmallError, RecordTooLargeError: the ring cannot hold the samples that are worked on at once; at once
            where their size is known, else from the reads of those that found no room.
    """

    def __init__(
        self,
        config: Any = None,
        tokenizer: Any = None,
        split: str = "train",
        dataset_name: Any = None,
        *,
        transform: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
        process: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
        columns: dict[str, str] | None = None,
        load: dict[str, Any] | None = None,
        options: Options | None = None,
        writable: bool = False,
        seed: int = 0,
    ) -> None:
        if dataset_name is None:
            raise OptionError(
                "dataset_name= is needed: a Hub id, a local folder or file, or a loaded `datasets` object",
                name="dataset_name",
                value="None",
                allowed="a dataset",
            )
        if tokenizer is not None:
            check_tokenizer(tokenizer)
        for name, function in (("transform", transform), ("process", process)):
            if function is not None and not callable(function):
                raise OptionError(
                    f"{name}= must be callable, but got {type(function).__name__}",
                    name=name,
                    value=repr(function),
                    allowed="a callable",
                )
        options = Options.from_env() if options is None else options
        request = SourceRequest(dataset_name, split, columns, process is not None, dict(load or {}))
        work = Work(request, MultimodalConfig() if config is None else config, tokenizer, process)
        self.transform = transform
        self.writable = writable
        self.seed = operator.index(seed)
        self._reader = open_set(work, options)
        self._closer = weakref.finalize(self, close_set, self._reader, os.getpid())
        self._closer.atexit = False  # the process's end is noticed without us
        _show_log(options.log)
        for notice in self._reader.plan.source.notices:
            log.info("%s", notice)

    # -- reading ---------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._reader.plan.source.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self)):
            yield self[index]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of ``indices``, looked up at once; torch's fetcher calls it with a whole batch."""
        rows = self._rows(indices)
        if not rows:
            return []
        attachment, refs = self._reader.get(rows)
        if self.transform is None:
            return [Sample.over(attachment, refs, i, self.writable) for i in range(len(rows))]
        epoch = attachment.ring.segment.epoch()
        epochs = [epoch - 1] * len(rows) if epoch else attachment.ring.segment.count_reads(array("Q", rows))
        samples = (Sample.over(attachment, refs, i, writable=True) for i in range(len(rows)))
        return [self._transformed(s, row, epoch) for s, row, epoch in zip(samples, rows, epochs, strict=True)]

    def _rows(self, indices: Sequence[int]) -> list[int]:
        rows = [operator.index(i) for i in indices]
        n = len(self)
        if rows and not 0 <= min(rows) <= max(rows) < n:
            rows = [row + n if row < 0 else row for row in rows]
            for index, row in zip(indices, rows, strict=True):
                if not 0 <= row < n:
                    raise IndexError(f"index {index} is out of range: {self.name!r} has {n} samples")
        return rows

    def _transformed(self, sample: Sample, row: int, epoch: int) -> Sample:
        assert self.transform is not None
        with seeded(self.seed, epoch, row):
            try:
                result = self.transform(dict(sample))
            except Exception as error:
                error.add_note(f"in transform= for sample {row} of {self.name!r}")
                raise
        if not isinstance(result, Mapping):
            raise OptionError(
                f"transform= must return a dict, but got {type(result).__name__} (sample {row} of {self.name!r})",
                name="transform",
                value=type(result).__name__,
                allowed="a function from dict to dict",
            )
        made = Sample(result)
        made._attachment = sample._attachment  # for the padding that the schema says
        return made

    # -- its order -------------------------------------------------------------------------------------

    def sampler(
        self,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = False,
    ) -> ShmSampler:
        """A sampler for ``DataLoader(dataset, sampler=…)`` whose order the prefetchers know and work ahead in.

        The order depends on the data, ``seed`` and the epoch, and on nothing else where all samples fit the ring: it
        is uniform then. Else it also depends on ``window_bytes``: chunks of the source are shuffled, and within a
        window of them the rows (docs/order.md tells how well that mixes).

        shuffle: else in the source's order. rank, world_size: every world_size-th position from rank on, for
        training with several processes; None: the whole order, whatever the environment says (accelerate and
        Lightning shard by themselves). drop_last: drop the positions that not every rank gets one of; else the order
        goes on from its beginning until they do.

        Raises:
            OptionError: only one of rank and world_size is given, or they do not go together.
        """
        if (rank is None) != (world_size is None):
            raise OptionError(
                f"rank={rank} and world_size={world_size} must both be given, or neither",
                name="rank" if rank is None else "world_size",
                value="None",
                allowed="a whole number",
            )
        ring = self._reader.attach()
        kind = Kind.SEQUENTIAL if not shuffle else Kind.WINDOWED if ring.has_transit else Kind.UNIFORM
        plan, chunks = self._reader.plan, self._reader.plan.chunks()

        def make(epoch: int) -> Order:
            return Order(
                chunks,
                kind,
                seed=operator.index(seed) & (1 << 64) - 1,  # as many bits as cross to the prefetchers
                epoch=epoch,
                rank=rank or 0,
                world_size=1 if world_size is None else world_size,
                drop_last=drop_last,
                window_bytes=plan.window_bytes,
            )

        make(0)  # what is wrong shows now
        return ShmSampler(make, self._reader.begin_order, self.set_epoch)

    # -- around it -------------------------------------------------------------------------------------

    @property
    def collate(self) -> Callable[..., dict[str, Any]]:
        """The collate function that a DataLoader takes by default for these samples."""
        return collate

    @property
    def name(self) -> str:
        """The dataset's name, as in every sample's ``source``."""
        return self._reader.plan.source.name

    @property
    def columns(self) -> dict[str, Any]:
        """Which columns were chosen: {"text": …, "image": …, "labels": …} and ``class_names``."""
        columns = self._reader.plan.source.columns
        return {key: value for key, value in vars(columns).items() if value is not None}

    @property
    def sources(self) -> list[dict[str, Any]]:
        """For each source: name, split, mode, rows, revision, and what was noticed about it."""
        source = self._reader.plan.source
        return [
            {
                "name": source.name,
                "split": source.split,
                "mode": source.mode,
                "rows": source.num_rows,
                "revision": source.revision,
                "notices": list(source.notices),
            }
        ]

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch for ``transform``'s seeds, in all workers, persistent ones included.

        Without it the seed counts how often each sample was read, by anybody. Call it before iterating: workers
        that run ahead take it up with the next sample that they read.
        """
        epoch = operator.index(epoch)
        if not 0 <= epoch < 1 << 63:
            raise OptionError(
                f"epoch={epoch} is not valid: it must be 0 or more", name="epoch", value=str(epoch), allowed="0 or more"
            )
        self._reader.attach().segment.epoch(epoch + 1)  # 0: nobody has named one

    def stats(self) -> Stats:
        """What the set is doing, now."""
        ring = self._reader.attach()
        ring.segment.reap(False)
        raw = ring.segment.stats()
        services = [pid for _, pid, role in ring.segment.clients() if role == native.SERVICE]
        batches = batch_ring()
        counters = batches.counters if batches is not None else None
        return Stats(
            num_rows=len(self),
            samples_ready=raw["num_ready"],
            samples_bad=raw["num_errors"] + raw["num_aside"],
            commits=raw["num_commits"],
            decoding_s=raw["decoding_ns"] / 1e9,
            samples_read=raw["num_reads"],
            guest_reads=raw["num_guest_reads"],
            fetched_bytes=raw["fetched_bytes"],
            ring_bytes=raw["resident_bytes"] + raw["transit_bytes"],
            ring_backed_bytes=raw["resident_backed_bytes"] + raw["transit_backed_bytes"],
            ring_used_bytes=raw["resident_used_bytes"] + raw["transit_used_bytes"],
            transit_bytes=raw["transit_bytes"],
            encoded_bytes=raw["raw_used_bytes"],
            spill_bytes=raw["spill_bytes"],
            spill_used_bytes=raw["spill_used_bytes"],
            prefetchers=max(0, len(services) - 1),
            service_pids=services,
            num_workers=raw["num_workers"],
            restarts=raw["num_services_lost"],
            batches_in_slots=counters.in_slots if counters else 0,
            batches_copied=counters.copied if counters else 0,
            batches_inline=counters.inline if counters else 0,
            batch_backed_bytes=batches.ring.stats()["backed_bytes"] if batches is not None else 0,
        )

    def close(self) -> None:
        """End this process's use: the prefetch processes end with the last owner. Samples and batches stay valid.

        Raises nothing when called again; reading then raises `ClosedError`.
        """
        self._closer()

    def __enter__(self) -> ShmMultimodalDataset:
        if self._reader.is_closed:
            raise ClosedError(f"The dataset {self.name!r} was closed", dataset=self.name)
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._reader.is_closed else ""
        return f"ShmMultimodalDataset({self.name!r}, split={self._reader.plan.source.split!r}, rows={len(self)}{state})"

    def __getstate__(self) -> dict[str, Any]:
        """On the way to a spawned worker: the set's files and, by cloudpickle, the transform."""
        self._reader.check_can_travel()
        try:
            import cloudpickle

            transform = cloudpickle.dumps(self.transform)
        except Exception as error:
            raise OptionError(
                f"transform= cannot be sent to a worker that is spawned: {type(error).__name__}: {error}. It must be "
                "picklable by cloudpickle: leave open files, locks, connections and generators out of it, or make "
                "them on first use.",
                name="transform",
                value=type(self.transform).__name__,
                allowed="a picklable function",
            ) from error
        state = {k: v for k, v in self.__dict__.items() if k not in ("_closer", "transform")}
        return state | {"transform": transform, "batch_ring": known_files()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        import pickle

        join(state.pop("batch_ring"))
        self.transform = pickle.loads(state.pop("transform"))
        self.__dict__.update(state)
        self._closer = weakref.finalize(self, close_set, self._reader, os.getpid())
        self._closer.atexit = False


def _show_log(level: str) -> None:
    """Have this process show what the services show (``SHMLOADER_LOG``), unless the program set up its logging."""
    if logging.getLevelName(level) < logging.WARNING:
        logger = logging.getLogger("shmloader")
        logger.setLevel(level)
        if not logger.hasHandlers():
            logger.addHandler(logging.StreamHandler())
