"""`ShmMultimodalDataset`: a map-style dataset whose samples lie, decoded once, in shared memory."""

from __future__ import annotations

import logging
import operator
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from shmloader.base_dataset import SharedDataset
from shmloader.errors import OptionError
from shmloader.options import Options
from shmloader.order import Kind, Order
from shmloader.sampler import ShmSampler
from shmloader.selection import select
from shmloader.sources.base import SourceRequest
from shmloader.sources.resolve import source_name
from shmloader.views import Sample
from shmloader.weighting import FIRST_NAMED, WINDOW, Weighting, checked_weights, weights_by_source

log = logging.getLogger("shmloader")


class ShmMultimodalDataset(SharedDataset, Dataset[dict[str, Any]]):
    """Samples of a dataset, each decoded once per node and read in place by any number of processes.

    Give it to a stock ``torch.utils.data.DataLoader``, with any number of workers. Constructing it starts the
    prefetch processes and returns when the number of rows is known; samples come as they are decoded, and whoever asks
    for one that is not there yet waits for it. Use it as a context manager, or `close` it; else it ends with the
    process.

    Args:
        config: sizes of a sample (`MultimodalConfig`, or anything with its attributes).
        tokenizer: anything with ``encode(str)``; ``tokenizers`` and transformers tokenizers are called by the batch;
            None: the text's UTF-8 bytes.
        split: name of the split, or splits and parts of them, as ``datasets`` writes it: "train[:95%]",
            "train[10:20]+validation", "all".
        dataset_name: a short name (``shmloader datasets`` lists them, docs/datasets.md says what their samples are), a
            Hub id, a local folder or file, an already loaded ``datasets`` object, or a list of these (all samples of
            the first, then all of the second, …); "all": the nine built-in short names; "auto": the one that
            ``task_type`` says.
        task_type: "code" or "code-generation", "vision", "audio", "text", "financial" or "stock": which dataset
            "auto" is; None: instructions to text (open_platypus). Beside a named dataset it chooses nothing.
        transform: called in the reading process on every read with a dict of private copies; returns a dict. Its
            random numbers (``random``, numpy's and torch's global generators) are seeded by (seed, epoch, sample).
        process: called in a prefetch process when a row is decoded (once, where all samples fit the ring), in
            place of the built-in decoding: takes the row as a dict (images and audio as ``{"bytes", "path"}``: see
            `decode_image`, `decode_audio`), returns a dict of arrays, tensors, numbers or strings; cached.
        columns: which columns to use, as {"text" | "target" | "image" | "audio" | "labels": column}; None: recognise
            them. "target" is the answer to text: ``text`` is both then, and ``labels`` are -100 up to the answer. A
            column inside another one is named by its path ("answers.text"); of text there may be several, in a list,
            which are joined by a line's end.
        use_streaming: a Hub's data is read from where it lies, and never all of it at once. False: it is downloaded
            first, into the caches of ``huggingface_hub`` and ``datasets``, and found there the next time.
        cache_size: at most so many samples stay in the ring (``stats().samples_kept``); the others are decoded when
            they are needed, as where the data does not fit it. Beside them there are those that are on their way, or
            lie where they passed until another needs the place (``stats().samples_passing``): at most twice
            ``Options.in_flight + ahead`` (``stats().most_passing``), less in a small ring. None: as many stay as find
            room.
        keys: the names of fields in samples, batches and what ``transform`` gets. "shmloader": as below. "hf": those of
            transformers' models (``input_ids``, ``attention_mask``, ``pixel_values``, ``input_values``, ``labels``)
            and nothing else. A dict: {name: new name, or None to drop it}, masks included; the others keep theirs.
            Only this drops what a row may lack: where ``transform`` leaves it out, batches have zeros and the mask.
        load: passed on to ``datasets`` (name, revision, token, data_files, …).
        train_on_prompt: where there is a target, ``labels`` are the tokens of the prompt as well.
        fallback: what may stand in for a dataset that cannot be read as it was asked for. "synthetic": what cannot be
            streamed is downloaded, and in the place of a dataset of the catalog whose Hub cannot be reached, and that
            no cache has, are 1,000 made-up rows with its columns; a warning says so, and each sample's ``source``.
            "download": only the first. "error": nothing, it is an error. `sources` tells what was taken, and why.
        on_error: what comes in the place of a bad row: one that cannot become a sample, or whose shard cannot be read.
            "raise": its error. "skip": the next good row of its source, which the data alone decides, so length and
            order stay. "synthetic": the same, its values shuffled, and its ``source`` ends in " (synthetic)". What
            ``transform`` raises is always raised. `quarantine` lists bad rows.
        max_bad: the share of the rows, 0 to 1, of which more that are bad and asked for are an error; one is allowed in
            any case, unless it is 0; 1: any number.
        weights: of several datasets, how many samples each has in proportion to the others: a dict by their names, or
            a list in their order; None: each sample comes once an epoch. With weights an epoch is as long, and an index
            stands for a place in a random mixture, so that shuffling adds nothing. Each epoch has its own, and goes on
            where the one before ended: of each dataset all samples come, in random order, before one comes again.
            `sampler` names the epochs; without it call `set_epoch`, or all are the first. Where not all samples fit the
            ring they are decoded when they are asked for, not ahead.
        options: settings; None: those of the environment (``SHMLOADER_*``).
        writable: ``dataset[i]`` gives private copies in place of read-only views.
        seed: of the random numbers of ``transform``; another one gives other augmentations. Also of what ``weights``
            choose.

    A sample is a dict: ``text`` int64 [L], ``image`` [3, V, V] (dtype by the config), ``audio`` float32 [A] at 16 kHz,
    ``labels`` int64 (a class, or [L] tokens), ``task_type``, ``source``; what the dataset lacks is absent. A batch has
    tensors [B, …], with ``attention_mask`` int64 [B, L] beside ``text``. What only some of a dataset's samples have (an
    image or a clip beside text may be null) is absent in the others; each batch has zeros in its place, and
    ``image_mask`` (so for ``audio``), bool [B], that tells. So has a batch with samples of several datasets
    (ConcatDataset) for what the samples of one of them lack. Several in one dataset have the fields of all of them:
    each sample those of its own, each batch all, with masks. Where ``labels`` are of tokens in one of them and a class
    in another, that is one label, [1]; where some lack a class, batches have -100.

    Raises:
        DatasetNotFoundError, SplitNotFoundError, EmptyDatasetError, ColumnError: at once.
        OptionError: a bad argument or environment variable.
        TooManyBadRowsError: from reads, with ``on_error`` "skip" or "synthetic".
        RingTooSmallError, RecordTooLargeError: the ring cannot hold the samples that are worked on at once; at once
            where their size is known, else from the reads of those that found no room.
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
        weights: Mapping[str, float] | Sequence[float] | None = None,
        options: Options | None = None,
        writable: bool = False,
        seed: int = 0,
    ) -> None:
        request = SourceRequest(
            dataset_name,
            split,
            columns,
            process is not None,
            dict(load or {}),
            is_downloaded=not use_streaming,
            fallback=fallback,
        )
        requests = select(dataset_name, task_type, request)
        if weights is not None:
            checked_weights(weights, len(requests))
        self._weighting: Weighting | None = None
        self._open(
            config,
            tokenizer,
            requests,
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
        if weights is not None:
            try:
                self._weighting = self._weighted(weights, [source_name(request) for request in requests])
            except BaseException:
                self.close()
                raise

    def _weighted(self, weights: Any, asked: Sequence[str]) -> Weighting:
        """What ``weights`` stand for. asked: the names of the datasets, as they were asked for."""
        sources = self._reader.plan.source.sources
        found = weights_by_source(weights, [source.name for source in sources], asked)
        if self._reader.attach().has_transit:
            log.info(
                "%s: not all samples stay in the ring, and prefetchers do not work ahead in an order by weights: what "
                "does not stay is decoded when it is asked for. Set SHMLOADER_RING_BYTES higher to have all stay",
                self.name,
            )
        return Weighting(found, [source.num_rows or 0 for source in sources], self.seed)

    # -- reading ---------------------------------------------------------------------------------------

    def __len__(self) -> int:
        num_rows = self._reader.plan.source.num_rows
        assert num_rows is not None  # only an iterable request has an open plan
        return num_rows

    def __getitem__(self, index: Any) -> dict[str, Any]:
        """The sample of an index; of a slice or several indices (a list, a tensor [n]) the batch that `collate` makes.

        So a DataLoader may be given ``sampler=BatchSampler(…), batch_size=None``.
        """
        if hasattr(index, "__index__") and not getattr(index, "ndim", 0):  # a tensor [1] has one too
            return self.__getitems__([index])[0]
        batch: dict[str, Any] = self.collate(self.__getitems__(self._several(index)))
        return batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self)):
            yield self[index]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of ``indices``, looked up at once; torch's fetcher calls it with a whole batch."""
        asked = rows = self._rows(indices)
        if not rows:
            return []
        named: Sequence[int | None] = [None] * len(rows)
        if self._weighting is not None:
            rows = self._weighting.rows(self._epoch(), asked)
            named, asked = map(list, zip(*map(self._weighting.parse, asked), strict=True))
        attachment, refs = self._reader.get(rows)
        if self.transform is None and self._reader.policy.on_error != "synthetic":
            return [Sample.over(attachment, refs, i, self.writable) for i in range(len(rows))]
        if self.transform is None:
            return [self._sample(attachment, refs, i, row, self.writable) for i, row in enumerate(rows)]
        epoch = attachment.ring.segment.epoch()
        told = [epoch - 1] * len(rows) if epoch else attachment.ring.segment.count_reads(array("Q", rows))
        epochs = [other if own is None else own for own, other in zip(named, told, strict=True)]
        samples = (self._sample(attachment, refs, i, row, writable=True) for i, row in enumerate(rows))
        # By the index: what comes twice in an epoch is to be transformed in two ways.
        return [self._transformed(s, index, epoch) for s, index, epoch in zip(samples, asked, epochs, strict=True)]

    def _epoch(self) -> int:
        """The epoch that `set_epoch`, or a sampler, has named; 0 before."""
        named = self._reader.attach().segment.epoch()
        return named - 1 if named else 0

    def _several(self, index: Any) -> Sequence[int]:
        """The indices that ``index`` stands for."""
        if isinstance(index, slice):
            rows: Any = range(*index.indices(len(self)))
        else:
            rows = index.tolist() if hasattr(index, "tolist") else index
        if not isinstance(rows, list | tuple | range) or any(isinstance(row, bool) for row in rows):
            raise TypeError(
                f"A sample's index must be a whole number, a batch's a list of such or a slice, but got {index!r:.80} "
                f"({type(index).__name__}). A field is of a sample: dataset[0]['text']"
            )
        if not rows:
            raise IndexError(f"{index!r:.80} of {self.name!r} is no sample at all, which makes no batch")
        return rows

    def _rows(self, indices: Sequence[int]) -> list[int]:
        rows = [operator.index(i) for i in indices]
        n = len(self)
        if rows and not 0 <= min(rows) <= max(rows) < n:
            rows = [row + n if row < 0 else row for row in rows]
            for index, row in zip(indices, rows, strict=True):
                if not 0 <= row < n and (self._weighting is None or row < FIRST_NAMED):
                    raise IndexError(f"index {index} is out of range: {self.name!r} has {n} samples")
        return rows

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
        window of them the rows (docs/order.md tells how well that mixes). With ``weights`` it depends on these and the
        dataset's ``seed`` too, and its indices name their epoch: they are beyond ``len()``.

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
        chunks, window = self._reader.plan.chunks(), self._reader.plan.window_bytes
        if self._weighting is not None:
            kind = Kind.WINDOWED if shuffle else Kind.SEQUENTIAL
            window = WINDOW

        def make(epoch: int) -> Order:
            return Order(
                chunks if self._weighting is None else self._weighting.chunks(epoch),
                kind,
                seed=operator.index(seed) & (1 << 64) - 1,  # as many bits as cross to the prefetchers
                epoch=epoch,
                rank=rank or 0,
                world_size=1 if world_size is None else world_size,
                drop_last=drop_last,
                window_bytes=window,
            )

        make(0)  # what is wrong shows now
        begin = self._reader.begin_order if self._weighting is None else _begin_none
        return ShmSampler(make, begin, self.set_epoch)


def _begin_none(order: Order, epoch: int) -> None:
    """Begins no order that prefetchers follow: theirs is one of rows, and this one of what is mixed of them."""
